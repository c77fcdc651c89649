"""Host mappings of grants in the guest's page tables (GNTTABOP_map_grant_ref and its inverse,
grant_table.h), and the references that a granted frame holds."""

from __future__ import annotations

from bus.abi.errno import XEN_EBUSY, XEN_EINVAL
from bus.abi.grant_table import (
    GNTMAP_application_map,
    GNTMAP_contains_pte,
    GNTMAP_guest_avail_mask,
    GNTMAP_readonly,
    GNTST_general_error,
    GNTST_okay,
)
from bus.addresses import Mfn
from domains.pv.api import GuestFault
from domains.pv.mm.bits import (
    ACCESSED,
    AVAIL,
    DIRTY,
    PFN_MASK,
    PRESENT,
    RW,
    T_L1,
    T_NONE,
    T_WRITABLE,
    USER,
    adjust_l1,
)
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.walk import GuestMemory


class GrantMappings:
    """L1 entries that map granted frames. Only these calls make such entries: an mmu_update that names a
    foreign frame is refused, grant or not."""

    def __init__(self, pages: PageTypes, memory: GuestMemory) -> None:
        self._pages = pages
        self._memory = memory
        self.held: dict[tuple[int, bool], int] = {}
        """Own frames that others map: (frame index, writable) -> how often."""

    def create(self, address: int, mfn: int, flags: int) -> int:
        """See `PagingApi.create_grant_mapping`. GNTST_general_error: no L1 table there, no such frame, a
        writable mapping of a read-only grant, or (of an own frame) of a page table."""
        at = self._slot(address, flags & GNTMAP_contains_pte != 0)
        if at < 0 or not self._take(mfn, flags & GNTMAP_readonly == 0):
            return GNTST_general_error
        entry = mfn << 12 | PRESENT | ACCESSED | DIRTY
        if not flags & GNTMAP_readonly:
            entry |= RW
        if flags & GNTMAP_application_map:
            entry |= USER
        entry |= (flags & GNTMAP_guest_avail_mask) >> 16 << 9 & AVAIL
        old = self._pages.words[at]
        self._pages.words[at] = adjust_l1(entry)
        if old & 1:
            self._pages.put_l1e(old)
        return GNTST_okay

    def replace(self, address: int, mfn: int, new_address: int, flags: int) -> int:
        """See `PagingApi.replace_grant_mapping`. GNTST_general_error if the entry at `address` does not map
        `mfn` as the grant did; for unmap_and_replace also if `new_address` has no L1 entry, or `address` is a PTE's."""
        contains = flags & GNTMAP_contains_pte != 0
        at = self._slot(address, contains)
        if at < 0:
            return GNTST_general_error
        pages = self._pages
        old = pages.words[at]
        if not old & 1 or (old >> 12 & PFN_MASK) != mfn:
            return GNTST_general_error
        if bool(old & RW) == bool(flags & GNTMAP_readonly):
            return GNTST_general_error  # another entry for the frame: it holds another kind of reference (XSA-234)
        entry = 0
        if new_address:
            source = -1 if contains else self._slot(new_address, False)
            if source < 0 or source == at:
                return GNTST_general_error
            # The entry moves with the reference it holds.
            entry = pages.words[source]
            pages.words[source] = 0
            pages.stale = True
        pages.words[at] = entry
        pages.put_l1e(old)
        pages.flush_wanted = True
        return GNTST_okay

    def _slot(self, address: int, is_entry: bool) -> int:
        """Word index of the L1 entry meant; -1 if it is none of a validated L1 table of the domain."""
        pages = self._pages
        if is_entry:
            index = pages.index(address >> 12)
            if address & 7 or index < 0:
                return -1
            at = index << 9 | address >> 3 & 511
        else:
            try:
                at, _ = self._memory.l1_entry(address, self._memory.root())
            except GuestFault:
                return -1
        return at if pages.ptype[at >> 9] == T_L1 else -1

    def _take(self, mfn: int, writable: bool) -> bool:
        """The reference of a new mapping: of a granted frame, or of an own one (a grant to oneself)."""
        pages = self._pages
        if pages.index(mfn) >= 0:
            return pages.get_l1e(mfn << 12 | PRESENT | (RW if writable else 0)) == 0
        foreign = pages.frames.foreign(Mfn(mfn))
        if foreign is None or (writable and not foreign[1]):
            return False
        pages.foreign_maps[mfn] = pages.foreign_maps.get(mfn, 0) + 1
        return True

    # --- frames that this domain grants ---

    def can_grant_writable(self, mfn: int) -> bool:
        """A writable reference could be had."""
        index = self._pages.index(mfn)
        return index >= 0 and self._pages.ptype[index] in (T_NONE, T_WRITABLE)

    def is_table(self, mfn: int) -> bool:
        """One of the domain's own frames, and a page table or a descriptor table."""
        index = self._pages.index(mfn)
        return index >= 0 and self._pages.ptype[index] not in (T_NONE, T_WRITABLE)

    def hold(self, mfn: int, writable: bool) -> int:
        """See `PagingApi.hold_for_grant`."""
        index = self._pages.index(mfn)
        if index < 0:
            return -XEN_EINVAL
        if writable:
            if self._pages.ptype[index] not in (T_NONE, T_WRITABLE):
                return -XEN_EBUSY
            self._pages.get_type(index, T_WRITABLE)
        else:
            self._pages.plain[index] += 1
        self.held[index, writable] = self.held.get((index, writable), 0) + 1
        return 0

    def release(self, mfn: int, writable: bool) -> None:
        """See `PagingApi.release_from_grant`. ValueError if no such reference is held."""
        index = mfn - self._pages.base
        left = self.held.pop((index, writable), 0) - 1
        if left < 0:
            raise ValueError(f"mfn {mfn:#x} is not held by a grant")
        if left:
            self.held[index, writable] = left
        if writable:
            self._pages.put_type(index)
        else:
            self._pages.plain[index] -= 1
