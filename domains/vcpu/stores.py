"""Stores to pages without translated code leave Unicorn's slow path after the first one, as in QEMU.

Unicorn marks each writable TLB entry "not dirty": a store goes through a helper, which drops the translations that it
overwrites. QEMU takes the mark away at the first store to a page that holds no translated code, and puts it back, in
every entry that maps the page, when code of it is translated. Unicorn 2.1.4 keeps it as long as there is any memory
hook, and this program needs one (a bad physical address must end the run at once): so every store of a guest was slow. And
where Unicorn does take the mark away, it puts it back in the one entry by which the code was fetched: stores by another
virtual address would miss the code.

Two functions of the loaded library are therefore led to machine code of ours, each after a comparison of the code that is
there (`UnknownUnicorn` otherwise):

* `notdirty_write` (not exported: found as the one call of the store helper whose target begins as expected): looks up
  the page as `tb_invalidate_phys_page_fast` does (the walk's constants are read from that function); with no
  translation in it the mark goes, else the library's own function runs;
* `tlb_protect_code` (empty in Unicorn, called whenever a page gets its first translation): `tlb_reset_dirty`, QEMU's
  own and unused by Unicorn, for the host memory of the page.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from typing import Final

from domains.vcpu.api import VcpuError
from domains.vcpu.insides import Library, UnknownUnicorn, described, library
from domains.vcpu.thunks import PAGE, Code, CodePage, protect

_D: Final = rb"(....)"
# tb_invalidate_phys_page_fast up to the look at the page's bitmap: PageDesc (24 bytes, first_tb at 0) by three levels.
_WALK: Final = re.compile(
    rb"\x41\x57\x41\x56\x4d\x89\xc6\x41\x55\x49\x89\xf5\x48\x89\xd6\x41\x54\x48\xc1\xee\x0c"  # rsi = address >> 12
    rb"\x49\x89\xd4\x55\x48\x89\xf2\x48\x89\xfd\x53\x48\x63\xd9\x48\x83\xec\x18"
    rb"\x8b\x87"
    + _D
    + rb"\x8b\x8f"
    + _D
    + rb"\x83\xe8\x01\x48\xd3\xea\x48\x98\x48\x21\xd0"  # size - 1, shift
    rb"\x48\x8b\x97" + _D + rb"\x48\x8d\x14\xc2"  # first level
    rb"\x8b\x87" + _D + rb"\x85\xc0\x7e\x22\x8d\x04\x80\x8d\x0c\x00"  # levels * 10
    rb"\x48\x8b\x12\x48\x85\xd2\x74.\x48\x89\xf0\x48\xd3\xe8\x25\xff\x03\x00\x00\x48\x8d\x14\xc2\x83\xe9\x0a\x75\xe4"
    rb"\x48\x8b\x12\x48\x85\xd2\x74.\x81\xe6\xff\x03\x00\x00\x48\x8d\x04\x76\x4c\x8d\x3c\xc2"  # 24 * (index & 1023)
    rb"\x49\x8b\x7f\x08\x48\x85\xff",
    re.DOTALL,
)
# notdirty_write(cpu, address, size, iotlb address, return address, TLB entry). The first five instructions (12 bytes) move.
_MOVED: Final = b"\x41\x57\x49\x89\xff\x41\x56\x41\x89\xd6\x41\x55"
_NOTDIRTY: Final = re.compile(
    re.escape(_MOVED)
    + rb"\x49\x89\xcd\x41\x54\x49\x89\xf4\x55\x4c\x89\xcd\x53\x48\x89\xf3\x81\xe3\xff\x0f\x00\x00"
    rb"\x48\x83\xec\x28\x48\x8b\x87" + _D + rb"\x49\x8b\x71\x18\x4c\x89\x44\x24\x08\x48\x09\xde\x48\x89\xc7"
    rb"\xff\x90....\x48\x85\xc0\x74\x2d\x49\x89\xc1\xf6\x80....\x04\x75\x35\x48\x83\x7d\x08\xff\x74\x13",
    re.DOTALL,
)
_STORE_HELPER: Final = "helper_le_stq_mmu_x86_64"
_STORE_HELPER_BYTES: Final = 0xA80
# tlb_protect_code: mov rdi, rsi; mov edx, 1; mov esi, 0x1000; jmp cpu_physical_memory_test_and_clear_dirty
_PROTECT: Final = re.compile(rb"\x48\x89\xf7\xba\x01\x00\x00\x00\xbe\x00\x10\x00\x00\xe9....", re.DOTALL)
_TEST_AND_CLEAR: Final = b"\x31\xc0\xc3"
"""xor eax, eax; ret: Unicorn has no dirty bitmap."""
# tlb_reset_dirty(cpu, start, length): begins with the CPU in r9, start in r8, length in rdi.
_RESET_DIRTY: Final = b"\x49\x89\xf9\x53\x49\x89\xf0\x48\x89\xd7"
# tlb_set_dirty(cpu, address): mov rax, [rdi+d]; mov rcx, rsi; shr rsi, 12; and rcx, -4096
_SET_DIRTY: Final = re.compile(
    rb"\x48\x8b\x87" + _D + rb"\x48\x89\xf1\x48\xc1\xee\x0c\x48\x81\xe1\x00\xf0\xff\xff", re.DOTALL
)
_JUMP: Final = b"\x48\xb8"  # mov rax, imm64; then jmp rax: 12 bytes
_JUMP_BYTES: Final = 12


def _d32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _expect(found: object, what: str) -> None:
    if not found:
        raise UnknownUnicorn(f"{described()}: {what} is not as expected")


def _find_notdirty_write(lib: Library) -> tuple[int, int]:
    """Its address, and where the CPU object has its `uc_struct`."""
    start = lib.address(_STORE_HELPER)
    code = lib.code(_STORE_HELPER, _STORE_HELPER_BYTES)
    found: dict[int, int] = {}
    for match in re.finditer(rb"\xe8(?=(....))", code, re.DOTALL):
        target = start + match.start() + 5 + int.from_bytes(match.group(1), "little", signed=True)
        if abs(target - start) > 0x10000:  # not in this object file: its calls of others go by the PLT
            continue
        seen = _NOTDIRTY.match(ctypes.string_at(target, 0x80))
        if seen is not None:
            found[target] = int.from_bytes(seen.group(1), "little")
    _expect(len(found) == 1, f"notdirty_write as {_STORE_HELPER} calls it ({len(found)} candidates)")
    return next(iter(found.items()))


def _notdirty_thunk(lib: Library, entry: int, cpu_uc: int) -> Code:
    walk = _WALK.match(lib.code("tb_invalidate_phys_page_fast_x86_64", 0x98))
    _expect(walk, "tb_invalidate_phys_page_fast")
    assert walk is not None
    size, shift, table, levels = walk.groups()
    return (
        Code()
        .emit("488b87", _d32(cpu_uc))  # mov rax, [rdi + uc]
        .emit("4c8d140e", "49c1ea0c")  # lea r10, [rsi + rcx]; shr r10, 12: the page in the RAM address space
        .emit("51")  # push rcx
        .emit("8b88", shift, "4d89d3", "49d3eb")  # mov ecx, [rax + shift]; mov r11, r10; shr r11, cl
        .emit("8b88", size, "83e901", "4921cb")  # mov ecx, [rax + size]; sub ecx, 1; and r11, rcx
        .emit("488b88", table, "4e8d1cd9")  # mov rcx, [rax + table]; lea r11, [rcx + 8 * r11]
        .emit("8b80", levels, "85c0")  # mov eax, [rax + levels]; test eax, eax
        .jump("7e", "leaf")  # jle
        .emit("8d0480", "8d0c00")  # lea eax, [rax + 4 * rax]; lea ecx, [rax + rax]
        .label("level")
        .emit("4d8b1b", "4d85db")  # mov r11, [r11]; test r11, r11
        .jump("74", "clean")
        .emit("4c89d0", "48d3e8", "25ff030000")  # mov rax, r10; shr rax, cl; and eax, 1023
        .emit("4d8d1cc3", "83e90a")  # lea r11, [r11 + 8 * rax]; sub ecx, 10
        .jump("75", "level")
        .label("leaf")
        .emit("4d8b1b", "4d85db")  # mov r11, [r11]; test r11, r11
        .jump("74", "clean")
        .emit("4181e2ff030000", "4b8d0452")  # and r10d, 1023; lea rax, [r10 + 2 * r10]
        .emit("49833cc300")  # cmp qword [r11 + 8 * rax], 0: the page's first translation
        .jump("74", "clean")
        .emit("59")  # pop rcx
        .emit(_MOVED)
        .tail(entry + _JUMP_BYTES)  # rax is free there: the next thing that happens to it is a load
        .label("clean")
        .emit("59")  # pop rcx
        .tail(lib.address("tlb_set_dirty_x86_64"))
    )


def _protect_thunk(lib: Library, uc_cpu: int) -> Code:
    """tlb_protect_code(uc, ram_addr)."""
    return (
        Code()
        .emit("53", "4889fb")  # push rbx; mov rbx, rdi
        .emit("4889f2", "4881e200f0ffff", "31f6")  # mov rdx, rsi; and rdx, -4096; xor esi, esi
        .call(lib.address("qemu_map_ram_ptr_x86_64"))
        .emit("4889c6")  # mov rsi, rax
        .emit("488bbb", _d32(uc_cpu))  # mov rdi, [rbx + cpu]
        .emit("ba00100000", "5b")  # mov edx, 4096; pop rbx
        .tail(lib.address("tlb_reset_dirty_x86_64"))
    )


def lead(address: int, old: bytes, target: int) -> None:
    """Write `mov rax, target; jmp rax` over `old`. No vCPU runs yet in this process."""
    if ctypes.string_at(address, len(old)) != old:
        raise VcpuError("the library's code changed under the patch")
    first = address & ~(PAGE - 1)
    size = (address + _JUMP_BYTES - first + PAGE - 1) & ~(PAGE - 1)
    protect(first, size, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        ctypes.memmove(address, _JUMP + target.to_bytes(8, "little") + b"\xff\xe0", _JUMP_BYTES)
    finally:
        protect(first, size, mmap.PROT_READ | mmap.PROT_EXEC)


@functools.cache
def make_stores_fast(uc_cpu: int) -> CodePage:
    """Lead both functions to machine code, once a process; the pages are kept for its life. `uc_cpu`: where `uc_struct` has
    the CPU. Before any vCPU runs. UnknownUnicorn if the library is not the one that is known."""
    lib = library()
    entry, cpu_uc = _find_notdirty_write(lib)
    protect_code = lib.address("tlb_protect_code_x86_64")
    _expect(_PROTECT.match(lib.code("tlb_protect_code_x86_64", 18)), "tlb_protect_code")
    _expect(
        lib.code("cpu_physical_memory_test_and_clear_dirty_x86_64", 3) == _TEST_AND_CLEAR, "the dirty bitmap"
    )
    _expect(lib.code("tlb_reset_dirty_x86_64", len(_RESET_DIRTY)) == _RESET_DIRTY, "tlb_reset_dirty")
    _expect(_SET_DIRTY.match(lib.code("tlb_set_dirty_x86_64", 24)), "tlb_set_dirty")
    page = CodePage()
    notdirty = page.add(_notdirty_thunk(lib, entry, cpu_uc))
    protect_thunk = page.add(_protect_thunk(lib, uc_cpu))
    page.seal()
    # First the mark comes back where it must, then it may go.
    lead(protect_code, lib.code("tlb_protect_code_x86_64", _JUMP_BYTES), protect_thunk)
    lead(entry, _MOVED, notdirty)
    return page


__all__ = ["make_stores_fast"]
