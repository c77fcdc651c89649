"""The Xen platform PCI device 5853:0001: unplug protocol and log at ports 0x10 to 0x13, its interrupt pin, its two BARs.

The memory BAR is a range of guest-physical addresses where nothing is: guests put their grant table and shared pages there. Ports
by size of access: reading 2 bytes at 0x10 gives the magic, 1 byte at 0x12 the protocol's version; writing 2 bytes at 0x10 unplugs,
1 byte at 0x12 logs, 2 bytes at 0x12 say the product, 4 bytes at 0x10 its build. The older ways of unplugging through the I/O BAR
are there as well. Source: Xen, docs/misc/hvm-emulated-unplug.pandoc; public/hvm/pvdrivers.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import ONES, PortSpace, Range
from drivers.pc.pci import Bar, PciFunction

PORT: Final = 0x10
MAGIC: Final = 0x49D2
BLACKLISTED: Final = 0xD249
PROTOCOL: Final = 1
DISKS, NICS, SECONDARY_DISKS, NVME = 1, 2, 4, 8
ALL: Final = DISKS | NICS
VENDOR: Final = 0x5853
MMIO_SIZE: Final = 16 << 20
MAX_LINE: Final = 1024
LINES_A_SECOND: Final = 20
"""Further lines of a second are dropped."""
SECOND: Final = 1_000_000_000


class XenPlatform(PciFunction):
    """`unplug` gets the mask of DISKS and others. `refused(product, build)` says whether those drivers must not load."""

    def __init__(
        self,
        now: Callable[[], int],
        unplug: Callable[[int], None],
        log_line: Callable[[str], None],
        refused: Callable[[int, int], bool] = lambda product, build: False,
    ) -> None:
        super().__init__(
            "Xen platform",
            vendor=VENDOR,
            device=1,
            class_code=0xFF8000,
            revision=1,
            subsystem=(VENDOR, 1),
            pin=1,
            bars={
                0: Bar(0x100, self._read_bar, self._write_bar, io=True),
                1: Bar(MMIO_SIZE, self._read_memory, self._write_memory, prefetchable=True, width=8),
            },
        )
        self._now: Final = now
        self._unplug: Final = unplug
        self._log_line: Final = log_line
        self._refused: Final = refused
        self._line = bytearray()
        self._second = -1
        self._lines = 0
        self._product = 0
        self._blacklisted = False
        self._flags = 0

    def attach(self, ports: PortSpace) -> None:
        """Ports 0x10 to 0x13. BusError."""
        ports.add(Range("Xen platform", PORT, 4, self._read, self._write, 4))

    def reset(self) -> None:
        """No product has introduced itself. What is unplugged is not this device's to bring back."""
        super().reset()
        self._product, self._blacklisted, self._flags = 0, False, 0

    def _read(self, offset: int, size: int) -> int:
        if offset == 0 and size == 2:
            return BLACKLISTED if self._blacklisted else MAGIC
        if offset == 2 and size == 1:
            return PROTOCOL
        if offset == 0 and size == 1:
            return self._flags
        return ONES[size]

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == 2 and size == 1:
            self._log_byte(value)
        elif offset == 0 and size == 2:
            self._unplug(value)
        elif offset == 2 and size == 2:
            self._product = value
        elif offset == 0 and size == 4:
            self._blacklisted = self._refused(self._product, value)
        elif offset == 0 and size == 1:
            self._flags = value & 1

    def _log_byte(self, byte: int) -> None:
        if byte != 10 and len(self._line) < MAX_LINE:
            self._line.append(byte if 32 <= byte < 127 else 63)
        if byte != 10:
            return
        second = self._now() // SECOND
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= LINES_A_SECOND:
            self._log_line(self._line.decode("ascii"))
        self._line.clear()

    def _read_bar(self, offset: int, size: int) -> int:
        return self._flags if offset == 0 and size == 1 else ONES[size]

    def _write_bar(self, offset: int, size: int, value: int) -> None:
        if offset == 1 and size == 1:
            self._log_byte(value)
        elif offset == 0 and size == 1:
            self._flags = value & 1
        elif offset == 4 and value == 1:
            self._unplug(ALL)
        elif offset == 8 and value in (1, 2):
            self._unplug(DISKS if value == 1 else NICS)

    def _read_memory(self, offset: int, size: int) -> int:
        return 0

    def _write_memory(self, offset: int, size: int, value: int) -> None:
        pass
