"""Model-specific registers that an HVM vCPU keeps itself, without an exit: which they are, and the checks of their values that
QEMU does not make.
"""

from __future__ import annotations

from typing import Final

from bus.addresses import canonical
from domains.vcpu.api import GuestFault
from domains.vcpu.state import EnvRegisters

GP: Final = 13
SYSENTER_ESP, SYSENTER_EIP = 0x175, 0x176
EFER, LSTAR = 0xC0000080, 0xC0000082
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC0000100, 0xC0000101, 0xC0000102
NATIVE_MSRS: Final = (
    0x174, SYSENTER_ESP, SYSENTER_EIP,  # and SYSENTER_CS
    0x277,  # PAT
    EFER, 0xC0000081, LSTAR, 0xC0000083, 0xC0000084,  # and STAR, CSTAR, FMASK
    FS_BASE, GS_BASE, KERNEL_GS_BASE, 0xC0000103,  # and TSC_AUX
)  # fmt: skip
"""Kept by the vCPU itself; all others go to `on_rdmsr` and `on_wrmsr`."""
ADDRESSES: Final = {
    SYSENTER_ESP: "sysenter_esp",
    SYSENTER_EIP: "sysenter_eip",
    LSTAR: "lstar",
    FS_BASE: "fs_base",
    GS_BASE: "gs_base",
    KERNEL_GS_BASE: "kernel_gs_base",
}
"""Registers with a linear address: #GP if it is not canonical (SDM volume 2, WRMSR)."""
CHECKED: Final = frozenset((EFER, *ADDRESSES))
"""Writes of these exit for the check; reads do not."""
SCE, LME, LMA, NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
PG: Final = 1 << 31
_READ, _WRITE = 1, 2


def permission_map() -> bytes:
    """SVM's map, two bits a register, set where it exits (AMD64 APM volume 2, 15.11)."""
    bits = bytearray(b"\xff" * 0x1800)
    for number in NATIVE_MSRS:
        at = 2 * number if number < 0x2000 else 2 * (number - 0xC0000000 + 0x2000)
        free = _READ if number in CHECKED else _READ | _WRITE
        bits[at >> 3] &= ~(free << (at & 7)) & 0xFF
    return bytes(bits)


def write(regs: EnvRegisters, number: int, value: int) -> None:
    """WRMSR of a register of CHECKED. GuestFault (#GP) for an address that is not canonical, and in EFER for a bit that is not
    known or for LME changed while paging is on. LMA is read-only."""
    name = ADDRESSES.get(number)
    if name is not None:
        if not canonical(value):
            raise GuestFault(GP, 0)
        setattr(regs, name, value)
        return
    old = regs.efer
    if value & ~(SCE | LME | LMA | NXE) or ((value ^ old) & LME and regs.cr0 & PG):
        raise GuestFault(GP, 0)
    regs.efer = value & ~LMA | old & LMA
