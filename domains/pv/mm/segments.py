"""Which segment descriptors a PV guest may have (Xen's check_descriptor; Intel SDM vol. 3A, sections 3.4.5,
5.8.3)."""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86 import FIRST_RESERVED_GDT_ENTRY
from bus.abi.arch_x86_64 import FLAT_KERNEL_CS

_PRESENT: Final = 1 << 47
_DPL3: Final = 3 << 45
_CODE_OR_DATA: Final = 1 << 44
_TYPE: Final = 0xF << 40
_CALL_GATE: Final = 0xC << 40


def check_descriptor(value: int) -> int | None:
    """The descriptor as it may be installed, or None if it may not be.

    Code and data segments get DPL 3 (both guest modes run there). System descriptors are refused, but for
    type 0 (the upper half of a 64-bit call gate) and call gates to a guest code segment: these get DPL 0, so
    that their use always faults, and the guest's DPL goes to the selector's RPL.
    """
    if not value & _PRESENT:
        return value
    dpl = value >> 45 & 3
    if value & _CODE_OR_DATA:
        return value | _DPL3
    kind = value & _TYPE
    if kind == 0:
        return value | _DPL3
    if kind != _CALL_GATE:
        return None
    selector = value >> 16 & 0xFFFF
    if not selector & 4 and selector >> 3 >= FIRST_RESERVED_GDT_ENTRY and selector != FLAT_KERNEL_CS:
        return None
    if value >> 32 & 0xFF:
        return None
    # Xen forces the DPL up to 3 before it keeps it, as for every descriptor.
    dpl = 3
    return value & ~(_DPL3 | 0xFFFF << 16) | (selector & ~3 | dpl) << 16


def fix_descriptor_page(words: memoryview, first: int) -> bool:
    """Check 512 descriptors from word `first` on and fix them up in place. False if one may not be
    installed."""
    for slot, value in enumerate(words[first : first + 512].tolist()):
        if value:
            fixed = check_descriptor(value)
            if fixed is None:
                return False
            if fixed != value:
                words[first + slot] = fixed
    return True
