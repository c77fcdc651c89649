"""The local APIC by itself: priorities, timer, addressing of interprocessor interrupts, x2APIC's rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.hvm import lapic as la
from domains.hvm.lapic import Ipi, LocalApic, RegisterFault


class Clock:
    def __init__(self) -> None:
        self.now = 0


def make(number: int = 0) -> tuple[LocalApic, Clock, list[Ipi]]:
    clock, sent = Clock(), list[Ipi]()
    apic = LocalApic(number, lambda: clock.now, lambda sender, ipi: sent.append(ipi))
    apic.write(la.SVR, 0x1FF)
    return apic, clock, sent


def test_a_higher_vector_interrupts_a_lower_one_and_not_its_own_class() -> None:
    apic, _, _ = make()
    apic.accept(0x41)
    assert apic.pending() == 0x41
    apic.taken(0x41)
    apic.accept(0x42)
    assert apic.pending() is None  # same class as the one in service
    apic.accept(0x51)
    assert apic.pending() == 0x51
    apic.taken(0x51)
    apic.end_of_interrupt()
    assert apic.pending() is None  # 0x41 is still in service
    apic.end_of_interrupt()
    assert apic.pending() == 0x42


def test_the_task_priority_holds_back_its_class_and_those_below() -> None:
    apic, _, _ = make()
    apic.accept(0x45)
    apic.write(la.TPR, 0x40)
    assert apic.pending() is None
    apic.write(la.TPR, 0x3F)
    assert apic.pending() == 0x45


def test_disabled_by_software_it_takes_nothing_but_xens_upcall() -> None:
    apic, _, _ = make()
    apic.write(la.SVR, 0xFF)
    assert not apic.accept(0x50)
    assert apic.accept(0x60, always=True)
    assert apic.pending() is None
    enabled: list[LocalApic] = []
    apic.software_enabled = enabled.append
    apic.write(la.SVR, 0x1FF)
    assert apic.pending() == 0x60
    assert enabled == [apic]


def test_local_vectors_are_masked_while_it_is_disabled() -> None:
    apic, _, _ = make()
    apic.write(la.SVR, 0xFF)
    apic.write(la.LVT_TIMER, 0x30)
    assert apic.read(la.LVT_TIMER) == 0x10030


def test_one_shot_timer() -> None:
    apic, clock, _ = make()
    apic.write(la.LVT_TIMER, 0x30)
    apic.write(la.TIMER_DIVIDE, 0xB)  # by 1: 10 ns
    apic.write(la.TIMER_INITIAL, 100)
    clock.now = 400
    assert apic.read(la.TIMER_CURRENT) == 60
    assert not apic.expire(clock.now)
    clock.now = 1000
    assert apic.expire(clock.now)
    assert apic.pending() == 0x30
    assert apic.deadline is None
    assert apic.read(la.TIMER_CURRENT) == 0


def test_periodic_timer_keeps_its_grid_and_makes_up_for_nothing() -> None:
    apic, clock, _ = make()
    apic.write(la.LVT_TIMER, 0x20030)
    apic.write(la.TIMER_INITIAL, 50)  # divide by 2: 20 ns a count
    clock.now = 3500
    assert apic.expire(clock.now)
    assert apic.deadline == 4000


@pytest.mark.parametrize(
    ("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_timer_divisors(code: int, divisor: int) -> None:
    apic, _, _ = make()
    apic.write(la.TIMER_DIVIDE, code)
    apic.write(la.TIMER_INITIAL, 3)
    assert apic.deadline == 30 * divisor


def test_destinations() -> None:
    apics = [make(n)[0] for n in range(4)]
    for apic in apics:
        apic.write(la.LDR, 1 << 24 + apic.number)

    def targets(**fields: Any) -> list[int]:
        ipi = Ipi(0x40, la.FIXED, False, True, 0, 0, False)._replace(**fields)
        return [a.number for a in apics if a.is_target(ipi, apics[1])]

    assert targets(destination=4) == [2]  # physical: the APIC's number is twice the vCPU's
    assert targets(destination=0xFF) == [0, 1, 2, 3]
    assert targets(logical=True, destination=0b1010) == [1, 3]
    assert targets(shorthand=1) == [1]
    assert targets(shorthand=2) == [0, 1, 2, 3]
    assert targets(shorthand=3) == [0, 2, 3]


def test_icr_in_both_modes() -> None:
    apic, _, sent = make()
    apic.write(la.ICR2, 6 << 24)
    apic.write(la.ICR, 0x4500)
    assert sent[-1] == Ipi(0, la.INIT, False, True, 0, 6, False)
    apic.write_base(apic.base | la.BASE_X2APIC)
    apic.write_msr(0x830, 6 << 32 | 0x4609)
    assert sent[-1] == Ipi(9, la.STARTUP, False, True, 0, 6, True)
    assert apic.read_msr(0x830) == 6 << 32 | 0x4609
    apic.write_msr(0x83F, 0x77)
    assert sent[-1].shorthand == 1
    assert sent[-1].vector == 0x77


def test_an_illegal_vector_is_an_error_and_not_sent() -> None:
    apic, _, sent = make()
    apic.write(la.ICR, 0x4005)
    assert sent == []
    apic.write(la.ESR, 0)
    assert apic.read(la.ESR) == la.ESR_SEND_ILLEGAL


def test_an_illegal_error_vector_is_an_error_too_and_has_no_end() -> None:
    """XSA-462: the error of the error interrupt is recorded, and is not sent in its turn."""
    apic, _, sent = make()
    apic.write(0x370, 0xF)
    apic.write(la.ICR, 0x4005)
    assert sent == []
    assert apic.pending() is None
    apic.write(la.ESR, 0)
    assert apic.read(la.ESR) == la.ESR_SEND_ILLEGAL | la.ESR_RECEIVE_ILLEGAL


@pytest.mark.parametrize(
    ("index", "value"),
    [(0x802, 0), (0x80B, 1), (0x808, 0x100), (0x80E, 0), (0x831, 0), (0x832, 1 << 32), (0x8FF, 0)],
)
def test_x2apic_writes_that_fault(index: int, value: int) -> None:
    apic, _, _ = make()
    apic.write_base(apic.base | la.BASE_X2APIC)
    with pytest.raises(RegisterFault):
        apic.write_msr(index, value)


def test_x2apic_registers_fault_in_xapic_mode() -> None:
    apic, _, _ = make()
    with pytest.raises(RegisterFault):
        apic.read_msr(0x802)


@pytest.mark.parametrize("bits", [la.BASE_X2APIC, la.BASE_ENABLE | 0x1000])
def test_base_values_that_fault(bits: int) -> None:
    apic, _, _ = make()
    with pytest.raises(RegisterFault):
        apic.write_base(la.APIC_BASE | bits)


def test_x2apic_is_left_only_by_disabling() -> None:
    apic, _, _ = make()
    apic.write_base(apic.base | la.BASE_X2APIC)
    with pytest.raises(RegisterFault):
        apic.write_base(apic.base & ~la.BASE_X2APIC)
    apic.write_base(la.APIC_BASE)
    assert not apic.hardware_enabled
    assert apic.pending() is None


@given(st.lists(st.one_of(st.integers(16, 255), st.just(-1), st.just(-2)), max_size=80), st.integers(0, 255))
def test_what_is_pending_always_outranks_what_is_in_service(steps: list[int], tpr: int) -> None:
    apic, _, _ = make()
    apic.write(la.TPR, tpr)
    for step in steps:
        if step >= 0:
            apic.accept(step)
        elif step == -1:
            vector = apic.pending()
            if vector is not None:
                assert vector >> 4 > apic.ppr >> 4
                apic.taken(vector)
                assert apic.isr.bit_length() - 1 == vector  # the newest is the highest
        else:
            apic.end_of_interrupt()
        assert apic.ppr >> 4 >= tpr >> 4
