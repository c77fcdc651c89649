"""drivers/pc/acpi_pm: timer, events and SCI, S5, the block's place, general purpose events."""

from __future__ import annotations

import pytest

from drivers.pc.acpi_pm import FREQUENCY, AcpiPm
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.pci import PciBus
from drivers.pc.system import ResetControl
from tests.unit.pc.pc_rig import SECOND, Time, Wire

BASE = 0xB000


class Power:
    """The function, its block at 0xB000."""

    def __init__(self) -> None:
        self.time, self.sci = Time(SECOND), Wire()
        self.slept: list[int] = []
        self.ports = PortSpace()
        self.pm = AcpiPm(self.time, self.sci, self.slept.append)
        bus = PciBus(self.ports, MmioSpace(), lambda *pin: None, ResetControl(lambda hard: None))
        bus.attach()
        bus.add(1, 3, self.pm)
        self.pm.attach(self.ports)
        self.config(0x40, BASE | 1)
        self.config(0x80, 1)

    def config(self, offset: int, value: int) -> None:
        self.ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | 3 << 8 | offset)
        self.ports.write(0xCFC, 4, value)

    def word(self, offset: int) -> int:
        return self.ports.read(BASE + offset, 2)

    def set(self, offset: int, value: int) -> None:
        self.ports.write(BASE + offset, 2, value)


@pytest.fixture
def power() -> Power:
    return Power()


def test_the_timer_runs_at_its_frequency_and_wraps(power: Power) -> None:
    first = power.ports.read(BASE + 8, 4)
    power.time.ns += SECOND
    assert power.ports.read(BASE + 8, 4) - first == FREQUENCY
    power.time.ns = SECOND * (1 << 32) // FREQUENCY + 1000
    assert power.ports.read(BASE + 8, 4) < 10


def test_the_timers_event(power: Power) -> None:
    power.set(2, 1)
    half = (1 << 31) * SECOND // FREQUENCY
    assert power.pm.next_deadline() == pytest.approx(half, abs=2)
    assert power.time.run(half + SECOND, power.pm) == 1
    assert power.sci.level
    assert power.word(0) == 1
    power.set(0, 1)
    assert not power.sci.level
    assert power.pm.next_deadline() == pytest.approx(2 * half, abs=2)


def test_the_power_button(power: Power) -> None:
    power.pm.press_power_button()
    assert not power.sci.level
    power.set(2, 0x0100)
    assert power.sci.level
    assert power.word(0) == 0x0100
    power.ports.write(BASE + 1, 1, 1)
    assert (power.sci.level, power.word(0)) == (False, 0)


def test_without_sci_en_there_is_no_interrupt(power: Power) -> None:
    assert power.word(4) & 1, "ACPI mode from the start"
    power.set(2, 0x0100)
    power.pm.press_power_button()
    power.ports.write(0xB2, 1, 0xF0)
    assert (power.sci.level, power.word(4) & 1) == (False, 0)
    power.ports.write(0xB2, 1, 0xF1)
    assert power.sci.level
    assert power.ports.read(0xB2, 1) == 0xF1


def test_linux_powers_off(power: Power) -> None:
    """acpi_hw_legacy_sleep: SLP_TYP first, then SLP_TYP with SLP_EN."""
    power.set(4, 1)
    assert power.slept == []
    power.set(4, 1 | 1 << 13)
    assert power.slept == [0]
    assert not power.word(4) & 1 << 13
    power.set(4, 1 | 2 << 10 | 1 << 13)
    assert power.slept == [0, 2]


def test_a_byte_write_can_sleep_too(power: Power) -> None:
    power.ports.write(BASE + 5, 1, 0x20)
    assert power.slept == [0]


def test_the_block_moves_and_goes(power: Power) -> None:
    power.config(0x40, 0x4001)
    assert power.word(4) == 0xFFFF
    assert power.ports.read(0x4004, 2) == 1
    power.config(0x80, 0)
    assert power.ports.read(0x4004, 2) == 0xFFFF


def test_general_purpose_events(power: Power) -> None:
    power.pm.raise_gpe(1)
    assert power.ports.read(0xAFE0, 2) == 2
    assert not power.sci.level
    power.ports.write(0xAFE2, 2, 0x0002)
    assert power.sci.level
    power.ports.write(0xAFE0, 2, 0x0002)
    assert not power.sci.level
    assert power.ports.read(0xAFE0, 4) == 0x0002_0000


def test_wide_and_odd_accesses(power: Power) -> None:
    power.ports.write(BASE, 4, 0x0121_0000)
    assert power.ports.read(BASE, 4) == 0x0121_0000
    assert power.ports.read(BASE + 2, 1) == 0x21
    assert power.ports.read(BASE + 0x20, 4) == 0


def test_reset(power: Power) -> None:
    power.set(2, 0x0100)
    power.pm.press_power_button()
    power.pm.reset()
    assert not power.sci.level
    assert power.word(0) == 0xFFFF, "the block has no place again"
