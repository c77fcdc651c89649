"""HYPERVISOR_iret: the guest kernel goes back to what was interrupted, or into user mode (arch-x86/xen-x86_64.h)."""

from __future__ import annotations

from struct import Struct
from typing import Final

from bus.abi.arch_x86_64 import (
    FLAT_RING3_CS32,
    FLAT_RING3_CS64,
    FLAT_RING3_SS64,
    IRET_CONTEXT,
    VGCF_in_syscall,
)
from bus.abi.xen import VMASST_TYPE_architectural_iopl
from domains.pv.api import GuestFault
from domains.pv.bounce import RFLAGS_IF, RFLAGS_IOPL, RFLAGS_TF, inject_gp
from domains.pv.cpu import RFLAGS_DROP, RFLAGS_FIXED, Cpu

_UNPACK: Final = Struct("<9Q").unpack
_SIZE: Final = IRET_CONTEXT.size
_IOPL_ASSIST: Final = 1 << VMASST_TYPE_architectural_iopl
_FLAGS_KEEP: Final = 0x3FFFFF & ~RFLAGS_DROP
_CANONICAL: Final = (0, 0x1FFFF)


def iret(cpu: Cpu) -> None:
    """Restore the iret_context at the guest's RSP. The domain crashes if it cannot be read, or if it names user mode and
    there is no user page table. Context that the processor itself would refuse gives the guest kernel a #GP."""
    s = cpu.current
    r = cpu.regs
    try:
        context = cpu.mmu.read_virtual(r.rsp, _SIZE)
    except GuestFault as fault:
        cpu.crash(f"Fault while reading IRET context from guest stack at {fault.va:#x}")
        return
    rax, r11, rcx, vgcf, rip, cs, rflags, rsp, ss = _UNPACK(context)
    if cs & 3 == 3:
        if s.user_root is None:
            cpu.crash("Guest switching to user mode with no user page tables")
            return
        cpu.toggle_mode()
    if cpu.assists & _IOPL_ASSIST:
        s.iopl = rflags & RFLAGS_IOPL
    r.rax = rax
    r.rip = rip
    r.rsp = rsp
    r.rflags = (rflags & _FLAGS_KEEP) | RFLAGS_FIXED
    if vgcf & VGCF_in_syscall:
        # Back by SYSRET: RCX and R11 get what that instruction leaves there, CS and SS are the flat ones.
        r.rcx = rip
        r.r11 = (rflags & _FLAGS_KEEP) | RFLAGS_FIXED
        cs = FLAT_RING3_CS32 if cs & 0xFFFF == FLAT_RING3_CS32 else FLAT_RING3_CS64
        ss = FLAT_RING3_SS64
    else:
        r.r11 = r11
        r.rcx = rcx
        cs = (cs | 3) & 0xFFFF
        ss = (ss | 3) & 0xFFFF
    cpu.octets[s.info + 1] = 0 if rflags & RFLAGS_IF else 1
    s.nmi_masked = False
    refused = cpu.load_stack_and_code(cs, ss)
    if refused is None and (rip >> 47) in _CANONICAL:
        cpu.stale_step = rflags & RFLAGS_TF != 0
        return
    # IRETQ itself faults: the guest kernel sees #GP with the bad context as the interrupted one.
    r.cs = cs
    r.ss = ss
    inject_gp(cpu, refused or 0)
