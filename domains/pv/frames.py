"""The machine frames that a PV domain's process can reach: its own range as one host mapping, and granted
pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bus.addresses import PAGE_SIZE, DomId, Mfn
from domains.pv.api import FRAME_NONE, FRAME_RAM, FRAME_XEN


class ForeignPage(NamedTuple):
    """A frame of another domain, mapped here by a live grant."""

    granter: DomId
    writable: bool
    page: memoryview
    """Its 4096 bytes in this process."""


class DomainFrames:
    """`domains.pv.api.GuestFrames` over one contiguous host mapping.

    `memory` holds `count` frames (anything with a writable buffer: an mmap, a bytearray); the caller keeps it
    alive. MFNs of the range are [base, base + count); the first `ram_count` of them are guest RAM. No frame
    is owned at first, unless `populated` names it; Xen-heap frames are shared one by one by `share`.
    """

    def __init__(
        self,
        memory: memoryview,
        base: int,
        ram_count: int,
        *,
        populated: Iterable[int] = (),
        shared: Iterable[int] = (),
    ) -> None:
        octets = memory.cast("B") if memory.format != "B" or memory.ndim != 1 else memory
        if octets.readonly:
            raise ValueError("the frames' memory must be writable")
        if octets.nbytes % PAGE_SIZE or not octets.nbytes:
            raise ValueError(f"the frames' memory must be whole pages, not {octets.nbytes} bytes")
        self.count = octets.nbytes // PAGE_SIZE
        if not 0 <= ram_count <= self.count:
            raise ValueError(f"{ram_count} RAM frames do not fit in {self.count}")
        if base < 0:
            raise ValueError("the first MFN must not be negative")
        self.base = Mfn(base)
        self.ram_count = ram_count
        self.octets = octets
        self.words = octets.cast("Q")
        self.ownership = bytearray(self.count)
        self._foreign: dict[int, ForeignPage] = {}
        for mfn in populated:
            self.set_owned(Mfn(mfn), True)
        for mfn in shared:
            self.share(Mfn(mfn), True)

    def owned(self, mfn: Mfn) -> bool:
        """The domain owns this RAM frame now."""
        index = mfn - self.base
        return 0 <= index < self.ram_count and self.ownership[index] == FRAME_RAM

    def shared_by_xen(self, mfn: Mfn) -> bool:
        """A Xen-heap frame that the guest may map."""
        index = mfn - self.base
        return self.ram_count <= index < self.count and self.ownership[index] == FRAME_XEN

    def foreign(self, mfn: Mfn) -> tuple[DomId, bool] | None:
        """(granter, writable) of a frame that is mapped here by a live grant."""
        page = self._foreign.get(mfn)
        return None if page is None else (page.granter, page.writable)

    def page(self, mfn: Mfn) -> memoryview | None:
        """4096 bytes of an own populated or shared frame, or of a granted one (read-only if the grant is)."""
        index = mfn - self.base
        if 0 <= index < self.count:
            if self.ownership[index] == FRAME_NONE:
                return None
            return self.octets[index << 12 : (index + 1) << 12]
        foreign = self._foreign.get(mfn)
        return None if foreign is None else foreign.page

    def set_owned(self, mfn: Mfn, owned: bool) -> None:
        """A RAM frame is populated or given back. ValueError if it lies outside the domain's RAM range."""
        index = mfn - self.base
        if not 0 <= index < self.ram_count:
            raise ValueError(f"mfn {mfn:#x} is not in the domain's RAM range")
        self.ownership[index] = FRAME_RAM if owned else FRAME_NONE

    def share(self, mfn: Mfn, shared: bool) -> None:
        """A Xen-heap frame becomes mappable or no longer is. ValueError if it is none of the domain's."""
        index = mfn - self.base
        if not self.ram_count <= index < self.count:
            raise ValueError(f"mfn {mfn:#x} is not in the domain's Xen-heap range")
        self.ownership[index] = FRAME_XEN if shared else FRAME_NONE

    def add_foreign(self, mfn: Mfn, granter: DomId, page: memoryview, *, writable: bool) -> None:
        """A grant of another domain is mapped into this process: `page` is its 4096 bytes.

        Called once more for the same frame when a later grant of it is writable (replaces). ValueError if the
        frame is in the own range, or `page` is no page.
        """
        if 0 <= mfn - self.base < self.count:
            raise ValueError(f"mfn {mfn:#x} is the domain's own")
        if page.nbytes != PAGE_SIZE:
            raise ValueError(f"a page has {PAGE_SIZE} bytes, not {page.nbytes}")
        view = page.cast("B") if page.format != "B" else page
        self._foreign[mfn] = ForeignPage(granter, writable, view if writable else view.toreadonly())

    def remove_foreign(self, mfn: Mfn) -> None:
        """The last grant of a foreign frame is unmapped. KeyError if it is not there."""
        del self._foreign[mfn]
