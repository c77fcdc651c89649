"""The instructions that guests write page-table entries with, decoded (Intel SDM vol. 2, appendix A and
section 2.1).

Only 64-bit code and only forms that write memory; `decode` says None for everything else, and the fault is
then the guest's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_LENGTH: Final = 15

# Kinds of operation. ALU kinds have the numbers of the opcode map (add 0 ... xor 6).
ADD, OR, ADC, SBB, AND, SUB, XOR = range(7)
MOV, XCHG, CMPXCHG, CMPXCHG8B, XADD, NOT, NEG, INC, DEC, BTS, BTR, BTC, STOS, MOVS = range(8, 22)

_RSP: Final = 4
_BIT_OPCODES: Final = {0xAB: BTS, 0xB3: BTR, 0xBB: BTC}


class Instruction(NamedTuple):
    """One decoded instruction with a memory destination."""

    kind: int
    length: int
    size: int
    """Of the memory operand: 1, 2, 4 or 8 bytes."""
    register: int
    """Number of the register operand; -1 if it is an immediate."""
    high_byte: bool
    """The register is AH, CH, DH or BH (of register 0..3)."""
    immediate: int
    """Sign-extended to `size`, unsigned."""
    base: int
    """Register of the address; -1 none, -2 RIP of the next instruction."""
    index_register: int
    """Of the address; -1 none."""
    scale: int
    displacement: int
    """Signed."""
    segment: int
    """0x64 FS, 0x65 GS, 0 no base."""
    repeat: bool
    locked: bool


class _Cursor:
    """Bytes of the instruction, read from the front. IndexError when they end."""

    __slots__ = ("at", "code")

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.at = 0

    def byte(self) -> int:
        value = self.code[self.at]
        self.at += 1
        return value

    def signed(self, size: int) -> int:
        raw = self.code[self.at : self.at + size]
        if len(raw) < size:
            raise IndexError("the instruction goes on")
        self.at += size
        return int.from_bytes(raw, "little", signed=True)


class _Prefixes(NamedTuple):
    operand16: bool
    locked: bool
    repeat: bool
    segment: int
    rex: int


def decode(code: bytes) -> Instruction | None:
    """The instruction at the start of `code` (up to 15 bytes); None if it is none of the known forms."""
    cursor = _Cursor(code[:MAX_LENGTH])
    try:
        return _decode(cursor)
    except IndexError:
        return None


def _prefixes(cursor: _Cursor) -> tuple[_Prefixes, int] | None:
    operand16 = locked = repeat = False
    segment = 0
    while True:
        byte = cursor.byte()
        if byte == 0x66:
            operand16 = True
        elif byte == 0xF0:
            locked = True
        elif byte in (0xF2, 0xF3):
            repeat = True
        elif byte in (0x64, 0x65):
            segment = byte
        elif byte in (0x26, 0x2E, 0x36, 0x3E):
            continue  # no meaning in 64-bit code
        elif byte == 0x67:
            return None
        else:
            break
    rex = 0
    if byte & 0xF0 == 0x40:
        rex = byte
        byte = cursor.byte()
    return _Prefixes(operand16, locked, repeat, segment, rex), byte


def _decode(cursor: _Cursor) -> Instruction | None:
    start = _prefixes(cursor)
    if start is None:
        return None
    prefixes, opcode = start
    wide = 8 if prefixes.rex & 8 else 2 if prefixes.operand16 else 4
    if opcode == 0x0F:
        return _decode_0f(cursor, prefixes, wide)
    size = wide if opcode & 1 else 1
    if opcode < 0x38 and opcode & 7 < 2:
        return _memory(cursor, prefixes, opcode >> 3, size)
    if opcode in (0x86, 0x87):
        return _memory(cursor, prefixes, XCHG, size)
    if opcode in (0x88, 0x89):
        return _memory(cursor, prefixes, MOV, size)
    if opcode in (0xA4, 0xA5, 0xAA, 0xAB):
        kind = MOVS if opcode < 0xA8 else STOS
        return Instruction(
            kind,
            cursor.at,
            size,
            0,
            False,
            0,
            7,
            -1,
            0,
            0,
            prefixes.segment,
            prefixes.repeat,
            prefixes.locked,
        )
    extension = cursor.code[cursor.at] >> 3 & 7
    if opcode in (0x80, 0x81, 0x83) and extension < 7:
        return _memory(cursor, prefixes, extension, size, immediate=1 if opcode != 0x81 else min(wide, 4))
    if opcode in (0xC6, 0xC7) and extension == 0:
        return _memory(cursor, prefixes, MOV, size, immediate=min(size, 4))
    if opcode in (0xF6, 0xF7) and extension in (2, 3):
        return _memory(cursor, prefixes, NOT if extension == 2 else NEG, size, immediate=0)
    if opcode in (0xFE, 0xFF) and extension in (0, 1):
        return _memory(cursor, prefixes, DEC if extension else INC, size, immediate=0)
    return None


def _decode_0f(cursor: _Cursor, prefixes: _Prefixes, wide: int) -> Instruction | None:
    opcode = cursor.byte()
    size = wide if opcode & 1 else 1
    if opcode in (0xB0, 0xB1):
        return _memory(cursor, prefixes, CMPXCHG, size)
    if opcode in (0xC0, 0xC1):
        return _memory(cursor, prefixes, XADD, size)
    if opcode == 0xC3 and not prefixes.operand16:
        return _memory(cursor, prefixes, MOV, wide)  # MOVNTI
    if opcode in _BIT_OPCODES:
        return _memory(cursor, prefixes, _BIT_OPCODES[opcode], wide)
    extension = cursor.code[cursor.at] >> 3 & 7
    if opcode == 0xBA and extension >= 5:
        return _memory(cursor, prefixes, BTS + extension - 5, wide, immediate=1)
    if opcode == 0xC7 and extension == 1 and wide != 8:
        return _memory(cursor, prefixes, CMPXCHG8B, 8, immediate=0)
    return None


def _memory(
    cursor: _Cursor, prefixes: _Prefixes, kind: int, size: int, immediate: int | None = None
) -> Instruction | None:
    """ModR/M with a memory operand, then an immediate of so many bytes (None: the other operand is a
    register)."""
    rex = prefixes.rex
    modrm = cursor.byte()
    mode, register, base = modrm >> 6, modrm >> 3 & 7, modrm & 7
    if mode == 3:
        return None
    index, scale = -1, 0
    if base == _RSP:
        sib = cursor.byte()
        scale = sib >> 6
        index = sib >> 3 & 7 | (rex & 2) << 2
        if index == _RSP:
            index = -1
        base = sib & 7
        if base == 5 and mode == 0:
            base = -1
    elif base == 5 and mode == 0:
        base = -2
    if base >= 0:
        base |= (rex & 1) << 3
    displacement = 0
    if mode == 1:
        displacement = cursor.signed(1)
    elif mode == 2 or base < 0:
        displacement = cursor.signed(4)
    value = cursor.signed(immediate) if immediate else 0
    high_byte = False
    if immediate is not None:
        register = -1
    elif size == 1 and not rex and register >= 4:
        register, high_byte = register - 4, True
    else:
        register |= (rex & 4) << 1
    return Instruction(
        kind,
        cursor.at,
        size,
        register,
        high_byte,
        value & ((1 << size * 8) - 1),
        base,
        index,
        scale,
        displacement,
        prefixes.segment,
        False,
        prefixes.locked,
    )
