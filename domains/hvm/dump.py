"""The registers of a crashed HVM vCPU as text."""

from __future__ import annotations

from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.walk import NotMapped

STACK_WORDS = 16


def register_dump(vcpu: UnicornHvmVcpu) -> str:
    """Lines of registers, the code at RIP and the top of the guest's stack."""
    r = vcpu.regs
    lines = [
        f"RIP:    {r.cs:04x}:[<{r.rip:016x}>]   code: {vcpu.code_at_rip().hex(' ')}",
        f"RFLAGS: {r.rflags:016x}   CONTEXT: hvm guest   CPL {r.cpl}",
        f"rax: {r.rax:016x}   rbx: {r.rbx:016x}   rcx: {r.rcx:016x}",
        f"rdx: {r.rdx:016x}   rsi: {r.rsi:016x}   rdi: {r.rdi:016x}",
        f"rbp: {r.rbp:016x}   rsp: {r.rsp:016x}   r8:  {r.r8:016x}",
        f"r9:  {r.r9:016x}   r10: {r.r10:016x}   r11: {r.r11:016x}",
        f"r12: {r.r12:016x}   r13: {r.r13:016x}   r14: {r.r14:016x}",
        f"r15: {r.r15:016x}   cr0: {r.cr0:016x}   cr4: {r.cr4:016x}",
        f"cr3: {r.cr3:016x}   cr2: {r.cr2:016x}   efer: {r.efer:016x}",
        f"ds: {r.ds:04x}   es: {r.es:04x}   fs: {r.fs:04x}   gs: {r.gs:04x}   ss: {r.ss:04x}   cs: {r.cs:04x}",
    ]
    words = _stack(vcpu, r.segment("ss").base + r.rsp)
    lines += ["   " + " ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    return "\n".join(lines)


def _stack(vcpu: UnicornHvmVcpu, top: int) -> list[str]:
    words: list[str] = []
    while len(words) < STACK_WORDS:
        try:
            words.append(f"{int.from_bytes(vcpu.memory.read(top + 8 * len(words), 8), 'little'):016x}")
        except NotMapped as fault:
            return [*words, f"(nothing at {fault.address:#x})"]
    return words
