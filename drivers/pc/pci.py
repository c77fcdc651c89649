"""Conventional PCI: a function's configuration space with its BARs, and the bus behind configuration mechanism 1.

A function's registers are bytes with a mask of the bits that a write changes and a mask of those that a written 1 clears. BARs and the
expansion ROM are ranges that come and go in the spaces of `bus.py` as software places them. A BAR that would overlap something else is
not decoded until the way is free; the log callback is told. Sources: PCI Local Bus 3.0, chapters 3.2.2.3 and 6; Intel 82441FX, 3.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from drivers.pc.bus import ONES, BusError, Line, MmioSpace, PortSpace, Range, Read, Write
from drivers.pc.system import ResetControl

CONFIG_SIZE: Final = 256
CONFIG_ADDRESS: Final = 0xCF8
CONFIG_DATA: Final = 0xCFC
ENABLE: Final = 1 << 31
COMMAND, STATUS, CLASS_REVISION, HEADER_TYPE, BAR0, SUBSYSTEM, ROM, CAPABILITIES = (
    4,
    6,
    8,
    0xE,
    0x10,
    0x2C,
    0x30,
    0x34,
)
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D
COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_OFF = 1, 2, 4, 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
QEMU_SUBSYSTEM: Final = (0x1AF4, 0x1100)
"""By which SeaBIOS knows the machine (src/fw/paravirt.c, qemu_detect)."""
ROM_ENABLE: Final = 1


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register and what is behind it. `size` is a power of two, at least 4 for ports, 16 for memory."""

    size: int
    read: Read
    write: Write
    io: bool = False
    prefetchable: bool = False
    wide: bool = False
    """64 bits: it takes the next BAR's place too."""
    width: int = 4
    """See Range."""


class ConfigTarget(Protocol):
    """What can sit at a bus number: a function of ours, or one that is given through."""

    def config_read(self, offset: int, size: int) -> int:
        """1, 2 or 4 bytes within an aligned four."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Likewise."""


class PciFunction:
    """One function. Devices derive from it or hold one; registers of their own go into `data` and `mask`."""

    def __init__(
        self,
        name: str,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = QEMU_SUBSYSTEM,
        pin: int = 0,
        multifunction: bool = False,
        bars: Mapping[int, Bar] | None = None,
        rom: bytes = b"",
    ) -> None:
        """`class_code`: 24 bits. `pin`: 1 to 4 for INTA to INTD, 0 for none. ValueError: BARs that cannot be."""
        self.name: Final = name
        self.bars: Final = dict(bars or {})
        self.data: Final = bytearray(CONFIG_SIZE)
        self.mask: Final = bytearray(CONFIG_SIZE)
        self.clear: Final = bytearray(CONFIG_SIZE)
        """Bits that are cleared by writing a 1 there."""
        self.on_write: Callable[[int, int], None] | None = None
        """Called with (offset, size) after each write."""
        self.log: Callable[[str], None] = lambda text: None
        self._ports: PortSpace | None = None
        self._mmio: MmioSpace | None = None
        self._intx: Line | None = None
        self._others: Callable[[], None] = lambda: None
        self._mapped: dict[int, Range] = {}
        self._rom = rom.ljust(max(2048, 1 << (len(rom) - 1).bit_length()), b"\xff") if rom else b""
        self._level = False
        struct.pack_into("<HH", self.data, 0, vendor, device)
        struct.pack_into("<I", self.data, CLASS_REVISION, class_code << 8 | revision)
        struct.pack_into("<HH", self.data, SUBSYSTEM, *subsystem)
        self.data[HEADER_TYPE] = 0x80 if multifunction else 0
        self.data[INTERRUPT_PIN] = pin
        self.mask[INTERRUPT_LINE] = 0xFF
        command = COMMAND_MASTER | COMMAND_INTX_OFF | 0x140
        self._add_bars()
        if any(bar.io for bar in self.bars.values()):
            command |= COMMAND_IO
        if self._rom or any(not bar.io for bar in self.bars.values()):
            command |= COMMAND_MEMORY
        struct.pack_into("<H", self.mask, COMMAND, command)
        struct.pack_into("<H", self.clear, STATUS, 0xF900)
        self._fresh = bytes(self.data)

    def _add_bars(self) -> None:
        taken: set[int] = set()
        for index, bar in self.bars.items():
            places = {index, index + 1} if bar.wide else {index}
            if (
                bar.size < (4 if bar.io else 16)
                or bar.size & (bar.size - 1)
                or max(places) > 5
                or places & taken
            ):
                raise ValueError(f"{self.name}: BAR {index} of {bar.size} bytes is not possible")
            taken |= places
            kind = 1 if bar.io else (4 if bar.wide else 0) | (8 if bar.prefetchable else 0)
            struct.pack_into("<I", self.data, BAR0 + 4 * index, kind)
            struct.pack_into(
                "<Q" if bar.wide else "<I",
                self.mask,
                BAR0 + 4 * index,
                ~(bar.size - 1) & ONES[8 if bar.wide else 4],
            )
        if self._rom:
            struct.pack_into("<I", self.mask, ROM, ~(len(self._rom) - 1) & ONES[4] | ROM_ENABLE)

    def connect(
        self, ports: PortSpace, mmio: MmioSpace, intx: Line | None, others: Callable[[], None]
    ) -> None:
        """For the bus: where its BARs and its interrupt pin go; `others` lets other functions try again to be decoded."""
        self._ports, self._mmio, self._intx, self._others = ports, mmio, intx, others
        self._fresh = bytes(self.data)

    def disconnect(self) -> None:
        """For the bus: its ranges go, its pin is quiet."""
        self.set_interrupt(False)
        for key in list(self._mapped):
            self._unmap(key)
        self._ports = self._mmio = self._intx = None

    def reset(self) -> None:
        """As at `connect`: not decoded, no bus master. Derived classes do more."""
        self.set_interrupt(False)
        self.data[:] = self._fresh
        self.settle()

    # -- configuration accesses -----------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """See ConfigTarget."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See ConfigTarget."""
        data = self.data
        for index in range(offset, offset + size):
            new, mask = value & 0xFF, self.mask[index]
            data[index] = (data[index] & ~mask | new & mask) & ~(new & self.clear[index])
            value >>= 8
        if offset < 0x34 and (offset + size > BAR0 or COMMAND in range(offset, offset + size)):
            self.settle()
            self._others()
        if offset <= COMMAND + 1 < offset + size:
            self._drive()
        if self.on_write is not None:
            self.on_write(offset, size)

    @property
    def command(self) -> int:
        """The command register."""
        return self.data[COMMAND] | self.data[COMMAND + 1] << 8

    @property
    def bus_master(self) -> bool:
        """It may make DMA accesses and send messages."""
        return bool(self.data[COMMAND] & COMMAND_MASTER)

    def bar_address(self, index: int) -> int | None:
        """Where that BAR is decoded; None: it is not."""
        found = self._mapped.get(index)
        return None if found is None else found.start

    # -- interrupt pin --------------------------------------------------------------------------------------------

    def set_interrupt(self, level: bool) -> None:
        """The level of its pin, before the command register's bit that silences it."""
        self._level = level
        if level:
            self.data[STATUS] |= STATUS_INTERRUPT
        else:
            self.data[STATUS] &= ~STATUS_INTERRUPT
        self._drive()

    def _drive(self) -> None:
        if self._intx is not None:
            self._intx(self._level and not self.command & COMMAND_INTX_OFF)

    # -- decoding -------------------------------------------------------------------------------------------------

    def _wanted(self, index: int, bar: Bar) -> int | None:
        enabled = self.data[COMMAND] & (COMMAND_IO if bar.io else COMMAND_MEMORY)
        code = "<Q" if bar.wide else "<I"
        address = int(struct.unpack_from(code, self.data, BAR0 + 4 * index)[0]) & ~(3 if bar.io else 15)
        # The topmost place is what sizing by writing ones leaves there.
        top = PortSpace.limit if bar.io else MmioSpace.limit if bar.wide else 1 << 32
        return address if enabled and address and address + bar.size < top else None

    def settle(self) -> None:
        """Make what is decoded what the registers say."""
        if self._ports is None or self._mmio is None:
            return
        for index, bar in self.bars.items():
            self._place(index, self._wanted(index, bar), bar.size, bar.read, bar.write, bar.width, bar.io)
        if self._rom:
            register = int(struct.unpack_from("<I", self.data, ROM)[0])
            address = register & ~0x7FF
            on = register & ROM_ENABLE and self.data[COMMAND] & COMMAND_MEMORY and address
            fits = address + len(self._rom) < 1 << 32
            where = address if on and fits else None
            self._place(6, where, len(self._rom), self._read_rom, lambda o, s, v: None, 8, False)

    def _place(
        self, key: int, where: int | None, size: int, read: Read, write: Write, width: int, io: bool
    ) -> None:
        old = self._mapped.get(key)
        if old is not None:
            if old.start == where:
                return
            self._unmap(key)
        if where is None:
            return
        space = self._ports if io else self._mmio
        assert space is not None
        new = Range(f"{self.name} BAR {key}", where, size, read, write, width)
        try:
            space.add(new)
        except BusError as error:
            self.log(str(error))
        else:
            self._mapped[key] = new

    def _unmap(self, key: int) -> None:
        old = self._mapped.pop(key)
        space = self._ports if key in self.bars and self.bars[key].io else self._mmio
        assert space is not None
        space.remove(old)

    def _read_rom(self, offset: int, size: int) -> int:
        return int.from_bytes(self._rom[offset : offset + size], "little")


class PciBus:
    """Bus 0 behind ports 0xCF8 and 0xCFC. `intx(device, pin, level)` is told of interrupt pins (pin 0 is INTA)."""

    def __init__(
        self,
        ports: PortSpace,
        mmio: MmioSpace,
        intx: Callable[[int, int, bool], None],
        reset_control: ResetControl,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._ports: Final = ports
        self._mmio: Final = mmio
        self._intx: Final = intx
        self._reset: Final = reset_control
        self._log: Final = log
        self._address = 0
        self.targets: Final[dict[int, ConfigTarget]] = {}
        """By device << 3 | function."""

    def attach(self) -> None:
        """Ports 0xCF8 to 0xCFF. BusError."""
        self._ports.add(Range("PCI address", CONFIG_ADDRESS, 4, self._read_address, self._write_address, 4))
        self._ports.add(Range("PCI data", CONFIG_DATA, 4, self._read_data, self._write_data, 4))

    def add(self, device: int, function: int, target: ConfigTarget) -> None:
        """Put it there. ValueError: there is one, or no such place."""
        devfn = device << 3 | function
        if not 0 <= device < 32 or not 0 <= function < 8 or devfn in self.targets:
            raise ValueError(f"PCI 00:{device:02x}.{function} is not free")
        self.targets[devfn] = target
        if isinstance(target, PciFunction):
            target.log = self._log
            pin = target.data[INTERRUPT_PIN]
            line = self._pin(device, pin - 1) if pin else None
            target.connect(self._ports, self._mmio, line, self._settle_all)
            target.settle()

    def remove(self, device: int, function: int) -> None:
        """It is gone from the bus. KeyError."""
        target = self.targets.pop(device << 3 | function)
        if isinstance(target, PciFunction):
            target.disconnect()
            self._settle_all()

    def reset(self) -> None:
        """RST#: all functions of ours, and the address register."""
        self._address = 0
        self._reset.reset()
        for target in self.targets.values():
            if isinstance(target, PciFunction):
                target.reset()

    def _pin(self, device: int, pin: int) -> Line:
        return lambda level: self._intx(device, pin, level)

    def _settle_all(self) -> None:
        for target in self.targets.values():
            if isinstance(target, PciFunction):
                target.settle()

    def _target(self) -> ConfigTarget | None:
        address = self._address
        if not address & ENABLE or address & 0x00FF_0000:
            return None
        return self.targets.get(address >> 8 & 0xFF)

    def _read_address(self, offset: int, size: int) -> int:
        if size == 4:
            return self._address
        return self._reset.value if offset == 1 and size == 1 else ONES[size]

    def _write_address(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self._address = value & 0x80FF_FFFC
        elif offset == 1 and size == 1:
            self._reset.write(value)

    def _read_data(self, offset: int, size: int) -> int:
        target = self._target()
        if target is None:
            return ONES[size]
        return target.config_read((self._address & 0xFC) + offset, size)

    def _write_data(self, offset: int, size: int, value: int) -> None:
        target = self._target()
        if target is not None:
            target.config_write((self._address & 0xFC) + offset, size, value)
