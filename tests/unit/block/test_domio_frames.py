"""DomIO's copies of indirect pages: as many in one hypercall as fit its page, each with its own outcome."""

from __future__ import annotations

import pytest

from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import PAGE_SIZE, DomId
from domains.domio.hardware import MAX_KEPT_PAGES, FrontendFrames
from domains.native.domain import GrantError, GrantMapping

FRONTEND, BOUNCE = DomId(5), 77


class Host:
    """Carries out GNTTABOP_copy between granted pages and the one page of its own."""

    def __init__(self) -> None:
        self.bounce = bytearray(PAGE_SIZE)
        self.calls: list[int] = []
        self.mapped: list[int] = []

    @staticmethod
    def granted(ref: int) -> bytes:
        return bytes([ref & 0xFF, ref >> 8]) * (PAGE_SIZE // 2)

    def page(self, gfn: int) -> memoryview:
        assert gfn == BOUNCE
        return memoryview(self.bounce)

    def map_grants(self, domain: DomId, refs: list[int], *, writable: bool) -> GrantMapping:
        assert (domain, writable) == (FRONTEND, False)
        if 13 in refs:
            raise GrantError(gt.GNTST_bad_gntref, "map")
        self.mapped += refs
        return GrantMapping(domain, refs, [memoryview(self.granted(ref)) for ref in refs], [0 for _ in refs])

    def unmap_grants(self, mapping: GrantMapping) -> None:
        for ref in mapping.handles:
            self.mapped.remove(ref)

    def call(self, nr: int, cmd: int, data: bytes, what: str) -> bytes:
        assert (nr, cmd) == (xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_copy)
        layout = gt.GNTTAB_COPY
        items = layout.unpack_array(data, len(data) // layout.size)
        self.calls.append(len(items))
        reply = b""
        for item in items:
            assert (item.source.domid, item.dest.domid, item.dest.u) == (FRONTEND, xen.DOMID_SELF, BOUNCE)
            assert item.flags == gt.GNTCOPY_source_gref
            assert item.dest.offset + item.len <= PAGE_SIZE
            status = gt.GNTST_bad_gntref if item.source.u == 13 else gt.GNTST_okay
            if status == gt.GNTST_okay:
                at = item.dest.offset
                self.bounce[at : at + item.len] = self.granted(item.source.u)[: item.len]
            reply += layout.pack(item._replace(status=status))
        return reply


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([256] * 40, [16, 16, 8]),
        ([8], [1]),
        ([4096, 4096], [1, 1]),
        ([4000, 96, 8, 4088, 4096], [2, 2, 1]),
        ([8] * 300, [128, 128, 44]),
        ([], []),
    ],
)
def test_copies_share_hypercalls_and_keep_their_outcomes(lengths: list[int], calls: list[int]) -> None:
    """Whatever their lengths; a page that is not granted is an error of its own request only."""
    host = Host()
    frames = FrontendFrames(host, FRONTEND, BOUNCE)  # type: ignore[arg-type]  # all that it uses of it
    items = [(ref, length) for ref, length in enumerate(lengths)]
    expected = [gt.GNTST_bad_gntref if ref == 13 else Host.granted(ref)[:length] for ref, length in items]
    assert frames.read_frames(items) == expected
    assert host.calls == calls


def test_pages_of_a_frontend_with_persistent_grants_stay_mapped() -> None:
    """A bounded number of them, read without a hypercall; what is beyond, and what cannot be mapped, is copied."""
    host = Host()
    frames = FrontendFrames(host, FRONTEND, BOUNCE, persistent=True)  # type: ignore[arg-type]  # all that it uses of it
    items = [(ref, 16) for ref in range(MAX_KEPT_PAGES + 3)]
    expected = [gt.GNTST_bad_gntref if ref == 13 else Host.granted(ref)[:16] for ref, _ in items]
    for _ in range(3):
        assert frames.read_frames(items) == expected
    assert len(host.mapped) == MAX_KEPT_PAGES
    assert host.calls == [3, 3, 3]
    assert isinstance(frames.read_frames([(5, 8)])[0], bytes)
    assert host.calls == [3, 3, 3]
    frames.unmap_all()
    assert host.mapped == []
