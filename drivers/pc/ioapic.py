"""I/O APIC 82093AA with 48 inputs, as Xen's virtual one (version 0x11), and messages of interrupts: its own, and those of MSI.

A message goes out by `deliver`; who has the local APICs calls `end_of_interrupt` with the vector of each level triggered interrupt that
they end. Inputs are active levels: the polarity bit is kept and changes nothing. A masked edge is lost, as on Xen. There is no
directed EOI register (that came with version 0x20). Sources: Intel 82093AA data sheet; Intel SDM volume 3, 11.11 (MSI); Xen, vioapic.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from drivers.pc.bus import MmioSpace, Range
from drivers.pc.fabric import GSIS

ADDRESS: Final = 0xFEC0_0000
SIZE: Final = 0x1000
VERSION: Final = 0x11
SELECT, WINDOW = 0x00, 0x10
REG_ID, REG_VERSION, REG_ARBITRATION, REG_ENTRIES = 0, 1, 2, 0x10
PENDING, REMOTE_IRR, LEVEL, MASKED = 1 << 12, 1 << 14, 1 << 15, 1 << 16
WRITABLE: Final = 0xFF00_0000_0001_AFFF
FIXED, LOWEST, SMI, NMI, INIT, EXTINT = 0, 1, 2, 4, 5, 7
MSI_BASE: Final = 0xFEE0_0000


class Message(NamedTuple):
    """An interrupt on its way to local APICs."""

    vector: int
    mode: int
    """FIXED to EXTINT."""
    logical: bool
    """The destination is a logical one."""
    level: bool
    destination: int


def decode_msi(address: int, data: int) -> Message | None:
    """The message of a memory write by a device; None: it is no interrupt."""
    if address & ~0xFFFFF != MSI_BASE:
        return None
    return Message(data & 0xFF, data >> 8 & 7, bool(address & 4), bool(data & 0x8000), address >> 12 & 0xFF)


class IoApic:
    """One I/O APIC. Implements `fabric.Set` by `set_input`."""

    def __init__(self, deliver: Callable[[Message], None], identifier: int = 1) -> None:
        self._deliver: Final = deliver
        self._identifier: Final = identifier
        self._levels = 0
        self.entries: Final = [MASKED] * GSIS
        self._select = 0
        self._id = identifier

    def attach(self, mmio: MmioSpace, address: int = ADDRESS) -> None:
        """Its page. BusError."""
        mmio.add(Range("I/O APIC", address, SIZE, self.read, self.write, 4))

    def reset(self) -> None:
        """All masked; inputs keep their level."""
        self.entries[:] = [MASKED] * GSIS
        self._select, self._id = 0, self._identifier

    # -- interrupts -----------------------------------------------------------------------------------------------

    def set_input(self, number: int, level: bool) -> None:
        """Drive input `number`."""
        bit = 1 << number
        before = bool(self._levels & bit)
        if level == before:
            return
        self._levels = self._levels | bit if level else self._levels & ~bit
        if level:
            self._raise(number)

    def _raise(self, number: int) -> None:
        entry = self.entries[number]
        if entry & MASKED:
            return
        if entry & LEVEL:
            if entry & REMOTE_IRR:
                return
            self.entries[number] = entry | REMOTE_IRR
        self._deliver(
            Message(entry & 0xFF, entry >> 8 & 7, bool(entry & 1 << 11), bool(entry & LEVEL), entry >> 56)
        )

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC ended a level triggered interrupt: what still asks is delivered again."""
        for number, entry in enumerate(self.entries):
            if entry & 0xFF == vector and entry & REMOTE_IRR:
                self.entries[number] = entry & ~REMOTE_IRR
                if self._levels & 1 << number:
                    self._raise(number)

    # -- registers ------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """From its page."""
        register = offset & 0xF0
        if register == SELECT:
            return self._select >> 8 * (offset & 3) if offset < 4 else 0
        if register != WINDOW:
            return 0
        return self._read_register() >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """To its page: the index in a byte, data in four."""
        if offset == SELECT:
            self._select = value & 0xFF
        elif offset == WINDOW and size == 4:
            self._write_register(value)

    def _read_register(self) -> int:
        index = self._select
        if index >= REG_ENTRIES:
            number = index - REG_ENTRIES >> 1
            return self.entries[number] >> 32 * (index & 1) & 0xFFFF_FFFF if number < GSIS else 0
        if index in (REG_ID, REG_ARBITRATION):
            return self._id << 24
        return GSIS - 1 << 16 | VERSION if index == REG_VERSION else 0

    def _write_register(self, value: int) -> None:
        index = self._select
        if index == REG_ID:
            self._id = value >> 24 & 0xF
        number = index - REG_ENTRIES >> 1
        if not 0 <= number < GSIS:
            return
        old = self.entries[number]
        shift = 32 * (index & 1)
        mask = WRITABLE & 0xFFFF_FFFF << shift
        new = old & ~mask | value << shift & mask
        if not new & LEVEL:
            new &= ~REMOTE_IRR
        self.entries[number] = new
        if new & LEVEL and self._levels & 1 << number:
            self._raise(number)
