"""drivers/pc/ioapic and hpet: registers, delivery, level and edge, EOI; the timer as Linux programs it."""

from __future__ import annotations

import pytest

from drivers.pc.bus import MmioSpace
from drivers.pc.hpet import MIN_PERIOD, Hpet
from drivers.pc.ioapic import EXTINT, FIXED, LOWEST, IoApic, Message, decode_msi
from tests.unit.pc.pc_rig import MS, SECOND, Time

BASE = 0xFEC0_0000
TIMER = 0xFED0_0000


class Apic:
    """The I/O APIC behind its page."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.apic = IoApic(self.sent.append)
        self.mmio = MmioSpace()
        self.apic.attach(self.mmio)

    def get(self, index: int) -> int:
        self.mmio.write(BASE, 4, index)
        return self.mmio.read(BASE + 0x10, 4)

    def set(self, index: int, value: int) -> None:
        self.mmio.write(BASE, 4, index)
        self.mmio.write(BASE + 0x10, 4, value)

    def route(self, number: int, low: int, destination: int = 0) -> None:
        """Linux writes the high half first."""
        self.set(0x11 + 2 * number, destination << 24)
        self.set(0x10 + 2 * number, low)


@pytest.fixture
def apic() -> Apic:
    return Apic()


def test_identity(apic: Apic) -> None:
    assert apic.get(1) == 47 << 16 | 0x11
    assert apic.get(0) == 1 << 24
    apic.set(0, 0x0F00_0000)
    assert (apic.get(0), apic.get(2)) == (0x0F00_0000, 0x0F00_0000)
    assert apic.get(0x10) == 0x10000
    assert apic.get(0x10 + 96) == 0
    assert apic.mmio.read(BASE, 4) == 0x70
    assert apic.mmio.read(BASE + 0x20, 4) == 0
    assert apic.mmio.read(BASE + 0x12, 1) == 0


def test_edges(apic: Apic) -> None:
    apic.apic.set_input(4, True)
    apic.apic.set_input(4, False)
    apic.route(4, 0x34, 2)
    assert apic.sent == [], "a masked edge is lost"
    apic.apic.set_input(4, True)
    apic.apic.set_input(4, True)
    assert apic.sent == [Message(0x34, FIXED, False, False, 2)]
    apic.apic.set_input(4, False)
    apic.apic.set_input(4, True)
    assert len(apic.sent) == 2


def test_levels_wait_for_the_end(apic: Apic) -> None:
    apic.route(28, 0xA000 | 0x1900 | 0x51, 3)  # level, low, masked bit clear, lowest priority, logical
    apic.apic.set_input(28, True)
    assert apic.sent == [Message(0x51, LOWEST, True, True, 3)]
    assert apic.get(0x10 + 56) & 1 << 14
    apic.apic.set_input(28, False)
    apic.apic.set_input(28, True)
    assert len(apic.sent) == 1
    apic.apic.end_of_interrupt(0x52)
    assert len(apic.sent) == 1
    apic.apic.end_of_interrupt(0x51)
    assert len(apic.sent) == 2, "it still asks"
    apic.apic.set_input(28, False)
    apic.apic.end_of_interrupt(0x51)
    assert len(apic.sent) == 2
    assert not apic.get(0x10 + 56) & 1 << 14


def test_unmasking_a_level_that_asks(apic: Apic) -> None:
    apic.route(20, 0x18041)
    apic.apic.set_input(20, True)
    assert apic.sent == []
    apic.set(0x10 + 40, 0x8041)
    assert len(apic.sent) == 1
    apic.set(0x10 + 40, 0x0041)
    assert not apic.get(0x10 + 40) & 1 << 14, "edge: no remote IRR"


def test_external_interrupts_of_the_8259(apic: Apic) -> None:
    apic.route(0, 0x0700)
    apic.apic.set_input(0, True)
    assert apic.sent[0].mode == EXTINT


def test_status_bits_are_read_only_and_reset_masks(apic: Apic) -> None:
    apic.route(1, 0xFFFF_FFFF, 0xFF)
    assert (apic.get(0x12), apic.get(0x13)) == (0x1AFFF, 0xFF00_0000)
    apic.apic.reset()
    assert apic.get(0x12) == 0x10000
    apic.set(0x10 + 96, 5)


def test_msi() -> None:
    assert decode_msi(0xFEE0_2004, 0x4131) == Message(0x31, LOWEST, True, False, 2)
    assert decode_msi(0xFEE0_0000, 0xC041) == Message(0x41, FIXED, False, True, 0)
    assert decode_msi(0xFED0_0000, 0x41) is None


class Block:
    """The HPET behind its registers."""

    def __init__(self) -> None:
        self.time = Time(7 * SECOND)
        self.gsis: list[tuple[int, bool]] = []
        self.isa: list[tuple[int, bool]] = []
        self.legacy: list[bool] = []
        self.hpet = Hpet(
            self.time,
            lambda n, v: self.gsis.append((n, v)),
            lambda n, v: self.isa.append((n, v)),
            self.legacy.append,
        )
        self.mmio = MmioSpace()
        self.hpet.attach(self.mmio)

    def get(self, offset: int, size: int = 4) -> int:
        return self.mmio.read(TIMER + offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.mmio.write(TIMER + offset, size, value)

    def rises(self) -> int:
        return sum(level for _, level in self.gsis + self.isa)


@pytest.fixture
def block() -> Block:
    return Block()


def test_capabilities_and_counter(block: Block) -> None:
    assert block.get(4) == 16_000_000, "femtoseconds"
    assert block.get(0) == 0x8086_A201
    block.time.ns += SECOND
    assert block.get(0xF0) == 0, "it stands"
    block.set(0xF0, 1000)
    block.set(0x10, 1)
    block.time.ns += 1600
    assert block.get(0xF0, 8) == 1100
    block.set(0xF0, 5)
    assert block.get(0xF0) == 1100
    block.set(0x10, 0)
    block.time.ns += SECOND
    assert block.get(0xF0) == 1100


def test_linux_programs_a_periodic_tick(block: Block) -> None:
    """hpet_set_periodic: stop, counter 0, start; config with SET_VAL and 32 bits; comparator, then period."""
    block.set(0x10, 0)
    block.set(0xF0, 0)
    block.set(0xF4, 0)
    block.set(0x10, 1)
    block.set(0x100, 4 | 8 | 0x40 | 0x100)
    delta = 62_500
    block.set(0x108, block.get(0xF0) + delta)
    block.set(0x108, delta)
    block.set(0x10, 3)
    assert block.legacy == [True]
    assert block.time.run(block.time.ns + 100 * MS + 10, block.hpet) == 100
    assert block.isa == [(0, True), (0, False)] * 100
    assert block.get(0x108) == 101 * delta


def test_linux_programs_one_shots(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x120, 4 | 0x100 | 21 << 9)
    for delta in (6250, 62_500):
        block.set(0x128, block.get(0xF0) + delta & 0xFFFF_FFFF)
        start = block.time.ns
        assert block.hpet.next_deadline() == pytest.approx(start + delta * 16, abs=16)
        assert block.time.run(start + 10 * MS, block.hpet) == 1
    assert block.gsis == [(21, True), (21, False)] * 2


def test_a_32_bit_comparator_matches_again_after_a_turn(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x100, 4 | 0x100 | 20 << 9)
    block.set(0x108, 100)
    assert block.time.run(block.time.ns + (1 << 32) * 16 + MS, block.hpet) == 2
    block.set(0x100, 4 | 20 << 9)
    block.set(0x108, 50, 8)
    assert block.hpet.next_deadline() is None or block.hpet.next_deadline() > 1 << 62  # type: ignore[operator]


def test_levels_stay_until_they_are_cleared(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x100, 2 | 4 | 22 << 9)
    block.set(0x108, block.get(0xF0) + 6250, 8)
    block.time.run(block.time.ns + MS, block.hpet)
    assert (block.gsis, block.get(0x20)) == ([(22, True)], 1)
    block.set(0x20, 1)
    assert (block.gsis[-1], block.get(0x20)) == ((22, False), 0)


def test_a_level_moves_with_its_route_and_leaves_no_line_high(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x100, 2 | 4 | 22 << 9)
    block.set(0x108, block.get(0xF0) + 6250, 8)
    block.time.run(block.time.ns + MS, block.hpet)
    block.set(0x100, 2 | 4 | 23 << 9)
    assert block.gsis == [(22, True), (22, False), (23, True)]
    block.set(0x10, 3)
    assert (block.gsis[-1], block.isa) == ((23, False), [(0, True)])
    block.set(0x10, 1)
    assert (block.isa[-1], block.gsis[-1]) == ((0, False), (23, True))
    block.set(0x100, 2 | 23 << 9)
    assert block.gsis[-1] == (23, False), "its interrupt is off"
    block.set(0x20, 1)
    assert block.get(0x20) == 0


def test_storms_and_lateness_are_bounded(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x100, 4 | 8 | 0x40 | 20 << 9)
    block.set(0x108, 10, 8)
    block.set(0x108, 1, 8)
    assert block.time.run(block.time.ns + 10 * MS, block.hpet) <= 10 * MS // MIN_PERIOD + 1
    before = block.rises()
    block.time.ns += SECOND
    block.hpet.expire(block.time.ns)
    assert block.rises() == before + 1


def test_routes_that_are_not_there_go_nowhere(block: Block) -> None:
    block.set(0x10, 1)
    block.set(0x100, 4 | 3 << 9)
    block.set(0x108, block.get(0xF0) + 6250, 8)
    block.time.run(block.time.ns + MS, block.hpet)
    assert block.gsis == []
    assert block.get(0x104) == 0x00F0_0000


def test_reset(block: Block) -> None:
    block.set(0x10, 3)
    block.hpet.reset()
    assert block.legacy == [True, False]
    assert (block.get(0x10), block.get(0xF0), block.hpet.next_deadline()) == (0, 0, None)
    assert block.get(0x3F8) == 0
    block.set(0x3F8, 5)
