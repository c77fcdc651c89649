"""16550A serial port: FIFOs, interrupts, modem lines, loopback. Bytes out by a callback, bytes in by `receive`.

The line has no speed: what is transmitted is gone at once, and what is received below the FIFO's trigger level is told as a
timeout at once. Bytes that came in wait in a backlog until the FIFO has room, so nothing is overrun. Source: National
PC16550D data sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import Line, PortSpace, Range

COM1: Final = 0x3F8
COM2: Final = 0x2F8
COM1_IRQ: Final = 4
COM2_IRQ: Final = 3
FIFO: Final = 16
BACKLOG: Final = 1 << 16
TRIGGER: Final = (1, 4, 8, 14)

IER_RECEIVED, IER_EMPTY, IER_LINE, IER_MODEM = 1, 2, 4, 8
LSR_READY, LSR_OVERRUN, LSR_FRAMING, LSR_BREAK, LSR_EMPTY, LSR_FIFO_ERROR = 1, 2, 8, 0x10, 0x60, 0x80
MCR_OUT2, MCR_LOOP = 8, 0x10
MSR_LINES: Final = 0xB0
"""Clear to send, data set ready, carrier: somebody is there."""
IIR_NONE, IIR_MODEM, IIR_EMPTY, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT = 1, 0, 2, 4, 6, 0xC


class Uart:
    """One port. `transmit` is called with each byte that the guest sends."""

    def __init__(self, irq: Line, transmit: Callable[[int], object]) -> None:
        self._irq: Final = irq
        self._transmit: Final = transmit
        self._fifo = bytearray()
        self._backlog = bytearray()
        self._level = False
        self.reset()

    def attach(self, ports: PortSpace, base: int = COM1) -> None:
        """Eight ports. BusError."""
        ports.add(Range(f"16550A at {base:#x}", base, 8, self.read, self.write))

    def reset(self) -> None:
        """As after master reset; the backlog stays."""
        self._ier = self._lcr = self._mcr = self._scratch = self._fcr = 0
        self._divisor = 12
        self._errors = 0
        self._broken = 0  # number of bytes in the FIFO up to and with the one that is a break; 0: none
        self._delta = 0
        self._msr_lines = MSR_LINES
        self._empty_told = False  # the transmitter's interrupt is pending
        self._fifo.clear()
        self._refill()

    @property
    def baud(self) -> int:
        """By the divisor latch; nothing depends on it."""
        return 115_200 // self._divisor if self._divisor else 0

    @property
    def room(self) -> int:
        """Bytes that `receive` would take."""
        return BACKLOG - len(self._backlog)

    @property
    def polled(self) -> bool:
        """Software does not ask for interrupts when bytes come in: a BIOS or a boot loader, not a driver."""
        return not self._ier & IER_RECEIVED

    # -- from outside ---------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """Bytes for the guest; the number of those taken."""
        taken = data[: self.room]
        self._backlog += taken
        self._refill()
        return len(taken)

    def receive_break(self) -> None:
        """A break (Linux: the next byte is a SysRq)."""
        if len(self._fifo) < (FIFO if self._fcr & 1 else 1):
            self._fifo.append(0)
            self._broken = len(self._fifo)
        self._update()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        if self._backlog and not self._mcr & MCR_LOOP:
            room = (FIFO if self._fcr & 1 else 1) - len(self._fifo)
            if room > 0:
                self._fifo += self._backlog[:room]
                del self._backlog[:room]
        self._update()

    def _cause(self) -> int:
        """The interrupt identification, highest priority first."""
        ier = self._ier
        if ier & IER_LINE and (self._errors or self._broken == 1):
            return IIR_LINE
        if ier & IER_RECEIVED and self._fifo:
            if not self._fcr & 1 or len(self._fifo) >= TRIGGER[self._fcr >> 6]:
                return IIR_RECEIVED
            return IIR_TIMEOUT
        if ier & IER_EMPTY and self._empty_told:
            return IIR_EMPTY
        if ier & IER_MODEM and self._delta:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_LINES
        mcr = self._mcr  # DTR -> DSR, RTS -> CTS, OUT1 -> RI, OUT2 -> DCD
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 0xC) << 4

    # -- registers ------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """IN from port `offset` of eight."""
        if offset == 5:
            status = LSR_EMPTY | self._errors | bool(self._fifo)
            if self._broken:
                status |= LSR_FIFO_ERROR if self._fcr & 1 else 0
                status |= LSR_BREAK | LSR_FRAMING if self._broken == 1 else 0
            if self._errors:
                self._errors = 0
                self._update()
            return status
        if offset == 0:
            if self._lcr & 0x80:
                return self._divisor & 0xFF
            if not self._fifo:
                return 0
            value = self._fifo.pop(0)
            self._broken = max(self._broken - 1, 0)
            self._refill()
            return value
        if offset == 1:
            return self._divisor >> 8 if self._lcr & 0x80 else self._ier
        if offset == 2:
            cause = self._cause()
            if cause == IIR_EMPTY:
                self._empty_told = False
                self._update()
            return cause | (0xC0 if self._fcr & 1 else 0)
        if offset == 3:
            return self._lcr
        if offset == 4:
            return self._mcr
        if offset == 6:
            value = self._modem_lines() | self._delta
            self._delta = 0
            self._update()
            return value
        return self._scratch

    def write(self, offset: int, size: int, value: int) -> None:
        """OUT to port `offset` of eight."""
        if offset == 0:
            if self._lcr & 0x80:
                self._divisor = self._divisor & 0xFF00 | value
                return
            if not self._mcr & MCR_LOOP:
                self._transmit(value)
            elif len(self._fifo) < (FIFO if self._fcr & 1 else 1):
                self._fifo.append(value)
            else:
                self._errors |= LSR_OVERRUN
            # The holding register was full for no time, which ends the old interrupt and gives a new one: a new edge of the line.
            self._empty_told = False
            self._update()
            self._empty_told = True
            self._update()
        elif offset == 1:
            if self._lcr & 0x80:
                self._divisor = self._divisor & 0xFF | value << 8
                return
            if value & IER_EMPTY and not self._ier & IER_EMPTY:
                self._empty_told = True
            self._ier = value & 0xF
            self._update()
        elif offset == 2:
            changed = (value ^ self._fcr) & 1
            if changed or (value & 2 and value & 1):
                self._fifo.clear()
                self._broken = 0
            self._fcr = value & 0xC9 if value & 1 else 0
            self._refill()
        elif offset == 3:
            self._lcr = value
        elif offset == 4:
            before = self._modem_lines()
            self._mcr = value & 0x1F
            after = self._modem_lines()
            changed = before ^ after
            # Delta bits: CTS, DSR, DCD on any change, RI on its trailing edge.
            self._delta |= changed >> 4 & 3 | changed >> 4 & 8 | (4 if before & ~after & 0x40 else 0)
            self._refill()
        elif offset == 7:
            self._scratch = value
