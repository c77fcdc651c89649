"""Grant copies between a frontend's granted pages and NetIO's own memory. `drivers.net.ports.GrantCopier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import PAGE_SIZE, DomId
from domains.native.domain import MAX_GRANT_BATCH, NativeDomain

STAGE_PAGES: Final = 2 * MAX_GRANT_BATCH
_COPY: Final = gt.GNTTAB_COPY


class Stage:
    """Pages of NetIO's own through which all bytes pass: one piece a page. What is in them is used up before the next call."""

    def __init__(self, host: NativeDomain, first_gfn: int) -> None:
        """STAGE_PAGES frames of its own from `first_gfn` on, in a row in machine memory."""
        self.host: Final = host
        self.first: Final = first_gfn
        self.view: Final = host.pages(first_gfn, STAGE_PAGES)


class FrontendPages:
    """One frontend's."""

    def __init__(self, stage: Stage, domid: DomId) -> None:
        self._stage: Final = stage
        self._domid: Final = domid

    def fetch(self, items: Sequence[tuple[int, int, int]]) -> list[bytes | int]:
        """See GrantCopier."""
        stage, out = self._stage, list[bytes | int]()
        view = stage.view
        for start in range(0, len(items), MAX_GRANT_BATCH):
            batch = items[start : start + MAX_GRANT_BATCH]
            request = b"".join(
                _COPY.pack(
                    gt.gnttab_copy(
                        gt.gnttab_copy_ptr(ref, self._domid, offset),
                        gt.gnttab_copy_ptr(stage.first + index, xen.DOMID_SELF, 0),
                        length,
                        gt.GNTCOPY_source_gref,
                        0,
                    )
                )
                for index, (ref, offset, length) in enumerate(batch)
            )
            for index, status in enumerate(self._copy(request, len(batch))):
                at = index * PAGE_SIZE
                out.append(bytes(view[at : at + batch[index][2]]) if status == gt.GNTST_okay else status)
        return out

    def store(self, items: Sequence[tuple[int, bytes]]) -> list[int]:
        """See GrantCopier."""
        stage, out = self._stage, list[int]()
        view = stage.view
        for start in range(0, len(items), MAX_GRANT_BATCH):
            batch = items[start : start + MAX_GRANT_BATCH]
            request = []
            for index, (ref, data) in enumerate(batch):
                at = index * PAGE_SIZE
                view[at : at + len(data)] = data
                request.append(
                    _COPY.pack(
                        gt.gnttab_copy(
                            gt.gnttab_copy_ptr(stage.first + index, xen.DOMID_SELF, 0),
                            gt.gnttab_copy_ptr(ref, self._domid, 0),
                            len(data),
                            gt.GNTCOPY_dest_gref,
                            0,
                        )
                    )
                )
            out += self._copy(b"".join(request), len(batch))
        return out

    def _copy(self, request: bytes, count: int) -> list[int]:
        reply = self._stage.host.call(
            xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_copy, request, "GNTTABOP_copy"
        )
        return [_COPY.unpack(reply, index * _COPY.size).status for index in range(count)]
