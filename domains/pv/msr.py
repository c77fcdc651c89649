"""Model-specific registers of a PV guest: which RDMSR and WRMSR are answered, as Xen 4.17 answers them for an unprivileged
domain. Everything else is #GP.
"""

from __future__ import annotations

from typing import Final

from bus.abi.xen import HYPERVISOR_iret
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn, canonical
from domains.pv.cpu import EFER_HARDWARE, Cpu
from domains.pv.time import Timekeeper

MSR_TSC: Final = 0x10
MSR_PLATFORM_ID: Final = 0x17
MSR_APIC_BASE: Final = 0x1B
MSR_UCODE_REV: Final = 0x8B
MSR_PLATFORM_INFO: Final = 0xCE
MSR_MISC_FEATURES_ENABLES: Final = 0x140
MSR_MCG_CAP: Final = 0x179
MSR_MCG_STATUS: Final = 0x17A
MSR_MCG_CTL: Final = 0x17B
MSR_PERF_STATUS: Final = 0x198
MSR_PERF_CTL: Final = 0x199
MSR_MISC_ENABLE: Final = 0x1A0
MSR_DEBUGCTL: Final = 0x1D9
MSR_PAT: Final = 0x277
MSR_PERF_CAPABILITIES: Final = 0x345
MSR_HYPERCALL_PAGE: Final = 0x40000000
MSR_EFER: Final = 0xC0000080
MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101
MSR_SHADOW_GS_BASE: Final = 0xC0000102

APIC_BASE: Final = 0xFEE00000
APIC_BASE_ENABLE: Final = 1 << 11
APIC_BASE_BSP: Final = 1 << 8
CPUID_FAULTING: Final = 1 << 31
XEN_PAT: Final = 0x050100070406
"""PAT as Xen programs it: WB WT UC- UC WC WP (xen.h, MMU_NORMAL_PT_UPDATE)."""
MISC_ENABLE: Final = 1 | 1 << 11 | 1 << 12 | 1 << 23
"""Fast strings, no branch trace, no PEBS, no xTPR: what Xen leaves of MSR_IA32_MISC_ENABLE."""


class GeneralProtection(Exception):
    """The access is refused: the guest gets #GP(0)."""


def read_msr(cpu: Cpu, time: Timekeeper, index: int) -> int:
    """RDMSR in guest-kernel mode. Raises GeneralProtection."""
    s = cpu.current
    if index == MSR_FS_BASE:
        return cpu.regs.fs_base
    if index == MSR_GS_BASE:
        return cpu.regs.gs_base
    if index == MSR_SHADOW_GS_BASE:
        return cpu.regs.kernel_gs_base
    if index == MSR_TSC:
        return time.now()
    if index == MSR_EFER:
        return EFER_HARDWARE
    if index == MSR_APIC_BASE:
        return APIC_BASE | APIC_BASE_ENABLE | (APIC_BASE_BSP if s.id == 0 else 0)
    if index == MSR_PAT:
        return XEN_PAT
    if index == MSR_MISC_ENABLE:
        return MISC_ENABLE
    if index == MSR_PLATFORM_INFO:
        return CPUID_FAULTING
    if index == MSR_MISC_FEATURES_ENABLES:
        return s.misc_features
    if index in _READ_AS_ZERO:
        return 0
    raise GeneralProtection(f"rdmsr {index:#x}")


_READ_AS_ZERO: Final = frozenset(
    (
        MSR_PLATFORM_ID, MSR_UCODE_REV, MSR_MCG_CAP, MSR_MCG_STATUS, MSR_PERF_STATUS, MSR_PERF_CTL,
        MSR_DEBUGCTL, MSR_PERF_CAPABILITIES, MSR_HYPERCALL_PAGE,
    )
)  # fmt: skip


def write_msr(cpu: Cpu, index: int, value: int) -> None:
    """WRMSR in guest-kernel mode. Raises GeneralProtection."""
    if index in (MSR_FS_BASE, MSR_GS_BASE, MSR_SHADOW_GS_BASE):
        if not canonical(value):
            raise GeneralProtection(f"wrmsr {index:#x}: {value:#x} is not canonical")
        if index == MSR_FS_BASE:
            cpu.regs.fs_base = value
        elif index == MSR_GS_BASE:
            cpu.regs.gs_base = value
        else:
            cpu.regs.kernel_gs_base = value
    elif index == MSR_MISC_FEATURES_ENABLES:
        if value & ~1:
            raise GeneralProtection(f"wrmsr {index:#x}: reserved bits {value:#x}")
        cpu.current.misc_features = value
    elif index == MSR_EFER:
        if value != EFER_HARDWARE:
            raise GeneralProtection(f"wrmsr of EFER: {value:#x}")
    elif index == MSR_UCODE_REV:
        if value:
            raise GeneralProtection("wrmsr of a microcode revision")
    elif index in (MSR_PERF_CTL, MSR_MISC_ENABLE, MSR_MCG_STATUS):
        pass  # Xen drops these writes
    elif index == MSR_HYPERCALL_PAGE:
        _write_hypercall_page(cpu, value)
    else:
        raise GeneralProtection(f"wrmsr {index:#x}")


def _write_hypercall_page(cpu: Cpu, value: int) -> None:
    """Bits 63:12: the frame; bits 11:0: the index of the page, of which there is one."""
    mfn = Mfn(value >> PAGE_SHIFT)
    if value & 0xFFF or not cpu.mmu.can_grant_writable(mfn):
        raise GeneralProtection("hypercall page: bad index or frame")
    offset = (mfn - cpu.base) << PAGE_SHIFT
    cpu.octets[offset : offset + PAGE_SIZE] = hypercall_page()
    cpu.drop_code(mfn)


def hypercall_page() -> bytes:
    """The page of stubs, 32 bytes for each hypercall number, as Xen fills it for a 64-bit PV guest.

    Each saves RCX and R11, which SYSCALL destroys, and returns; iret, which does not return, also pushes RAX.
    """
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for number in range(PAGE_SIZE // 32):
        load = b"\xb8" + number.to_bytes(4, "little")
        if number == HYPERVISOR_iret:
            stub = b"\x51\x41\x53\x50" + load + b"\x0f\x05"
        else:
            stub = b"\x51\x41\x53" + load + b"\x0f\x05\x41\x5b\x59\xc3"
        page[32 * number : 32 * number + len(stub)] = stub
    return bytes(page)
