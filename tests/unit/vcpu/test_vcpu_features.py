"""Features that CPUID shows are there, what is hidden stays hidden, and the self-check can fail."""

from __future__ import annotations

import pytest

from domains.pv.cpuid import CpuidPolicy
from domains.vcpu import selfcheck
from domains.vcpu.api import Trap
from domains.vcpu.features import EBX, ECX, EDX, usable
from domains.vcpu.insides import UnknownUnicorn
from domains.vcpu.testing import PvGuest

# (leaf, register, bit): an instruction of that feature
INSTRUCTIONS = {
    (1, ECX, 0): "f20f7cc1", (1, ECX, 1): "660f3a44c100", (1, ECX, 9): "660f3800c1", (1, ECX, 13): "480fc70c2500000300",
    (1, ECX, 19): "660f3840c1", (1, ECX, 20): "f2480f38f1c3", (1, ECX, 22): "480f38f0042500000300",
    (1, ECX, 23): "f3480fb8c3", (1, ECX, 25): "660f38dcc1", (1, ECX, 30): "480fc7f0",
    (1, EDX, 4): "0f31", (1, EDX, 15): "480f44c3", (1, EDX, 19): "0fae3c2500000300", (1, EDX, 23): "0f6fc1",
    (1, EDX, 24): "480fae042500000300", (1, EDX, 25): "0f58c1", (1, EDX, 26): "660f58c1",
    (7, EBX, 0): "f3480faec0", (7, EBX, 3): "c4e2e0f2c1", (7, EBX, 8): "c4e2fbf6cb",
    (0x80000001, ECX, 0): "9f", (0x80000001, ECX, 5): "f3480fbdc3", (0x80000001, ECX, 8): "0f0d0c2500000300",
    (0x80000001, EDX, 27): "0f01f9",
}  # fmt: skip
# Shown without an instruction to try at CPL3: FPU .. (paging, MSRs, machine features that the machine
# decides on)
NOT_TRIED = {
    (1, ECX): {26, 27, 31},  # XSAVE and OSXSAVE (CR4.OSXSAVE is 0 in a PV guest), hypervisor
    (1, EDX): {0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14, 16, 17},
    (7, EBX): {7},
    (0x80000001, ECX): set(),
    (0x80000001, EDX): {11, 20, 26, 29, *range(10), *range(12, 18), 22, 23, 24},
}


def test_every_feature_shown_works() -> None:
    """For each feature bit that native_cpuid shows, an instruction of it runs without #UD; none is left
    out."""
    guest = PvGuest()
    for leaf, register in NOT_TRIED:
        value = guest.vcpu.native_cpuid(leaf, 0)[register]
        for bit in range(32):
            if not value >> bit & 1 or bit in NOT_TRIED[leaf, register]:
                continue
            code = INSTRUCTIONS[leaf, register, bit]  # KeyError: a bit is shown that nobody tried
            trial = PvGuest(bytes.fromhex(code + "cd21"))
            trial.vcpu.regs.cr4 |= 1 << 16  # FSGSBASE, as a guest that uses the feature sets it
            trial.vcpu.regs.rsi = trial.vcpu.regs.rdi = 0x30000
            trial.run()
            assert trial.traps.seen[0][:2] == ("trap", Trap(0x21, 0, True)), (leaf, register, bit)


@pytest.mark.parametrize(
    ("leaf", "register", "bit"),
    [(1, ECX, 3), (1, ECX, 12), (1, ECX, 17), (1, ECX, 21), (1, ECX, 24), (1, ECX, 28), (1, ECX, 29), (7, EBX, 5),
     (7, EBX, 10), (7, EBX, 18), (7, EBX, 19), (7, EBX, 20), (7, EBX, 23), (7, EBX, 24), (7, EBX, 29), (7, ECX, 16),
     (0x80000001, ECX, 2)],
)  # fmt: skip
def test_hidden(leaf: int, register: int, bit: int) -> None:
    """Even a library that showed them all would not get these past the mask."""
    from domains.vcpu.features import usable

    shown = usable(leaf, 0, (0xFFFFFFFF,) * 4)
    assert not shown[register] >> bit & 1


def test_xsave_leaf() -> None:
    """XCR0 has x87 and SSE, the area 576 bytes, no further components."""
    vcpu = PvGuest().vcpu
    assert vcpu.native_cpuid(0xD, 0) == (3, 0x240, 0x240, 0)
    assert vcpu.native_cpuid(0xD, 2) == (0, 0, 0, 0)


def test_selfcheck_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that is pinned passes; a work-around that stops working is named."""
    selfcheck.check()
    monkeypatch.setattr(
        selfcheck, "CHECKS", (("gravity holds", lambda: False), ("HVM: light shines", lambda: False))
    )
    with pytest.raises(UnknownUnicorn, match=r"gravity holds; HVM: light"):
        selfcheck.check()
    with pytest.raises(UnknownUnicorn, match=r"gravity holds$"):
        selfcheck.check(hvm=False)


def test_single_step() -> None:
    """TF: #DB after each instruction, RIP at the next."""
    guest = PvGuest(bytes.fromhex("90 48ffc3 90"))
    guest.vcpu.regs.rflags = 0x302
    guest.run()
    guest.run()
    assert [(what, rip) for _, what, rip in guest.traps.seen] == [
        (Trap(1, 0, False), 0x10001),
        (Trap(1, 0, False), 0x10004),
    ]


def test_fast_string_copies_are_not_promised() -> None:
    """A step of REP MOVSB takes as long here as one of REP MOVSQ: a guest that sees ERMS copies eight times as slowly."""
    assert not CpuidPolicy(1).query(7, 0, 0)[1] & 1 << 9
    assert not usable(7, 0, (0, 0xFFFFFFFF, 0, 0))[1] & 1 << 9
