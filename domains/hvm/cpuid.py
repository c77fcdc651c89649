"""What CPUID shows to an HVM or PVH guest: what the vCPU can execute (`Vcpu.native_cpuid`), what the machine adds (local APIC,
x2APIC, MTRRs, hypervisor), and Xen's leaves with the HVM features.

Sources: Intel SDM volume 2, CPUID; arch-x86/cpuid.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.abi.cpuid import (
    XEN_CPUID_FIRST_LEAF,
    XEN_CPUID_MAX_NUM_LEAVES,
    XEN_CPUID_SIGNATURE_EBX,
    XEN_CPUID_SIGNATURE_ECX,
    XEN_CPUID_SIGNATURE_EDX,
    XEN_HVM_CPUID_DOMID_PRESENT,
    XEN_HVM_CPUID_UPCALL_VECTOR,
    XEN_HVM_CPUID_VCPU_ID_PRESENT,
)
from bus.abi.version import XEN_VERSION
from bus.addresses import DomId
from domains.hvm.physmap import ADDRESS_BITS
from domains.hvm.shadow import ADDRESS_BITS as SHADOW_BITS
from domains.pv.cpuid import BRAND, BUS_MHZ, CRYSTAL_HZ, MAX_LEAF, SIGNATURE, VENDOR, VIRTUAL_BITS
from domains.pv.time import TSC_HZ, TSC_SHIFT, TSC_TO_SYSTEM_MUL

Leaf = tuple[int, int, int, int]
Native = Callable[[int, int], Leaf]
HYPERCALL_MSR: Final = 0x40000000
FEATURES: Final = XEN_HVM_CPUID_VCPU_ID_PRESENT | XEN_HVM_CPUID_DOMID_PRESENT | XEN_HVM_CPUID_UPCALL_VECTOR
"""Leaf 4, EAX. Not there: hardware APIC virtualisation, IOMMU mappings, extended destinations."""


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


ADDED_1_ECX: Final = _bits(21, 31)  # x2APIC, hypervisor
ADDED_1_EDX: Final = _bits(9, 12)  # APIC, MTRR
HIDDEN_1_EDX: Final = _bits(7, 14)  # machine check: there is none
SHOWN_8_1_EDX: Final = _bits(11, 20, 27, 29)  # SYSCALL NX RDTSCP LM
GIB_PAGES: Final = 1 << 26
"""Leaf 0x80000001, EDX: pages of 1 GiB. The vCPU's walk takes them whatever CPUID says; shadow paging does not."""
ARAT: Final = 1 << 2


CR4_ALWAYS: Final = 0x7FF
"""VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT."""
CR4_BY_FEATURE: Final = ((7, 1, 0, 16), (1, 2, 26, 18), (7, 1, 7, 20), (7, 1, 20, 21))
"""(leaf, register, bit, bit of CR4): FSGSBASE, XSAVE, SMEP, SMAP."""


class HvmCpuid:
    """The leaves of one domain. `native` is the vCPU's own answer; it follows CR4 (OSXSAVE)."""

    def __init__(self, domain: DomId, vcpus: int, native: Native, *, hap: bool = True) -> None:
        self._domain: Final = domain
        self._native: Final = native
        self._added_8_1_edx: Final = GIB_PAGES if hap else 0
        self._vcpus: Final = max(1, min(vcpus, 127))
        words = [int.from_bytes(VENDOR[i : i + 4], "little") for i in range(0, 12, 4)]
        base = XEN_CPUID_FIRST_LEAF
        fixed: dict[tuple[int, int], Leaf] = {
            (0, -1): (MAX_LEAF, words[0], words[2], words[1]),
            (6, -1): (ARAT, 0, 0, 0),
            (0x15, -1): (1, TSC_HZ // CRYSTAL_HZ, CRYSTAL_HZ, 0),
            (0x16, -1): (TSC_HZ // 1_000_000, TSC_HZ // 1_000_000, BUS_MHZ, 0),
            (0x80000000, -1): (0x80000008, 0, 0, 0),
            (0x80000008, -1): (VIRTUAL_BITS << 8 | (ADDRESS_BITS if hap else SHADOW_BITS), 0, 0, 0),
            (base, -1): (
                base + XEN_CPUID_MAX_NUM_LEAVES, XEN_CPUID_SIGNATURE_EBX, XEN_CPUID_SIGNATURE_ECX, XEN_CPUID_SIGNATURE_EDX,
            ),
            (base + 1, -1): (XEN_VERSION, 0, 0, 0),
            (base + 2, -1): (1, HYPERCALL_MSR, 0, 0),
            # Time: the TSC is reliable (bit 1), its frequency in kHz, incarnation 0.
            (base + 3, 0): (0b10, 0, TSC_HZ // 1000, 0),
            (base + 3, 1): (0, 0, TSC_TO_SYSTEM_MUL, TSC_SHIFT),
            (base + 3, 2): (TSC_HZ // 1000, 0, 0, 0),
        }  # fmt: skip
        brand = BRAND.ljust(48, b"\0")
        for i in range(3):
            part = brand[16 * i : 16 * i + 16]
            a, b, c, d = (int.from_bytes(part[j : j + 4], "little") for j in range(0, 16, 4))
            fixed[(0x80000002 + i, -1)] = (a, b, c, d)
        self._fixed: Final = fixed

    def cr4_bits(self) -> int:
        """Bits that the guest may set in CR4: those of features that it is shown."""
        return CR4_ALWAYS | sum(
            1 << flag
            for leaf, register, bit, flag in CR4_BY_FEATURE
            if self.query(leaf, 0, 0)[register] >> bit & 1
        )

    def query(self, leaf: int, subleaf: int, vcpu: int) -> Leaf:
        """EAX, EBX, ECX, EDX. Leaves that are not shown read as zeros."""
        found = self._fixed.get((leaf, -1)) or self._fixed.get((leaf, subleaf))
        if found is not None:
            return found
        if leaf == 1:
            _, _, ecx, edx = self._native(1, 0)
            ebx = (vcpu * 2 & 0xFF) << 24 | self._vcpus << 16 | 8 << 8
            return SIGNATURE, ebx, ecx | ADDED_1_ECX, edx & ~HIDDEN_1_EDX | ADDED_1_EDX
        if leaf in (7, 0xD):
            return self._native(leaf, subleaf)
        if leaf == 0xB:
            levels = ((1, 1, 0x100), (8, self._vcpus, 0x201))
            shift, count, kind = levels[subleaf] if subleaf < 2 else (0, 0, subleaf & 0xFF)
            return shift, count, kind, vcpu * 2
        if leaf == 0x80000001:
            _, _, ecx, edx = self._native(leaf, 0)
            return 0, 0, ecx, edx & SHOWN_8_1_EDX | self._added_8_1_edx
        if leaf == XEN_CPUID_FIRST_LEAF + 4:
            return FEATURES, vcpu, int(self._domain), 0
        return 0, 0, 0, 0
