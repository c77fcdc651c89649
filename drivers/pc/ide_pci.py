"""PIIX3's IDE function 8086:7010: two channels and the bus master that moves their data by DMA.

The channels' ports are the legacy ones and are always decoded. Descriptors (PRDs) are read one at a time while data moves; a transfer
begins when both the drive's command and the start bit are there, and is over at once or goes on by `expire` (a medium may be slow, and
whoever started the transfer waits for the access that did). Sources: 82371SB data sheet, 2.3 and 2.7; Programming Interface
for Bus Master IDE Controller 1.0.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from drivers.pc.bus import Clock, GuestMemory, GuestMemoryError, Line, PortSpace
from drivers.pc.ide import PIECE, PRIMARY, SECONDARY, Channel, Drive, Failed, Transfer
from drivers.pc.ide_cd import OpticalDrive
from drivers.pc.ide_disk import Disk
from drivers.pc.pci import Bar, PciFunction

START, TO_MEMORY = 1, 8
ACTIVE, ERROR, INTERRUPT = 1, 2, 4
END_OF_TABLE: Final = 1 << 31
BURST_NS: Final = 20_000_000
"""So long a transfer is carried on at a time, and a piece (`ide.PIECE` bytes at most)."""
MAX_DESCRIPTORS: Final = 65_536 // 8
"""A table lies within 64 KiB."""


class _Descriptors:
    """The PRD table of one transfer: gives (address, length) pieces."""

    def __init__(self, memory: GuestMemory, table: int) -> None:
        self._memory = memory
        self._at = table
        self._left = MAX_DESCRIPTORS
        self.address = 0
        self.length = 0
        self.last = False

    def advance(self) -> bool:
        """To the next one; False: the table has ended. GuestMemoryError."""
        if self.last or not self._left:
            return False
        entry = self._memory.read(self._at, 8)
        self._at += 8
        self._left -= 1
        self.address = int.from_bytes(entry[:4], "little") & ~1
        self.length = int.from_bytes(entry[4:6], "little") & ~1 or 0x10000
        self.last = bool(entry[7] & 0x80)
        return True


class BusMaster:
    """One channel's."""

    def __init__(self, memory: GuestMemory, channel: Channel, function: PciFunction, now: Clock) -> None:
        self._memory: Final = memory
        self._channel: Final = channel
        self._function: Final = function
        self._now: Final = now
        self._moving: tuple[Transfer, Generator[None, None, tuple[bool, bool]]] | None = None
        self.due: int | None = None
        """When a transfer under way is to go on (now, that is); None: there is none."""
        self.command = self.status = self.table = 0
        channel.on_transfer = self._go
        channel.on_interrupt = self._interrupted

    def reset(self) -> None:
        """Stopped."""
        self._ended()
        self.command = self.status = self.table = 0

    def read(self, offset: int, size: int) -> int:
        """Of its eight ports."""
        word = self.command | self.status << 16 | self.table << 32
        return word >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """To its eight ports."""
        for index in range(offset, offset + size):
            byte = value & 0xFF
            value >>= 8
            if index == 0:
                self._set_command(byte)
            elif index == 2:
                self.status = (self.status & ~(byte & (ERROR | INTERRUPT))) & ~0x60 | byte & 0x60
            elif index >= 4:
                shift = 8 * (index - 4)
                self.table = (self.table & ~(0xFF << shift) | byte << shift) & ~3

    def _set_command(self, value: int) -> None:
        before = self.command
        if not before & START:  # the direction does not change under way
            self.command = value & (START | TO_MEMORY)
        else:
            self.command = before & TO_MEMORY | value & START
        if value & START and not before & START:
            self.status |= ACTIVE
            self._go()
        elif not value & START:
            self._ended()
            self.status &= ~ACTIVE

    def _interrupted(self) -> None:
        self.status |= INTERRUPT

    def _go(self) -> None:
        transfer = self._channel.waiting
        if transfer is None or not self.status & ACTIVE or self._moving is not None:
            return
        to_memory = bool(self.command & TO_MEMORY)
        if to_memory != (transfer.produce is not None):
            return  # the two sides never agree: the drive waits until it is reset
        self._moving = transfer, self._move(transfer)
        self._step()

    def _step(self) -> None:
        """Move data for at most BURST_NS: it may have been started by an access, which is to be short."""
        assert self._moving is not None
        transfer, work = self._moving
        end = self._now() + BURST_NS
        try:
            while True:
                if self._channel.waiting is not transfer:  # the drive was reset, or is gone
                    self._moving = self.due = None
                    return
                if not self._function.bus_master:
                    raise GuestMemoryError("no bus mastering")
                next(work)
                now = self._now()
                if now >= end:
                    self.due = now
                    return
        except StopIteration as stop:
            whole, more = stop.value
            if not more:
                self.status &= ~ACTIVE
            self._ended()
            if whole:
                transfer.finish()
        except GuestMemoryError:
            self.status = self.status & ~ACTIVE | ERROR
            self._ended()
            transfer.fail()
        except Failed:
            self.status &= ~ACTIVE
            self._ended()
            transfer.fail()

    def _ended(self) -> None:
        """No transfer is under way any more: it is over, or the host has stopped it, and the drive waits until it is reset."""
        if self._moving is not None and self._channel.waiting is self._moving[0]:
            self._channel.waiting = None
        self._moving = self.due = None

    def expire(self) -> None:
        """Go on, if there is something under way."""
        if self._moving is not None:
            self._step()

    def _move(self, transfer: Transfer) -> Generator[None, None, tuple[bool, bool]]:
        """Piece by piece. (All of the drive's data moved, room is left in the table). GuestMemoryError, Failed."""
        descriptors = _Descriptors(self._memory, self.table)
        left, used = transfer.length, 0  # bytes; used: of the present descriptor
        if not descriptors.advance():
            return False, False
        while left:
            piece = min(left, PIECE)
            data: memoryview
            if transfer.produce is not None:
                data = memoryview(transfer.produce(piece))
                piece = len(data)
                if not piece:
                    raise Failed
            else:
                data = memoryview(bytearray(piece))
            done = 0
            while done < piece:
                if used == descriptors.length:
                    yield
                    if not descriptors.advance():
                        self._part(transfer, data[:done])
                        return False, False
                    used = 0
                size = min(piece - done, descriptors.length - used)
                where = descriptors.address + used
                if transfer.produce is not None:
                    self._memory.write(where, data[done : done + size])
                else:
                    data[done : done + size] = self._memory.read(where, size)
                done += size
                used += size
            if transfer.consume is not None:
                transfer.consume(data)
            left -= piece
            if left:
                yield
        return True, not descriptors.last or used < descriptors.length

    @staticmethod
    def _part(transfer: Transfer, data: memoryview) -> None:
        """The table was too short: whole sectors of what came are written, as a disk would have by then."""
        whole = len(data) & ~511
        if transfer.consume is not None and whole:
            transfer.consume(data[:whole])


class IdeFunction(PciFunction):
    """00:01.1. `irqs` are ISA lines 14 and 15; `now` is real time, as far as media take some."""

    def __init__(self, memory: GuestMemory, irqs: tuple[Line, Line], now: Clock) -> None:
        super().__init__(
            "82371SB IDE",
            vendor=0x8086,
            device=0x7010,
            class_code=0x010180,
            bars={4: Bar(16, self._read_bar, self._write_bar, io=True)},
        )
        self.data[6:8] = (0x0280).to_bytes(2, "little")
        self.mask[0x40:0x45] = b"\xff\xff\xff\xff\xff"
        self.channels: Final = (Channel(irqs[0]), Channel(irqs[1]))
        self._masters: Final = tuple(BusMaster(memory, channel, self, now) for channel in self.channels)

    def attach(self, ports: PortSpace) -> None:
        """The legacy ports of both channels. BusError."""
        self.channels[0].attach(ports, PRIMARY)
        self.channels[1].attach(ports, SECONDARY)

    def plug(self, place: int, drive: Drive) -> None:
        """0 to 3: hda to hdd. ValueError: there is one."""
        self.channels[place >> 1].plug(place & 1, drive)

    def unplug_disks(self, *, keep_first: bool = False) -> list[Disk]:
        """Xen's unplug protocol: hard disks go, optical drives stay. The media of the answer are the caller's to close."""
        gone: list[Disk] = []
        for place in range(1 if keep_first else 0, 4):
            channel = self.channels[place >> 1]
            drive = channel.drives[place & 1]
            if isinstance(drive, Disk):
                channel.unplug(place & 1)
                gone.append(drive)
        return gone

    def optical(self, place: int) -> OpticalDrive | None:
        """The optical drive at a place, if there is one."""
        drive = self.channels[place >> 1].drives[place & 1]
        return drive if isinstance(drive, OpticalDrive) else None

    def reset(self) -> None:
        """Both channels too."""
        super().reset()
        for master, channel in zip(self._masters, self.channels, strict=True):
            master.reset()
            channel.reset()

    def next_deadline(self) -> int | None:
        """See Timed: while a transfer is under way, at once."""
        return min((master.due for master in self._masters if master.due is not None), default=None)

    def expire(self, now: int) -> None:
        """See Timed."""
        for master in self._masters:
            master.expire()

    def _read_bar(self, offset: int, size: int) -> int:
        return self._masters[offset >> 3].read(offset & 7, size)

    def _write_bar(self, offset: int, size: int, value: int) -> None:
        self._masters[offset >> 3].write(offset & 7, size, value)
