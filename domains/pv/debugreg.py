"""Virtual debug registers: what HYPERVISOR_set/get_debugreg and MOV DR check. The vCPU's breakpoints
are armed with them (`domains.vcpu.breakpoints`).

Sources: Intel SDM volume 3, chapter 18; the checks are those of Xen 4.17.
"""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86_64 import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from bus.abi.errno import XEN_EINVAL, XEN_ENODEV, XEN_EPERM
from bus.addresses import canonical
from domains.pv.state import VcpuState

CR4_DE: Final = 1 << 3
DR6_BS: Final = 1 << 14
"""A single step."""
DR6_RESERVED_ZERO: Final = 0x1000
DR6_RESERVED_ONE: Final = 0xFFFF0FF0
DR7_RESERVED_ZERO: Final = 0xD800
DR7_RESERVED_ONE: Final = 0x400
DR7_GENERAL_DETECT: Final = 0x2000
DR7_ACTIVE_MASK: Final = 0xFF
DR_IO: Final = 2


def hypervisor_range(address: int) -> bool:
    """An address of Xen's part of the address space."""
    return HYPERVISOR_VIRT_START <= address < HYPERVISOR_VIRT_END


def _address_ok(address: int) -> bool:
    return canonical(address) and not hypervisor_range(address)


def set_debugreg(s: VcpuState, register: int, value: int) -> int:
    """0; -ENODEV: no such register (#UD); -EINVAL: reserved bits; -EPERM: not allowed to a guest (both #GP)."""
    if register in (4, 5):
        if s.cr4 & CR4_DE:
            return -XEN_ENODEV
        register += 2
    if 0 <= register <= 3:
        if not _address_ok(value):
            return -XEN_EPERM
        s.dr[register] = value
        return 0
    if register == 6:
        if value >> 32:
            return -XEN_EINVAL
        s.dr6 = value & ~DR6_RESERVED_ZERO | DR6_RESERVED_ONE
        return 0
    if register == 7:
        return _set_dr7(s, value)
    return -XEN_ENODEV


def _set_dr7(s: VcpuState, value: int) -> int:
    if value >> 32:
        return -XEN_EINVAL
    value = value & ~DR7_RESERVED_ZERO | DR7_RESERVED_ONE
    if value & DR7_GENERAL_DETECT:
        return -XEN_EPERM
    io_enable = 0
    if value & DR7_ACTIVE_MASK:
        for i in range(4):
            if value >> (16 + 4 * i) & 3 == DR_IO:
                if not s.cr4 & CR4_DE:
                    return -XEN_EPERM
                io_enable |= value & 3 << 2 * i
    s.dr7_io = io_enable
    s.dr7 = value & ~io_enable
    return 0


def read_debugreg(s: VcpuState, register: int) -> int | None:
    """The register's value, or None if there is no such register."""
    if register in (4, 5):
        if s.cr4 & CR4_DE:
            return None
        register += 2
    if 0 <= register <= 3:
        return s.dr[register]
    if register == 6:
        return s.dr6
    if register == 7:
        return s.dr7 | s.dr7_io
    return None
