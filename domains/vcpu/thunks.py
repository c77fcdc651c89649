"""Machine code that stands between Unicorn and Python: hooks that must be fast, exact, or may not be Python
at all.

* the block hook: counts down, looks at the bell word, asks Unicorn to stop (6 % of guest speed);
* fix-ups round the Python hooks: RIP behind SYSCALL, `old_exception` forgotten, an exception raised
  *instead of* an instruction (Unicorn leaves by longjmp, which must not cross a Python frame);
* RDTSC and RDTSCP without Python;
* delivery of exceptions by the guest's IDT (HVM): `domains.vcpu.hvm_thunks`.

All code follows the System V calling convention. It is assembled byte by byte, the assembly beside it. The
pages are written first and made executable afterwards, never both.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

from domains.vcpu.api import VcpuError
from domains.vcpu.insides import Fixed, Offsets, barrier_patch, library

PAGE: Final = 4096
DEBUG_REQUEST: Final = 0x80
"""CPU_INTERRUPT_DEBUG."""


class Control:
    """Byte offsets in the control page, which machine code and Python share."""

    COUNTDOWN = 0
    """u64: blocks left."""
    BELL = 8
    """u32: not 0: somebody wants the thread."""
    FAULT = 16
    """u32: not 0: raise the exception that follows when the hook returns."""
    FAULT_VECTOR = 20
    FAULT_ERROR = 24
    """u32 each."""
    TSC_MULTIPLIER = 32
    """u64: guest ticks a host tick, 32.32 fixed point."""
    TSC_OFFSET = 40
    """u64, modulo 2**64."""
    TSC_TRAP = 48
    """u32: not 0: RDTSC and RDTSCP go to Python."""
    REQUESTS = 52
    """u32: interrupt requests to put back when an exception from outside was raised."""
    RESUME = 56
    """u64: blocks left after that."""
    DELIVERING = 64
    """u32, HVM: not 0 while an exception is being delivered (`corrections.HARDWARE`, `SOFTWARE`); set again by the next one."""
    DELIVERED = 68
    """u32: its vector."""
    PUT_OFF = 72
    """u32: not 0: the block hook makes a request for #DB before its next block, and goes on (`watchpoints.py`)."""
    SHADOW_CR0 = 80
    SHADOW_CR3 = 88
    SHADOW_CR4 = 96
    """u64 each: what the MMU has in place of the guest's during a walk (`domains.vcpu.shadow_mmu`)."""
    GUEST_CR3 = 104
    """u64: the guest's, for which they are."""


_lent: list[tuple[mmap.mmap, int]] = []


def lend_control_page(memory: mmap.mmap, offset: int) -> None:
    """The next vCPU object that this process makes has its control page there, and whoever else has that memory can ring its bell: one
    store, and the vCPU stops before its next block. The memory stays mapped from then on."""
    _lent[:] = [(memory, offset)]


class ControlPage:
    """The control page: memory that stays where it is, private to the process unless it was lent."""

    def __init__(self) -> None:
        self._map, offset = _lent.pop() if _lent else (mmap.mmap(-1, PAGE), 0)
        self.address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self._map, offset))
        page = memoryview(self._map)[offset : offset + PAGE]
        self.q: Final = page.cast("Q")
        self.d: Final = page.cast("I")


class Code:
    """Bytes of machine code with forward jumps."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def emit(self, *parts: str | bytes) -> Code:
        """Append bytes, given as such or in hexadecimal."""
        for part in parts:
            self._bytes += bytes.fromhex(part) if isinstance(part, str) else part
        return self

    def load(self, register: str, value: int) -> Code:
        """`mov register, imm64`; the register is one of rax, rcx, rdx, rdi, rsi, r8."""
        opcode = {"rax": "48b8", "rcx": "48b9", "rdx": "48ba", "rsi": "48be", "rdi": "48bf", "r8": "49b8"}[
            register
        ]
        return self.emit(opcode, value.to_bytes(8, "little"))

    def jump(self, opcode: str, label: str) -> Code:
        """A near conditional jump (`74` je, `75` jne, `78` js, `72` jb, `73` jae) to a label."""
        self.emit("0f", bytes([bytes.fromhex(opcode)[0] + 0x10]), "00000000")
        self._jumps.append((len(self._bytes) - 4, label))
        return self

    def jump_back(self, label: str) -> Code:
        """`jmp` to a label that is there already."""
        distance = self._labels[label] - (len(self._bytes) + 5)
        return self.emit("e9", distance.to_bytes(4, "little", signed=True))

    def label(self, name: str) -> Code:
        """The place jumps to `name` go to."""
        self._labels[name] = len(self._bytes)
        return self

    def call(self, address: int) -> Code:
        """`mov rax, address; call rax`."""
        return self.load("rax", address).emit("ffd0")

    def tail(self, address: int) -> Code:
        """`mov rax, address; jmp rax`."""
        return self.load("rax", address).emit("ffe0")

    def assemble(self) -> bytes:
        """The finished code."""
        for at, label in self._jumps:
            distance = self._labels[label] - (at + 4)
            self._bytes[at : at + 4] = (distance & 0xFFFFFFFF).to_bytes(4, "little")
        self._jumps.clear()
        return bytes(self._bytes)


class CodePage:
    """Pages for machine code: `add` while they are writable, `seal` makes them executable and read-only."""

    def __init__(self, size: int = PAGE) -> None:
        self._map: Final = mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._pin: Final = ctypes.c_char.from_buffer(self._map)
        self._base: Final = ctypes.addressof(self._pin)
        self._size: Final = size
        self._used = 0
        self._sealed = False

    def add(self, code: Code) -> int:
        """Append code and return its address. VcpuError if it does not fit or the pages are sealed."""
        data = code.assemble()
        if self._sealed or self._used + len(data) > self._size:
            raise VcpuError("no room for machine code, or its pages are sealed")
        at = self._used
        self._map[at : at + len(data)] = data
        self._used = (at + len(data) + 15) & ~15
        return self._base + at

    def seal(self) -> None:
        """Make the code executable and no longer writable."""
        protect(self._base, self._size, mmap.PROT_READ | mmap.PROT_EXEC)
        self._sealed = True


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def protect(address: int, size: int, protection: int) -> None:
    """mprotect(2). OSError if the host refuses (a hardened kernel may forbid executable memory)."""
    if _libc.mprotect(address, size, protection):
        number = ctypes.get_errno()
        raise OSError(number, f"mprotect of {size} bytes for machine code refused")


def block_hook(env: int, requests: int) -> Code:
    """UC_HOOK_BLOCK: (rdi uc, rsi address, edx size, rcx control page). Unicorn looks for a stop behind the
    hook and before the block: a block whose hook asks for a stop is not run. With the countdown at 0 from
    the start and FAULT set the hook raises an exception at the first instruction: so one comes from outside
    (`requests`: where QEMU keeps its interrupt requests, which must not be served before it). With it at 0 and PUT_OFF set it asks for
    #DB behind the block, and the count goes on at RESUME."""
    return (
        Code()
        .label("again")
        .emit("48ff09")  # dec qword [rcx + COUNTDOWN]
        .jump("78", "stop")  # js: before the block that would be one too many
        .emit("83790800")  # cmp dword [rcx + BELL], 0
        .jump("75", "stop")
        .emit("c3")  # ret
        .label("stop")
        .emit("837948", "00")  # cmp dword [rcx + PUT_OFF], 0
        .jump("75", "put off")
        .emit("83791000")  # cmp dword [rcx + FAULT], 0
        .jump("74", "leave")
        .emit("c7411000000000")  # mov dword [rcx + FAULT], 0
        .emit("488b4138", "488901")  # mov rax, [rcx + RESUME]; mov [rcx + COUNTDOWN], rax
        .load("rdi", requests)
        .emit("8b4134", "0907")  # mov eax, [rcx + REQUESTS]; or [rdi], eax
        .emit("8b7114", "8b5118")  # mov esi, [rcx + FAULT_VECTOR]; mov edx, [rcx + FAULT_ERROR]
        .load("rdi", env)
        .emit("4883ec08")  # sub rsp, 8
        .call(library().address("raise_exception_err_x86_64"))  # does not return
        .label("put off")
        .emit("c74148", "00000000")  # mov dword [rcx + PUT_OFF], 0
        .emit("488b4138", "488901")  # mov rax, [rcx + RESUME]; mov [rcx + COUNTDOWN], rax
        .load("rax", requests)
        .emit("8108", DEBUG_REQUEST.to_bytes(4, "little"))  # or dword [rax], DEBUG
        .jump_back("again")
        .label("leave")
        .tail(library().address("uc_emu_stop"))
    )


def forget_exception(env: int, found: Offsets, target: int) -> Code:
    """UC_HOOK_INTR and UC_HOOK_INSN_INVALID: old_exception = -1, then the hook proper with the same
    arguments.

    QEMU remembers the exception being delivered, to make a double fault of the next. Here it is never
    delivered by QEMU, so the memory must go: else the second #PF arrives as #DF.
    """
    return (
        Code()
        .load("rax", env + found.old_exception)
        .emit("c700", "ffffffff")  # mov dword [rax], -1
        .tail(target)
    )


def instruction_hook(env: int, control: int, target: int) -> Code:
    """IN, OUT, CPUID, a bad access: the hook proper, then, if it asks for that, an exception instead of the
    instruction."""
    code = Code().emit("4883ec08").call(target)  # sub rsp, 8; call target
    return fault_or_return(code, env, control)


def syscall_hook(env: int, control: int, target: int) -> Code:
    """SYSCALL, SYSENTER: the hook sees RIP behind the instruction, and what it writes there is where the
    guest goes.

    Unicorn adds the instruction's length, kept in r13, to RIP after the hook.
    """
    rip = env + Fixed.RIP
    code = (
        Code()
        .emit("4883ec08")  # sub rsp, 8
        .load("rax", rip)
        .emit("4c0128")  # add [rax], r13
        .call(target)
        .load("rax", rip)
        .emit("4c2928")  # sub [rax], r13
    )
    return fault_or_return(code, env, control)


def fault_or_return(code: Code, env: int, control: int) -> Code:
    """The end of a hook whose frame is `sub rsp, 8`: raise the exception the hook asked for, or return."""
    return (
        code.load("rcx", control + Control.FAULT)
        .emit("833900")  # cmp dword [rcx], 0
        .jump("75", "fault")
        .emit("4883c408", "c3")  # add rsp, 8; ret
        .label("fault")
        .emit("c701", "00000000")  # mov dword [rcx], 0
        .emit("8b7104")  # mov esi, [rcx+4]    vector
        .emit("8b5108")  # mov edx, [rcx+8]    error code
        .load("rdi", env)
        .call(library().address("raise_exception_err_x86_64"))  # does not return
        .emit("0f0b")  # ud2
    )


def _read_host_tsc(code: Code) -> Code:
    return code.emit("0f31", "48c1e220", "4809d0")  # rdtsc; shl rdx, 32; or rax, rdx


def _scale(code: Code) -> Code:
    """rax = (rax * [rsi+TSC_MULTIPLIER] >> 32) + [rsi+TSC_OFFSET]."""
    return code.emit(
        "488b4e20",  # mov rcx, [rsi+32]
        "48f7e1",  # mul rcx
        "480facd020",  # shrd rax, rdx, 32
        "48034628",  # add rax, [rsi+40]
    )


def tsc_hook(env: int, found: Offsets, target: int, *, with_aux: bool) -> Code:
    """RDTSC or RDTSCP: (rdi uc, rsi control page). Returns 1: the instruction is done."""
    code = (
        Code()
        .emit("837e3000")  # cmp dword [rsi + TSC_TRAP], 0
        .jump("75", "trap")
    )
    code = _scale(_read_host_tsc(code))
    code = (
        code.load("rcx", env)
        .emit("89c2")  # mov edx, eax
        .emit("488911")  # mov [rcx + RAX], rdx
        .emit("48c1e820")  # shr rax, 32
        .emit("48894110")  # mov [rcx + RDX], rax
    )
    if with_aux:
        code.emit("8b81", found.tsc_aux.to_bytes(4, "little"))  # mov eax, [rcx + tsc_aux]
        code.emit("48894108")  # mov [rcx + RCX], rax
    return (
        code.emit("b801000000", "c3")  # mov eax, 1; ret
        .label("trap")
        .tail(target)
    )


def host_tsc_function() -> Code:
    """uint64_t f(void): the host's time stamp counter."""
    return _read_host_tsc(Code()).emit("c3")


def guest_tsc_function(control: int) -> Code:
    """uint64_t f(void): what RDTSC in the guest gives now."""
    return _scale(_read_host_tsc(Code().load("rsi", control))).emit("c3")


def make_barriers_real() -> None:
    """Let Unicorn translate MFENCE to a fence of the host (see `insides.barrier_patch`). For code
    translated later."""
    patch = barrier_patch(library())
    if patch is None:
        return
    address, old, new = patch
    page = address & ~(PAGE - 1)
    if ctypes.string_at(address, 1) != old:
        raise VcpuError("tcg_gen_mb changed under the patch")
    # One byte of one page: never writable and executable at once, and no vCPU runs yet in this process.
    protect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        ctypes.memmove(address, new, 1)
    finally:
        protect(page, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)


def python_function(prototype: Callable[..., Any], address: int) -> Any:
    """Machine code at `address` as a Python callable of a ctypes prototype."""
    return prototype(address)
