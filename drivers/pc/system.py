"""Small things of a PC's board: A20, reset (ports 0x92 and 0xCF9), POST codes (0x80), debug output (0x402, 0xE9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import PortSpace, Range

PORT92: Final = 0x92
POST: Final = 0x80
SEABIOS_DEBUG: Final = 0x402
XEN_DEBUG: Final = 0xE9
DEBUG_SIGNATURE: Final = 0xE9
"""What reading a debug port gives: how SeaBIOS knows that it is there (QEMU: isa-debugcon)."""


class A20:
    """Address line 20: on while the keyboard controller or port 0x92 wants it. `out` is told of changes."""

    def __init__(self, out: Callable[[bool], None]) -> None:
        self._out: Final = out
        self._by_keyboard = True
        self._by_port92 = False

    @property
    def on(self) -> bool:
        """It is passed through to memory."""
        return self._by_keyboard or self._by_port92

    def _set(self, keyboard: bool, port92: bool) -> None:
        before = self.on
        self._by_keyboard, self._by_port92 = keyboard, port92
        if self.on != before:
            self._out(self.on)

    def keyboard(self, level: bool) -> None:
        """The keyboard controller's output port, bit 1."""
        self._set(level, self._by_port92)

    def port92(self, level: bool) -> None:
        """Port 0x92, bit 1."""
        self._set(self._by_keyboard, level)

    def reset(self) -> None:
        """On, by the keyboard controller: as firmware for PCs since 2000 finds it."""
        self._set(True, False)


class Port92:
    """System control port A: bit 0 reset (on its rising edge), bit 1 A20."""

    def __init__(self, a20: A20, reset: Callable[[], None]) -> None:
        self._a20: Final = a20
        self._do_reset: Final = reset
        self._value = 0

    def attach(self, ports: PortSpace) -> None:
        """Port 0x92. BusError."""
        ports.add(Range("port 92", PORT92, 1, lambda offset, size: self._value, self._write))

    def reset(self) -> None:
        """A20 by this port is off."""
        self._value = 0
        self._a20.port92(False)

    def _write(self, offset: int, size: int, value: int) -> None:
        before, self._value = self._value, value & 3
        self._a20.port92(bool(value & 2))
        if value & 1 and not before & 1:
            self._do_reset()


class ResetControl:
    """PIIX3's reset control register at 0xCF9: bit 2 starts a reset on its rising edge, bit 1 says that it is a hard one.

    Its port lies inside that of PCI's configuration address, which passes bytes on to here (82371SB, section 2.5.4.2).
    """

    def __init__(self, reset: Callable[[bool], None]) -> None:
        self._do_reset: Final = reset
        self.value = 0

    def write(self, value: int) -> None:
        """A byte."""
        before, self.value = self.value, value & 6
        if value & 4 and not before & 4:
            self._do_reset(bool(value & 2))

    def reset(self) -> None:
        """No reset under way."""
        self.value = 0


class DebugPort:
    """A port whose bytes are a log. `sink` is called with each."""

    def __init__(self, port: int, sink: Callable[[int], object]) -> None:
        self._port: Final = port
        self._sink: Final = sink

    def attach(self, ports: PortSpace) -> None:
        """BusError."""
        ports.add(Range(f"debug port {self._port:#x}", self._port, 1, self._read, self._write))

    def _read(self, offset: int, size: int) -> int:
        return DEBUG_SIGNATURE

    def _write(self, offset: int, size: int, value: int) -> None:
        self._sink(value)


class PostCode:
    """Port 0x80: the last POST code. Linux writes there to wait for about a microsecond."""

    def __init__(self) -> None:
        self.value = 0

    def attach(self, ports: PortSpace) -> None:
        """Port 0x80. BusError."""
        ports.add(Range("POST code", POST, 1, lambda offset, size: self.value, self._write))

    def _write(self, offset: int, size: int, value: int) -> None:
        self.value = value
