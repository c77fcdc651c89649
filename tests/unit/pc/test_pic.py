"""drivers/pc/pic: initialization as firmware and kernels do it, priorities, EOI forms, level triggers, cascade, spurious interrupts."""

from __future__ import annotations

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.pic import PicPair
from tests.unit.pc.pc_rig import Wire


class Pic:
    """The pair behind its ports."""

    def __init__(self) -> None:
        self.intr = Wire()
        self.pair = PicPair(self.intr)
        self.ports = PortSpace()
        self.pair.attach(self.ports)

    def out(self, *pairs: tuple[int, int]) -> None:
        for port, value in pairs:
            self.ports.write(port, 1, value)

    def init(self, icw4: int = 1, slave_icw4: int = 1, mask: int = 0) -> None:
        """Linux's init_8259A, bases 0x30 and 0x38."""
        self.out((0x21, 0xFF), (0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, icw4))
        self.out((0xA0, 0x11), (0xA1, 0x38), (0xA1, 2), (0xA1, slave_icw4))
        self.out((0x21, mask & 0xFF), (0xA1, mask >> 8))

    def pulse(self, number: int) -> None:
        self.pair.set_line(number, True)
        self.pair.set_line(number, False)

    def read(self, port: int, ocw3: int) -> int:
        self.out((port, ocw3))
        return self.ports.read(port, 1)


@pytest.fixture
def pic() -> Pic:
    made = Pic()
    made.init()
    return made


def test_a_probe_reads_the_mask_back(pic: Pic) -> None:
    pic.out((0x21, 0xFB), (0xA1, 0xFF))
    assert (pic.ports.read(0x21, 1), pic.ports.read(0xA1, 1)) == (0xFB, 0xFF)
    assert pic.ports.read(0x20, 2) == 0xFB00


def test_lower_numbers_come_first_and_wait_for_eoi(pic: Pic) -> None:
    pic.pulse(4)
    pic.pulse(1)
    assert pic.intr.level
    assert pic.pair.acknowledge() == 0x31
    assert not pic.intr.level, "4 is lower than 1, which is in service"
    assert pic.read(0x20, 0x0B) == 0b10
    assert pic.read(0x20, 0x0A) == 0b10000
    pic.pulse(0)
    assert pic.intr.level
    assert pic.pair.acknowledge() == 0x30
    pic.out((0x20, 0x20), (0x20, 0x20))
    assert pic.pair.acknowledge() == 0x34
    pic.out((0x20, 0x20))
    assert not pic.intr.level
    assert pic.read(0x20, 0x0B) == 0


def test_the_slave_goes_through_line_2_and_needs_two_eois(pic: Pic) -> None:
    pic.pulse(14)
    pic.pulse(8)
    assert pic.pair.acknowledge() == 0x38
    assert pic.read(0x20, 0x0B) == 4
    pic.out((0xA0, 0x20))
    assert not pic.intr.level, "line 2 is in service"
    pic.out((0x20, 0x62))
    assert pic.pair.acknowledge() == 0x3E
    pic.out((0xA0, 0x66), (0x20, 0x62))
    assert not pic.intr.level
    pic.pulse(3)
    assert pic.pair.acknowledge() == 0x33, "3 is behind 8 to 15, and comes now"


def test_special_fully_nested_mode_lets_a_higher_slave_line_through() -> None:
    pic = Pic()
    pic.init(icw4=0x11)
    pic.pulse(14)
    assert pic.pair.acknowledge() == 0x3E
    pic.pulse(8)
    assert pic.intr.level
    assert pic.pair.acknowledge() == 0x38


def test_masked_requests_wait(pic: Pic) -> None:
    pic.out((0x21, 0xFF))
    pic.pulse(5)
    assert not pic.intr.level
    pic.out((0x21, 0xDF))
    assert pic.intr.level
    assert pic.pair.acknowledge() == 0x35


def test_special_mask_mode_lets_lower_ones_through(pic: Pic) -> None:
    pic.pulse(1)
    assert pic.pair.acknowledge() == 0x31
    pic.pulse(6)
    assert not pic.intr.level
    pic.out((0x20, 0x68), (0x21, 0x02))
    assert pic.pair.acknowledge() == 0x36
    pic.out((0x20, 0x20))
    assert pic.read(0x20, 0x0B) == 0b10, "the masked one in service is not ended by a non-specific EOI"


def test_level_triggered_lines_come_again_until_they_drop(pic: Pic) -> None:
    pic.out((0x4D0, 0xFF), (0x4D1, 0x0C))
    assert pic.ports.read(0x4D0, 2) == 0x0CF8, "0, 1, 2 and 8, 13 are edge for ever"
    assert pic.pair.level_triggered(10)
    assert not pic.pair.level_triggered(1)
    pic.pair.set_line(10, True)
    for _ in range(3):
        assert pic.pair.acknowledge() == 0x3A
        pic.out((0xA0, 0x20), (0x20, 0x20))
        assert pic.intr.level
    pic.pair.set_line(10, False)
    assert not pic.intr.level


def test_an_edge_that_stays_high_comes_once(pic: Pic) -> None:
    pic.pair.set_line(3, True)
    assert pic.pair.acknowledge() == 0x33
    pic.out((0x20, 0x20))
    assert not pic.intr.level
    pic.pair.set_line(3, True)
    assert not pic.intr.level
    pic.pair.set_line(3, False)
    pic.pair.set_line(3, True)
    assert pic.intr.level


def test_a_level_that_drops_before_the_acknowledge_is_spurious(pic: Pic) -> None:
    pic.out((0x4D0, 0x20), (0x4D1, 0x08))
    pic.pair.set_line(5, True)
    pic.pair.set_line(5, False)
    assert pic.pair.acknowledge() == 0x37
    assert pic.read(0x20, 0x0B) == 0, "a spurious interrupt is not in service"


def test_automatic_eoi_and_rotation_in_it() -> None:
    pic = Pic()
    pic.init(icw4=3)
    pic.out((0x20, 0x80))  # rotate in automatic EOI mode
    pic.pulse(0)
    pic.pulse(4)
    assert pic.pair.acknowledge() == 0x30
    assert pic.read(0x20, 0x0B) == 0
    pic.pulse(0)
    assert pic.pair.acknowledge() == 0x34, "0 is the lowest now"
    assert pic.pair.acknowledge() == 0x30


def test_rotation_on_eoi_and_set_priority(pic: Pic) -> None:
    for number in (3, 5):
        pic.pulse(number)
    assert pic.pair.acknowledge() == 0x33
    pic.out((0x20, 0xA0))
    pic.pulse(3)
    assert pic.pair.acknowledge() == 0x35
    pic.out((0x20, 0x20))
    pic.out((0x20, 0xC4))  # 4 is the lowest: 5 is first
    pic.pulse(5)
    assert pic.pair.acknowledge() == 0x35
    pic.out((0x20, 0xE5))  # specific, and 5 is the lowest
    assert pic.pair.acknowledge() == 0x33


def test_poll_mode(pic: Pic) -> None:
    pic.pulse(6)
    assert pic.read(0x20, 0x0C) == 0x86
    assert pic.ports.read(0x20, 1) == 0, "one read only; the request is taken"
    assert not pic.intr.level
    assert pic.read(0x20, 0x0C) == 0


def test_icw1_drops_edges_and_mask_but_not_the_level_of_lines(pic: Pic) -> None:
    pic.out((0x4D1, 0x08), (0x21, 0xFF))
    pic.pulse(4)
    pic.pair.set_line(11, True)
    pic.init()
    assert pic.pair.acknowledge() == 0x3B
    pic.out((0xA0, 0x20), (0x20, 0x20))
    pic.pair.set_line(11, False)
    assert not pic.intr.level


def test_linux_checks_for_a_pic_with_its_mask(pic: Pic) -> None:
    """probe_8259A: mask all but the cascade, read it back; then auto-detects by writing the mask that it must hold."""
    pic.out((0x21, 0xFB))
    assert pic.ports.read(0x21, 1) == 0xFB


def test_lines_that_cannot_be(pic: Pic) -> None:
    for number in (2, -1, 16):
        with pytest.raises(IndexError, match=str(number)):
            pic.pair.line(number)
    pic.pair.line(9)(True)
    assert pic.pair.acknowledge() == 0x39


def test_reset_keeps_levels(pic: Pic) -> None:
    pic.pair.set_line(9, True)
    pic.pair.reset()
    assert not pic.intr.level or pic.pair.acknowledge() >= 0
    pic.init()
    assert not pic.intr.level, "edge triggered after reset: no new edge"
