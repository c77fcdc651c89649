"""Limits of segments in 32-bit code, which QEMU does not check: which segment an access went by, and whether it may.

The question is asked of accesses to pages that lie beyond the limit of a segment that was loaded when the page came into the TLB
(`watchpoints.py`): a guest whose segments are flat never asks. Not asked of: 16-bit, virtual-8086 and real mode; segments that grow down;
null ones; FS and GS of less than 64 KiB (kernels keep per-processor data in such, and every other access would be asked about).
"""

from __future__ import annotations

from typing import Final

from domains.vcpu.operand import SEGMENTS, located_operand
from domains.vcpu.state import EnvRegisters

SS_FAULT, GP_FAULT = 12, 13
FLAT: Final = 0xFFFFFFFF
PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
RSI, RDI = 6, 7
SOURCE: Final = frozenset((0xA4, 0xA5, 0xA6, 0xA7, 0xAC, 0xAD, 0x6E, 0x6F))
TARGET: Final = frozenset((0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAE, 0xAF, 0x6C, 0x6D))
"""String instructions that read DS:ESI, and those that go by ES:EDI."""
BY_OFFSET: Final = frozenset((0xA0, 0xA1, 0xA2, 0xA3, 0xD7))
"""MOV by an offset in the instruction, and XLAT."""
STACK: Final = frozenset(
    (
        6,
        7,
        14,
        22,
        23,
        30,
        31,
        *range(80, 98),
        104,
        106,
        154,
        156,
        157,
        194,
        195,
        200,
        201,
        202,
        203,
        204,
        205,
        206,
        207,
        232,
    )
)
STACK_0F: Final = frozenset((0xA0, 0xA1, 0xA8, 0xA9))
MODRM: Final = frozenset(
    (
        *(high | low for high in range(0, 0x40, 8) for low in range(4)),
        *(0x62, 0x63, 0x69, 0x6B),
        *range(0x80, 0x90),
        *(0xC0, 0xC1, 0xC4, 0xC5, 0xC6, 0xC7),
        *range(0xD0, 0xD4),
        *range(0xD8, 0xE0),
        *(0xF6, 0xF7, 0xFE, 0xFF),
    )
)
PRESENT, TYPE, GROWS_DOWN = 0x80, 0xC, 0x4
"""In a segment's attributes: present; code and expand-down; a data segment that grows down."""
SMALL: Final = 0xFFFF
PIECE: Final = 8
M32: Final = 0xFFFFFFFF


def segment_of(code: bytes, address: int, regs: EnvRegisters) -> tuple[str | None, int]:
    """The segment register by which the 32-bit instruction at the start of `code` reaches the linear address (None: not known), and where
    its access begins: QEMU reads what is not aligned in pieces that are."""
    try:
        return _decide(code, address, regs)
    except IndexError:  # the bytes end before the instruction does
        return None, address


def _decide(code: bytes, address: int, regs: EnvRegisters) -> tuple[str | None, int]:
    at, override = 0, "ds"
    while code[at] in PREFIXES:
        override = SEGMENTS.get(code[at], override)
        at += 1
    opcode = code[at]
    if opcode in SOURCE or opcode in TARGET:
        if opcode in TARGET and (opcode not in SOURCE or _is_at(address, "es", RDI, regs)):
            return "es", address
        return override, address
    if opcode in BY_OFFSET:
        return override, address
    stack = opcode in STACK or (opcode == 0x0F and code[at + 1] in STACK_0F)
    length = 1
    if opcode == 0x0F:
        length = 3 if code[at + 1] in (0x38, 0x3A) else 2
    if opcode in (0x8F, 0xFF) or ((opcode in MODRM or opcode == 0x0F) and not stack):
        modrm = code[at + length :]
        if modrm[0] >> 6 != 3:
            linear, _, segment = located_operand(modrm, code[:at], 0, regs, length)
            if not stack_operand(opcode, modrm[0]) or address - linear & M32 < PIECE:
                begun = linear - address & M32 < PIECE or address - linear & M32 < PIECE
                return segment, linear if begun else address
        elif not stack_operand(opcode, modrm[0]):
            return None, address
    return "ss" if stack or opcode in (0x8F, 0xFF) else None, address


def stack_operand(opcode: int, modrm: int) -> bool:
    """POP and PUSH of memory, CALL by memory: they go by the stack as well."""
    return opcode == 0x8F or (opcode == 0xFF and modrm >> 3 & 7 in (2, 3, 6))


def _is_at(address: int, name: str, register: int, regs: EnvRegisters) -> bool:
    return address - regs.segment(name).base - regs.gpr(register) & M32 < PIECE


def fault(code: bytes, address: int, size: int, regs: EnvRegisters) -> int:
    """The vector of the exception that the access of `size` bytes at a linear address is, by the instruction at the start of `code`; 0 if
    it may be."""
    name, address = segment_of(code, address, regs)
    if name is None:
        return 0
    segment = regs.segment(name)
    if not checked(name, segment.limit, segment.attributes):
        return 0
    if (address - segment.base & M32) + size - 1 <= segment.limit:
        return 0
    return SS_FAULT if name == "ss" else GP_FAULT


def checked(name: str, limit: int, attributes: int) -> bool:
    """A segment that is asked about. The machine code of `watchpoints.py` has the same."""
    if limit == FLAT or not attributes & PRESENT or attributes & TYPE == GROWS_DOWN:
        return False
    return name not in ("fs", "gs") or limit >= SMALL
