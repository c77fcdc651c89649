"""Entry into the guest kernel: the frame that Xen pushes for an exception, an event or a system call, and what it clears.

From the top of the frame (lowest address): RCX, R11, [error code,] RIP, CS | saved upcall mask << 32, RFLAGS, RSP, SS; for the
failsafe callback DS, ES, FS, GS precede RIP in the place of the error code. Source: arch-x86/xen-x86_64.h, and the behaviour
of Xen 4.17 (create_bounce_frame).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from bus.abi.arch_x86_64 import FLAT_KERNEL_CS, FLAT_KERNEL_SS, HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from bus.abi.xen import VMASST_TYPE_architectural_iopl
from domains.pv.api import GuestFault
from domains.pv.cpu import Cpu
from domains.pv.state import VcpuState

RFLAGS_TF: Final = 1 << 8
RFLAGS_IF: Final = 1 << 9
RFLAGS_DF: Final = 1 << 10
RFLAGS_IOPL: Final = 3 << 12
RFLAGS_NT: Final = 1 << 14
RFLAGS_RF: Final = 1 << 16
RFLAGS_VM: Final = 1 << 17
RFLAGS_AC: Final = 1 << 18

TRAP_DB: Final = 1
TRAP_UD: Final = 6
TRAP_NMI: Final = 2
TRAP_SS: Final = 12
TRAP_PF: Final = 14
PF_FETCH: Final = 16
"""Error code of #PF: an instruction fetch."""
VECTORS_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
TI_IF: Final = 4

_CLEARED: Final = ~(RFLAGS_AC | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT | RFLAGS_TF)
_NOT_SHOWN: Final = ~(RFLAGS_IF | RFLAGS_IOPL)
_IOPL_ASSIST: Final = 1 << VMASST_TYPE_architectural_iopl
_MASK64: Final = (1 << 64) - 1

_PLAIN: Final = Struct("<7Q").pack
_WITH_CODE: Final = Struct("<8Q").pack
_FAILSAFE: Final = Struct("<11Q").pack

_NAMES: Final = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM",
}  # fmt: skip


def trap_name(vector: int) -> str:
    """Short name of an exception, as '#GP'."""
    return _NAMES.get(vector, f"vector {vector:#x}")


def bounce(
    cpu: Cpu,
    address: int,
    error_code: int | None,
    mask_events: bool,
    segments: tuple[int, int, int, int] | None = None,
) -> None:
    """Enter the guest kernel at `address`. Crashes the domain if its stack cannot take the frame or `address` is 0.

    `segments` (DS, ES, FS, GS): the failsafe callback's frame.
    """
    s = cpu.current
    r = cpu.regs
    octets = cpu.octets
    cs = r.cs
    rsp = r.rsp
    rflags = r.rflags
    if s.kernel_mode:
        sp = rsp
        cs &= ~3
    else:
        cpu.toggle_mode()
        sp = s.kernel_sp
    sp &= ~0xF & _MASK64
    if HYPERVISOR_VIRT_START < sp < HYPERVISOR_VIRT_END + 64:
        cpu.crash(f"Bad guest kernel stack {sp:#x}")
        return
    index = s.info + 1
    mask = octets[index]
    if mask_events:
        octets[index] = mask | 1
    flags = rflags & _NOT_SHOWN
    if not mask:
        flags |= RFLAGS_IF
    if cpu.assists & _IOPL_ASSIST:
        flags |= s.iopl
    if segments is not None:
        ds, es, fs, gs = segments
        frame = _FAILSAFE(r.rcx, r.r11, ds, es, fs, gs, r.rip, cs | mask << 32, flags, rsp, r.ss)
    elif error_code is None:
        frame = _PLAIN(r.rcx, r.r11, r.rip, cs | mask << 32, flags, rsp, r.ss)
    else:
        frame = _WITH_CODE(r.rcx, r.r11, error_code, r.rip, cs | mask << 32, flags, rsp, r.ss)
    sp -= len(frame)
    try:
        cpu.mmu.write_virtual(sp & _MASK64, frame)
    except GuestFault as fault:
        cpu.crash(
            f"Fatal page fault: no guest kernel stack at {fault.va:#x} for the frame of entry {address:#x}"
        )
        return
    if not address:
        cpu.crash("Guest entry point 0: no handler or callback is registered")
        return
    r.rsp = sp
    r.rip = address
    if r.cs == FLAT_KERNEL_CS:
        r.ss = FLAT_KERNEL_SS
    else:
        cpu.enter_flat()
    r.rflags = rflags & _CLEARED


def inject(cpu: Cpu, vector: int, error_code: int | None = None) -> None:
    """Give the guest an exception or a permitted software interrupt by its virtual IDT."""
    s = cpu.current
    address = s.trap_address[vector]
    if not address:
        code = "" if error_code is None else f", ec={error_code:04x}"
        cpu.crash(f"Unhandled {trap_name(vector)} fault/trap [#{vector}{code}] at rip {cpu.regs.rip:#x}")
        return
    bounce(cpu, address, error_code, bool(s.trap_flags[vector] & TI_IF))


def inject_gp(cpu: Cpu, error_code: int = 0) -> None:
    """#GP. RIP is at the instruction."""
    inject(cpu, 13, error_code)


def inject_page_fault(cpu: Cpu, address: int, error_code: int) -> None:
    """#PF: CR2 goes to the vCPU's virtual CR2 and to vcpu_info.arch.cr2; the U bit tells the guest's mode."""
    s = cpu.current
    s.cr2 = address
    cpu.words[(s.info >> 3) + 2] = address
    code = error_code & ~4 if s.kernel_mode else error_code | 4
    inject(cpu, TRAP_PF, code)


def inject_failsafe(cpu: Cpu, segments: tuple[int, int, int, int]) -> None:
    """The failsafe callback: segment selectors could not be restored when the vCPU was switched in."""
    s = cpu.current
    bounce(cpu, s.failsafe_callback, None, s.failsafe_masks, segments)


def deliver_events(cpu: Cpu, s: VcpuState) -> None:
    """What Xen does on each way back to the guest: a pending NMI, then the event upcall. `s` is the current vCPU."""
    if s.nmi_pending and not s.nmi_masked:
        s.nmi_pending = False
        if s.trap_address[TRAP_NMI]:
            s.nmi_masked = True
            bounce(cpu, s.trap_address[TRAP_NMI], None, True)
    octets = cpu.octets
    info = s.info
    if octets[info] and not octets[info + 1]:
        bounce(cpu, s.event_callback, None, True)
