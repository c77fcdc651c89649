"""Ways from guest user mode into the guest kernel that are not exceptions: SYSCALL, SYSENTER, INT n."""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86_64 import FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_SS64
from bus.abi.xen import VMASST_TYPE_architectural_iopl
from domains.pv.bounce import RFLAGS_DF, RFLAGS_NT, TI_IF, TRAP_UD, bounce, inject, inject_gp
from domains.pv.cpu import Cpu

_IOPL_ASSIST: Final = 1 << VMASST_TYPE_architectural_iopl
LEGACY_SYSCALL_VECTOR: Final = 0x80
HARDWARE_DPL3: Final = frozenset((3, 4))
"""Vectors whose gates Xen itself opens to ring 3: INT3 and INTO arrive as exceptions."""
SYSCALL_LENGTH: Final = 2


def user_syscall(cpu: Cpu) -> None:
    """SYSCALL in user mode, RIP behind it: to the syscall callback, or the 32-bit one from compatibility code. #UD if the
    guest registered none. RCX and R11 are loaded as the instruction does."""
    s = cpu.current
    r = cpu.regs
    compat = r.cs & 0xFFFF == FLAT_RING3_CS32
    if compat:
        address, masks = s.syscall32_callback, s.syscall32_masks
    else:
        address, masks = s.syscall_callback, s.syscall_masks
    if not address:
        r.rip -= SYSCALL_LENGTH
        inject(cpu, TRAP_UD)
        return
    r.rcx = r.rip
    r.r11 = r.rflags
    if not compat:
        r.cs = FLAT_RING3_CS64
    r.ss = FLAT_RING3_SS64
    bounce(cpu, address, None, masks)
    r.rflags &= ~RFLAGS_DF


def user_sysenter(cpu: Cpu) -> None:
    """SYSENTER in user mode: to the sysenter callback with a null CS:RIP and RSP, as on Xen; #GP if there is none."""
    s = cpu.current
    r = cpu.regs
    if not s.sysenter_callback:
        inject_gp(cpu)
        return
    r.cs = 3
    r.rip = 0
    r.ss = FLAT_RING3_SS64
    r.rsp = 0
    flags = r.rflags
    if flags & RFLAGS_NT:
        r.rflags = flags & ~RFLAGS_NT
    bounce(cpu, s.sysenter_callback, None, s.sysenter_masks)


def software_interrupt(cpu: Cpu, vector: int) -> None:
    """INT n, INT3 or INTO, RIP behind it.

    INT3 and INTO always reach their handlers. INT 0x80 goes straight to a registered handler. Any other needs a virtual gate
    whose DPL admits the guest's mode; otherwise #GP with the selector error code, RIP at the instruction.
    """
    s = cpu.current
    if vector in HARDWARE_DPL3:
        inject(cpu, vector)
        return
    if vector == LEGACY_SYSCALL_VECTOR and s.trap_address[vector]:
        bounce(cpu, s.trap_address[vector], None, bool(s.trap_flags[vector] & TI_IF))
        return
    if s.kernel_mode:
        level = 0 if cpu.assists & _IOPL_ASSIST else 1
    else:
        level = 3
    if s.trap_address[vector] and s.trap_flags[vector] & 3 >= level:
        inject(cpu, vector)
        return
    cpu.regs.rip -= 2
    inject_gp(cpu, vector << 3 | 2)
