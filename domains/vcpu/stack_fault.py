"""Whether a #GP(0) of a guest is really a #SS(0): QEMU, on which the vCPU rests, gives #GP for every address that is not
canonical; a processor gives #SS where the access goes by the stack segment (Intel SDM volume 1, 3.3.7.1; volume 2, 2.1.5).
"""

from __future__ import annotations

from typing import Final

from bus.addresses import canonical
from domains.vcpu.api import Registers

_RSP: Final = 4
_RBP: Final = 5
_NO_BASE: Final = -1
_M64: Final = (1 << 64) - 1
_SEGMENTS: Final = frozenset((0x26, 0x2E, 0x36, 0x3E))
"""ES, CS, SS and DS: without effect in 64-bit code."""
_PREFIXES: Final = _SEGMENTS | {0x66, 0x67, 0xF0, 0xF2, 0xF3}
_FS_GS: Final = frozenset((0x64, 0x65))
_PUSH_POP: Final = frozenset(
    (*range(0x50, 0x60), 0x68, 0x6A, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCF, 0xE8)
)
"""PUSH, POP, PUSHF, POPF, RET, ENTER, LEAVE, RETF, IRET, CALL."""
_PUSH_POP_0F: Final = frozenset((0xA0, 0xA1, 0xA8, 0xA9))
_MODRM: Final = frozenset(
    (
        *(high | low for high in range(0, 0x40, 8) for low in range(4)),
        *(0x63, 0x69, 0x6B),
        *range(0x80, 0x90),
        *(0xC0, 0xC1, 0xC6, 0xC7),
        *range(0xD0, 0xD4),
        *range(0xD8, 0xE0),
        *(0xF6, 0xF7, 0xFE, 0xFF),
    )
)
"""Opcodes of one byte that have a ModR/M byte, in 64-bit code."""
_NO_MODRM_0F: Final = frozenset(
    (5, 6, 7, 8, 9, 0x0B, *range(0x30, 0x38), 0x77, *range(0x80, 0x90), *(0xA0, 0xA1, 0xA2), *(0xA8, 0xA9, 0xAA), *range(0xC8, 0xD0))
)  # fmt: skip


def by_stack_segment(code: bytes, regs: Registers) -> bool:
    """The 64-bit instruction at the start of `code` reaches an address that is not canonical by the stack segment."""
    try:
        return _decide(code, regs)
    except IndexError:  # the bytes end before the instruction does
        return False


def _decide(code: bytes, regs: Registers) -> bool:
    at = rex = 0
    other = False
    while (byte := code[at]) in _PREFIXES or byte in _FS_GS:
        other = other or byte in _FS_GS
        at += 1
    if byte & 0xF0 == 0x40:
        rex = byte
        at += 1
        byte = code[at]
    at += 1
    if byte == 0x0F:
        byte = code[at]
        at += 1
        if byte in _PUSH_POP_0F:
            return not canonical(regs.rsp)
        if byte in (0x38, 0x3A):
            at += 1
        elif byte in _NO_MODRM_0F:
            return False
    elif byte in _PUSH_POP:
        return not canonical(regs.rsp) or (byte == 0xC9 and not canonical(regs.rbp))
    elif byte not in _MODRM:
        return False
    modrm = code[at]
    if byte == 0xFF and modrm >> 3 & 7 in (2, 3, 6) and not canonical(regs.rsp):
        return True  # CALL and PUSH of what may be in memory: the stack as well
    if modrm >> 6 == 3 or other:
        return False
    base, offset = _address(code, at, modrm, rex, regs)
    return base in (_RSP, _RBP) and not canonical((regs.gpr(base) + offset) & _M64)


def _address(code: bytes, at: int, modrm: int, rex: int, regs: Registers) -> tuple[int, int]:
    """(number of the base register, or -1; index times scale plus displacement)."""
    mode, base = modrm >> 6, modrm & 7
    offset = 0
    at += 1
    if base == _RSP:
        sib = code[at]
        at += 1
        index = sib >> 3 & 7 | (rex & 2) << 2
        if index != _RSP:
            offset = regs.gpr(index) << (sib >> 6)
        base = sib & 7
    if base == _RBP and mode == 0:
        return _NO_BASE, 0  # RIP or nothing
    size = (0, 1, 4)[mode]
    raw = code[at : at + size]
    if len(raw) < size:
        raise IndexError("the displacement goes on")
    return base | (rex & 1) << 3, offset + int.from_bytes(raw, "little", signed=True)
