"""What hvmloader does to PCI before it starts the BIOS, done through the same registers: SeaBIOS under Xen sets nothing up itself.

Links to lines 5, 10, 11, 5; level triggers for these; BARs by size, largest first, ports from 0xC000, memory from 0xF0000000; interrupt
lines; decoding and bus mastering on; the PM block at 0xB000. Source: Xen, tools/firmware/hvmloader/pci.c.
"""

from __future__ import annotations

from typing import Final

from bus.abi.hvm.ioreq import ACPI_PM1A_EVT_BLK_ADDRESS_V1
from drivers.pc.bus import PortSpace
from drivers.pc.fabric import LINKS, link_of
from drivers.pc.pci import (
    BAR0,
    CLASS_REVISION,
    COMMAND,
    COMMAND_IO,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    CONFIG_ADDRESS,
    CONFIG_DATA,
    ENABLE,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    ROM,
)
from drivers.pc.piix3 import PIRQ

ISA_BRIDGE: Final = 1 << 3
LINES: Final = (5, 10, 11, 5)
ELCR: Final = 0x4D0
IO_BASE, IO_END = 0xC000, 0x10000
MMIO_BASE, MMIO_END = 0xF000_0000, 0xFC00_0000
_ALL: Final = 0xFFFF_FFFF


class _Config:
    def __init__(self, ports: PortSpace) -> None:
        self._ports: Final = ports

    def read(self, devfn: int, offset: int, size: int) -> int:
        self._ports.write(CONFIG_ADDRESS, 4, ENABLE | devfn << 8 | offset & 0xFC)
        return self._ports.read(CONFIG_DATA + (offset & 3), size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        self._ports.write(CONFIG_ADDRESS, 4, ENABLE | devfn << 8 | offset & 0xFC)
        self._ports.write(CONFIG_DATA + (offset & 3), size, value)


def _size(config: _Config, devfn: int, register: int) -> tuple[int, bool, bool]:
    """(bytes, of ports, 64 bits) of a BAR; 0 bytes: it is not there."""
    old = config.read(devfn, register, 4)
    config.write(devfn, register, 4, _ALL & ~1 if register == ROM else _ALL)
    mask = config.read(devfn, register, 4)
    config.write(devfn, register, 4, old)
    if register == ROM:
        mask &= ~0x7FF
        return mask & -mask, False, False
    if old & 1:
        mask &= 0xFFFC
        return mask & -mask, True, False
    mask &= ~0xF
    wide = old & 6 == 4
    if wide:
        high = config.read(devfn, register + 4, 4)
        config.write(devfn, register + 4, 4, _ALL)
        mask |= config.read(devfn, register + 4, 4) << 32
        config.write(devfn, register + 4, 4, high)
    return mask & -mask, False, wide


def set_up_pci(ports: PortSpace) -> list[str]:
    """Do it. What found no place is in the answer, a line each."""
    config = _Config(ports)
    for link in range(LINKS):
        config.write(ISA_BRIDGE, PIRQ + link, 1, LINES[link])
    triggers = sum(1 << line for line in set(LINES))
    ports.write(ELCR, 1, triggers & 0xFF)
    ports.write(ELCR + 1, 1, triggers >> 8)
    found: list[tuple[int, int, int, bool]] = []  # size, devfn, register, ports
    decode: dict[int, int] = {}
    for devfn in range(256):
        if config.read(devfn, 0, 4) == _ALL:
            continue
        kind = config.read(devfn, CLASS_REVISION + 2, 2)
        vendor = config.read(devfn, 0, 2)
        if kind == 0x0680:
            config.write(devfn, 0x3C, 2, 0x0109)
            config.write(devfn, 0x40, 4, ACPI_PM1A_EVT_BLK_ADDRESS_V1 | 1)
            config.write(devfn, 0x80, 1, 1)
        elif kind == 0x0101 and vendor == 0x8086:
            config.write(devfn, 0x40, 4, 0x8000_8000)
        command = config.read(devfn, COMMAND, 2) & ~(COMMAND_IO | COMMAND_MEMORY)
        config.write(devfn, COMMAND, 2, command)
        decode[devfn] = COMMAND_MASTER | (COMMAND_IO if kind == 0x0300 else 0)
        register = BAR0
        while register <= BAR0 + 4 * 5:
            size, io, wide = _size(config, devfn, register)
            if size:
                found.append((size, devfn, register, io))
            register += 8 if wide else 4
        size, _, _ = _size(config, devfn, ROM)
        if size:
            found.append((size, devfn, ROM, False))
        pin = config.read(devfn, INTERRUPT_PIN, 1)
        if pin and kind != 0x0680:
            config.write(devfn, INTERRUPT_LINE, 1, LINES[link_of(devfn >> 3, pin - 1)])
    problems = _place(config, found, decode)
    for devfn, bits in decode.items():
        config.write(devfn, COMMAND, 2, config.read(devfn, COMMAND, 2) | bits)
    return problems


def _place(config: _Config, found: list[tuple[int, int, int, bool]], decode: dict[int, int]) -> list[str]:
    problems: list[str] = []
    at = {True: IO_BASE, False: MMIO_BASE}
    end = {True: IO_END, False: MMIO_END}
    for size, devfn, register, io in sorted(found, key=lambda item: -item[0]):
        base = at[io] + size - 1 & ~(size - 1)
        if base + size > end[io]:
            where = f"00:{devfn >> 3:02x}.{devfn & 7}"
            problems.append(f"{where}: no room for BAR at {register:#x} of {size:#x} bytes")
            continue
        at[io] = base + size
        config.write(devfn, register, 4, base)
        decode[devfn] |= COMMAND_IO if io else COMMAND_MEMORY
    return problems
