"""What the programs that are frontends of a device have in common (disk_front, net_front): granted pages, and the way up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.programs.native_guest import PvNative
from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import DomId, Mfn
from domains.native.xenstore import XenstoreClient
from drivers.xenbus.client import Procedure
from drivers.xenbus.pages import Page

FIRST_PAGE = 8192
"""Frames (of the domain's own range) from here on are for rings and data: the builder put the unused kernel below."""
GRANT_FRAMES = 8


class Grants:
    """`PageSource` of the drivers, on a version 1 table."""

    def __init__(self, host: PvNative, backend: DomId) -> None:
        self._host, self._backend = host, backend
        request = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(xen.DOMID_SELF, GRANT_FRAMES, 0, 0))
        reply = host.call(
            xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, request, "GNTTABOP_setup_table"
        )
        assert host.memory is not None
        self._memory = host.memory
        size = gt.GNTTAB_SETUP_TABLE.size
        self._tables = [
            self._memory.page(Mfn(int.from_bytes(reply[size + 8 * n : size + 8 * n + 8], "little")))
            for n in range(GRANT_FRAMES)
        ]
        self._refs = list(range(GRANT_FRAMES * 512 - 1, 63, -1))
        self._pages = list(range(host.ram_frames - 1, FIRST_PAGE, -1))

    def allocate(self, count: int) -> list[Page]:
        """See PageSource."""
        if len(self._pages) < count:
            raise MemoryError
        return [Page(gfn, self._host.page(gfn)) for gfn in (self._pages.pop() for _ in range(count))]

    def free(self, pages: Sequence[Page]) -> None:
        """See PageSource."""
        self._pages += [page.gfn for page in pages]

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        """See PageSource."""
        out = []
        for page in pages:
            ref = self._refs.pop()
            flags = gt.GTF_permit_access | (gt.GTF_readonly if readonly else 0)
            entry = gt.GRANT_ENTRY_V1.pack(
                gt.grant_entry_v1(flags, self._backend, self._memory.base + page.gfn)
            )
            self._tables[ref >> 9][8 * (ref & 511) : 8 * (ref & 511) + 8] = entry
            out.append(ref)
        return out

    def end(self, refs: Sequence[int]) -> list[bool]:
        """See PageSource."""
        out = []
        for ref in refs:
            entry = self._tables[ref >> 9][8 * (ref & 511) : 8 * (ref & 511) + 8]
            free = not entry[0] & (gt.GTF_reading | gt.GTF_writing)
            if free:
                entry[:2] = b"\0\0"
                self._refs.append(ref)
            out.append(free)
        return out


class Frontend(Protocol):
    """Of either driver."""

    error: str | None

    def poll(self) -> Any:
        """Take what the back end has published."""


class Device(Protocol):
    """`FrontDevice` of either driver."""

    def changed(self) -> Procedure[Any]:
        """The back end's nodes have changed."""


class FrontProgram:
    """One device of the domain. The program makes `frontend` and `device`, then calls `follow`."""

    frontend: Frontend
    device: Device

    def __init__(self, host: PvNative, store: XenstoreClient) -> None:
        self.host, self.store = host, store
        self._busy = self._again = False

    def follow(self, backend: str) -> None:
        """Look at the back end's state, whose directory that is, now and with each change."""
        self.store.watch(f"{backend}/state", lambda path: self.changed())
        self.changed()

    def changed(self) -> None:
        """One at a time."""
        self._again = True
        if self._busy:
            return
        self._busy = True
        while self._again:
            self._again = False
            self.store.run(self.device.changed())
        self._busy = False

    def removed(self) -> None:
        """See FrontPort."""

    def poll(self) -> None:
        """The back end answered, or brought something. SystemExit if it makes no sense."""
        self.frontend.poll()
        if self.frontend.error is not None:
            raise SystemExit(f"back end: {self.frontend.error}")
