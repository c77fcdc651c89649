"""drivers/pc/pit: each mode, latches, read-back, gate and port 0x61, interrupts of counter 0, as Linux and SeaBIOS program it."""

from __future__ import annotations

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.pit import FREQUENCY, MIN_PERIOD, Pit
from tests.unit.pc.pc_rig import MS, SECOND, Time, Wire

TICK = SECOND / FREQUENCY


class Timer:
    """The timer behind its ports."""

    def __init__(self) -> None:
        self.time = Time(1_000_000_007)
        self.irq = Wire()
        self.pit = Pit(self.time, self.irq)
        self.ports = PortSpace()
        self.pit.attach(self.ports)

    def out(self, *pairs: tuple[int, int]) -> None:
        for port, value in pairs:
            self.ports.write(port, 1, value)

    def word(self, number: int, mode: int, count: int, bcd: int = 0) -> None:
        self.out(
            (0x43, number << 6 | 0x30 | mode << 1 | bcd),
            (0x40 + number, count & 0xFF),
            (0x40 + number, count >> 8),
        )

    def ticks(self, number: float) -> None:
        self.time.ns += round(number * TICK)

    def latched(self, number: int) -> int:
        self.out((0x43, number << 6))
        return self.ports.read(0x40 + number, 1) | self.ports.read(0x40 + number, 1) << 8

    def status(self, number: int) -> int:
        self.out((0x43, 0xE0 | 2 << number))
        return self.ports.read(0x40 + number, 1)

    def gate(self, level: bool) -> None:
        self.out((0x61, int(level)))

    @property
    def out2(self) -> bool:
        return bool(self.ports.read(0x61, 1) & 0x20)


@pytest.fixture
def timer() -> Timer:
    return Timer()


def test_the_bios_tick_is_18_2_hz(timer: Timer) -> None:
    timer.word(0, 2, 0)
    start = timer.time.ns
    assert timer.time.run(start + 10 * SECOND, timer.pit) == 182
    assert timer.irq.rises == 182
    assert timer.pit.missed == 0


def test_mode_2_counts_down_and_reloads(timer: Timer) -> None:
    timer.word(0, 2, 1000)
    timer.ticks(1.5)
    assert timer.latched(0) == 999
    timer.ticks(998)
    assert timer.latched(0) == 1
    timer.ticks(1)
    assert timer.latched(0) == 1000


def test_mode_3_is_square_and_counts_by_two(timer: Timer) -> None:
    timer.gate(True)
    timer.word(2, 3, 100)
    timer.ticks(10.5)
    assert timer.latched(2) == 80
    assert timer.out2
    timer.ticks(40)
    assert not timer.out2
    timer.ticks(50)
    assert timer.out2


def test_an_odd_square_wave_is_high_one_clock_longer(timer: Timer) -> None:
    timer.gate(True)
    timer.word(2, 3, 5)
    levels = []
    timer.ticks(0.5)
    for _ in range(10):
        levels.append(timer.out2)
        timer.ticks(1)
    assert levels == [True, True, True, False, False] * 2


def test_linux_calibrates_with_counter_2(timer: Timer) -> None:
    """pit_calibrate_tsc: gate on, speaker off, mode 0, count; then bit 5 of port 0x61 is polled."""
    timer.out((0x61, timer.ports.read(0x61, 1) & ~2 | 1))
    timer.word(2, 0, FREQUENCY // 20)
    assert not timer.out2
    timer.ticks(FREQUENCY // 20 - 2)
    assert not timer.out2
    timer.ticks(3)
    assert timer.out2


def test_linux_quick_calibration_reads_the_high_byte(timer: Timer) -> None:
    """quick_pit_calibrate: mode 0 with 0xffff, then the unlatched count, low and high byte in turn."""
    timer.gate(True)
    timer.word(2, 0, 0xFFFF)
    timer.ticks(2)
    seen = []
    for _ in range(4):
        timer.ticks(256)
        timer.ports.read(0x42, 1)
        seen.append(timer.ports.read(0x42, 1))
    assert seen == [0xFE, 0xFD, 0xFC, 0xFB]


def test_seabios_waits_with_counter_2(timer: Timer) -> None:
    """tsctimer_setup in older versions: mode 0, one-byte access is not used; a write of half a count stops OUT low."""
    timer.gate(True)
    timer.word(2, 0, 10)
    timer.ticks(20)
    assert timer.out2
    timer.out((0x42, 5))
    assert not timer.out2
    timer.ticks(100)
    assert not timer.out2, "the count is not complete"
    timer.out((0x42, 0))
    timer.ticks(6)
    assert timer.out2


def test_mode_0_interrupts_once_and_goes_on_below_zero(timer: Timer) -> None:
    timer.word(0, 0, 1193)
    assert timer.pit.next_deadline() == pytest.approx(timer.time.ns + MS, abs=1000)
    assert timer.time.run(timer.time.ns + SECOND // 100, timer.pit) == 1
    assert timer.irq.level, "OUT stays high"
    assert timer.pit.next_deadline() is None
    timer.word(0, 0, 1193)
    assert not timer.irq.level
    timer.ticks(1200.5)
    assert timer.latched(0) == 0x10000 - 7


def test_linux_one_shot_is_mode_4(timer: Timer) -> None:
    timer.out((0x43, 0x38))
    for count in (2000, 5000):
        timer.out((0x40, count & 0xFF), (0x40, count >> 8))
        start = timer.time.ns
        assert timer.time.run(start + 20 * MS, timer.pit) == 1
    assert timer.irq.rises == 2


def test_switching_the_timer_off_as_linux_does(timer: Timer) -> None:
    timer.word(0, 2, 1193)
    timer.out((0x43, 0x30), (0x40, 0), (0x40, 0))
    assert timer.time.run(timer.time.ns + 50 * MS, timer.pit) == 0
    assert not timer.irq.level


def test_mode_1_is_triggered_by_the_gate(timer: Timer) -> None:
    timer.word(2, 1, 100)
    timer.ticks(200)
    assert timer.out2
    timer.gate(True)
    timer.ticks(50.5)
    assert not timer.out2
    timer.gate(False)
    timer.gate(True)
    timer.ticks(60)
    assert not timer.out2, "triggered again"
    timer.ticks(50)
    assert timer.out2


def test_mode_5_strobes_after_its_trigger(timer: Timer) -> None:
    timer.word(2, 5, 10)
    timer.ticks(100)
    assert timer.out2
    timer.gate(True)
    levels = []
    timer.ticks(8.5)
    for _ in range(4):
        levels.append(timer.out2)
        timer.ticks(1)
    assert levels == [True, True, False, True]


def test_the_gate_stops_mode_0_and_restarts_mode_2(timer: Timer) -> None:
    timer.gate(True)
    timer.word(2, 0, 100)
    timer.ticks(40.5)
    timer.gate(False)
    timer.ticks(1000)
    assert timer.latched(2) == 60
    timer.gate(True)
    timer.ticks(59)
    assert not timer.out2
    timer.ticks(2)
    assert timer.out2
    timer.word(2, 2, 100)
    timer.ticks(30)
    timer.gate(False)
    assert timer.out2
    timer.gate(True)
    timer.ticks(0.5)
    assert timer.latched(2) == 100


def test_a_new_count_waits_for_the_end_of_the_cycle(timer: Timer) -> None:
    timer.word(0, 2, 1000)
    timer.ticks(400.5)
    timer.out((0x40, 2000 & 0xFF), (0x40, 2000 >> 8))
    assert timer.status(0) & 0x40, "null count"
    assert timer.latched(0) == 600
    timer.ticks(600)
    assert timer.latched(0) == 2000
    assert not timer.status(0) & 0x40


def test_read_back_latches_status_and_count_of_several(timer: Timer) -> None:
    timer.gate(True)
    timer.word(0, 2, 500)
    timer.word(2, 0, 300)
    timer.ticks(100.5)
    timer.out((0x43, 0xC0 | 2 | 8))
    timer.ticks(50)
    assert timer.ports.read(0x40, 1) == 0x80 | 0x30 | 2 << 1
    assert timer.ports.read(0x40, 1) | timer.ports.read(0x40, 1) << 8 == 400
    assert timer.ports.read(0x42, 1) == 0x30
    assert timer.ports.read(0x42, 1) | timer.ports.read(0x42, 1) << 8 == 200


def test_a_second_latch_is_ignored_until_the_first_is_read(timer: Timer) -> None:
    timer.word(0, 2, 5000)
    timer.ticks(100.5)
    timer.out((0x43, 0))
    timer.ticks(100)
    assert timer.latched(0) == 4900
    assert timer.latched(0) == 4800


def test_one_byte_accesses(timer: Timer) -> None:
    timer.out((0x43, 0x14), (0x40, 200))  # low byte, mode 2
    timer.ticks(10.5)
    assert timer.ports.read(0x40, 1) == 190
    assert timer.ports.read(0x40, 1) == 190
    timer.out((0x43, 0x24), (0x40, 2))  # high byte
    timer.ticks(1.5)
    assert timer.ports.read(0x40, 1) == 1


def test_bcd(timer: Timer) -> None:
    timer.word(0, 2, 0x1000, bcd=1)
    timer.ticks(1.5)
    assert timer.latched(0) == 0x0999
    timer.word(0, 2, 0, bcd=1)
    timer.ticks(1.5)
    assert timer.latched(0) == 0x9999


def test_modes_6_and_7_are_2_and_3(timer: Timer) -> None:
    timer.word(0, 6, 100)
    assert timer.status(0) & 0xE == 2 << 1
    timer.word(0, 7, 100)
    assert timer.status(0) & 0xE == 3 << 1


def test_the_refresh_bit_toggles_and_the_speaker_sounds(timer: Timer) -> None:
    seen = set()
    for _ in range(8):
        seen.add(timer.ports.read(0x61, 1) & 0x10)
        timer.time.ns += 15_085
    assert seen == {0, 0x10}
    assert timer.pit.speaker == 0
    timer.word(2, 3, 1193)
    timer.out((0x61, 3))
    assert timer.pit.speaker == 1000


def test_late_periods_are_one_interrupt_and_short_ones_are_not_a_storm(timer: Timer) -> None:
    timer.word(0, 2, 11932)  # 10 ms
    timer.time.ns += 105 * MS
    timer.pit.expire(timer.time.ns)
    assert timer.irq.rises == 1
    assert timer.pit.missed == 9
    assert timer.pit.next_deadline() == pytest.approx(timer.time.ns + 5 * MS, abs=10_000)
    timer.word(0, 2, 2)
    assert timer.time.run(timer.time.ns + 10 * MS, timer.pit) <= 10 * MS // MIN_PERIOD + 1


def test_after_reset_nothing_ticks(timer: Timer) -> None:
    timer.word(0, 2, 1000)
    timer.pit.reset()
    assert timer.pit.next_deadline() is None
    assert not timer.out2 or timer.ports.read(0x61, 1) & 1 == 0
