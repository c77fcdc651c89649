"""What CPUID shows to a PV guest: an x86-64 processor with the features that the vCPU really has (nothing of AVX, XSAVE, SMAP,
x2APIC, TSC-deadline, LA57, INVPCID, MONITOR, and no machine check), and Xen's own leaves.

Sources: Intel SDM volume 2, CPUID; AMD APM volume 3; arch-x86/cpuid.h.
"""

from __future__ import annotations

from typing import Final

from bus.abi.cpuid import (
    XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD,
    XEN_CPUID_FIRST_LEAF,
    XEN_CPUID_MAX_NUM_LEAVES,
    XEN_CPUID_SIGNATURE_EBX,
    XEN_CPUID_SIGNATURE_ECX,
    XEN_CPUID_SIGNATURE_EDX,
)
from bus.abi.version import XEN_VERSION
from domains.pv.time import TSC_HZ, TSC_SHIFT, TSC_TO_SYSTEM_MUL

Leaf = tuple[int, int, int, int]

VENDOR: Final = b"GenuineIntel"
BRAND: Final = b"Domicile virtual x86-64 CPU"
SIGNATURE: Final = 0x000106A3
"""Family 6, model 26, stepping 3."""
MAX_LEAF: Final = 0x16
CRYSTAL_HZ: Final = 25_000_000
BUS_MHZ: Final = 100
PHYSICAL_BITS: Final = 40
VIRTUAL_BITS: Final = 48


def _bits(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


FEATURES_1_EDX: Final = _bits(
    0, 2, 4, 5, 6, 8, 9, 11, 15, 16, 19, 23, 24, 25, 26
)  # FPU DE TSC MSR PAE CX8 APIC SEP CMOV PAT CLFLUSH MMX FXSR SSE SSE2
FEATURES_1_ECX: Final = _bits(
    0, 1, 9, 13, 19, 20, 22, 23, 25, 30, 31
)  # SSE3 PCLMUL SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES RDRAND HYPERVISOR
FEATURES_7_EBX: Final = _bits(
    0, 3, 8, 19
)  # FSGSBASE BMI1 BMI2 ADX; not ERMS (9): a step of REP MOVSB takes as long here as one of REP MOVSQ
FEATURES_8_1_ECX: Final = _bits(0)  # LAHF in long mode
FEATURES_8_1_EDX: Final = _bits(11, 20, 29)  # SYSCALL NX LM


class CpuidPolicy:
    """The leaves of one domain."""

    def __init__(self, vcpus: int, *, machine_address_bits: int = PHYSICAL_BITS) -> None:
        words = [int.from_bytes(VENDOR[i : i + 4], "little") for i in range(0, 12, 4)]
        vendor = (words[0], words[2], words[1])
        leaves: dict[tuple[int, int], Leaf] = {
            (0, -1): (MAX_LEAF, *vendor),
            (7, 0): (0, FEATURES_7_EBX, 0, 0),
            # TSC and processor frequency: the guest need not measure them (Linux would read the PIT 100,000 times).
            (0x15, -1): (1, TSC_HZ // CRYSTAL_HZ, CRYSTAL_HZ, 0),
            (0x16, -1): (TSC_HZ // 1_000_000, TSC_HZ // 1_000_000, BUS_MHZ, 0),
            (0x80000000, -1): (0x80000008, 0, 0, 0),
            (0x80000001, -1): (0, 0, FEATURES_8_1_ECX, FEATURES_8_1_EDX),
            (0x80000008, -1): (VIRTUAL_BITS << 8 | PHYSICAL_BITS, 0, 0, 0),
        }
        brand = BRAND.ljust(48, b"\0")
        for i in range(3):
            part = brand[16 * i : 16 * i + 16]
            a, b, c, d = (int.from_bytes(part[j : j + 4], "little") for j in range(0, 16, 4))
            leaves[(0x80000002 + i, -1)] = (a, b, c, d)
        base = XEN_CPUID_FIRST_LEAF
        leaves[(base, -1)] = (
            base + XEN_CPUID_MAX_NUM_LEAVES,
            XEN_CPUID_SIGNATURE_EBX,
            XEN_CPUID_SIGNATURE_ECX,
            XEN_CPUID_SIGNATURE_EDX,
        )
        leaves[(base + 1, -1)] = (XEN_VERSION, 0, 0, 0)
        leaves[(base + 2, -1)] = (1, 0x40000000, XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD, 0)
        # Time: the TSC is emulated (bit 0) and reliable (bit 1), mode 0, frequency in kHz, incarnation 0.
        leaves[(base + 3, 0)] = (0b11, 0, TSC_HZ // 1000, 0)
        leaves[(base + 3, 1)] = (0, 0, TSC_TO_SYSTEM_MUL, TSC_SHIFT)
        leaves[(base + 3, 2)] = (TSC_HZ // 1000, 0, 0, 0)
        leaves[(base + 5, 0)] = (0, machine_address_bits, 0, 0)
        self._leaves: Final = leaves
        self._logical: Final = max(1, min(vcpus, 255))

    def query(self, leaf: int, subleaf: int, vcpu: int) -> Leaf:
        """EAX, EBX, ECX, EDX. Leaves that are not shown read as zeros."""
        if leaf == 1:
            ebx = (vcpu * 2 & 0xFF) << 24 | self._logical << 16 | 8 << 8
            return SIGNATURE, ebx, FEATURES_1_ECX, FEATURES_1_EDX
        found = self._leaves.get((leaf, -1))
        if found is None:
            found = self._leaves.get((leaf, subleaf))
        return found or (0, 0, 0, 0)
