"""Data breakpoints: what QEMU does of them, and Unicorn has emptied.

QEMU keeps a list of watchpoints in the CPU object. A TLB entry of a page with one of them sends its accesses through the slow path, which
asks for each access whether it hits. The first hit drops the translation, goes back to the instruction and translates that alone; at its
second hit it runs to its end, and an interrupt request (CPU_INTERRUPT_DEBUG) brings `breakpoint_handler`, which sets DR6 and raises #DB
behind the instruction. In Unicorn 2.1.4 all of that is there, but four functions have no body: to insert and to remove a watchpoint, and
the two questions (a page, an access). They are led to machine code here, each after a comparison of the code that is there
(`UnknownUnicorn` otherwise).

MOV SS and POP SS put the #DB of their own hit off to the end of the next instruction (SDM volume 3, 6.8.3). When the request is
served, they are told by the interrupt shadow that they have set: no other instruction that touches memory leaves it on. The function
that raises #DB is led past a question of ours; where the shadow is on, the vCPU (Python, `put_off`) has the block hook make the request
again in front of the next block, which is that one instruction.

The list of each instance has four entries from its start on, one for each debug register; one without flags is free. Struct CPUWatchpoint:
address u64 +0, length u64 +8, flags u32 +0x1c, next +0x20; in the flags are BP_MEM_READ 1, BP_MEM_WRITE 2, BP_CPU 0x20, and that it was hit, 0xc0.
"""

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from typing import Final, Protocol

from domains.vcpu import limits
from domains.vcpu.insides import Fixed, Library, UnknownUnicorn, described, library
from domains.vcpu.stores import lead
from domains.vcpu.thunks import DEBUG_REQUEST, Code, CodePage

ENTRIES: Final = 4
_ENTRY_BYTES: Final = 0x40
_NEXT: Final = 0x20
_FLAGS: Final = 0x1C
_WAS_HIT: Final = 0xC0
_D: Final = rb"(....)"
# breakpoint_handler: mov rax, [rbp + watchpoint_hit]; test rax, rax; je; test byte [rax + 0x1c], BP_CPU
_HIT: Final = re.compile(rb"\x48\x8b\x85" + _D + rb"\x48\x85\xc0\x74.\xf6\x40\x1c\x20", re.DOTALL)
# cpu_exec: mov rax, [rax + watchpoints]; test rax, rax; je; and dword [rax + 0x1c], ~0xc0; mov rax, [rax + 0x20]
_LIST: Final = re.compile(
    rb"\x48\x8b\x80" + _D + rb"\x48\x85\xc0\x0f\x84....\x81\x60\x1c\x3f\xff\xff\xff\x48\x8b\x40\x20",
    re.DOTALL,
)
_CPU_EXEC_BYTES: Final = 0x990
# cpu_exit: mov rax, [rdi + icount_decr]; mov edx, -1; ...; mov [rax + 2], dx; ret
_LEAVE: Final = re.compile(
    rb"\x48\x8b\x87" + _D + rb"\xba\xff\xff\xff\xff.{14}\x66\x89\x50\x02\xc3", re.DOTALL
)
# cpu_io_recompile: mov dword [rbp + cflags_next_tb], CF_LAST_IO | 1
_NEXT_FLAGS: Final = re.compile(rb"\xc7\x45(.)\x01\x80\x00\x00", re.DOTALL)
# breakpoint_handler, the bytes that are moved: push rbp; mov rbp, rdi; add rdi, cpu state; mov rax, [rbp + watchpoint_hit]
_HANDLER: Final = re.compile(rb"\x55\x48\x89\xfd\x48\x81\xc7" + _D + rb"\x48\x8b\x85....", re.DOTALL)
_HANDLER_BYTES: Final = 18
_MODE: Final = 1 << 4 | 1 << 7 | 1 << 14 | 1 << 17
_MODE_32: Final = 1 << 4 | 1 << 7
"""hflags: of CS32, PE, LMA and VM the first two."""
_LIMIT, _ATTRIBUTES = 16, 20
"""In a segment register of the CPU state."""
SHADOW: Final = 8
"""HF_INHIBIT_IRQ: STI, MOV SS or POP SS was the last instruction."""
_PADDING: Final = b"\x66\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00"
_ZERO: Final = (b"\x31\xc0\xc3" + _PADDING)[:12]
"""xor eax, eax; ret."""
_NOTHING: Final = (b"\xc3" + _PADDING)[:12]
"""ret."""
_ENOSPC: Final = 28


def _d32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _found(pattern: re.Pattern[bytes], lib: Library, function: str, size: int) -> int:
    match = pattern.search(lib.code(function, size))
    if match is None:
        raise UnknownUnicorn(f"{described()}: {function} is not as expected")
    return int.from_bytes(match.group(1), "little")


@functools.cache
def _hit_offset() -> int:
    """`watchpoint_hit` in the CPU object; the list's head is 16 bytes before it."""
    lib = library()
    hit = _found(_HIT, lib, "breakpoint_handler_x86_64", 0x40)
    if _found(_LIST, lib, "cpu_exec_x86_64", _CPU_EXEC_BYTES) != hit - 16:
        raise UnknownUnicorn(f"{described()}: the list of watchpoints is not where it should be")
    return hit


@functools.cache
def next_flags_offset() -> int:
    """In the CPU object: how the next block is translated, once; 1: one instruction."""
    return _found(_NEXT_FLAGS, library(), "cpu_io_recompile_x86_64", 0x60)


def _insert(head: int) -> Code:
    """cpu_watchpoint_insert(rdi cpu, rsi address, rdx length, ecx flags, r8 where to write the entry). The processor ignores the bits of
    the address below the length."""
    return (
        Code()
        .emit("488b87", _d32(head))  # mov rax, [rdi + head]
        .label("next")
        .emit("4885c0")  # test rax, rax
        .jump("74", "full")
        .emit("83781c00")  # cmp dword [rax + 0x1c], 0
        .jump("74", "free")
        .emit("488b4020", "4885c0")  # mov rax, [rax + 0x20]; test rax, rax
        .jump("75", "next")
        .label("full")
        .emit("b8", _d32(-_ENOSPC & 0xFFFFFFFF), "c3")  # mov eax, -ENOSPC; ret
        .label("free")
        .emit("4989d1", "49f7d9", "4c21ce")  # mov r9, rdx; neg r9; and rsi, r9
        .emit("488930", "48895008", "89481c")  # mov [rax], rsi; mov [rax + 8], rdx; mov [rax + 0x1c], ecx
        .emit("498900")  # mov [r8], rax
        .emit("4883ec08")  # sub rsp, 8
        .call(library().address("tlb_flush_x86_64"))
        .emit("4883c408", "31c0", "c3")  # add rsp, 8; xor eax, eax; ret
    )


def _remove(head: int, requests: int) -> Code:
    """cpu_watchpoint_remove_by_ref(rdi cpu, rsi entry). What it hit and was not told yet is forgotten."""
    hit = head + 16
    return (
        Code()
        .emit("c7461c00000000")  # mov dword [rsi + 0x1c], 0
        .emit("4839b7", _d32(hit))  # cmp [rdi + hit], rsi
        .jump("75", "flush")
        .emit("48c787", _d32(hit), "00000000")  # mov qword [rdi + hit], 0
        .emit("81a7", _d32(requests), _d32(~DEBUG_REQUEST & 0xFFFFFFFF))  # and dword [rdi + requests], ~DEBUG
        .label("flush")
        .tail(library().address("tlb_flush_x86_64"))
    )


def _address_matches(head: int, env: int) -> Code:
    """cpu_watchpoint_address_matches(rdi cpu, rsi address, rdx length): the flags of all that are there; those of any access where, in
    32-bit protected mode, the page is not all within the limit of each segment (`limits.checked`)."""
    return (
        Code()
        .emit("31c0", "4c8d5416ff")  # xor eax, eax; lea r10, [rsi + rdx - 1]
        .emit("4c8b87", _d32(head))  # mov r8, [rdi + head]
        .emit("4d85c0")  # test r8, r8
        .jump("74", "end")
        .label("next")
        .emit("4d8b08", "4d39d1")  # mov r9, [r8]; cmp r9, r10
        .jump("77", "skip")
        .emit("4d034808", "4983e901", "4939f1")  # add r9, [r8 + 8]; sub r9, 1; cmp r9, rsi
        .jump("72", "skip")
        .emit("410b401c")  # or eax, [r8 + 0x1c]
        .label("skip")
        .emit("4d8b4020", "4d85c0")  # mov r8, [r8 + 0x20]; test r8, r8
        .jump("75", "next")
        .label("end")
        .emit("8b8f", _d32(env + Fixed.HFLAGS))  # mov ecx, [rdi + hflags]
        .emit("81e1", _d32(_MODE), "81f9", _d32(_MODE_32))  # and ecx, MODE; cmp ecx, MODE_32
        .jump("75", "done")
        .emit("4c8d87", _d32(env + Fixed.SEGMENTS), "31c9")  # lea r8, [rdi + segments]; xor ecx, ecx
        .label("segment")
        .emit("418378", bytes([_LIMIT]), "ff")  # cmp dword [r8 + limit], -1
        .jump("74", "inside")
        .emit("458b48", bytes([_ATTRIBUTES]))  # mov r9d, [r8 + flags]
        .emit("41f7c1", _d32(limits.PRESENT << 8))  # test r9d, P
        .jump("74", "inside")
        .emit("4181e1", _d32(limits.TYPE << 8), "4181f9", _d32(limits.GROWS_DOWN << 8))  # and; cmp r9d, ...
        .jump("74", "inside")
        .emit("83f904")  # cmp ecx, 4: FS and GS
        .jump("72", "compare")
        .emit("418178", bytes([_LIMIT]), _d32(limits.SMALL))  # cmp dword [r8 + limit], SMALL
        .jump("72", "inside")
        .label("compare")
        .emit(
            "4189f1", "452b4808", "453b48", bytes([_LIMIT])
        )  # mov r9d, esi; sub r9d, [r8 + 8]; cmp r9d, [r8 + limit]
        .jump("77", "outside")
        .emit("458d4c11ff", "453b48", bytes([_LIMIT]))  # lea r9d, [r9 + rdx - 1]; cmp r9d, [r8 + limit]
        .jump("77", "outside")
        .label("inside")
        .emit("4983c018", "ffc1", "83f906")  # add r8, 24; inc ecx; cmp ecx, 6
        .jump("72", "segment back")
        .emit("c3")
        .label("segment back")
        .jump_back("segment")
        .label("outside")
        .emit("83c803")  # or eax, BP_MEM_ACCESS
        .label("done")
        .emit("c3")
    )


def _check(head: int, requests: int, leave: int, flags: int, env: int, limit: int) -> Code:
    """cpu_check_watchpoint(rdi cpu, rsi address, rdx length, ecx attributes, r8d BP_MEM_*, r9 return address in translated code).

    An access that no translated instruction makes (a frame that is pushed while an exception is delivered: the return address is 0)
    cannot be repeated: the request alone is made, and #DB comes when that is done.

    QEMU asks of a store that is not aligned as of two halves, one in each page; where it does not leave its page, the first has a length
    that is not positive, and the second begins with the page. The address of the first is kept (HALF, behind the list's first entry).

    In 32-bit protected mode `limit(rdi cpu, rsi address, rdx length)` tells the vector if a segment's limit forbids the access.
    """
    lib = library()
    hit = head + 16
    return (
        Code()
        .emit("4c8b9f", _d32(head))  # mov r11, [rdi + head]
        .emit("4885d2")  # test rdx, rdx
        .jump("7e", "first half")  # jle
        .emit("498b4338", "4885c0")  # mov rax, [r11 + HALF]; test rax, rax
        .jump("74", "whole")
        .emit("49c7433800000000")  # mov qword [r11 + HALF], 0
        .emit("4989c2", "4981e200f0ffff", "4939f2")  # mov r10, rax; and r10, -4096; cmp r10, rsi
        .jump("75", "whole")
        .emit("4801f2", "4829c2", "4889c6")  # add rdx, rsi; sub rdx, rax; mov rsi, rax
        .label("whole")
        .emit("4d85c9")  # test r9, r9
        .jump("74", "watch")
        .emit("8b87", _d32(env + Fixed.HFLAGS))  # mov eax, [rdi + hflags]
        .emit("25", _d32(_MODE), "3d", _d32(_MODE_32))  # and eax, MODE; cmp eax, MODE_32
        .jump("75", "watch")
        .emit("57", "56", "52", "4150", "4151")  # push rdi, rsi, rdx, r8, r9
        .emit("4c89ce", "31d2")  # mov rsi, r9; xor edx, edx
        .call(lib.address("cpu_restore_state_x86_64"))  # RIP is right from here on
        .emit(
            "488b7c2420", "488b742418", "488b542410"
        )  # mov rdi, [rsp + 32]; mov rsi, [rsp + 24]; mov rdx, [rsp + 16]
        .call(limit)
        .emit("4159", "4158", "5a", "5e", "5f")  # pop r9, r8, rdx, rsi, rdi
        .emit("85c0")  # test eax, eax
        .jump("74", "watch")
        .emit(
            "4881c7", _d32(env), "89c6", "31d2", "4c89c9"
        )  # add rdi, env; mov esi, eax; xor edx, edx; mov rcx, r9
        .emit("4883ec08")  # sub rsp, 8
        .call(lib.address("raise_exception_err_ra_x86_64"))  # does not return
        .emit("0f0b")  # ud2
        .label("watch")
        .emit("4c8d5416ff", "31c9")  # lea r10, [rsi + rdx - 1]; xor ecx, ecx
        .emit("4883bf", _d32(hit), "00")  # cmp qword [rdi + hit], 0
        .jump("75", "look")
        .emit("4c8b9f", _d32(head))  # mov r11, [rdi + head]
        .label("clear")
        .emit("4181631c3fffffff")  # and dword [r11 + 0x1c], ~0xc0: of an instruction before this one
        .emit("4d8b5b20", "4d85db")  # mov r11, [r11 + 0x20]; test r11, r11
        .jump("75", "clear")
        .label("look")
        .emit("4c8b9f", _d32(head))  # mov r11, [rdi + head]
        .label("next")
        .emit("4585431c")  # test [r11 + 0x1c], r8d
        .jump("74", "skip")
        .emit("498b03", "4c39d0")  # mov rax, [r11]; cmp rax, r10
        .jump("77", "skip")
        .emit("49034308", "4883e801", "4839f0")  # add rax, [r11 + 8]; sub rax, 1; cmp rax, rsi
        .jump("72", "skip")
        .emit("41814b1cc0000000", "4c89d9")  # or dword [r11 + 0x1c], 0xc0; mov rcx, r11
        .label("skip")
        .emit("4d8b5b20", "4d85db")  # mov r11, [r11 + 0x20]; test r11, r11
        .jump("75", "next")
        .emit("4885c9")  # test rcx, rcx
        .jump("74", "end")
        .emit("4883bf", _d32(hit), "00")  # cmp qword [rdi + hit], 0
        .jump("75", "request")
        .emit("48898f", _d32(hit))  # mov [rdi + hit], rcx
        .emit("4d85c9")  # test r9, r9
        .jump("74", "request")
        .emit("53", "4889fb", "4c89ce")  # push rbx; mov rbx, rdi; mov rsi, r9
        .call(lib.address("tb_check_watchpoint_x86_64"))
        .emit("c783", _d32(flags), "01000000")  # mov dword [rbx + cflags_next_tb], 1: one instruction
        .emit("4889df")  # mov rdi, rbx
        .call(lib.address("cpu_loop_exit_noexc_x86_64"))  # does not return
        .emit("0f0b")  # ud2
        .label("first half")
        .emit("49897338", "c3")  # mov [r11 + HALF], rsi; ret
        .label("request")
        .emit("818f", _d32(requests), _d32(DEBUG_REQUEST))  # or dword [rdi + requests], DEBUG
        .emit("488b87", _d32(leave))  # mov rax, [rdi + icount_decr]
        .emit("66c74002ffff")  # mov word [rax + 2], -1: the next block asks for requests first
        .label("end")
        .emit("c3")
    )


def _handler(env: int, hit: int, moved: bytes, original: int, put_off: int) -> Code:
    """breakpoint_handler(rdi cpu): with a hit and the shadow of MOV SS on, `bool put_off(rdi cpu)`; if it is put off, back to the run
    loop."""
    return (
        Code()
        .emit("4883bf", _d32(hit), "00")  # cmp qword [rdi + hit], 0
        .jump("74", "raise")
        .emit("f687", _d32(env + Fixed.HFLAGS), bytes([SHADOW]))  # test byte [rdi + hflags], SHADOW
        .jump("74", "raise")
        .emit("53", "4889fb")  # push rbx; mov rbx, rdi
        .call(put_off)
        .emit("4889df")  # mov rdi, rbx
        .emit("84c0")  # test al, al
        .jump("74", "told")
        .call(library().address("cpu_loop_exit_noexc_x86_64"))  # does not return
        .emit("0f0b")  # ud2
        .label("told")
        .emit("5b")  # pop rbx
        .label("raise")
        .emit(moved)
        .emit("49bb", (original + len(moved)).to_bytes(8, "little"), "41ffe3")  # mov r11, ...; jmp r11
    )


class Owner(Protocol):
    """What is asked of a vCPU, inside `run`. Neither may raise."""

    def put_off(self) -> bool:
        """May a hit of MOV SS or POP SS wait for the next instruction's end?"""

    def limit_fault(self, address: int, size: int) -> int:
        """The vector of the exception that an access in 32-bit protected mode is by a segment's limit; 0: none."""


_owners: Final[dict[int, weakref.ref[Owner]]] = {}
"""By CPU object."""


def _ask_put_off(cpu: int) -> bool:
    owner = _owners[cpu]()
    return owner is not None and owner.put_off()


def _ask_limit(cpu: int, address: int, size: int) -> int:
    owner = _owners[cpu]()
    return owner.limit_fault(address, size) if owner is not None else 0


_put_off: Final = ctypes.PYFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(_ask_put_off)
_limit: Final = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)(_ask_limit)


def _address(callback: object) -> int:
    return ctypes.cast(callback, ctypes.c_void_p).value or 0  # type: ignore[arg-type]  # a function pointer


@functools.cache
def fill(requests: int) -> CodePage:
    """Give the four functions bodies, once a process, before any vCPU runs; the page is kept for its life. `requests`: where the CPU
    object has its interrupt requests. UnknownUnicorn if the library is not the one that is known."""
    lib = library()
    head = _hit_offset() - 16
    leave = _found(_LEAVE, lib, "cpu_exit", 0x20)
    flags = next_flags_offset()
    name = "breakpoint_handler_x86_64"
    original = lib.address(name)
    moved = _HANDLER.match(lib.code(name, _HANDLER_BYTES))
    if moved is None:
        raise UnknownUnicorn(f"{described()}: {name} does not begin as expected")
    env = int.from_bytes(moved.group(1), "little")
    page = CodePage()
    handler = page.add(_handler(env, head + 16, moved.group(), original, _address(_put_off)))
    bodies = (
        ("cpu_watchpoint_insert_x86_64", _ZERO, _insert(head)),
        ("cpu_watchpoint_remove_by_ref_x86_64", _NOTHING, _remove(head, requests)),
        ("cpu_watchpoint_address_matches_x86_64", _ZERO, _address_matches(head, env)),
        (
            "cpu_check_watchpoint_x86_64",
            _NOTHING,
            _check(head, requests, leave, flags, env, _address(_limit)),
        ),
    )
    for name, empty, _ in bodies:
        if lib.code(name, len(empty)) != empty:
            raise UnknownUnicorn(f"{described()}: {name} is not empty")
    placed = [(lib.address(name), empty, page.add(body)) for name, empty, body in bodies]
    page.seal()
    lead(original, moved.group(), handler)
    for address, empty, body in placed:
        lead(address, empty, body)
    return page


class Watchpoints:
    """The list of one instance."""

    def __init__(self, cpu: int, requests: int, owner: Owner) -> None:
        """`cpu`: the CPU object's address; `requests`: the offset in it of its interrupt requests. UnknownUnicorn."""
        _owners[cpu] = weakref.ref(owner)
        hit = _hit_offset()
        self._entries: Final = (ctypes.c_uint8 * (ENTRIES * _ENTRY_BYTES))()
        first = ctypes.addressof(self._entries)
        for number in range(ENTRIES - 1):
            at = first + number * _ENTRY_BYTES
            ctypes.c_uint64.from_address(at + _NEXT).value = at + _ENTRY_BYTES
        self._flags: Final = tuple(
            ctypes.c_uint32.from_address(first + number * _ENTRY_BYTES + _FLAGS) for number in range(ENTRIES)
        )
        ctypes.c_uint64.from_address(cpu + hit - 16).value = first
        self.hit: Final = ctypes.c_uint64.from_address(cpu + hit)
        """Not 0: one was hit, and the guest was not told yet."""
        self.put_off_at: int | None = None
        """RIP behind the MOV SS or POP SS whose #DB waits for the next instruction."""
        self._requests: Final = ctypes.c_uint32.from_address(cpu + requests)

    def between_runs(self, *, put_off: bool) -> None:
        """A run was stopped in front of an instruction that was to be repeated: it will hit again. Or (`put_off`) in front of the one
        that #DB waits for: it is asked for again by the next run."""
        if put_off:
            self._requests.value |= DEBUG_REQUEST
        elif self.hit.value and not self._requests.value & DEBUG_REQUEST:
            self.hit.value = 0

    def forget(self) -> None:
        """The guest is being told by a #DB (a single step's shows what was hit, too), or another vCPU comes: there is nothing to tell
        any more."""
        self.hit.value = 0
        self.put_off_at = None
        self._requests.value &= ~DEBUG_REQUEST
        for flags in self._flags:
            flags.value &= ~_WAS_HIT
