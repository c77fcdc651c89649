"""drivers/pc/rtc: time in each format, setting it as Linux does, alarm, periodic and update interrupts, firmware's bytes."""

from __future__ import annotations

import calendar

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.rtc import Rtc, cmos_for_firmware
from tests.unit.pc.pc_rig import MS, SECOND, Time, Wire

DATE = calendar.timegm((2024, 2, 29, 23, 59, 57))


class Clock:
    """The clock behind its ports; guest time starts at 5 s."""

    def __init__(self, date: int = DATE) -> None:
        self.time = Time(5 * SECOND)
        self.irq = Wire()
        self.rtc = Rtc(self.time, self.irq, date - 5)
        self.ports = PortSpace()
        self.rtc.attach(self.ports)

    def get(self, register: int) -> int:
        self.ports.write(0x70, 1, register)
        return self.ports.read(0x71, 1)

    def set(self, register: int, value: int) -> None:
        self.ports.write(0x70, 1, register)
        self.ports.write(0x71, 1, value)

    def date(self) -> list[int]:
        return [self.get(r) for r in (0x32, 9, 8, 7, 4, 2, 0)]

    def run(self, seconds: float) -> int:
        return self.time.run(self.time.ns + round(seconds * SECOND), self.rtc)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_time_is_bcd_and_goes_over_a_leap_day(clock: Clock) -> None:
    assert clock.date() == [0x20, 0x24, 2, 0x29, 0x23, 0x59, 0x57]
    assert clock.get(6) == 5, "a Thursday; Sunday is 1"
    clock.time.ns += 3 * SECOND
    assert clock.date() == [0x20, 0x24, 3, 1, 0, 0, 0]
    assert clock.get(6) == 6


def test_binary_and_twelve_hours(clock: Clock) -> None:
    clock.set(0xB, 0x04)
    assert clock.get(4) == 0x80 | 11
    clock.time.ns += 3 * SECOND
    assert (clock.get(4), clock.get(7), clock.get(9)) == (12, 1, 24)
    clock.set(0xB, 0)
    assert clock.get(4) == 0x12
    clock.time.ns += 13 * 3600 * SECOND
    assert clock.get(4) == 0x81


@pytest.mark.parametrize("mode", [0, 2, 4, 6])
def test_linux_sets_the_clock(mode: int) -> None:
    """mc146818_set_time: SET, divider reset, fields, SET off, divider on: the first second is half a second long."""
    clock = Clock()
    clock.set(0xB, mode)
    clock.set(0xB, mode | 0x80)
    clock.set(0xA, 0x66)
    binary = lambda n: n if mode & 4 else n // 10 << 4 | n % 10  # noqa: E731
    hour = binary(15) if mode & 2 else 0x80 | binary(3)
    for register, value in (
        (9, binary(31)),
        (8, binary(7)),
        (7, binary(4)),
        (4, hour),
        (2, binary(5)),
        (0, binary(9)),
        (0x32, binary(20)),
    ):
        clock.set(register, value)
    clock.time.ns += 7 * SECOND
    assert clock.get(0) == binary(9), "it stands"
    clock.set(0xB, mode)
    assert clock.get(0) == binary(9)
    clock.set(0xA, 0x26)
    assert clock.rtc.seconds == calendar.timegm((2031, 7, 4, 15, 5, 9))
    clock.time.ns += SECOND // 2 - MS
    assert clock.rtc.seconds == calendar.timegm((2031, 7, 4, 15, 5, 9))
    clock.time.ns += 2 * MS
    assert clock.rtc.seconds == calendar.timegm((2031, 7, 4, 15, 5, 10))
    assert clock.get(4) == hour


def test_update_in_progress_is_just_before_the_second(clock: Clock) -> None:
    assert not clock.get(0xA) & 0x80
    clock.time.ns += SECOND - 200_000
    assert clock.get(0xA) & 0x80
    clock.time.ns += 200_000
    assert not clock.get(0xA) & 0x80
    clock.set(0xB, 0x82)
    clock.time.ns += SECOND - 100_000
    assert not clock.get(0xA) & 0x80


def test_update_interrupts_come_once_a_second(clock: Clock) -> None:
    clock.set(0xB, 0x12)
    seen = []
    for _ in range(3):
        assert clock.run(1.0) == 1
        seen.append(clock.get(0xC) & 0x90)
    assert seen == [0x90] * 3
    assert clock.irq.rises == 3
    clock.run(0.5)
    clock.set(0xB, 0x02)
    assert clock.run(5) == 0
    assert clock.get(0xC) & 0x90 == 0x10, "the flag is there without the interrupt"


def test_an_interrupt_that_is_not_read_stays_and_asks_for_nothing(clock: Clock) -> None:
    clock.set(0xB, 0x12)
    assert clock.run(10) == 1
    assert clock.irq.level
    assert clock.rtc.next_deadline() is None
    assert clock.get(0xC) & 0x90 == 0x90
    assert not clock.irq.level
    assert clock.get(0xC) == 0


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (15, 2)])
def test_periodic_interrupts(clock: Clock, rate: int, hertz: int) -> None:
    clock.set(0xA, 0x20 | rate)
    clock.set(0xB, 0x42)
    clock.get(0xC)
    start, count = clock.time.ns, 0
    while clock.rtc.next_deadline() is not None and clock.rtc.next_deadline() <= start + SECOND:  # type: ignore[operator]
        clock.time.ns = clock.rtc.next_deadline() or 0
        clock.rtc.expire(clock.time.ns)
        assert clock.get(0xC) & 0xC0 == 0xC0
        count += 1
    assert count == hertz


def test_rate_0_is_none(clock: Clock) -> None:
    clock.set(0xA, 0x20)
    clock.set(0xB, 0x42)
    assert clock.rtc.next_deadline() is None


@pytest.mark.parametrize(
    ("alarm", "after"),
    [
        ((0x23, 0x59, 0x59), 2),
        ((0x00, 0x00, 0x01), 4),
        ((0x23, 0x59, 0x57), 86_400),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xFF, 0xFF, 0x10), 13),
        ((0xFF, 0x30, 0x00), 1803),
        ((0xFF, 0x59, 0xC0), 1),
        ((0x12, 0xFF, 0x30), 43_233),
    ],
)
def test_alarms(clock: Clock, alarm: tuple[int, int, int], after: int) -> None:
    clock.set(0xB, 0x02)
    for register, value in zip((5, 3, 1), alarm, strict=True):
        clock.set(register, value)
    clock.get(0xC)
    clock.set(0xB, 0x22)
    start = clock.time.ns
    assert clock.run(2 * 86_400) == 1
    clock.time.ns = start + after * SECOND - 1
    again = Clock()
    for register, value in ((0xB, 2), *zip((5, 3, 1), alarm, strict=True), (0xB, 0x22)):
        again.set(register, value)
    assert again.rtc.next_deadline() == start + after * SECOND


def test_an_alarm_that_cannot_be_never_comes(clock: Clock) -> None:
    clock.set(5, 0x45)
    clock.set(0xB, 0x22)
    assert clock.rtc.next_deadline() is None


def test_an_alarm_is_flagged_without_its_interrupt(clock: Clock) -> None:
    for register, value in ((5, 0), (3, 0), (1, 1)):
        clock.set(register, value)
    clock.get(0xC)
    clock.time.ns += 10 * SECOND
    assert clock.get(0xC) & 0x30 == 0x30


def test_impossible_dates_do_no_harm() -> None:
    for value in (0, 0x99, 0xFF):
        clock = Clock()
        for register in range(10):
            clock.set(register, value)
        clock.set(0x32, value)
        clock.set(0xB, 0x80)
        for register in range(10):
            clock.set(register, value)
        clock.set(0x32, value)
        clock.set(0xB, 0x72)
        clock.run(0.01)
        clock.date()


def test_memory_and_registers_that_only_read(clock: Clock) -> None:
    clock.set(0x0F, 5)
    clock.set(0x8E, 0xAA)
    assert (clock.get(0x0F), clock.get(0x0E)) == (5, 0xAA)
    assert not clock.rtc.nmi_masked
    clock.set(0x80 | 0x40, 1)
    assert clock.rtc.nmi_masked
    clock.set(0xD, 0)
    clock.set(0xC, 0xFF)
    assert (clock.get(0xD), clock.get(0xC) & 0x80) == (0x80, 0)
    assert clock.ports.read(0x70, 1) == 0xFF
    clock.rtc.reset()
    assert clock.get(0x0F) == 5


def test_reset_ends_interrupts(clock: Clock) -> None:
    clock.set(0xB, 0x12)
    clock.run(1.5)
    assert clock.irq.level
    clock.rtc.reset()
    assert not clock.irq.level
    assert clock.rtc.next_deadline() is None
    assert clock.get(0xC) == 0


def test_what_firmware_finds(clock: Clock) -> None:
    cmos_for_firmware(clock.rtc.memory, low_memory=256 << 20, high_memory=3 << 32, boot="dc", vcpus=2)
    assert clock.get(0x15) | clock.get(0x16) << 8 == 640
    assert clock.get(0x34) << 16 | clock.get(0x35) << 24 == (256 - 16) << 20
    assert clock.get(0x5B) << 16 | clock.get(0x5C) << 24 | clock.get(0x5D) << 32 == 3 << 32
    assert (clock.get(0x3D), clock.get(0x38), clock.get(0x5F)) == (0x23, 1, 1)
    cmos_for_firmware(clock.rtc.memory, low_memory=8 << 20, high_memory=0, boot="nca", vcpus=1)
    assert (clock.get(0x34), clock.get(0x17) | clock.get(0x18) << 8) == (0, 7 << 10)
    assert (clock.get(0x3D), clock.get(0x38)) == (0x24, 0x11)
    for bad in ("x", "cdna"):
        with pytest.raises(ValueError, match="boot order"):
            cmos_for_firmware(clock.rtc.memory, low_memory=8 << 20, high_memory=0, boot=bad, vcpus=1)


def test_who_sets_the_machines_clock_moves_this_one(clock: Clock) -> None:
    """Backwards, too; but not one that software is setting."""
    clock.rtc.shift(3)
    assert clock.date() == [0x20, 0x24, 3, 1, 0, 0, 0]
    clock.rtc.shift(-86_400)
    assert clock.date()[1:] == [0x24, 2, 0x29, 0, 0, 0]
    clock.set(0xB, 0x82)
    clock.rtc.shift(3600)
    clock.set(0xB, 0x02)
    assert clock.date()[1:] == [0x24, 2, 0x29, 0, 0, 0]
