"""The linear address of an instruction's memory operand (SDM volume 2, 2.1.5 and 2.2.1), for the few instructions that are done in Python."""

from __future__ import annotations

from typing import Final

from domains.vcpu.hvm_thunks import HF_CS64
from domains.vcpu.state import EnvRegisters

RSP, RBP = 4, 5
SEGMENTS: Final = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
ADDRESS_SIZE: Final = 0x67
CODE_32: Final = 1 << 14
"""D in the attributes of CS."""
M16, M32, M64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
_BASES_16: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))
"""Registers of each R/M with 16-bit addressing: BX+SI, BX+DI, BP+SI, BP+DI, SI, DI, BP, BX."""


def memory_operand(
    code: bytes, prefixes: bytes, rex: int, regs: EnvRegisters, opcode_bytes: int
) -> tuple[int, int]:
    """(linear address, bytes of ModRM, SIB and displacement). `code` begins at ModRM; `opcode_bytes` lie before it, behind `prefixes`
    (a REX among them)."""
    return located_operand(code, prefixes, rex, regs, opcode_bytes)[:2]


def located_operand(
    code: bytes, prefixes: bytes, rex: int, regs: EnvRegisters, opcode_bytes: int
) -> tuple[int, int, str]:
    """As `memory_operand`, and the segment register that it goes by."""
    long = bool(regs.hflags & HF_CS64)
    small = not long and bool(regs.segment("cs").attributes & CODE_32) == (ADDRESS_SIZE in prefixes)
    if small:
        offset, segment, length = _by_16(code, regs)
    else:
        offset, segment, length = _by_32(code, rex, regs, long=long)
        if long and code[0] & 0xC7 == 0x05:
            offset += regs.rip + len(prefixes) + opcode_bytes + length
        if not long or ADDRESS_SIZE in prefixes:
            offset &= M32
    for byte in prefixes:
        segment = SEGMENTS.get(byte, segment)
    if long:
        base = regs.segment(segment).base if segment in ("fs", "gs") else 0
        return offset + base & M64, length, segment
    return offset + regs.segment(segment).base & M32, length, segment


def _by_16(code: bytes, regs: EnvRegisters) -> tuple[int, str, int]:
    mod, rm = code[0] >> 6, code[0] & 7
    size = (0, 1, 2)[mod]
    bases: tuple[int, ...] = _BASES_16[rm]
    if mod == 0 and rm == 6:
        bases, size = (), 2
    displacement = int.from_bytes(code[1 : 1 + size], "little", signed=True)
    offset = sum(regs.gpr(number) for number in bases) + displacement & M16
    return offset, "ss" if RBP in bases else "ds", 1 + size


def _by_32(code: bytes, rex: int, regs: EnvRegisters, *, long: bool) -> tuple[int, str, int]:
    mod, rm, at, offset = code[0] >> 6, code[0] & 7, 1, 0
    size = (0, 1, 4)[mod]
    register: int | None = rm | (rex & 1) << 3
    if rm == RSP:  # SIB
        sib, at = code[1], 2
        index = sib >> 3 & 7 | (rex & 2) << 2
        register = sib & 7 | (rex & 1) << 3
        if index != RSP:
            offset += regs.gpr(index) << (sib >> 6)
        if mod == 0 and sib & 7 == RBP:
            register, size = None, 4
    elif mod == 0 and rm == RBP:
        register, size = None, 4
    if register is not None:
        offset += regs.gpr(register)
    offset += int.from_bytes(code[at : at + size], "little", signed=True)
    return offset, "ss" if register in (RSP, RBP) else "ds", at + size
