"""A PCI function's configuration space: type 0 header, BARs, capabilities (PCI Local Bus 3.0, section 6; PCI Express Base, 7.5).

No I/O: accesses in, values and the state of a few control bits out. Every register is bytes plus a mask of those bits that a
write changes, so that BAR sizing and read-only fields need no code of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

CONFIG_SIZE: Final = 4096
"""PCI Express configuration space; from 0x100 on it is empty here (no extended capabilities: reads as 0)."""

VENDOR_ID: Final = 0x00
DEVICE_ID: Final = 0x02
COMMAND: Final = 0x04
STATUS: Final = 0x06
CLASS_REVISION: Final = 0x08
HEADER_TYPE: Final = 0x0E
BAR0: Final = 0x10
SUBSYSTEM: Final = 0x2C
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C

COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2
COMMAND_INTX_OFF: Final = 1 << 10
STATUS_CAPABILITIES: Final = 1 << 4

CAP_POWER: Final = 0x01
CAP_EXPRESS: Final = 0x10
CAP_MSIX: Final = 0x11
MSIX_ENABLE: Final = 1 << 15
MSIX_FUNCTION_MASK: Final = 1 << 14

_CAP_START: Final = 0x40
_DEVCAP_FLR: Final = 1 << 28
_DEVCTL_FLR: Final = 1 << 15
_PMCSR_NO_SOFT_RESET: Final = 1 << 3


@dataclass(frozen=True, slots=True)
class BarSpec:
    """A memory BAR: `size` in bytes, a power of two of at least 16; `wide`: 64 bits, it takes the next BAR's place too."""

    size: int
    wide: bool = True
    prefetchable: bool = False


@dataclass(frozen=True, slots=True)
class MsixSpec:
    """Where an MSI-X table and its pending bits are."""

    vectors: int
    bar: int
    table_offset: int
    pba_offset: int


class ConfigSpace:
    """One function. `on_reset` is called for a function-level reset, after this space itself was reset."""

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        bars: Mapping[int, BarSpec],
        revision: int = 1,
        subsystem: tuple[int, int] | None = None,
        msix: MsixSpec | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        """`class_code`: base class, sub-class, programming interface (24 bits). ValueError for BARs that cannot be."""
        self.bars: Final = dict(bars)
        self.msix: Final = msix
        self._on_reset = on_reset
        self._data = bytearray(CONFIG_SIZE)
        self._mask = bytearray(CONFIG_SIZE)
        self._put(VENDOR_ID, "<HH", vendor, device)
        self._put(STATUS, "<H", STATUS_CAPABILITIES)
        self._put(CLASS_REVISION, "<I", class_code << 8 | revision)
        self._put(SUBSYSTEM, "<HH", *(subsystem or (vendor, device)))
        self._allow(COMMAND, "<H", COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF)
        self._allow(INTERRUPT_LINE, "<B", 0xFF)
        self._add_bars()
        self._power = self._express = self._msix = 0
        self._add_capabilities()
        self._reset_value = bytes(self._data)

    def _put(self, offset: int, code: str, *values: int) -> None:
        struct.pack_into(code, self._data, offset, *values)

    def _allow(self, offset: int, code: str, *masks: int) -> None:
        struct.pack_into(code, self._mask, offset, *masks)

    def _add_bars(self) -> None:
        taken: set[int] = set()
        for index, bar in self.bars.items():
            places = {index, index + 1} if bar.wide else {index}
            if bar.size < 16 or bar.size & (bar.size - 1) or max(places) > 5 or places & taken:
                raise ValueError(f"BAR {index} of {bar.size} bytes is not possible")
            taken |= places
            kind = (4 if bar.wide else 0) | (8 if bar.prefetchable else 0)
            self._put(BAR0 + 4 * index, "<I", kind)
            address = ~(bar.size - 1) & (0xFFFF_FFFF_FFFF_FFFF if bar.wide else 0xFFFF_FFFF)
            self._allow(BAR0 + 4 * index, "<Q" if bar.wide else "<I", address)

    def _add_capabilities(self) -> None:
        at = _CAP_START
        self._power = at
        self._put(at, "<BBHI", CAP_POWER, 0, 3, _PMCSR_NO_SOFT_RESET)  # version 1.2, D0 and D3hot
        self._allow(at + 4, "<H", 3)
        last, at = at, at + 8
        self._express = at
        self._put(last + 1, "<B", at)
        # Version 2, root complex integrated endpoint (it has no link); 128 bytes of payload; function-level reset.
        self._put(at, "<BBHI", CAP_EXPRESS, 0, 2 | 9 << 4, _DEVCAP_FLR | 1 << 15)
        self._allow(at + 8, "<H", 0x78FF)
        last, at = at, at + 0x3C
        if self.msix is not None:
            self._msix = at
            self._put(last + 1, "<B", at)
            self._put(
                at,
                "<BBHII",
                CAP_MSIX,
                0,
                self.msix.vectors - 1,
                self.msix.table_offset | self.msix.bar,
                self.msix.pba_offset | self.msix.bar,
            )
            self._allow(at + 2, "<H", MSIX_ENABLE | MSIX_FUNCTION_MASK)
        self._put(CAPABILITIES, "<B", _CAP_START)

    # -- accesses -------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """1, 2, 4 or 8 bytes; all ones beyond the end."""
        if offset < 0 or offset + size > CONFIG_SIZE:
            return (1 << 8 * size) - 1
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """The reverse; what cannot be changed stays."""
        if offset < 0 or offset + size > CONFIG_SIZE:
            return
        old_state = self._data[self._power + 4] & 3
        for index, new in enumerate((value & (1 << 8 * size) - 1).to_bytes(size, "little"), offset):
            mask = self._mask[index]
            self._data[index] = self._data[index] & ~mask & 0xFF | new & mask
        if self._data[self._power + 4] & 3 in (1, 2):  # D1, D2: not supported, such a write is dropped
            self._data[self._power + 4] = self._data[self._power + 4] & ~3 | old_state
        reset_byte = self._express + 9
        if offset <= reset_byte < offset + size and value >> 8 * (reset_byte - offset) & _DEVCTL_FLR >> 8:
            self.reset()
            if self._on_reset is not None:
                self._on_reset()

    def reset(self) -> None:
        """As after power on."""
        self._data[:] = self._reset_value

    # -- what the bits mean ---------------------------------------------------------------------------------------

    def _word(self, offset: int) -> int:
        return self._data[offset] | self._data[offset + 1] << 8

    @property
    def awake(self) -> bool:
        """In D0."""
        return not self._data[self._power + 4] & 3

    @property
    def memory_enabled(self) -> bool:
        """BARs are decoded."""
        return bool(self._data[COMMAND] & COMMAND_MEMORY) and self.awake

    @property
    def bus_master(self) -> bool:
        """DMA and message signalled interrupts are allowed."""
        return bool(self._data[COMMAND] & COMMAND_MASTER) and self.awake

    @property
    def msix_enabled(self) -> bool:
        """MSI-X interrupts are on."""
        return bool(self._msix and self._word(self._msix + 2) & MSIX_ENABLE)

    @property
    def msix_masked(self) -> bool:
        """All vectors are masked together."""
        return bool(self._msix and self._word(self._msix + 2) & MSIX_FUNCTION_MASK)

    def bar_address(self, index: int) -> int:
        """Where software put the BAR."""
        value = struct.unpack_from("<Q" if self.bars[index].wide else "<I", self._data, BAR0 + 4 * index)[0]
        return int(value) & ~0xF
