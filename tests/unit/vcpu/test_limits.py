"""Limits of segments in 32-bit code: #GP, or #SS by the stack segment, in front of the access; by every way to name a segment."""

from __future__ import annotations

import random
import struct

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import CODE, GDT, HANDLERS, HvmGuest
from tests.unit.vcpu.hvm_programs import protected_mode

pytestmark = pytest.mark.usefixtures("paging")

LIMITED, LIMITED_CODE = 0x30, 0x38
LIMIT = 0x9FFFF
BEYOND = 0xC0000
STOP = "e6f4ebfe"
REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
PREFIX = {"none": "", "es": "26", "cs": "2e", "ss": "36", "ds": "3e", "fs": "64", "gs": "65"}
MOV_FROM_AX = {"es": "8ec0", "ss": "8ed0", "ds": "8ed8", "fs": "8ee0", "gs": "8ee8"}
GP, SS = 13, 12


def descriptor(base: int, limit: int, *, code: bool = False, pages: bool = True) -> int:
    """Of 32-bit code or data of privilege 0; `limit` in pages or bytes."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return (
        low
        | (0x9B if code else 0x93) << 40
        | (limit >> 16 & 15) << 48
        | (0xC if pages else 4) << 52
        | base >> 24 << 56
    )


def guest_of(code: str, data: int = descriptor(0, LIMIT >> 12)) -> HvmGuest:
    guest = HvmGuest()
    protected_mode(guest, "31db" + code + STOP)
    for vector in (GP, SS):
        # pop ecx (the error code); pop edx (EIP); mov ebx, vector; stop: by segments of its own
        guest.write(HANDLERS + 64 * vector, f"66b81000 8ed8 8ed0 59 5a bb{vector:02x}000000 {STOP}")
    limited = struct.pack("<QQ", data, descriptor(0, LIMIT >> 12, code=True))
    guest.write(GDT + LIMITED, limited)
    guest.vcpu.regs.gdtr_limit = LIMITED + 15
    return guest


def load(segment: str) -> str:
    """mov ax, LIMITED; mov segment, ax"""
    return f"66b8{LIMITED:02x}00" + MOV_FROM_AX[segment]


def mov(register: int, value: int) -> str:
    return f"{0xB8 + register:02x}" + struct.pack("<I", value).hex()


def store(register: int, prefix: str) -> str:
    """mov byte [register], 0"""
    if register == 4:
        return prefix + "c6042400"
    return prefix + (f"c64{register}0000" if register == 5 else f"c60{register}00")


@pytest.mark.parametrize("register", range(8))
@pytest.mark.parametrize("segment", list(PREFIX))
def test_every_register_and_every_segment(segment: str, register: int) -> None:
    """As XTF's memop-seg: the fault tells by which segment the operand goes."""
    used = segment if segment != "none" else ("ss" if register in (4, 5) else "ds")
    to = "" if used == "cs" else load(used)
    if used == "cs":
        # jmp LIMITED_CODE:+0
        place = CODE + 7 + 4 + 2 + 2 + 4 + 3 + 2 + 7
        to = "ea" + struct.pack("<IH", place, LIMITED_CODE).hex()
    guest = guest_of(to + mov(register, BEYOND) + store(register, PREFIX[segment]))
    assert guest.run() is StopReason.REQUESTED
    want = SS if used == "ss" else GP
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == want
    # (An exception of the stack segment's own is pushed by it all the same: QEMU does not ask there.)
    assert guest.vcpu.regs.rcx & 0xFFFFFFFF == 0
    code = bytes.fromhex(store(register, PREFIX[segment]))
    at = guest.vcpu.regs.rdx & 0xFFFFFFFF
    assert guest.memory[at : at + len(code)] == code


@pytest.mark.parametrize("segment", [name for name in PREFIX if name not in ("cs", "none")])
def test_an_offset_in_the_instruction(segment: str) -> None:
    # mov segment:[BEYOND], al
    guest = guest_of(load(segment) + PREFIX[segment] + "a2" + struct.pack("<I", BEYOND).hex())
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == (SS if segment == "ss" else GP)


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        (load("es") + mov(6, 0x50000) + mov(7, BEYOND) + "a4", GP),  # movsb: to ES
        (load("es") + mov(6, BEYOND) + mov(7, 0x50000) + "a4", 0),
        (load("ds") + mov(6, BEYOND) + mov(7, 0x50000) + "a4", GP),
        (load("es") + mov(7, BEYOND) + "aa", GP),  # stosb
        (load("es") + mov(1, 0x40000) + mov(7, 0x9F000) + "f3aa", GP),  # rep stosb, up to the edge
        (load("ss") + mov(4, BEYOND) + "50", SS),  # push eax
        (load("ss") + mov(4, BEYOND) + "9c", SS),  # pushf
        (load("ss") + mov(4, BEYOND) + "e800000000", SS),  # call
        (load("ss") + mov(4, LIMIT + 1) + "50", 0),  # the last four bytes
        (load("ss") + mov(4, LIMIT - 1) + "58", SS),  # pop eax: across the edge
        (load("ds") + mov(0, LIMIT - 3) + "8b00", 0),  # mov eax, [eax]
        (load("ds") + mov(0, LIMIT - 2) + "8b00", GP),
        (load("ds") + mov(0, LIMIT) + "8a00", 0),
        (load("ds") + mov(3, BEYOND) + "f00fc103", GP),  # lock xadd [ebx], eax
        (load("ds") + mov(3, BEYOND) + "ff33", GP),  # push dword [ebx]
        (load("ds") + mov(3, BEYOND) + "d903", GP),  # fld dword [ebx]
        (load("ds") + mov(3, BEYOND) + "d7", GP),  # xlat
        (load("ds") + mov(3, BEYOND) + "268b03", 0),  # by ES, which is flat
        (load("fs") + mov(3, BEYOND) + "8b03", 0),  # by DS
    ],
)
def test_instructions(code: str, vector: int) -> None:
    guest = guest_of(code + "31db")
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == vector


def test_an_access_that_faults_has_not_happened() -> None:
    guest = guest_of(load("es") + mov(1, 0x40000) + mov(7, 0x9F000) + "b055 f3aa")
    assert guest.run() is StopReason.REQUESTED
    assert guest.memory[LIMIT : LIMIT + 2] == b"\x55\x00"
    assert guest.vcpu.regs.rdi & 0xFFFFFFFF == LIMIT + 1


@pytest.mark.parametrize("seed", range(40))
def test_any_base_and_limit(seed: int) -> None:
    """A store by DS: a fault if, and only if, one of its bytes is beyond."""
    chance = random.Random(seed)
    pages = chance.random() < 0.5
    limit = chance.randrange(1, 0x40) if pages else chance.randrange(0x1000, 0xFFFFF)
    size = chance.choice((1, 2, 4))
    top = (limit << 12 | 0xFFF) if pages else limit
    base = chance.randrange(0x40000, 0xA0000)
    offset = chance.choice((top - 3, top - 2, top - 1, top, top + 1, chance.randrange(0, 0x60000)))
    instruction = {1: "8818", 2: "668918", 4: "8918"}[size]  # mov [eax], bl / bx / ebx
    guest = guest_of(load("ds") + mov(0, offset) + instruction + "31db", descriptor(base, limit, pages=pages))
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == (GP if offset + size - 1 > top else 0)
