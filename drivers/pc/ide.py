"""An IDE channel: its registers, two drives' task files, PIO transfers, resets, the interrupt.

What a command does is the drive's (`ide_disk`, `ide_cd`); DMA is the bus master's (`ide_pci`). Commands end within the access that starts
them, but DMA that takes long (DRQ is seen meanwhile): BSY is seen only while software holds SRST. Source: ATA/ATAPI-6 (T13/1410D), chapters 7 and 9; primary and secondary
channel at the legacy ports of a PC.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from drivers.pc.bus import ONES, Line, PortSpace, Range

PRIMARY: Final = (0x1F0, 0x3F6, 14)
SECONDARY: Final = (0x170, 0x376, 15)
"""Command block, control block, interrupt line."""

BSY, DRDY, DF, DSC, DRQ, ERR = 0x80, 0x40, 0x20, 0x10, 0x08, 0x01
READY: Final = DRDY | DSC
ABRT, IDNF, UNC = 0x04, 0x10, 0x40
NIEN, SRST, HOB = 0x02, 0x04, 0x80
DEV, LBA = 0x10, 0x40
CMD_DEVICE_RESET, CMD_DIAGNOSTIC = 0x08, 0x90
DIAGNOSTIC_PASSED: Final = 1
PIECE: Final = 1 << 17
"""Bytes that move at once in a DMA transfer."""

Produce = Callable[[int], memoryview | bytes | bytearray]
"""Next bytes of a DMA transfer to memory: at most that many, empty at its end."""
Consume = Callable[[memoryview], None]


class Transfer:
    """A DMA transfer that waits for the bus master, `length` bytes.

    `produce` for one to memory, `consume` for one from memory. `finish` ends the command; `fail` ends it with an error.
    """

    __slots__ = ("consume", "fail", "finish", "length", "produce")

    def __init__(
        self,
        length: int,
        finish: Callable[[], None],
        fail: Callable[[], None],
        *,
        produce: Produce | None = None,
        consume: Consume | None = None,
    ) -> None:
        self.length = length
        self.finish = finish
        self.fail = fail
        self.produce = produce
        self.consume = consume


class Failed(Exception):
    """A drive's transfer went wrong; the drive has noted how."""


class Drive(ABC):
    """What both kinds of drive have: task file and PIO buffer. `attention` is called to interrupt, `dma` with a transfer to do."""

    signature = (0x00, 0x00)
    """LBA mid and high after a reset."""

    def __init__(self) -> None:
        self.attention: Callable[[], None] = lambda: None
        self.dma: Callable[[Transfer], None] = lambda transfer: None
        self.status = READY
        self.error = self.feature = self.count = self.device = 0
        self.lba = [0, 0, 0]
        self.hob = [0, 0, 0, 0, 0]
        """Former values of feature, count, LBA low, mid, high."""
        self._buffer: bytes | bytearray | memoryview = b""
        self._at = self._end = 0
        self._incoming = False
        self._after: Callable[[], None] = lambda: None
        self.reset()

    # -- for drives -----------------------------------------------------------------------------------------------

    @abstractmethod
    def command(self, code: int) -> None:
        """Carry out a command; the task file is set."""

    def forget(self) -> None:  # noqa: B027  # a drive may have none
        """Reset: settings of drives of one kind."""

    def send(self, data: bytes | bytearray | memoryview, after: Callable[[], None]) -> None:
        """Data for the host by PIO; `after` when it has taken all of it."""
        self._buffer, self._at, self._end, self._incoming, self._after = data, 0, len(data), False, after
        self.status |= DRQ

    def ask(self, length: int, after: Callable[[], None]) -> None:
        """Data from the host by PIO; `after` when all of it is in `received`."""
        self._buffer, self._at, self._end, self._incoming, self._after = (
            bytearray(length),
            0,
            length,
            True,
            after,
        )
        self.status |= DRQ

    @property
    def received(self) -> bytearray:
        """What the host sent."""
        assert isinstance(self._buffer, bytearray)
        return self._buffer

    def done(self) -> None:
        """The command ended well."""
        self.status = READY
        self.error = 0
        self._at = self._end = 0
        self.attention()

    def abort(self, error: int = ABRT) -> None:
        """The command ended with that error."""
        self.status = READY | ERR
        self.error = error
        self._at = self._end = 0
        self.attention()

    # -- for the channel ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """After reset or diagnostics: the signature."""
        self.status = READY
        self.error = DIAGNOSTIC_PASSED
        self.count = self.lba[0] = 1
        self.lba[1:] = self.signature
        self.device &= ~0xF
        self._at = self._end = 0
        self.forget()

    def read_data(self, size: int) -> int:
        """From the data port."""
        at = self._at
        end = self._end
        if at >= end or self._incoming:
            return ONES[size]
        value = int.from_bytes(self._buffer[at : at + size], "little")
        self._at = at = at + size
        if at >= end:
            self._end = 0
            self.status &= ~DRQ
            self._after()
        return value

    def read_block(self, length: int) -> bytes:
        """Up to `length` bytes of the block that is offered; ones if there is none."""
        at = self._at
        if at >= self._end or self._incoming:
            return b"\xff" * length
        piece = bytes(self._buffer[at : min(at + length, self._end)])
        self._at = at + len(piece)
        if self._at >= self._end:
            self._end = 0
            self.status &= ~DRQ
            self._after()
        return piece

    def write_block(self, data: bytes) -> int:
        """As much of `data` as is asked for, which is the answer; all of it where nothing is."""
        at = self._at
        if at >= self._end or not self._incoming:
            return len(data)
        piece = data[: self._end - at]
        self.received[at : at + len(piece)] = piece
        self._at = at + len(piece)
        if self._at >= self._end:
            self._end = 0
            self.status &= ~DRQ
            self._after()
        return len(piece)

    def write_data(self, size: int, value: int) -> None:
        """To the data port."""
        at = self._at
        if at >= self._end or not self._incoming:
            return
        part = value.to_bytes(size, "little")[: self._end - at]
        self.received[at : at + len(part)] = part
        self._at = at + size
        if self._at >= self._end:
            self._end = 0
            self.status &= ~DRQ
            self._after()


class Channel:
    """Two drives behind one set of registers."""

    def __init__(self, irq: Line) -> None:
        self._irq: Final = irq
        self.drives: Final[list[Drive | None]] = [None, None]
        self._selected = 0
        self._control = 0
        self._pending = False
        self._level = False
        self.waiting: Transfer | None = None
        """A DMA transfer that a drive waits for, until it is over; another one, or none: it was given up."""
        self._waiting_unit = 0
        self.on_transfer: Callable[[], None] = lambda: None
        """Told when there is one."""
        self.on_interrupt: Callable[[], None] = lambda: None
        """Told of each interrupt (the bus master's status shows it)."""

    def attach(self, ports: PortSpace, place: tuple[int, int, int] = PRIMARY) -> None:
        """Its ports: eight, and the device control port. BusError."""
        base, control, _ = place
        ports.add(
            Range(
                f"IDE {base:#x}", base, 8, self._read, self._write, 4, self._read_string, self._write_string
            )
        )
        ports.add(Range(f"IDE control {control:#x}", control, 1, self._read_control, self._write_control))

    def plug(self, unit: int, drive: Drive) -> None:
        """Put a drive there (0 master, 1 slave). ValueError: there is one."""
        if self.drives[unit] is not None:
            raise ValueError(f"IDE unit {unit} is taken")
        drive.attention = lambda: self._attention(unit)
        drive.dma = lambda transfer: self._transfer(unit, transfer)
        self.drives[unit] = drive
        drive.reset()

    def unplug(self, unit: int) -> Drive | None:
        """Take it out."""
        drive, self.drives[unit] = self.drives[unit], None
        if drive is not None and unit == self._selected:
            self._quiet()
        if drive is not None and unit == self._waiting_unit:
            self.waiting = None
        return drive

    def reset(self) -> None:
        """RESET-: as after power on."""
        self._control = self._selected = 0
        self._reset_drives()

    def _reset_drives(self) -> None:
        self.waiting = None
        self._quiet()
        self._selected = 0
        for drive in self.drives:
            if drive is not None:
                drive.device = 0
                drive.reset()

    # -- interrupt and DMA ----------------------------------------------------------------------------------------

    def _attention(self, unit: int) -> None:
        if unit != self._selected:
            return
        self._pending = True
        self.on_interrupt()
        self._drive_line()

    def _quiet(self) -> None:
        self._pending = False
        self._drive_line()

    def _drive_line(self) -> None:
        level = self._pending and not self._control & NIEN
        if level != self._level:
            self._level = level
            self._irq(level)

    def _transfer(self, unit: int, transfer: Transfer) -> None:
        if unit == self._selected:
            self.waiting, self._waiting_unit = transfer, unit
            self.on_transfer()

    # -- registers ------------------------------------------------------------------------------------------------

    def _read(self, port: int, size: int) -> int:
        if port == 0:  # data, in one access of any size
            drive = self.drives[self._selected]
            return ONES[size] if drive is None else drive.read_data(size)
        if size > 1:
            return sum(self._read(port + index, 1) << 8 * index for index in range(size))
        drive = self.drives[self._selected]
        if port == 7:  # status; reading it ends the interrupt
            if drive is None:
                return 0
            if self._pending:
                self._quiet()
            return BSY if self._control & SRST else drive.status
        if drive is None:
            # Unit 0 answers for a unit 1 that is not there.
            drive = self.drives[0]
            if drive is None:
                return 0
        if port == 6:
            return drive.device & 0x4F | 0xA0 | self._selected << 4
        if self._control & HOB:
            return drive.hob[port - 1]
        if port == 1:
            return drive.error
        return drive.count if port == 2 else drive.lba[port - 3]

    def _write(self, port: int, size: int, value: int) -> None:
        if port == 0:
            drive = self.drives[self._selected]
            if drive is not None:
                drive.write_data(size, value)
            return
        if size > 1:
            for index in range(size):
                self._write(port + index, 1, value >> 8 * index & 0xFF)
            return
        self._control &= ~HOB
        if port == 7:
            self._command(value)
            return
        if port == 6:
            self._selected = value >> 4 & 1
        for drive in self.drives:
            if drive is None or drive.status & (BSY | DRQ):
                continue
            if port == 1:
                drive.hob[0], drive.feature = drive.feature, value
            elif port == 2:
                drive.hob[1], drive.count = drive.count, value
            elif port == 6:
                drive.device = value
            else:
                drive.hob[port - 1], drive.lba[port - 3] = drive.lba[port - 3], value

    def _read_string(self, size: int, count: int) -> bytes:
        length = size * count
        out = bytearray()
        while len(out) < length:
            drive = self.drives[self._selected]
            left = length - len(out)
            piece = b"\xff" * left if drive is None else drive.read_block(left)
            out += piece.ljust(
                -(-len(piece) // size) * size, b"\0"
            )  # an odd end of a block takes a whole access
        return bytes(out)

    def _write_string(self, size: int, data: bytes) -> None:
        while data:
            drive = self.drives[self._selected]
            if drive is None:
                return
            used = drive.write_block(data)
            data = data[-(-used // size) * size :]

    def _command(self, code: int) -> None:
        self._quiet()
        drive = self.drives[self._selected]
        if code == CMD_DIAGNOSTIC:
            if any(self.drives):
                self._reset_drives()
                self._attention(0)
            return
        if drive is None or self._control & SRST:
            return
        if drive.status & (BSY | DRQ) and code != CMD_DEVICE_RESET:
            return
        self.waiting = None
        drive.status = READY
        drive.command(code)

    def _read_control(self, offset: int, size: int) -> int:
        drive = self.drives[self._selected]
        if drive is None:
            return 0
        return BSY if self._control & SRST else drive.status

    def _write_control(self, offset: int, size: int, value: int) -> None:
        before, self._control = self._control, value & (NIEN | SRST | HOB)
        if before & SRST and not value & SRST:
            self._reset_drives()
        self._drive_line()
