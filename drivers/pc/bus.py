"""How PC devices are joined to each other and to their owner: ranges of ports and of memory, interrupt lines, time, DMA.

A device is a state machine. It is told of accesses (`read`, `write` of a `Range`), of time (`Timed`), and of what comes from outside
by methods of its own; it drives interrupt lines (`Line`) and reads and writes guest memory (`GuestMemory`) that it was given when it
was made. Nothing here waits, allocates on a usual access, or knows where the guest is.

All times are guest nanoseconds, as whole numbers, from one clock that never goes back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

Line = Callable[[bool], None]
"""An interrupt line: called with its level. Calling it with the level that it already has must do no harm."""
Clock = Callable[[], int]
"""Guest time now, ns."""
Read = Callable[[int, int], int]
"""(offset in the range, size in bytes) -> value."""
Write = Callable[[int, int, int], None]
"""(offset in the range, size in bytes, value); the value has no bits beyond its size."""

ReadString = Callable[[int, int], bytes]
"""(size, count) -> what `count` reads of `size` bytes give, one behind the other."""
WriteString = Callable[[int, bytes], None]
"""(size, data): the data in writes of `size` bytes."""

ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
"""What is read where nothing answers."""
PORTS: Final = 0x10000
MAX_RANGES: Final = 512
"""Of one space."""


class BusError(ValueError):
    """A range that cannot be: it overlaps another one, leaves the space, or there are too many."""


class GuestMemoryError(Exception):
    """DMA to an address that is not the guest's memory. No byte of the transfer that raised it need have moved."""


class GuestMemory(Protocol):
    """Guest-physical memory as a bus master sees it."""

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes from there. GuestMemoryError."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Puts `data` there. GuestMemoryError."""


class Timed(Protocol):
    """A device that does something at a certain time."""

    def next_deadline(self) -> int | None:
        """When `expire` must be called next; None: not before the device is touched again. It may change with every access."""

    def expire(self, now: int) -> None:
        """Do all that is due at `now`. Being called early, late or for nothing does no harm."""


def earliest(devices: Iterable[Timed]) -> int | None:
    """The first deadline of all."""
    found: int | None = None
    for device in devices:
        at = device.next_deadline()
        if at is not None and (found is None or at < found):
            found = at
    return found


@dataclass(frozen=True, slots=True)
class Range:
    """Ports or memory that one device answers.

    `width` is the largest access, in bytes, that the device takes in one piece; larger ones, and those that cross a multiple of
    `width`, arrive as several, lowest address first, as a bus bridge splits them. Sizes that arrive are 1, 2, 4 or 8.
    """

    name: str
    start: int
    length: int
    read: Read
    write: Write
    width: int = 1
    read_string: ReadString | None = None
    write_string: WriteString | None = None
    """Of the first port, if it takes many accesses in a row (REP INS and OUTS): all of them in one call."""
    aligned: bool = True
    """False, for ports: an access of up to `width` arrives whole wherever it begins."""

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.start + self.length


Changed = Callable[[Range, bool], None]
"""(a range, whether it was added or removed). BusError: a range that was added cannot be."""


class _Space:
    """What both kinds of space have: a sorted list of ranges without overlaps."""

    limit: int

    def __init__(self, on_change: Changed | None = None) -> None:
        self._on_change: Final = on_change
        self._ranges: list[Range] = []
        self._starts: list[int] = []

    @property
    def ranges(self) -> tuple[Range, ...]:
        """All, by address."""
        return tuple(self._ranges)

    def conflict(self, start: int, length: int) -> Range | None:
        """The first range that has an address of these."""
        at = bisect_right(self._starts, start)
        if at and self._ranges[at - 1].end > start:
            return self._ranges[at - 1]
        if at < len(self._ranges) and self._starts[at] < start + length:
            return self._ranges[at]
        return None

    def _insert(self, new: Range) -> None:
        if new.width not in ONES:
            raise BusError(f"{new.name}: accesses of {new.width} bytes")
        if new.length <= 0 or new.start < 0 or new.end > self.limit:
            raise BusError(f"{new.name}: {new.length:#x} at {new.start:#x} is not in the space")
        if len(self._ranges) >= MAX_RANGES:
            raise BusError(f"{new.name}: there are {MAX_RANGES} ranges already")
        other = self.conflict(new.start, new.length)
        if other is not None:
            raise BusError(f"{new.name} at {new.start:#x} overlaps {other.name} at {other.start:#x}")
        at = bisect_right(self._starts, new.start)
        self._ranges.insert(at, new)
        self._starts.insert(at, new.start)

    def _take_out(self, old: Range) -> None:
        at = bisect_right(self._starts, old.start) - 1
        if at < 0 or self._ranges[at] is not old:
            raise BusError(f"{old.name} at {old.start:#x} is not there")
        del self._ranges[at], self._starts[at]

    def _tell(self, which: Range, added: bool) -> None:
        if self._on_change is not None:
            self._on_change(which, added)

    def _tell_or_undo(self, new: Range) -> None:
        """A range was added; who is told may have something else there (BusError), and then it is not."""
        try:
            self._tell(new, True)
        except BusError:
            self._take_out(new)
            raise


def _piece(left: int, most: int) -> int:
    """The largest access of a size that exists, of `left` bytes where `most` fit."""
    room = min(left, most)
    return 8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1


class PortSpace(_Space):
    """The 64 KiB of I/O ports. Ports where nothing is read as ones; writes there are dropped."""

    limit = PORTS

    def __init__(self, on_change: Changed | None = None) -> None:
        super().__init__(on_change)
        self._table: dict[int, tuple[Read, Write, int, int]] = {}
        self._strings: dict[int, tuple[ReadString | None, WriteString | None]] = {}
        self.unclaimed: Final[dict[int, int]] = {}
        """Accesses by port where nothing is."""

    def add(self, new: Range) -> None:
        """BusError: it cannot be."""
        self._insert(new)
        for offset in range(new.length):
            before = (new.start + offset) % new.width if new.aligned else 0
            most = min(new.width - before, new.length - offset)
            self._table[new.start + offset] = (new.read, new.write, offset, most)
        if new.read_string is not None or new.write_string is not None:
            self._strings[new.start] = (new.read_string, new.write_string)
        self._tell_or_undo(new)

    def remove(self, old: Range) -> None:
        """BusError: this very range is not there."""
        self._take_out(old)
        self._tell(old, False)

    def _take_out(self, old: Range) -> None:
        super()._take_out(old)
        self._strings.pop(old.start, None)
        for port in range(old.start, old.end):
            del self._table[port]

    def read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        entry = self._table.get(port)
        if entry is not None and size <= entry[3]:
            return entry[0](entry[2], size)
        return self._read_split(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        entry = self._table.get(port)
        if entry is not None and size <= entry[3]:
            entry[1](entry[2], size, value & ONES[size])
        else:
            self._write_split(port, size, value)

    def read_string(self, port: int, size: int, count: int) -> bytes:
        """`count` times IN of `size` bytes, as REP INS makes them: size * count bytes. The caller bounds `count`."""
        found = self._strings.get(port)
        if found is not None and found[0] is not None:
            return found[0](size, count)
        read = self.read
        return b"".join([read(port, size).to_bytes(size, "little") for _ in range(count)])

    def write_string(self, port: int, size: int, data: bytes) -> None:
        """OUT of `size` bytes as often as `data` lasts, as REP OUTS makes them."""
        found = self._strings.get(port)
        if found is not None and found[1] is not None:
            found[1](size, data)
            return
        for at in range(0, len(data), size):
            self.write(port, size, int.from_bytes(data[at : at + size], "little"))

    def _nothing(self, port: int) -> None:
        self.unclaimed[port] = self.unclaimed.get(port, 0) + 1

    def _read_split(self, port: int, size: int) -> int:
        value = done = 0
        while done < size:
            at = port + done & PORTS - 1
            entry = self._table.get(at)
            if entry is None:
                self._nothing(at)
                piece, part = 1, 0xFF
            else:
                piece = _piece(size - done, entry[3])
                part = entry[0](entry[2], piece)
            value |= part << 8 * done
            done += piece
        return value

    def _write_split(self, port: int, size: int, value: int) -> None:
        done = 0
        while done < size:
            at = port + done & PORTS - 1
            entry = self._table.get(at)
            if entry is None:
                self._nothing(at)
                done += 1
                continue
            piece = _piece(size - done, entry[3])
            entry[1](entry[2], piece, value >> 8 * done & ONES[piece])
            done += piece


class MmioSpace(_Space):
    """Guest-physical addresses that are no memory. Those where nothing is read as ones; writes there are dropped."""

    limit = 1 << 52

    def add(self, new: Range) -> None:
        """BusError: it cannot be."""
        self._insert(new)
        self._tell_or_undo(new)

    def remove(self, old: Range) -> None:
        """BusError: this very range is not there."""
        self._take_out(old)
        self._tell(old, False)

    def read(self, address: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            found = self._ranges[at]
            offset = address - found.start
            if offset + size <= found.length and (address & found.width - 1) + size <= found.width:
                return found.read(offset, size)
        return self._read_split(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            found = self._ranges[at]
            offset = address - found.start
            if offset + size <= found.length and (address & found.width - 1) + size <= found.width:
                found.write(offset, size, value & ONES[size])
                return
        self._write_split(address, size, value)

    def _find(self, address: int) -> Range | None:
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ranges[at].end:
            return self._ranges[at]
        return None

    def _read_split(self, address: int, size: int) -> int:
        value = done = 0
        while done < size:
            at = address + done
            found = self._find(at)
            if found is None:
                piece, part = 1, 0xFF
            else:
                piece = _piece(size - done, min(found.width - at % found.width, found.end - at))
                part = found.read(at - found.start, piece)
            value |= part << 8 * done
            done += piece
        return value

    def _write_split(self, address: int, size: int, value: int) -> None:
        done = 0
        while done < size:
            at = address + done
            found = self._find(at)
            if found is None:
                done += 1
                continue
            piece = _piece(size - done, min(found.width - at % found.width, found.end - at))
            found.write(at - found.start, piece, value >> 8 * done & ONES[piece])
            done += piece


class SharedLine:
    """A line that several devices pull: high while one of them does."""

    def __init__(self, out: Line) -> None:
        self._out: Final = out
        self._pulling = 0
        self._inputs = 0

    def input(self) -> Line:
        """A new input of its own."""
        bit = 1 << self._inputs
        self._inputs += 1

        def drive(level: bool) -> None:
            before = self._pulling
            self._pulling = before | bit if level else before & ~bit
            if bool(before) != bool(self._pulling):
                self._out(bool(self._pulling))

        return drive
