"""Page tables of the hypervisor's own for an HVM vCPU: what its MMU walks in place of the guest's.

QEMU fills a translation (`tlb_fill` of the CPU's class) by a walk from CR3. Here a function of machine code stands before it: it puts
CR0, CR3 and CR4 of ours in place for the time of the walk and the guest's back afterwards, so that the guest, and everything else that
looks at the registers, never sees ours. A walk of ours that finds nothing is not the guest's affair: the handler (Python) is asked to mend
the tables, and the walk is made once more. What fails then is a page fault of the guest's, with the error code that our tables
give; it is raised by QEMU's own code, so that faults in the middle of a delivery, a task switch or a REP instruction are what they are
without this. An exit by the SVM intercept of #PF would have lost what was being delivered.

The pointer lies in the instance's own class structure; where, is read from `tlb_vaddr_to_host`. The words of `Control` from SHADOW_CR0
on are this module's.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from typing import Final, Protocol

from domains.vcpu.api import VcpuError
from domains.vcpu.insides import Fixed, Library, Offsets, UnknownUnicorn, described, library
from domains.vcpu.thunks import Code, CodePage, Control, ControlPage

READ, WRITE, FETCH = 0, 1, 2
"""MMUAccessType."""
SWITCHED: Final = -1
"""In place of an access: the guest's CR3 is not the one that our tables are for."""
USER_INDEX: Final = 1
"""The MMU index of accesses of user mode."""
PG, WP, PAE = 1 << 31, 1 << 16, 1 << 5
NOBODY: Final = (1 << 64) - 1
"""A CR3 that no guest has."""
# mov rax, [rdi + class]; lea r10, [rdi + cpu]; push 0; mov rdi, r10; call [rax + tlb_fill]   (rdi: CPU state)
_CALL: Final = re.compile(
    rb"\x48\x8b\x87(....)\x4c\x8d\x97(....)\x6a\x00\x4c\x89\xd7\xff\x50(.)\x5a\x59\x84\xc0", re.DOTALL
)
# x86_cpu_tlb_fill, where a walk failed: a probe returns false.
_PROBE: Final = re.compile(
    rb"\x80\x7c\x24\x08\x00\x0f\x84....\x48\x83\xc4\x68\x31\xc0\x5b\x5d\x41\x5c\x41\x5d\x41\x5e\x41\x5f\xc3",
    re.DOTALL,
)


class MissHandler(Protocol):
    """Who builds the tables. Called inside translation, on the vCPU's thread: it must not run the vCPU."""

    def switched(self) -> None:
        """The guest's CR3 or its paging mode changed: `load` the tables for what is in the registers now."""

    def miss(self, linear: int, access: int, user: bool) -> None:
        """Our tables do not allow an access (READ, WRITE, FETCH): mend them, if the guest's do. A GuestFault is raised in the guest."""


def _u32(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")


def fill_function(env: int, control: int, found: Offsets, original: int, handler: int) -> Code:
    """tlb_fill(rdi cpu, rsi address, edx size, ecx access, r8d MMU index, r9b probe, [rsp + 8] return address of translated code).

    `handler(rdi address, esi access or -1, edx MMU index)`.
    """
    cr0, cr2, cr3, cr4 = (_u32(Fixed.CR + 8 * number) for number in (0, 2, 3, 4))
    index, error = _u32(found.cpu_exception_index), _u32(found.error_code)
    code = (
        Code()
        .emit("5553", "4154", "4155", "4156", "4157")  # push rbp, rbx, r12, r13, r14, r15
        .emit("4883ec48")  # sub rsp, 0x48
        .emit("48bb", env.to_bytes(8, "little"))  # mov rbx, env
        .emit("48bd", control.to_bytes(8, "little"))  # mov rbp, control
        .emit("48893c24", "89542408")  # mov [rsp], rdi; mov [rsp+8], edx
        .emit(
            "4989f4", "4189cd", "4589c6", "4589cf"
        )  # mov r12, rsi; mov r13d, ecx; mov r14d, r8d; mov r15d, r9d
        .emit("c744244000000000")  # mov dword [rsp+0x40], 0: not mended yet
        .emit("488b83", cr2, "4889442410")  # mov rax, [rbx+cr2]; mov [rsp+0x10], rax
        .emit("8b87", index, "89442418")  # mov eax, [rdi+exception_index]; mov [rsp+0x18], eax
        .emit("8b83", error, "8944241c")  # mov eax, [rbx+error_code]; mov [rsp+0x1c], eax
        .emit(
            "488b83", cr3, "483b45", bytes([Control.GUEST_CR3])
        )  # mov rax, [rbx+cr3]; cmp rax, [rbp+GUEST_CR3]
        .jump("74", "walk")
        .emit("4c89e7", "beffffffff", "31d2")  # mov rdi, r12; mov esi, -1; xor edx, edx
        .call(handler)
        .label("walk")
    )
    for number, (register, ours) in enumerate(
        ((cr0, Control.SHADOW_CR0), (cr3, Control.SHADOW_CR3), (cr4, Control.SHADOW_CR4))
    ):
        code.emit("488b83", register, "48894424", bytes([0x20 + 8 * number]))  # [rsp+0x20+..] = the guest's
        code.emit("488b45", bytes([ours]), "488983", register)  # [rbx+register] = ours
    code = (
        code.emit("488b3c24", "4c89e6", "8b542408")  # mov rdi, [rsp]; mov rsi, r12; mov edx, [rsp+8]
        .emit("4489e9", "4589f0", "41b901000000")  # mov ecx, r13d; mov r8d, r14d; mov r9d, 1: a probe
        .emit("4883ec08", "ffb42488000000")  # sub rsp, 8; push qword [rsp+0x88]
        .call(original)
        .emit("4883c410")  # add rsp, 16
    )
    for number, register in enumerate((cr0, cr3, cr4)):
        code.emit("488b4c24", bytes([0x20 + 8 * number]), "48898b", register)  # the guest's again
    return (
        code.emit("84c0")  # test al, al
        .jump("75", "done")
        .emit("837c244000")  # cmp dword [rsp+0x40], 0
        .jump("75", "fault")
        .emit("c744244001000000")  # mov dword [rsp+0x40], 1
        .emit("488b442410", "488983", cr2)  # what the failed walk left is undone: CR2,
        .emit("488b3c24", "8b442418", "8987", index)  # exception_index,
        .emit("8b44241c", "8983", error)  # error_code
        .emit("4c89e7", "4489ee", "4489f2")  # mov rdi, r12; mov esi, r13d; mov edx, r14d
        .call(handler)
        .emit("837d", bytes([Control.FAULT]), "00")  # cmp dword [rbp+FAULT], 0
        .jump("74", "walk")
        .emit("c745", bytes([Control.FAULT]), "00000000")  # mov dword [rbp+FAULT], 0
        .emit("8b75", bytes([Control.FAULT_VECTOR]))  # mov esi, [rbp+FAULT_VECTOR]
        .emit("8b55", bytes([Control.FAULT_ERROR]))  # mov edx, [rbp+FAULT_ERROR]
        .emit("eb10")  # jmp raise
        .label("fault")
        .emit("488b3c24", "8bb7", index)  # mov rdi, [rsp]; mov esi, [rdi+exception_index]
        .emit("8b93", error)  # mov edx, [rbx+error_code]
        .emit("4584ff")  # raise: test r15b, r15b
        .jump("75", "nothing")
        .emit("4889df", "488b8c2480000000")  # mov rdi, rbx; mov rcx, [rsp+0x80]
        .call(library().address("raise_exception_err_ra_x86_64"))  # does not return
        .emit("0f0b")  # ud2
        .label("nothing")
        .emit("31c0", "eb05")  # xor eax, eax; jmp end
        .label("done")
        .emit("b801000000")  # mov eax, 1
        .emit(
            "4883c448", "415f", "415e", "415d", "415c", "5b", "5d", "c3"
        )  # end: add rsp, 0x48; pop all; ret
    )


def _find(lib: Library, found: Offsets, cpu: int, env: int) -> int:
    """Host address of this instance's pointer to its tlb_fill. UnknownUnicorn."""
    match = _CALL.search(lib.code("tlb_vaddr_to_host_x86_64", 0x110))
    if match is None or not _PROBE.search(lib.code("x86_cpu_tlb_fill_x86_64", 0x5A0)):
        raise UnknownUnicorn(f"{described()}: tlb_vaddr_to_host or tlb_fill is not as expected")
    to_class, to_cpu = (int.from_bytes(match.group(n), "little", signed=True) for n in (1, 2))
    if env + to_cpu != cpu:
        raise UnknownUnicorn(f"{described()}: the CPU object is not where tlb_vaddr_to_host has it")
    cpu_class = ctypes.c_uint64.from_address(env + to_class).value
    at = cpu_class + match.group(3)[0]
    if ctypes.c_uint64.from_address(at).value != lib.address("x86_cpu_tlb_fill_x86_64"):
        raise UnknownUnicorn(f"{described()}: the CPU's class has another tlb_fill")
    return at


class ShadowMmu:
    """The machine side. `pool` is memory for tables, at guest-physical `address` of the vCPU (below what entries can name)."""

    def __init__(self, pages: int) -> None:
        self._control: ControlPage | None = None
        self.pool: Final = mmap.mmap(-1, pages * 4096)
        self.host: Final = ctypes.addressof(ctypes.c_char.from_buffer(self.pool))
        self.pages: Final = pages
        self._pointer: ctypes.c_uint64 | None = None
        self._page: CodePage | None = None

    def use(self, control: ControlPage) -> None:
        """The control page of its vCPU."""
        self._control = control

    def install(self, function: int, page: CodePage, cpu: int, env: int, found: Offsets) -> None:
        """`function`: machine code made by `fill_function`, in `page`."""
        lib = library()
        self._page = page  # kept as long as it may be called
        self._pointer = ctypes.c_uint64.from_address(_find(lib, found, cpu, env))
        self._pointer.value = function

    def load(self, guest: tuple[int, int, int], root: int) -> None:
        """Tables for the guest's (CR0, CR3, CR4): the physical address of their root."""
        assert self._control is not None
        q = self._control.q
        if root & 0xFFF:
            raise VcpuError(f"tables at {root:#x}")
        q[Control.SHADOW_CR0 // 8] = guest[0] | PG | WP
        q[Control.SHADOW_CR3 // 8] = root
        q[Control.SHADOW_CR4 // 8] = guest[2] | PAE
        q[Control.GUEST_CR3 // 8] = guest[1]

    def forget(self) -> None:
        """Our tables are for nobody: `switched` is called before the next walk."""
        assert self._control is not None
        self._control.q[Control.GUEST_CR3 // 8] = NOBODY
