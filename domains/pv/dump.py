"""The registers of a crashed vCPU as text, in the order of Xen's own dump."""

from __future__ import annotations

from typing import Final

from domains.pv.api import GuestFault
from domains.pv.cpu import Cpu

STACK_WORDS: Final = 24


def register_dump(cpu: Cpu) -> str:
    """Lines of registers, control registers and the top of the guest's stack."""
    r, s = cpu.regs, cpu.current
    lines = [
        f"RIP:    {r.cs:04x}:[<{r.rip:016x}>]",
        f"RFLAGS: {r.rflags:016x}   CONTEXT: pv guest {'kernel' if s.kernel_mode else 'user'}",
        f"rax: {r.rax:016x}   rbx: {r.rbx:016x}   rcx: {r.rcx:016x}",
        f"rdx: {r.rdx:016x}   rsi: {r.rsi:016x}   rdi: {r.rdi:016x}",
        f"rbp: {r.rbp:016x}   rsp: {r.rsp:016x}   r8:  {r.r8:016x}",
        f"r9:  {r.r9:016x}   r10: {r.r10:016x}   r11: {r.r11:016x}",
        f"r12: {r.r12:016x}   r13: {r.r13:016x}   r14: {r.r14:016x}",
        f"r15: {r.r15:016x}   cr0: {s.cr0:016x}   cr4: {s.cr4:016x}",
        f"cr3: {r.cr3:016x}   cr2: {s.cr2:016x}",
        f"fsb: {r.fs_base:016x}   gsb: {r.gs_base:016x}   gss: {r.kernel_gs_base:016x}",
        f"ds: {r.ds:04x}   es: {r.es:04x}   fs: {r.fs:04x}   gs: {r.gs:04x}   ss: {r.ss:04x}   cs: {r.cs:04x}",
        f"Guest stack trace from rsp={r.rsp:016x}:",
    ]
    words = []
    try:
        for index in range(STACK_WORDS):
            word = cpu.mmu.read_virtual(r.rsp + 8 * index, 8, user=not s.kernel_mode)
            words.append(f"{int.from_bytes(word, 'little'):016x}")
    except GuestFault as fault:
        words.append(f"(fault at {fault.va:#x})")
    lines += ["   " + " ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    return "\n".join(lines)
