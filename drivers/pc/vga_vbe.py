"""Bochs' VBE display interface: index port 0x1CE, data port 0x1CF. Source: Bochs, vbe_display_api.txt; QEMU, hw/display/bochs-vbe.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY = range(11)
FIRST_ID, LAST_ID = 0xB0C0, 0xB0C5
MAX_X, MAX_Y, MAX_BPP = 2560, 1600, 32
ENABLED, GET_CAPS, WIDE_DAC, LINEAR_BUFFER, NO_CLEAR = 1, 2, 0x20, 0x40, 0x80
DEPTHS: Final = (4, 8, 15, 16, 24, 32)


class Vbe:
    """The registers. `changed(n)` is called when the mode or bank changed; the first n bytes of memory are then to be cleared."""

    def __init__(self, memory: int, changed: Callable[[int], None]) -> None:
        self._memory: Final = memory
        self._changed: Final = changed
        self._index = 0
        self._set_initial()

    def _set_initial(self) -> None:
        self.id = LAST_ID
        self.width = self.height = 0
        self.bpp = 8
        self.flags = 0
        self.bank = 0
        self.virtual_width = self.virtual_height = self.x_offset = self.y_offset = 0

    def reset(self) -> None:
        """Off."""
        self._index = 0
        self._set_initial()

    @property
    def enabled(self) -> bool:
        """A VBE mode is on."""
        return bool(self.flags & ENABLED)

    @property
    def wide_dac(self) -> bool:
        """The palette has 8 bits a colour."""
        return self.enabled and bool(self.flags & WIDE_DAC)

    def _pitch(self, pixels: int) -> int:
        return pixels // 2 if self.bpp == 4 else pixels * (self.bpp + 7 >> 3)

    @property
    def pitch(self) -> int:
        """Bytes of a line (of a plane's, times four, with 4 bits)."""
        return self._pitch(self.virtual_width)

    @property
    def start(self) -> int:
        """Offset of the first pixel that is seen."""
        return self.y_offset * self.pitch + self._pitch(self.x_offset)

    def read(self, offset: int, size: int) -> int:
        """A port: 0 index, 1 or 2 data."""
        value = self._index if offset == 0 else self.get(self._index)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A port: words only."""
        if size != 2:
            return
        if offset == 0:
            self._index = value
        else:
            self.set(self._index, value)

    def get(self, index: int) -> int:
        """A register."""
        if self.flags & GET_CAPS and index in (XRES, YRES, BPP):
            return (MAX_X, MAX_Y, MAX_BPP)[index - XRES]
        values = (
            self.id, self.width, self.height, self.bpp, self.flags, self.bank, self.virtual_width, self.virtual_height,
            self.x_offset, self.y_offset, self._memory >> 16,
        )  # fmt: skip
        return values[index] if index < len(values) else 0xFFFF

    def set(self, index: int, value: int) -> None:
        """A register. What cannot be is not taken."""
        if index == ID:
            if FIRST_ID <= value <= LAST_ID:
                self.id = value
        elif index == XRES:
            if not self.enabled and 0 < value <= MAX_X and not value & 7:
                self.width = value
        elif index == YRES:
            if not self.enabled and 0 < value <= MAX_Y:
                self.height = value
        elif index == BPP:
            if not self.enabled and (value or 8) in DEPTHS:
                self.bpp = value or 8
        elif index == ENABLE:
            self._enable(value)
        elif index == BANK:
            if value << 16 < self._memory:
                self.bank = value
                self._changed(0)
        elif index == VIRT_WIDTH:
            if self.enabled and self.width <= value and self._pitch(value) * self.height <= self._memory:
                self.virtual_width = value
                self.virtual_height = self._memory // max(self.pitch, 1) & 0xFFFF
                self._clip()
        elif index == X_OFFSET:
            self.x_offset = value
            self._clip()
        elif index == Y_OFFSET:
            self.y_offset = value
            self._clip()

    def _clip(self) -> None:
        self.x_offset = min(self.x_offset, max(self.virtual_width - self.width, 0))
        lines = self._memory // max(self.pitch, 1)
        self.y_offset = min(self.y_offset, max(lines - self.height, 0))

    def _enable(self, value: int) -> None:
        before = self.enabled
        self.flags = value & (ENABLED | GET_CAPS | WIDE_DAC | LINEAR_BUFFER | NO_CLEAR)
        if not value & ENABLED:
            self.bank = 0
            self._changed(0)
            return
        if before:
            self._changed(0)
            return
        size = self._pitch(self.width) * self.height
        if not self.width or not self.height or size > self._memory:
            self.flags &= ~ENABLED
            return
        self.virtual_width = self.width
        self.virtual_height = min(self._memory // max(self.pitch, 1), 0xFFFF)
        self.x_offset = self.y_offset = self.bank = 0
        self._changed(0 if value & NO_CLEAR else size)
