"""REP INS and REP OUTS of an HVM guest as one exit, where that is safe: a disk's sector is 256 of them.

Unicorn makes an exit of each step. In the first one the rest can be done as well: the memory is moved here, and the registers are
left as if one step were still to come, which the instruction then does itself. As on Xen a block ends at the end of a page.
Anything unusual (another direction, memory that is no RAM or must not be reached) is left to Unicorn, step by step, with its faults.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from domains.vcpu.hvm_thunks import HF_CS64
from domains.vcpu.state import HF_CPL, RCX, RDI, RSI, EnvRegisters
from domains.vcpu.walk import PAGE, GuestMemory, NotMapped

INSB, INSW, OUTSB, OUTSW = 0x6C, 0x6D, 0x6E, 0x6F
REPEAT: Final = (0xF2, 0xF3)
SEGMENTS: Final = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
PG, WP, DF = 1 << 31, 1 << 16, 1 << 10
BIG: Final = 1 << 14
"""D bit of a code segment's attributes."""
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


class Block(NamedTuple):
    """The steps of a REP INS or REP OUTS that can be done at once."""

    linear: int
    """Of the first step."""
    size: int
    steps: int
    """Steps, the one under way included; at least 2."""
    mask: int
    """Of the address and count registers."""


def decode(code: bytes, regs: EnvRegisters, size: int, *, output: bool) -> Block | None:
    """The block that the instruction at `code` makes, with the registers of now; None: it is no repeated one, or just one step."""
    at, repeated, segment = 0, False, "ds"
    long = bool(regs.hflags & HF_CS64)
    big = bool(regs.segment("cs").attributes & BIG)
    width = 64 if long else 32 if big else 16
    other = 32 if width != 32 else 16
    while at < len(code):
        byte = code[at]
        if byte in REPEAT:
            repeated = True
        elif byte == 0x67:
            width = other
        elif byte in SEGMENTS:
            segment = SEGMENTS[byte]
        elif byte != 0x66 and not (long and byte & 0xF0 == 0x40):
            break
        at += 1
    wanted = (OUTSB, OUTSW) if output else (INSB, INSW)
    if not repeated or at >= len(code) or code[at] not in wanted or regs.rflags & DF:
        return None
    mask = (1 << width) - 1
    count = regs.q[RCX] & mask
    offset = regs.q[RSI if output else RDI] & mask
    if not output:
        segment = "es"
    base = regs.segment(segment).base if not long or segment in ("fs", "gs") else 0
    linear = base + offset & (M64 if long else M32)
    count = min(count, (PAGE - linear % PAGE) // size, (mask + 1 - offset) // size)
    return Block(linear, size, count, mask) if count > 1 else None


def place(block: Block, memory: GuestMemory, regs: EnvRegisters, *, write: bool) -> int | None:
    """The physical address of a block, all of it in one page of RAM that the code may reach so; None if it may not."""
    try:
        found = memory.translate(block.linear)
        user = regs.hflags & HF_CPL == 3
        paging = regs.cr0 & PG
        if paging and user and not found.user:
            return None
        if paging and write and not found.writable and (user or regs.cr0 & WP):
            return None
        if (
            memory.physical(block.linear) != found.physical
        ):  # A20, or a walk that the processor does otherwise
            return None
    except NotMapped:
        return None
    return found.physical


def advance(block: Block, regs: EnvRegisters, *, output: bool) -> None:
    """All steps but one are done; the last is the instruction's own."""
    steps = block.steps - 1
    for index, change in ((RSI if output else RDI, steps * block.size), (RCX, -steps)):
        old = regs.q[index]
        new = old + change & block.mask
        # A 32-bit register's upper half is zeroed in 64-bit mode; a 16-bit one keeps the rest.
        regs.q[index] = new if block.mask >= M32 else old & ~block.mask & M64 | new
