"""drivers/pc/bus: dispatch, how accesses are split, overlaps, caps, shared lines."""

from __future__ import annotations

import pytest

from drivers.pc.bus import MAX_RANGES, BusError, MmioSpace, PortSpace, Range, SharedLine, earliest


class Bytes:
    """A device of bytes that notes its accesses."""

    def __init__(self, content: bytes = bytes(range(1, 33))) -> None:
        self.content = bytearray(content)
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = int.from_bytes(self.content[offset : offset + size], "little")
        self.log.append(("r", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        assert value < 1 << 8 * size
        self.log.append(("w", offset, size, value))
        self.content[offset : offset + size] = value.to_bytes(size, "little")

    def at(self, start: int, length: int, width: int = 1) -> Range:
        return Range("bytes", start, length, self.read, self.write, width)


def test_nothing_reads_as_ones_and_is_counted() -> None:
    space = PortSpace()
    assert [space.read(0x80, n) for n in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    space.write(0x80, 1, 5)
    assert space.unclaimed[0x80] == 4


def test_a_byte_device_sees_wide_accesses_as_bytes_lowest_first() -> None:
    device, space = Bytes(), PortSpace()
    space.add(device.at(0x40, 4))
    assert space.read(0x40, 4) == 0x04030201
    space.write(0x41, 2, 0xBBAA)
    assert device.log == [
        *[("r", i, 1, i + 1) for i in range(4)],
        ("w", 1, 1, 0xAA),
        ("w", 2, 1, 0xBB),
    ]


def test_an_access_across_the_end_of_a_range_reaches_both_sides() -> None:
    first, second, space = Bytes(), Bytes(bytes([0x77, 0x88])), PortSpace()
    space.add(first.at(0x10, 2, 4))
    space.add(second.at(0x12, 1))
    assert space.read(0x10, 4) == 0xFF77_0201
    assert first.log == [("r", 0, 2, 0x0201)]


@pytest.mark.parametrize("kind", [PortSpace, MmioSpace])
def test_an_access_across_a_multiple_of_the_width_is_split_there(
    kind: type[PortSpace] | type[MmioSpace],
) -> None:
    device, space = Bytes(), kind()
    space.add(device.at(0x100, 16, 4))
    assert space.read(0x102, 4) == 0x06050403
    assert space.read(0x101, 2) == 0x0302
    space.write(0x103, 4, 0xDDCCBBAA)
    assert [entry[:3] for entry in device.log] == [
        ("r", 2, 2),
        ("r", 4, 2),
        ("r", 1, 2),
        ("w", 3, 1),
        ("w", 4, 2),
        ("w", 6, 1),
    ]
    assert device.content[3:7] == bytes([0xAA, 0xBB, 0xCC, 0xDD])


def test_ports_that_take_words_anywhere() -> None:
    device, space = Bytes(), PortSpace()
    space.add(Range("words", 0x1CE, 3, device.read, device.write, 2, aligned=False))
    assert space.read(0x1CF, 2) == 0x0302
    assert space.read(0x1D0, 2) == 0xFF03
    assert device.log[0] == ("r", 1, 2, 0x0302)


def test_ports_wrap_at_64k() -> None:
    device, space = Bytes(), PortSpace()
    space.add(device.at(0, 1))
    assert space.read(0xFFFF, 2) == 0x01FF


def test_memory_of_eight_bytes_and_its_edges() -> None:
    device, space = Bytes(), MmioSpace()
    space.add(device.at(0xFED00000, 16, 8))
    assert space.read(0xFED00008, 8) == int.from_bytes(bytes(range(9, 17)), "little")
    assert space.read(0xFED0000C, 8) == 0xFFFF_FFFF_100F_0E0D
    assert space.read(0xFECFFFFE, 4) == 0x0201_FFFF
    space.write(0xFECFFFFC, 8, 0x1122334455667788)
    assert device.content[:4] == bytes([0x44, 0x33, 0x22, 0x11])
    assert space.read(0xFED00010, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("kind", [PortSpace, MmioSpace])
def test_overlaps_and_what_is_outside_are_refused(kind: type[PortSpace] | type[MmioSpace]) -> None:
    device, space = Bytes(), kind()
    held = device.at(0x100, 8)
    space.add(held)
    for start, length in ((0x100, 8), (0xFF, 2), (0x107, 1), (0xF0, 0x100), (0x102, 2)):
        with pytest.raises(BusError, match="overlaps bytes at 0x100"):
            space.add(device.at(start, length))
    with pytest.raises(BusError, match="not in the space"):
        space.add(device.at(space.limit - 1, 2))
    with pytest.raises(BusError, match="not in the space"):
        space.add(device.at(0x10, 0))
    with pytest.raises(BusError, match="3 bytes"):
        space.add(device.at(0x10, 1, 3))
    space.add(device.at(0x108, 1))
    assert space.ranges == (held, space.ranges[1])


@pytest.mark.parametrize("kind", [PortSpace, MmioSpace])
def test_a_range_that_goes_is_told_and_leaves_nothing(kind: type[PortSpace] | type[MmioSpace]) -> None:
    told: list[tuple[int, bool]] = []
    device, space = Bytes(), kind(lambda which, added: told.append((which.start, added)))
    held = device.at(0x100, 8)
    space.add(held)
    space.remove(held)
    assert space.read(0x100, 1) == 0xFF
    with pytest.raises(BusError, match="not there"):
        space.remove(held)
    with pytest.raises(BusError, match="not there"):
        space.remove(device.at(0x100, 8))
    assert told == [(0x100, True), (0x100, False)]
    space.add(held)


def test_there_is_a_cap() -> None:
    device, space = Bytes(), PortSpace()
    for number in range(MAX_RANGES):
        space.add(device.at(number, 1))
    with pytest.raises(BusError, match="ranges already"):
        space.add(device.at(MAX_RANGES, 1))


def test_a_shared_line_is_high_while_one_pulls() -> None:
    levels: list[bool] = []
    shared = SharedLine(levels.append)
    one, other = shared.input(), shared.input()
    one(True)
    other(True)
    one(False)
    one(False)
    other(False)
    assert levels == [True, False]


def test_earliest_deadline() -> None:
    class At:
        def __init__(self, at: int | None) -> None:
            self.at = at

        def next_deadline(self) -> int | None:
            return self.at

        def expire(self, now: int) -> None:
            raise AssertionError(now)

    assert earliest([At(None), At(7), At(3)]) == 3
    assert earliest([At(None)]) is None
    assert earliest([]) is None
