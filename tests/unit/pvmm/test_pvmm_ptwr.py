"""The writable page-table assist does to memory, registers and flags what the processor does (here: Unicorn), or
declines and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import unicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_MODE_64
from unicorn import x86_const as uc_x86

from bus.abi import xen
from domains.pv.mm import decode as op
from domains.pv.mm.decode import decode
from tests.unit.pvmm.pvmm_support import BASE, KERNEL_RO, KERNEL_RW, Guest, Registers

X, CODE = BASE + 20, BASE + 21
STATUS = 0x8D5
WRITE_TO_PRESENT = 3
_NAMES = [
    "RAX",
    "RCX",
    "RDX",
    "RBX",
    "RSP",
    "RBP",
    "RSI",
    "RDI",
    "R8",
    "R9",
    "R10",
    "R11",
    "R12",
    "R13",
    "R14",
    "R15",
]
_UC = [getattr(uc_x86, f"UC_X86_REG_{name}") for name in _NAMES]
WORD = (1 << 64) - 1


def guest_with_table() -> Guest:
    """Frame X is a pinned (empty) L1 table, mapped read-only; frame CODE holds code."""
    guest = Guest()
    guest.mmu.writable_page_tables = True
    assert guest.read_only(X) == 0
    assert guest.ext(xen.MMUEXT_PIN_L1_TABLE, X) == 0
    return guest


GUEST = guest_with_table()
TABLE_VA, CODE_VA = GUEST.va(X), GUEST.va(CODE)


class Reference:
    """The processor: the code at 0x10000, the "table" (ordinary memory) at 0x20000."""

    def __init__(self) -> None:
        # Unicorn's binding ships no types.
        self.uc: Any = getattr(unicorn, "Uc")(UC_ARCH_X86, UC_MODE_64)  # noqa: B009  # not exported, for mypy
        self.uc.mem_map(0x10000, 0x1000)
        self.uc.mem_map(0x20000, 0x1000)

    def run(self, code: bytes, regs: list[int], flags: int, word: int) -> tuple[int, list[int], int]:
        """(word 8 of the page, registers, status flags) behind the instruction."""
        self.uc.ctl_remove_cache(0x10000, 0x11000)
        self.uc.mem_write(0x10000, code + b"\x90" * 16)
        self.uc.mem_write(0x20040, word.to_bytes(8, "little"))
        for number, value in zip(_UC, regs, strict=True):
            self.uc.reg_write(number, value)
        self.uc.reg_write(uc_x86.UC_X86_REG_EFLAGS, flags)
        self.uc.emu_start(0x10000, 0x10000 + len(code))
        after = int.from_bytes(self.uc.mem_read(0x20040, 8), "little")
        values = [int(self.uc.reg_read(number)) for number in _UC]
        return after, values, int(self.uc.reg_read(uc_x86.UC_X86_REG_EFLAGS)) & STATUS


REFERENCE = Reference()
DEFINED_FLAGS = {
    **dict.fromkeys((op.AND, op.OR, op.XOR), STATUS & ~0x10),
    **dict.fromkeys((op.BTS, op.BTR, op.BTC), 1),
}
"""Status flags that the SDM defines, for the instructions where that is not all of them."""


def modrm(register: int) -> bytes:
    """ModR/M for [rdi], with a register or opcode extension."""
    return bytes([register << 3 | 7])


def rex_prefix(size: int, register: int) -> bytes:
    """REX (and operand size) for an operand of so many bytes and register 0..15."""
    rex = (8 if size == 8 else 0) | (4 if register >= 8 else 0)
    return (b"\x66" if size == 2 else b"") + (bytes([0x40 | rex]) if rex else b"")


@st.composite
def instructions(draw: st.DrawFn) -> tuple[bytes, int]:
    """(code, operand size) of an instruction that writes [rdi]."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    wide = 1 if size > 1 else 0
    register = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 9, 15]))
    prefix, field = rex_prefix(size, register), modrm(register & 7)
    plain = rex_prefix(size, 0)
    immediate = draw(st.binary(min_size=min(size, 4), max_size=min(size, 4)))
    byte = draw(st.binary(min_size=1, max_size=1))
    extension = draw(st.integers(0, 6))
    kind = draw(st.integers(0, 13))
    bit = draw(st.integers(5, 7))
    forms = [
        prefix + bytes([extension << 3 | wide]) + field,
        plain + bytes([0x80 | wide]) + modrm(extension) + immediate,
        prefix + bytes([0x88 | wide]) + field,
        plain + bytes([0xC6 | wide]) + modrm(0) + immediate,
        prefix + bytes([0x86 | wide]) + field,
        prefix + bytes([0x0F, 0xB0 | wide]) + field,
        prefix + bytes([0x0F, 0xC0 | wide]) + field,
        plain + bytes([0xF6 | wide]) + modrm(draw(st.integers(2, 3))),
        plain + bytes([0xFE | wide]) + modrm(draw(st.integers(0, 1))),
        plain + bytes([0xAA | wide]),
        (plain + b"\x83" + modrm(extension) + byte) if wide else plain + b"\x80" + modrm(extension) + byte,
        (plain + b"\x0f\xba" + modrm(bit) + byte) if wide else b"\x88" + modrm(0),
        (prefix + bytes([0x0F, draw(st.sampled_from([0xAB, 0xB3, 0xBB]))]) + field) if wide else b"\x88\x07",
        b"\xf0\x0f\xc7" + modrm(1) if size == 8 else prefix + bytes([0x88 | wide]) + field,
    ]
    return forms[kind], size


VALUES = st.one_of(st.integers(0, WORD), st.sampled_from([0, 1, WORD, 1 << 63, 0x80, 0x8000, 0x8000_0000]))


@settings(max_examples=400, deadline=None)
@given(
    instructions(),
    st.lists(VALUES, min_size=16, max_size=16),
    st.integers(0, 7),
    VALUES.map(lambda v: v & ~1),
    st.integers(0, 63),
    st.booleans(),
)
def test_against_the_processor(
    made: tuple[bytes, int], regs: list[int], byte: int, word: int, flag_bits: int, equal: bool
) -> None:
    code, size = made
    byte &= ~(size - 1)
    if equal:
        regs[0] = word >> byte * 8  # a cmpxchg that succeeds
    found = decode(code)
    assert found is not None
    if found.kind in (op.BTS, op.BTR, op.BTC):
        # The bit is in the very operand: other tests look at bit offsets.
        regs = [value & (size * 8 - 1) for value in regs]
    flags = 0x202 | sum(bit for n, bit in enumerate((1, 4, 0x10, 0x40, 0x80, 0x800)) if flag_bits >> n & 1)
    regs[7] = 0x20040 + byte
    after, expected, expected_flags = REFERENCE.run(code, regs, flags, word)
    if after & 1:
        return  # it would be a present entry: the subject of other tests
    GUEST.words[(X - BASE << 9) + 8] = word
    GUEST.words[CODE - BASE << 9] = 0
    GUEST.frames.octets[CODE - BASE << 12 : (CODE - BASE << 12) + 16] = code.ljust(16, b"\x90")
    view = Registers()
    for number, value in enumerate(regs):
        view.set_gpr(number, value)
    view.rdi = TABLE_VA + 0x40 + byte
    view.rip, view.rflags = CODE_VA, flags
    assert GUEST.mmu.write_fault(TABLE_VA + 0x40 + byte, WRITE_TO_PRESENT, view)
    view.rdi = view.rdi - TABLE_VA + 0x20000
    assert view.rip == CODE_VA + len(code)
    assert GUEST.load(X, 8) == after
    if found.kind == op.CMPXCHG and size == 4 and view.rflags & 0x40:
        # The SDM leaves RAX alone on success; Unicorn clears its upper half.
        expected[0] |= regs[0] & ~0xFFFF_FFFF
    assert [view.gpr(n) for n in range(16)] == expected
    mask = DEFINED_FLAGS.get(found.kind, STATUS)
    assert view.rflags & mask == expected_flags & mask
    GUEST.words[(X - BASE << 9) + 8] = 0


def run(guest: Guest, code: bytes, va: int, error: int = WRITE_TO_PRESENT, **values: int) -> Registers | None:
    """Run the assist for an instruction; None if it declined."""
    guest.frames.octets[CODE - BASE << 12 : (CODE - BASE << 12) + 16] = code.ljust(16, b"\x90")
    regs = Registers()
    regs.rip = CODE_VA
    for name, value in values.items():
        setattr(regs, name, value)
    return regs if guest.mmu.write_fault(va, error, regs) else None


@pytest.fixture
def guest() -> Guest:
    return guest_with_table()


MOV = b"\x48\x89\x07"  # mov [rdi], rax


def test_present_entries_are_checked_and_counted(guest: Guest) -> None:
    assert run(guest, MOV, TABLE_VA, rdi=TABLE_VA, rax=CODE << 12 | KERNEL_RO)
    assert guest.mmu.pages.plain[21] == 1
    assert guest.load(X, 0) & 4
    guest.clean()
    for bad in (X << 12 | KERNEL_RW, BASE - 1 << 12 | KERNEL_RO, CODE << 12 | KERNEL_RO | 0x80):
        assert run(guest, MOV, TABLE_VA, rdi=TABLE_VA, rax=bad) is None
        assert guest.load(X, 0) >> 12 & 0xFFFFF == CODE
    guest.clean()
    swapped = run(guest, b"\x48\x87\x07", TABLE_VA, rdi=TABLE_VA, rax=0)  # xchg: ptep_get_and_clear
    assert swapped is not None
    assert swapped.rax >> 12 & 0xFFFFF == CODE
    assert guest.mmu.pages.plain[21] == 0
    guest.clean()


def test_write_protect_by_btr_on_a_byte_displacement(guest: Guest) -> None:
    """ptep_set_wrprotect: lock btrl $1, 8(%rdi)."""
    assert run(guest, MOV, TABLE_VA + 8, rdi=TABLE_VA + 8, rax=BASE + 30 << 12 | KERNEL_RW)
    after = run(guest, b"\xf0\x0f\xba\x77\x08\x01", TABLE_VA + 8, rdi=TABLE_VA)
    assert after is not None
    assert after.rflags & 1
    assert not guest.load(X, 1) & 2
    assert (guest.mmu.pages.typed[30], guest.mmu.pages.plain[30]) == (1, 1)
    guest.clean()


def test_what_is_not_assisted(guest: Guest) -> None:
    assert run(guest, MOV, TABLE_VA, error=2, rdi=TABLE_VA) is None  # not present
    assert run(guest, MOV, TABLE_VA, error=1, rdi=TABLE_VA) is None  # a read
    assert run(guest, MOV, TABLE_VA, error=3 | 16, rdi=TABLE_VA) is None
    assert run(guest, MOV, TABLE_VA + 3, rdi=TABLE_VA + 3) is None  # misaligned
    assert run(guest, MOV, guest.va(guest.l2), rdi=guest.va(guest.l2)) is None  # a higher table
    assert run(guest, MOV, guest.va(BASE + 30), rdi=guest.va(BASE + 30)) is None  # no table
    assert run(guest, MOV, TABLE_VA, rdi=TABLE_VA + 4096) is None  # another page than CR2's
    assert run(guest, MOV, 0x1000, rdi=0x1000) is None
    assert run(guest, b"\x48\x0f\xc7\x0f", TABLE_VA, rdi=TABLE_VA) is None  # cmpxchg16b
    assert run(guest, b"\x0f\x0b", TABLE_VA) is None
    assert run(guest, b"\x48", TABLE_VA) is None
    guest.mmu.writable_page_tables = False
    assert run(guest, MOV, TABLE_VA, rdi=TABLE_VA) is None
    guest.clean()


def test_rep_stos_goes_on_element_by_element(guest: Guest) -> None:
    regs = run(guest, b"\xf3\x48\xab", TABLE_VA, rdi=TABLE_VA, rcx=2, rax=0x1000)
    assert regs is not None
    assert (regs.rip, regs.rcx, regs.rdi) == (CODE_VA, 1, TABLE_VA + 8)
    assert guest.mmu.write_fault(TABLE_VA + 8, 3, regs)
    assert (regs.rip, regs.rcx, regs.rdi) == (CODE_VA + 3, 0, TABLE_VA + 16)
    assert guest.load(X, 1) == 0x1000


def test_movs_reads_guest_memory(guest: Guest) -> None:
    source = guest.va(BASE + 30)
    guest.mmu.write_virtual(source, (0x5000).to_bytes(8, "little"))
    regs = run(guest, b"\x48\xa5", TABLE_VA, rdi=TABLE_VA, rsi=source, rflags=0x602)
    assert regs is not None
    assert (regs.rsi, regs.rdi) == (source - 8, TABLE_VA - 8)
    assert guest.load(X, 0) == 0x5000
    assert run(guest, b"\x48\xa5", TABLE_VA, rdi=TABLE_VA, rsi=0x1000) is None


@pytest.mark.parametrize(
    ("code", "base", "index", "scale", "displacement", "length"),
    [
        (b"\x48\x89\x05\x10\0\0\0", -2, -1, 0, 16, 7),  # rip-relative
        (b"\x48\x89\x04\x25\0\x10\0\0", -1, -1, 0, 0x1000, 8),  # absolute
        (b"\x4b\x89\x44\xec\xf8", 12, 13, 3, -8, 5),  # [r12 + r13*8 - 8]
        (b"\x48\x89\x44\x24\x08", 4, -1, 0, 8, 5),  # [rsp + 8]
        (b"\x48\x89\x04\xcd\0\0\0\x80", -1, 1, 3, -0x8000_0000, 8),
        (b"\x49\x89\x45\0", 13, -1, 0, 0, 4),
    ],
)
def test_addresses(code: bytes, base: int, index: int, scale: int, displacement: int, length: int) -> None:
    found = decode(code)
    assert found is not None
    assert (found.base, found.index_register, found.displacement, found.length) == (
        base,
        index,
        displacement,
        length,
    )
    assert index < 0 or found.scale == scale
    assert found.kind == op.MOV
    assert decode(code[:-1]) is None


@given(st.binary(max_size=15))
def test_decoder_takes_any_bytes(code: bytes) -> None:
    found = decode(code)
    assert found is None or 0 < found.length <= len(code)


def test_segment_base_and_rip(guest: Guest) -> None:
    assert run(guest, b"\x65\x48\x89\x07", TABLE_VA, gs_base=TABLE_VA - 64, rdi=64, rax=0x2000)
    assert guest.load(X, 0) == 0x2000
    distance = (TABLE_VA - CODE_VA - 7) & 0xFFFF_FFFF
    assert run(guest, b"\x48\x89\x05" + distance.to_bytes(4, "little"), TABLE_VA, rax=0x3000)
    assert guest.load(X, 0) == 0x3000
