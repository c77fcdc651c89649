"""Machine code for HVM: exceptions go through the guest's IDT, SYSCALL does what the processor does."""

from __future__ import annotations

from typing import Final

from domains.vcpu.corrections import ALWAYS, HARDWARE
from domains.vcpu.insides import SEGMENT_SIZE, Fixed, Offsets, library
from domains.vcpu.thunks import Code, Control, fault_or_return

FIRST_EXIT: Final = 0x100
"""Vectors from here on are SVM exit codes: 0x100 + code."""
HF_CS64: Final = 1 << 15
CODE64_DPL0: Final = 0x00A09B00
DATA_DPL0: Final = 0x00C09300
UD: Final = 6
RETRY: Final = 0xFFFF
"""In place of a vector: nothing is delivered, the vCPU goes on at RIP."""


def _u32(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")


def interrupt_hook(cpu: int, env: int, control: int, found: Offsets, exits: int, correct: int) -> Code:
    """UC_HOOK_INTR: (rdi uc, esi vector). Exceptions are delivered by QEMU's own code: frame, stack switch,
    error code.

    It may fault in its turn and then leaves by longjmp to the run loop, which calls this hook again: so
    double and triple faults come about; DELIVERING tells. `correct` (Python) sees those, and the vectors of
    `corrections.ALWAYS`, and returns the vector. `exception_is_int` must be cleared: a later exit would
    take its next RIP.
    """
    code = (
        Code()
        .emit("4883ec08")  # sub rsp, 8
        .load("rcx", control + Control.DELIVERING)
        .emit("81fe", _u32(FIRST_EXIT))  # cmp esi, 0x100
        .jump("73", "exit")  # jae
        .emit("833900")  # cmp dword [rcx], 0
        .jump("75", "correct")
        .emit("b8", _u32(ALWAYS), "0fa3f0")  # mov eax, ALWAYS; bt eax, esi (modulo 32: INT n may match)
        .jump("72", "correct")
        .emit("83fe0e")  # cmp esi, #PF
        .jump("75", "deliver")
        .load("rdx", env)
        .emit("488b82", _u32(Fixed.CR + 16))  # mov rax, [rdx + CR2]
        .emit("a9ff0f0000")  # test eax, 4095
        .jump("75", "deliver")
        .emit("482b82", _u32(Fixed.SEGMENTS + SEGMENT_SIZE + 8))  # sub rax, [rdx + CS base]
        .emit("48ffc8", "482b82", _u32(Fixed.RIP))  # dec rax; sub rax, [rdx + RIP]
        .emit("483dff0f0000")  # cmp rax, 4095: the page behind RIP's, at most a page away
        .jump("76", "correct")
        .label("deliver")
        .emit("897104")  # mov [rcx+4], esi
        .load("rax", env + found.exception_is_int)
        .emit("8b00", "ffc0", "8901")  # mov eax, [rax]; inc eax; mov [rcx], eax
        .load("rdi", cpu)
        .call(library().address("x86_cpu_do_interrupt_x86_64"))
        .load("rcx", control + Control.DELIVERING)
        .emit("c701", "00000000")  # mov dword [rcx], 0
        .load("rax", env + found.exception_is_int)
        .emit("c700", "00000000")  # mov dword [rax], 0
        .emit("4883c408", "c3")  # add rsp, 8; ret
        .label("correct")
        .call(correct)
        .load("rcx", control + Control.DELIVERING)
        .emit("89c6", "81fe", _u32(RETRY))  # mov esi, eax; cmp esi, RETRY
        .jump("75", "deliver")
        .load("rax", env + found.old_exception)
        .emit("c700", "ffffffff")  # mov dword [rax], -1
        .emit("4883c408", "c3")  # add rsp, 8; ret
        .label("exit")
        .emit("c701", "00000000")  # mov dword [rcx], 0
        .load("rax", env + found.exception_is_int)
        .emit("c700", "00000000")
        .call(exits)
    )
    return fault_or_return(code, env, control)


def invalid_hook(cpu: int, env: int, control: int, target: int) -> Code:
    """UC_HOOK_INSN_INVALID: Python says whether it was a hypercall; if not, #UD through the IDT. Returns
    true."""
    code = (
        Code()
        .emit("4883ec08")  # sub rsp, 8
        .call(target)
        .emit("84c0")  # test al, al
        .jump("75", "done")
        .load("rcx", control + Control.DELIVERING)
        .emit("c701", _u32(HARDWARE), "c74104", _u32(UD))  # mov dword [rcx], 1; mov dword [rcx+4], 6
        .load("rdi", cpu)
        .call(library().address("x86_cpu_do_interrupt_x86_64"))
        .load("rcx", control + Control.DELIVERING)
        .emit("c701", "00000000")  # mov dword [rcx], 0
        .label("done")
        .emit("b801000000")  # mov eax, 1
    )
    return fault_or_return(code, env, control)


def syscall_hook(env: int, control: int, found: Offsets, python: int) -> Code:
    """SYSCALL in 64-bit mode (AMD64 APM volume 3, SYSCALL); other modes in Python. r13 = length of the
    instruction."""
    cs, ss = Fixed.SEGMENTS + SEGMENT_SIZE, Fixed.SEGMENTS + 2 * SEGMENT_SIZE
    lib = library()
    code = (
        Code()
        .emit("53")  # push rbx
        .load("rax", env)
        .emit("4889c3")  # mov rbx, rax
        .emit("f683", _u32(found.efer), "01")  # test byte [rbx+efer], SCE
        .jump("74", "undefined")
        .emit("f783", _u32(Fixed.HFLAGS), _u32(HF_CS64))  # test dword [rbx+hflags], HF_CS64
        .jump("74", "python")
        .emit("4889df")  # mov rdi, rbx
        .call(lib.address("helper_read_eflags_x86_64"))
        .emit("25", _u32(~(1 << 16)))  # and eax, ~RF
        .emit("48898358000000")  # mov [rbx+R11], rax
        .emit("488b8b", _u32(Fixed.RIP))  # mov rcx, [rbx+RIP]
        .emit("4c01e9")  # add rcx, r13
        .emit("48894b08")  # mov [rbx+RCX], rcx
        .emit("488b93", _u32(found.fmask))  # mov rdx, [rbx+fmask]
        .emit("48f7d2")  # not rdx
        .emit("4821d0")  # and rax, rdx
        .emit("4889c6")  # mov rsi, rax
        .emit("baffffffff")  # mov edx, -1
        .emit("4889df")  # mov rdi, rbx
        .call(lib.address("helper_write_eflags_x86_64"))
        .emit("8b83", _u32(found.star + 4))  # mov eax, [rbx+star+4]
        .emit("25fcff0000")  # and eax, 0xfffc
    )
    for segment, flags in ((cs, CODE64_DPL0), (ss, DATA_DPL0)):
        code.emit("8983", _u32(segment))  # mov [rbx+segment], eax
        code.emit("48c783", _u32(segment + 8), "00000000")  # mov qword [rbx+base], 0
        code.emit("c783", _u32(segment + 16), "ffffffff")  # mov dword [rbx+limit], -1
        code.emit("c783", _u32(segment + 20), _u32(flags))  # mov dword [rbx+flags], flags
        code.emit("83c008")  # add eax, 8
    code = (
        code.emit("83a3", _u32(Fixed.HFLAGS), "fc")  # and dword [rbx+hflags], ~3
        .emit("488b83", _u32(found.lstar))  # mov rax, [rbx+lstar]
        .emit("4c29e8")  # sub rax, r13: Unicorn adds it
        .emit("488983", _u32(Fixed.RIP))  # mov [rbx+RIP], rax
        .emit("5b", "c3")  # pop rbx; ret
        .label("undefined")
        .emit("4889df")  # mov rdi, rbx
        .emit("be", _u32(UD), "31d2")  # mov esi, 6; xor edx, edx
        .call(lib.address("raise_exception_err_x86_64"))
        .emit("0f0b")  # ud2
    )
    code.label("python").call(python).emit("5b", "4883ec08")  # call python; pop rbx; sub rsp, 8
    return fault_or_return(code, env, control)
