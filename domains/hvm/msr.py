"""Model-specific registers of an HVM guest that the vCPU does not keep itself: Xen's policy, which is that unknown ones fault.

Source: Intel SDM volume 4; the hypercall page is described in arch-x86/cpuid.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domains.hvm.cpuid import HYPERCALL_MSR
from domains.hvm.lapic import RegisterFault
from domains.hvm.state import HvmState

TSC, PLATFORM_ID, APIC_BASE, FEATURE_CONTROL, UCODE_REV = 0x10, 0x17, 0x1B, 0x3A, 0x8B
PLATFORM_INFO, MTRR_CAP, MISC_FEATURES, MISC_ENABLE, DEBUGCTL = 0xCE, 0xFE, 0x140, 0x1A0, 0x1D9
MTRR_DEFAULT: Final = 0x2FF
CPUID_FAULTING: Final = 1
"""In MISC_FEATURES: CPUID outside CPL 0 is #GP."""
MTRR_CAPABILITIES: Final = 0x508
"""Eight variable ranges, fixed ranges, write combining."""
VARIABLE: Final = range(0x200, 0x210)
FIXED: Final = frozenset((0x250, 0x258, 0x259, *range(0x268, 0x270)))
LAST_BRANCH: Final = range(0x1DB, 0x1DF)
READ_AS: Final = {
    PLATFORM_ID: 0,
    FEATURE_CONTROL: 1,  # locked, nothing enabled
    UCODE_REV: 0,
    PLATFORM_INFO: 1 << 31,  # CPUID faulting
    MTRR_CAP: MTRR_CAPABILITIES,
    MISC_ENABLE: 1 << 11 | 1 << 12,  # no branch trace store, no precise event sampling
    DEBUGCTL: 0,
    HYPERCALL_MSR: 0,
    **dict.fromkeys(LAST_BRANCH, 0),
}
DROPPED: Final = frozenset((UCODE_REV, MISC_ENABLE, TSC))
"""Writes that do nothing. The TSC is Xen's system time (domains.pv.time): it cannot be moved."""
MEMORY_TYPES: Final = frozenset((0, 1, 4, 5, 6))


class MsrFault(Exception):
    """#GP."""


class Msrs:
    """RDMSR and WRMSR. `make_page` writes the hypercall page at a guest frame; False if that is not RAM."""

    def __init__(self, tsc: Callable[[], int], make_page: Callable[[int], bool]) -> None:
        self._tsc: Final = tsc
        self._make_page: Final = make_page

    def read(self, state: HvmState, index: int) -> int:
        """MsrFault where Xen gives #GP."""
        if 0x800 <= index < 0x900:
            try:
                return state.apic.read_msr(index)
            except RegisterFault:
                raise MsrFault from None
        if index == TSC:
            return self._tsc()
        if index == APIC_BASE:
            return state.apic.base
        if index == MISC_FEATURES:
            return state.misc_features
        if index in READ_AS:
            return READ_AS[index]
        if index in VARIABLE or index in FIXED or index == MTRR_DEFAULT:
            return state.mtrr.get(index, 0xC06 if index == MTRR_DEFAULT else 0)
        raise MsrFault

    def write(self, state: HvmState, index: int, value: int) -> None:
        """MsrFault where Xen gives #GP."""
        try:
            if 0x800 <= index < 0x900:
                state.apic.write_msr(index, value)
                return
            if index == APIC_BASE:
                state.apic.write_base(value)
                return
        except RegisterFault:
            raise MsrFault from None
        if index == HYPERCALL_MSR:
            if value & 0xFFF or not self._make_page(value >> 12):
                raise MsrFault
        elif index in VARIABLE or index in FIXED or index == MTRR_DEFAULT:
            self._write_mtrr(state, index, value)
        elif index == MISC_FEATURES and not value & ~CPUID_FAULTING:
            state.misc_features = value
        elif index == DEBUGCTL and not value:
            return
        elif index not in DROPPED:
            raise MsrFault

    @staticmethod
    def _write_mtrr(state: HvmState, index: int, value: int) -> None:
        """They are kept and have no effect: all memory is write-back here."""
        types = value.to_bytes(8, "little") if index in FIXED else (value & 0xFF,)
        if (index not in VARIABLE or not index & 1) and not MEMORY_TYPES.issuperset(types):
            raise MsrFault
        if index == MTRR_DEFAULT and value & ~0xCFF:
            raise MsrFault
        state.mtrr[index] = value
