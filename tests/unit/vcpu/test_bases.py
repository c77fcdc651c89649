"""WRFSBASE and WRGSBASE: an address that is not canonical is #GP, by any register and behind any prefix; all others are written."""

from __future__ import annotations

import pytest

from domains.vcpu.api import StopReason, Trap
from domains.vcpu.hvm_testing import HANDLERS, HvmGuest
from domains.vcpu.testing import CODE, PvGuest

UD2 = b"\x0f\x0b"
FSGSBASE = 1 << 16
CANONICAL = {
    0: True,
    0x7FFFFFFFFFFF: True,
    0x800000000000: False,
    0x7FFFFFFFFFFFFFFF: False,
    1 << 63: False,
    0xFFFF7FFFFFFFFFFF: False,
    0xFFFF800000000000: True,
    (1 << 64) - 1: True,
}


def run(code: str, register: int, value: int) -> PvGuest:
    guest = PvGuest(b"\x90" + bytes.fromhex(code) + UD2)
    regs = guest.vcpu.regs
    regs.cr4 |= FSGSBASE
    regs.fs_base = regs.gs_base = 0x1234
    regs.q[register] = value
    regs.rflags = 0x246
    assert guest.run() is StopReason.REQUESTED
    return guest


@pytest.mark.parametrize("value", list(CANONICAL))
@pytest.mark.parametrize(
    ("code", "register", "segment"),
    [
        ("f3480faed0", 0, "fs_base"),  # wrfsbase rax
        ("f3480faedf", 7, "gs_base"),  # wrgsbase rdi
        ("f3490faed1", 9, "fs_base"),  # wrfsbase r9
        ("f3490faedf", 15, "gs_base"),  # wrgsbase r15
        ("2ef34c0faed4", 4, "fs_base"),  # cs wrfsbase rsp, with a REX.R that means nothing
    ],
)
def test_sixty_four_bits(code: str, register: int, segment: str, value: int) -> None:
    guest = run(code, register, value)
    kind, what, rip = guest.traps.seen[0]
    written = getattr(guest.vcpu.regs, segment)
    if CANONICAL[value]:
        assert (kind, written) == ("invalid", value)
    else:
        assert (kind, rip, written) == ("trap", CODE + 1, 0x1234)
        assert what == Trap(13, 0, False)
    assert guest.vcpu.regs.rflags & 0xFFF == 0x246


@pytest.mark.parametrize("code", ["f30faed0", "f3400faed0", "f3410faed0"])
def test_thirty_two_bits_are_always_canonical(code: str) -> None:
    register = 8 if "41" in code else 0
    guest = run(code, register, 0x8000_0000_9000_0000)
    assert guest.traps.seen[0][0] == "invalid"
    assert guest.vcpu.regs.fs_base == 0x9000_0000


@pytest.mark.parametrize("code", ["f3480faec0", "f3480faec8"])
def test_reading_never_faults(code: str) -> None:
    guest = run(code, 0, 1 << 63)
    assert guest.traps.seen[0][0] == "invalid"
    assert guest.vcpu.regs.rax == 0x1234


def test_without_the_bit_of_cr4_it_is_undefined() -> None:
    guest = PvGuest(bytes.fromhex("f3480faed0") + UD2)
    guest.vcpu.regs.rax = 1 << 63
    assert guest.run() is StopReason.REQUESTED
    assert guest.traps.seen[0][1] == Trap(6, 0, False) or guest.traps.seen[0][0] == "invalid"
    assert guest.traps.seen[0][2] == CODE


def test_an_hvm_guest_gets_it_through_its_own_gate() -> None:
    guest = HvmGuest()
    # mov rax, cr4; bts rax, 16; mov cr4, rax; mov rax, 1 << 63; wrgsbase rax
    guest.long_mode("0f20e0 480fbae810 0f22e0 48b80000000000000080 f3480faed8 e6f4ebfe")
    guest.handler(13, "58 59 e6f4ebfe")  # pop rax; pop rcx
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rax == 0
    assert guest.vcpu.regs.rcx == guest.body + 3 + 5 + 3 + 10
    assert HANDLERS + 64 * 13 <= guest.vcpu.regs.rip < HANDLERS + 64 * 14
