"""Page types and references of a domain's own frames, and the validation of page tables (Xen's
arch/x86/mm.c).

A frame has one type at a time. Typed references keep it; while there is one, the type cannot change. The
last one that goes frees the type, and a page table then drops what its entries refer to. So no frame is ever
a page table (or a descriptor table) and mapped writable, and tables hold only entries that were checked.

Two counters a frame: `typed` (references of the present type: writable mappings, entries of the table above,
pins, roots, descriptor tables) and `plain` (references without a type: read-only mappings, read-only
grants). Xen's general reference count is their sum.

Validation runs to completion, so that there are no partly validated tables: each frame of the domain is looked at
once at most, some 0.2 ms for a full L1 table. A guest that makes this long harms only itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.abi.errno import XEN_EBUSY, XEN_EINVAL, XEN_EPERM
from bus.addresses import Mfn
from domains.pv.api import FRAME_RAM, FRAME_XEN, GuestFrames
from domains.pv.mm.bits import (
    ACCESSED,
    CACHE_ATTRIBUTES,
    DIRTY,
    GLOBAL,
    GUEST_KERNEL,
    L1_DISALLOW,
    PFN_MASK,
    PRESENT,
    RW,
    SLOW_BITS,
    T_L1,
    T_L4,
    T_NONE,
    T_SEGDESC,
    T_UNOWNED,
    T_WRITABLE,
    UPPER_DISALLOW,
    USER,
    adjust_l1,
)
from domains.pv.mm.segments import fix_descriptor_page
from domains.pv.xenmap import FIRST_XEN_SLOT, LAST_XEN_SLOT

MAX_PAGE_FLUSHES: Final = 8
"""Single-page flushes in one call: as many cost about as much as a whole flush with its refills."""
_ZERO_PAGE: Final = bytes(4096)
_ADJUSTED: Final = PRESENT | RW | USER | GLOBAL | GUEST_KERNEL
_ADDITIONS: Final = {
    flags: adjust_l1(flags) & ~flags
    for low in range(8)
    for flags in (low, low | GLOBAL, low | GUEST_KERNEL, low | GLOBAL | GUEST_KERNEL)
    if low & PRESENT
}
"""What `adjust_l1` adds to a present entry, by those of its bits that matter."""
_AD: Final = ACCESSED | DIRTY


class PageTypes:
    """The page information of one domain. All frames are given by index: `mfn - base`."""

    def __init__(
        self,
        frames: GuestFrames,
        max_mfn: int,
        xen_slots: list[int],
        *,
        cache_attributes: bool = False,
        linear: bool = True,
    ) -> None:
        self.frames: Final = frames
        self.words: Final = frames.words
        self.octets: Final = frames.octets
        self.base: Final = int(frames.base)
        self.count: Final = frames.count
        self.max_mfn: Final = max_mfn
        self.xen_slots: Final = xen_slots
        self.linear: Final = linear
        self.l1_disallow: Final = L1_DISALLOW & ~CACHE_ATTRIBUTES if cache_attributes else L1_DISALLOW
        self.m2p_strict = False
        self.io_frames: Final[set[int]] = set()
        """MFNs of I/O memory that the domain may map: the registers of its own devices."""
        self.ptype: Final = bytearray(self.count)
        self.typed: Final = [0] * self.count
        self.plain: Final = [0] * self.count
        self.pinned: Final = bytearray(self.count)
        self.foreign_maps: Final[dict[int, int]] = {}
        """Present L1 entries that map a granted frame of another domain, or I/O memory, by MFN."""
        self.walks: Final[dict[int, tuple[int, int]]] = {}
        """What page walks found (see `GuestMemory`): emptied when an entry above L1 changes or a table
        goes."""
        self.stale = False
        """A writable mapping went away since the last TLB flush: before a frame may become a table, flush."""
        self.flush_wanted = False
        self.pages_wanted: Final[list[int]] = []
        """Virtual addresses whose translations must go (INVLPG), unless `flush_wanted` covers them."""
        self.on_segdesc_unmapped: Callable[[], None] = _nothing
        """A mapping of a descriptor page went away: an LDT may have lost a page (Xen drops all LDT
        mappings)."""
        for index, state in enumerate(frames.ownership):
            self.set_ownership(index, state)

    def set_ownership(self, index: int, state: int) -> None:
        """FRAME_*. A Xen-heap frame has a writable type reference of Xen's own, so it can never become a
        table."""
        if state == FRAME_RAM:
            self.ptype[index], self.typed[index] = T_NONE, 0
        elif state == FRAME_XEN:
            self.ptype[index], self.typed[index] = T_WRITABLE, 1
        else:
            self.ptype[index], self.typed[index] = T_UNOWNED, 0

    def want_page_flush(self, va: int) -> None:
        """The translation of one page must go; many of them make a whole flush."""
        if len(self.pages_wanted) < MAX_PAGE_FLUSHES:
            self.pages_wanted.append(va)
        else:
            self.flush_wanted = True

    def index(self, mfn: int) -> int:
        """Index of a frame that the domain owns (or that Xen shares with it); -1 for any other."""
        index = mfn - self.base
        if 0 <= index < self.count and self.ptype[index] != T_UNOWNED:
            return index
        return -1

    # --- typed references ---

    def get_type(self, index: int, wanted: int) -> int:
        """Take a typed reference: 0, or -EINVAL if the frame is in use as something else or its content is
        not valid (-EBUSY, -EPERM by the entry that is not)."""
        current = self.ptype[index]
        if current == wanted:
            self.typed[index] += 1
            return 0
        if current != T_NONE:
            return -XEN_EINVAL
        self.ptype[index] = wanted
        self.typed[index] = 1
        if wanted == T_WRITABLE:
            return 0
        if self.stale:
            self.flush_wanted = True
        if wanted == T_L1:
            rc = self._alloc_l1(index)
        elif wanted == T_SEGDESC:
            rc = 0 if fix_descriptor_page(self.words, index << 9) else -XEN_EINVAL
        else:
            rc = self._alloc_upper(index, wanted)
        if rc:
            self.ptype[index] = T_NONE
            self.typed[index] = 0
        return rc

    def put_type(self, index: int) -> None:
        """Drop a typed reference."""
        left = self.typed[index] - 1
        self.typed[index] = left
        if left == 0:
            was = self.ptype[index]
            if was == T_L1:
                self._free_l1(index)
            elif was <= T_L4:
                self._free_upper(index, was)
            elif was == T_WRITABLE:
                self.stale = True
            self.ptype[index] = T_NONE

    def get_mfn_type(self, mfn: int, wanted: int) -> int:
        """`get_type` by MFN; -EINVAL for a frame that the domain does not own."""
        index = self.index(mfn)
        return -XEN_EINVAL if index < 0 else self.get_type(index, wanted)

    # --- L1 entries ---

    def get_l1e(self, entry: int) -> int:
        """Take the reference that a present L1 entry holds (get_page_from_l1e). 0; -EINVAL for forbidden
        flags; -EBUSY for a frame that is not the domain's, or a writable mapping of a table; -EPERM for I/O
        memory."""
        if entry & self.l1_disallow:
            return -XEN_EINVAL
        index = (entry >> 12 & PFN_MASK) - self.base
        if not 0 <= index < self.count:
            return self._get_other(index + self.base)
        if entry & 2:
            current = self.ptype[index]
            if current == T_WRITABLE:
                self.typed[index] += 1
            elif current == T_NONE:
                self.ptype[index] = T_WRITABLE
                self.typed[index] = 1
            else:
                return -XEN_EBUSY
        elif self.ptype[index] == T_UNOWNED:
            return -XEN_EBUSY
        else:
            self.plain[index] += 1
        return 0

    def put_l1e(self, entry: int) -> None:
        """Drop what a present L1 entry held (put_page_from_l1e)."""
        index = (entry >> 12 & PFN_MASK) - self.base
        if not 0 <= index < self.count:
            self.put_foreign(index + self.base)
        elif entry & 2:
            left = self.typed[index] - 1
            self.typed[index] = left
            self.stale = True
            if left == 0:
                self.ptype[index] = T_NONE
        else:
            self.plain[index] -= 1
            if self.ptype[index] == T_SEGDESC:
                self.on_segdesc_unmapped()

    def put_foreign(self, mfn: int) -> None:
        """An entry that mapped a granted frame, or I/O memory, is gone."""
        left = self.foreign_maps[mfn] - 1
        if left:
            self.foreign_maps[mfn] = left
        else:
            del self.foreign_maps[mfn]
        # The granter gets its frame back for itself: nothing may go on using a cached translation.
        self.stale = self.flush_wanted = True

    def _get_other(self, mfn: int) -> int:
        """0 for I/O memory that the domain may reach, else why an L1 entry may not map a frame outside the own range.
        Granted frames are mapped by grant_table_op alone, as on Xen."""
        if mfn in self.io_frames:
            self.foreign_maps[mfn] = self.foreign_maps.get(mfn, 0) + 1
            return 0
        if mfn <= self.max_mfn:
            return -XEN_EBUSY
        return -XEN_EINVAL if mfn == PFN_MASK else -XEN_EPERM

    def mod_l1(self, at: int, new: int, preserve_ad: bool) -> int:
        """Change the L1 entry that is word `at` (mod_l1_entry)."""
        words = self.words
        old = words[at]
        if new & 1:
            if new & self.l1_disallow:
                return -XEN_EINVAL
            if not (old ^ new) & SLOW_BITS:
                new = adjust_l1(new)
                words[at] = new | (old & _AD) if preserve_ad else new
                return 0
            rc = self.get_l1e(new)
            if rc:
                return rc
            new = adjust_l1(new)
        words[at] = new | (old & _AD) if preserve_ad else new
        if old & 1:
            self.put_l1e(old)
        return 0

    # --- L2, L3 and L4 entries ---

    def _get_upper(self, entry: int, table: int, level: int) -> int:
        """Take the reference of a present entry of an L2..L4 table (get_page_from_l2e and so on)."""
        if entry & UPPER_DISALLOW:
            return -XEN_EINVAL
        index = (entry >> 12 & PFN_MASK) - self.base
        if not 0 <= index < self.count:
            return -XEN_EINVAL
        if index == table:
            # A table that maps itself as the level below, read-only: counted nowhere (it would never go
            # away).
            return 0 if self.linear and not entry & 2 else -XEN_EINVAL
        return self.get_type(index, level - 1)

    def _put_upper(self, entry: int, table: int) -> None:
        index = (entry >> 12 & PFN_MASK) - self.base
        if index != table:
            self.put_type(index)

    def mod_upper(self, at: int, new: int, preserve_ad: bool, level: int) -> int:
        """Change an entry of an L2..L4 table (mod_l2_entry and so on). -EINVAL in Xen's slots of an L4."""
        if level == T_L4 and FIRST_XEN_SLOT <= at & 511 <= LAST_XEN_SLOT:
            return -XEN_EINVAL
        self.walks.clear()
        words = self.words
        old = words[at]
        table = at >> 9
        if new & 1:
            if new & UPPER_DISALLOW:
                return -XEN_EINVAL
            new |= USER
            if (old ^ new) & SLOW_BITS:
                rc = self._get_upper(new, table, level)
                if rc:
                    return rc
            elif old & 1:
                words[at] = new | (old & _AD) if preserve_ad else new
                return 0
        words[at] = new | (old & _AD) if preserve_ad else new
        if old & 1:
            self._put_upper(old, table)
        return 0

    # --- whole tables ---

    def _alloc_l1(self, index: int) -> int:
        words = self.words
        octets = self.octets
        if octets[index << 12 : (index + 1) << 12] == _ZERO_PAGE:
            return 0
        first = index << 9
        table = words[first : first + 512].tolist()
        base, count = self.base, self.count
        ptype, typed, plain = self.ptype, self.typed, self.plain
        # One mask and one look-up say whether an entry is present, allowed, and what to add to it.
        mask = self.l1_disallow | _ADJUSTED
        additions = _ADDITIONS
        rc = 0
        for slot, entry in enumerate(table):
            if not entry:
                continue
            add = additions.get(entry & mask)
            if add is None:
                if not entry & 1:
                    continue
                rc = -XEN_EINVAL
                break
            target = (entry >> 12 & PFN_MASK) - base
            if not 0 <= target < count:
                rc = self._get_other(target + base)
                if rc:
                    break
            elif entry & 2:
                if ptype[target] == T_WRITABLE:
                    typed[target] += 1
                elif ptype[target] == T_NONE:
                    ptype[target] = T_WRITABLE
                    typed[target] = 1
                else:
                    rc = -XEN_EBUSY
                    break
            elif ptype[target] == T_UNOWNED:
                rc = -XEN_EBUSY
                break
            else:
                plain[target] += 1
            if add:
                words[first + slot] = entry | add
        if rc:
            for taken in table[:slot]:
                if taken & 1:
                    self.put_l1e(taken)
        return rc

    def _free_l1(self, index: int) -> None:
        if self.octets[index << 12 : (index + 1) << 12] == _ZERO_PAGE:
            return
        first = index << 9
        base, count = self.base, self.count
        ptype, typed, plain = self.ptype, self.typed, self.plain
        stale = False
        for entry in self.words[first : first + 512].tolist():
            if not entry & 1:
                continue
            target = (entry >> 12 & PFN_MASK) - base
            if not 0 <= target < count:
                self.put_foreign(target + base)
            elif entry & 2:
                stale = True
                if typed[target] == 1:
                    typed[target] = 0
                    ptype[target] = T_NONE
                else:
                    typed[target] -= 1
            else:
                plain[target] -= 1
                if ptype[target] == T_SEGDESC:
                    self.on_segdesc_unmapped()
        if stale:
            self.stale = True

    def _alloc_upper(self, index: int, level: int) -> int:
        words = self.words
        first = index << 9
        table = words[first : first + 512].tolist()
        top = level == T_L4
        for slot, entry in enumerate(table):
            if not entry & 1 or (top and FIRST_XEN_SLOT <= slot <= LAST_XEN_SLOT):
                continue
            rc = self._get_upper(entry, index, level)
            if rc:
                for taken_slot, taken in enumerate(table[:slot]):
                    if taken & 1 and not (top and FIRST_XEN_SLOT <= taken_slot <= LAST_XEN_SLOT):
                        self._put_upper(taken, index)
                return rc
            if not entry & USER:
                words[first + slot] = entry | USER
        if top:
            # The M2P shows in tables used as a kernel root; strict guests have it in all that are not user
            # roots.
            for slot, value in enumerate(self.xen_slots):
                words[first + FIRST_XEN_SLOT + slot] = value if slot or self.m2p_strict else 0
        return 0

    def _free_upper(self, index: int, level: int) -> None:
        self.walks.clear()
        first = index << 9
        top = level == T_L4
        for slot, entry in enumerate(self.words[first : first + 512].tolist()):
            if entry & 1 and not (top and FIRST_XEN_SLOT <= slot <= LAST_XEN_SLOT):
                self._put_upper(entry, index)

    # --- roots and pins ---

    def show_m2p(self, mfn: int, shown: bool) -> None:
        """Put the M2P into slot 256 of a validated L4, or take it out."""
        self.words[(mfn - self.base << 9) + FIRST_XEN_SLOT] = self.xen_slots[0] if shown else 0

    def pin(self, mfn: int, level: int) -> int:
        """MMUEXT_PIN_Ln_TABLE: -EINVAL if the frame is not owned, not valid as that, or pinned already."""
        index = self.index(mfn)
        if index < 0:
            return -XEN_EINVAL
        rc = self.get_type(index, level)
        if rc:
            return rc
        if self.pinned[index]:
            self.put_type(index)
            return -XEN_EINVAL
        self.pinned[index] = 1
        return 0

    def unpin(self, mfn: int) -> int:
        """MMUEXT_UNPIN_TABLE: -EINVAL if it is not pinned."""
        index = self.index(mfn)
        if index < 0 or not self.pinned[index]:
            return -XEN_EINVAL
        self.pinned[index] = 0
        self.put_type(index)
        return 0

    def is_free(self, index: int) -> bool:
        """Nothing refers to the frame."""
        return not self.typed[index] and not self.plain[index]

    def own_page(self, index: int) -> memoryview:
        """The 4096 bytes of an own frame."""
        return self.octets[index << 12 : (index + 1) << 12]

    def mfn(self, index: int) -> Mfn:
        """MFN of a frame index."""
        return Mfn(self.base + index)


def _nothing() -> None:
    """No LDT is in use."""
