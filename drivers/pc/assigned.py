"""A real device's function as its new owner, an HVM or PVH guest, sees it on the guest's own PCI bus.

The header is the bus's (`PciFunction`): BARs are decoded where the guest puts them, and an access is passed to the device by BAR and
offset. Capabilities are the device's own, but the MSI-X table is kept here: its addresses and data are the guest's, and mean
something to the guest's local APICs alone. What the device raises is the number of an entry. Sources: PCI Local Bus 3.0,
section 6.8.2; PCI Express Base 3.0, 7.8.4 (function-level reset).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from drivers.pc.bus import ONES
from drivers.pc.pci import (
    BAR0,
    CAPABILITIES,
    CLASS_REVISION,
    COMMAND,
    COMMAND_INTX_OFF,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    STATUS,
    SUBSYSTEM,
    Bar,
    PciFunction,
)

CAP_EXPRESS, CAP_MSIX = 0x10, 0x11
HEADER_END: Final = 0x40
STATUS_CAPABILITIES: Final = 1 << 4
ENTRY: Final = 16
MASKED: Final = 1
MSIX_ENABLE, MSIX_MASK = 1 << 15, 1 << 14
FLR: Final = 1 << 15
MAX_CAPABILITIES: Final = 48
"""As many as fit; a list that is longer goes in circles."""
_COMMAND: Final = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF


class DeviceRegisters(Protocol):
    """The device itself. Where it does not answer, reads are ones and writes are lost."""

    def config_read(self, offset: int, size: int) -> int:
        """Its configuration space."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The reverse."""

    def read(self, bar: int, offset: int, size: int) -> int:
        """A register behind a BAR."""

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """The reverse."""

    def take_vector(self, entry: int, on: bool) -> bool:
        """Take an MSI-X vector (`message` is called from now on), or give it back. False: it is not to be had."""


class DeviceError(ValueError):
    """A device that cannot be given to a guest: its configuration space makes no sense."""


class AssignedFunction(PciFunction):
    """See the module. `deliver(address, data)` is the interrupt message that the guest programmed."""

    def __init__(
        self,
        name: str,
        device: DeviceRegisters,
        bars: Sequence[tuple[int, int]],
        vectors: int,
        deliver: Callable[[int, int], None],
        *,
        own_vectors: bool = True,
    ) -> None:
        """`bars`: (index, bytes) of each. `own_vectors` False: MSI-X is the hypervisor's to program (a PV guest asks for vectors by
        PHYSDEVOP_map_pirq), and what the guest writes there is dropped. DeviceError."""
        self._own_vectors: Final = own_vectors
        self._vectors_on = False
        self._device: Final = device
        self._deliver: Final = deliver
        identity = device.config_read(0, 4)
        if identity & 0xFFFF in (0, 0xFFFF):
            raise DeviceError(f"{name}: no device answers")
        revision = device.config_read(CLASS_REVISION, 4)
        subsystem = device.config_read(SUBSYSTEM, 4)
        found = {}
        for index, size in bars:
            kind = device.config_read(BAR0 + 4 * index, 4)
            if kind & 1:
                raise DeviceError(f"{name}: BAR {index} is of I/O ports")
            found[index] = Bar(
                size,
                partial(self._read, index),
                partial(self._write, index),
                prefetchable=bool(kind & 8),
                wide=kind & 6 == 4,
                width=8,
            )
        try:
            super().__init__(
                name,
                vendor=identity & 0xFFFF,
                device=identity >> 16,
                class_code=revision >> 8,
                revision=revision & 0xFF,
                subsystem=(subsystem & 0xFFFF, subsystem >> 16),
                bars=found,
            )
        except ValueError as error:
            raise DeviceError(str(error)) from None
        self._express = self._msix = 0
        self._table_bar, self._table_start, self._table_end = -1, 0, 0
        self._find_capabilities(vectors)
        self._table = bytearray()
        self._taken: set[int] = set()
        self._pending: set[int] = set()
        self._control = 0
        self._reset_table()

    def _find_capabilities(self, vectors: int) -> None:
        device = self._device
        at = device.config_read(CAPABILITIES, 1) & 0xFC
        self.data[CAPABILITIES] = at if at >= HEADER_END else 0
        if self.data[CAPABILITIES]:
            struct.pack_into("<H", self.data, STATUS, STATUS_CAPABILITIES)
        for _ in range(MAX_CAPABILITIES):
            if at < HEADER_END:
                break
            kind, following = device.config_read(at, 1), device.config_read(at + 1, 1)
            if kind == CAP_EXPRESS:
                self._express = at
            elif kind == CAP_MSIX:
                self._msix = at
                size = ENTRY * min(vectors, (device.config_read(at + 2, 2) & 0x7FF) + 1)
                place = device.config_read(at + 4, 4)
                self._table_bar, self._table_start = place & 7, place & ~7
                self._table_end = self._table_start + size
                bar = self.bars.get(self._table_bar)
                if bar is None or self._table_end > bar.size:
                    raise DeviceError(f"{self.name}: its MSI-X table is not in its BARs")
            at = following & 0xFC
        else:
            raise DeviceError(f"{self.name}: its list of capabilities does not end")

    @property
    def vectors(self) -> int:
        """MSI-X vectors that the guest can program."""
        return (self._table_end - self._table_start) // ENTRY

    def _reset_table(self) -> None:
        self._table = bytearray((bytes(12) + struct.pack("<I", MASKED)) * self.vectors)
        self._pending.clear()
        for entry in sorted(self._taken):
            self._device.take_vector(entry, False)
        self._taken.clear()
        self._control = 0

    def reset(self) -> None:
        """The bus is reset: so is the device."""
        if self._express:
            self._device.config_write(self._express + 8, 2, FLR)
        self._reset_table()
        super().reset()

    def device_was_reset(self) -> None:
        """The device starts anew by itself (its process did): as after a function-level reset."""
        self._reset_table()
        self._clear_header()
        if self._vectors_on:
            self.enable_vectors()

    def _clear_header(self) -> None:
        """BARs and command register as at power on: nothing is decoded until the guest has put it back."""
        super().reset()

    def enable_vectors(self) -> None:
        """MSI-X on, at the device itself: where its vectors are the hypervisor's to program (`own_vectors` False). They stay on when the
        device starts anew."""
        self._vectors_on = True
        if self._msix:
            control = self._device.config_read(self._msix + 2, 2)
            self._device.config_write(self._msix + 2, 2, control | MSIX_ENABLE)

    # -- configuration space --------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """See ConfigTarget: the header here, the rest from the device."""
        if offset < HEADER_END:
            return super().config_read(offset, size)
        return self._device.config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See ConfigTarget."""
        if offset < HEADER_END:
            super().config_write(offset, size, value)
            if offset <= COMMAND + 1 and offset + size > COMMAND:
                self._device.config_write(COMMAND, 2, self.command & _COMMAND)
            return
        if (
            self._msix
            and not self._own_vectors
            and offset <= self._msix + 3
            and offset + size > self._msix + 2
        ):
            return
        control = self._express + 9
        if self._express and offset <= control < offset + size and value >> 8 * (control - offset) & FLR >> 8:
            self._reset_table()
            self._device.config_write(offset, size, value)
            self._clear_header()
            return
        self._device.config_write(offset, size, value)
        if self._msix and offset <= self._msix + 3 and offset + size > self._msix + 2:
            self._set_control(self._device.config_read(self._msix + 2, 2))

    # -- BARs -----------------------------------------------------------------------------------------------------

    def _read(self, bar: int, offset: int, size: int) -> int:
        if bar == self._table_bar and self._table_start <= offset < self._table_end:
            at = offset - self._table_start
            return int.from_bytes(self._table[at : at + size], "little")
        return self._device.read(bar, offset, size)

    def _write(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar != self._table_bar or not self._table_start <= offset < self._table_end:
            self._device.write(bar, offset, size, value)
            return
        at = offset - self._table_start
        if size not in (4, 8) or at % size or not self._own_vectors:
            return  # the specification has only aligned ones
        self._table[at : at + size] = (value & ONES[size]).to_bytes(size, "little")
        entry = at // ENTRY
        if at % ENTRY + size > 12:
            self._table[entry * ENTRY + 12] &= MASKED
            self._table[entry * ENTRY + 13 : entry * ENTRY + 16] = bytes(3)
            self._settle_entry(entry)

    # -- MSI-X ----------------------------------------------------------------------------------------------------

    def _masked(self, entry: int) -> bool:
        return bool(self._table[entry * ENTRY + 12] & MASKED)

    def _set_control(self, control: int) -> None:
        was, self._control = self._control, control
        if control & MSIX_ENABLE and not was & MSIX_ENABLE:
            for entry in range(self.vectors):
                self._settle_entry(entry)
        elif was & MSIX_ENABLE and not control & MSIX_ENABLE:
            for entry in sorted(self._taken):
                self._device.take_vector(entry, False)
            self._taken.clear()
            self._pending.clear()
        self._release_pending()

    def _settle_entry(self, entry: int) -> None:
        """Have the device's own mask, and the way of the interrupt, follow the guest's table."""
        if not self._control & MSIX_ENABLE:
            return
        masked = self._masked(entry)
        if not masked and entry not in self._taken:
            if not self._device.take_vector(entry, True):
                self.log(f"{self.name}: vector {entry} is not to be had")
                return
            self._taken.add(entry)
        self._device.write(self._table_bar, self._table_start + entry * ENTRY + 12, 4, int(masked))
        self._release_pending()

    def _release_pending(self) -> None:
        if not self._pending or not self._control & MSIX_ENABLE or self._control & MSIX_MASK:
            return
        for entry in sorted(e for e in self._pending if not self._masked(e)):
            self._pending.discard(entry)
            self.message(entry)

    def message(self, entry: int) -> None:
        """The device raised that vector. One that the guest did not ask for is dropped."""
        if entry not in self._taken or not self._control & MSIX_ENABLE:
            return
        if self._masked(entry) or self._control & MSIX_MASK:
            self._pending.add(entry)
            return
        low, high, data = struct.unpack_from("<III", self._table, entry * ENTRY)
        self._deliver(high << 32 | low, data)
