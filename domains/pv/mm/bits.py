"""Page-table entry bits, and which of them Xen lets a 64-bit PV guest set (Intel SDM vol. 3A, section 4.5;
Xen 4.17's behaviour in arch/x86/mm.c for the masks)."""

from __future__ import annotations

from typing import Final

PRESENT: Final = 1 << 0
RW: Final = 1 << 1
USER: Final = 1 << 2
PWT: Final = 1 << 3
PCD: Final = 1 << 4
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
PSE: Final = 1 << 7
"""In an L2 or L3 entry: a large page. In an L1 entry the same bit is PAT."""
PAT: Final = PSE
GLOBAL: Final = 1 << 8
AVAIL: Final = 7 << 9
GUEST_KERNEL: Final = 1 << 52
"""Xen's own mark in an L1 entry: the guest mapped the page for its kernel only. (The user bit is then set
too, as the guest kernel runs unprivileged.)"""
AVAIL_HIGH: Final = 0x7FF << 52
NX: Final = 1 << 63

PFN_MASK: Final = (1 << 40) - 1
"""Applied after a shift by 12."""
ADDRESS_MASK: Final = PFN_MASK << 12
WORD: Final = (1 << 64) - 1

# A guest that may set none of the cache attributes may set these and no others; global pages at L1 only.
UPPER_DISALLOW: Final = (
    ~(ADDRESS_MASK | PRESENT | RW | USER | ACCESSED | DIRTY | AVAIL | AVAIL_HIGH | NX) & WORD
)
L1_DISALLOW: Final = UPPER_DISALLOW & ~GLOBAL
CACHE_ATTRIBUTES: Final = PWT | PCD | PAT

FAST_FLAGS: Final = NX | AVAIL_HIGH | AVAIL | GLOBAL | DIRTY | ACCESSED | USER
"""What may change in an entry without the entry being validated again."""
SLOW_BITS: Final = ~FAST_FLAGS & WORD

# Page types, one byte a frame.
T_NONE: Final = 0
T_L1: Final = 1
T_L2: Final = 2
T_L3: Final = 3
T_L4: Final = 4
T_SEGDESC: Final = 5
T_WRITABLE: Final = 7
T_UNOWNED: Final = 15
"""Not a type of Xen's: nothing may refer to the frame, as the domain does not own it."""
TYPE_NAMES: Final = {
    0: "none",
    1: "l1",
    2: "l2",
    3: "l3",
    4: "l4",
    5: "segdesc",
    7: "writable",
    15: "unowned",
}


def adjust_l1(entry: int) -> int:
    """A guest's present L1 entry as it goes into the table (adjust_guest_l1e)."""
    if entry & GUEST_KERNEL:
        return entry | USER
    if entry & USER:
        return entry | GLOBAL
    return entry | GUEST_KERNEL | USER
