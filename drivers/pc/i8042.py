"""The keyboard controller 8042 of a PC: ports 0x60 and 0x64, keyboard and mouse behind it, interrupts 1 and 12, A20, reset.

All of a PS/2 controller's commands but those of its RAM beyond the command byte, which read as 0. Its input buffer is never full.
Sources: IBM PS/2 Hardware Interface Technical Reference (keyboard and auxiliary device controller).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from drivers.pc.bus import Line, PortSpace, Range
from drivers.pc.keys import TRANSLATION
from drivers.pc.ps2 import Keyboard, Mouse
from drivers.pc.system import A20

DATA, COMMAND = 0x60, 0x64
OUTPUT_FULL, SYSTEM, WAS_COMMAND, NOT_LOCKED, AUX_FULL = 1, 4, 8, 0x10, 0x20
KEYBOARD_INTERRUPT, AUX_INTERRUPT, KEYBOARD_OFF, AUX_OFF, TRANSLATE = 1, 2, 0x10, 0x20, 0x40
RUN, A20_BIT = 1, 2
KEYBOARD_IRQ, AUX_IRQ = 1, 12


class I8042:
    """The controller. `reset` is called when its output port's bit 0 is pulled low."""

    def __init__(self, irq1: Line, irq12: Line, a20: A20, reset: Callable[[], None]) -> None:
        self._lines: Final = (irq1, irq12)
        self._a20: Final = a20
        self._do_reset: Final = reset
        self.keyboard: Final = Keyboard()
        self.mouse: Final = Mouse()
        self._answers: Final[deque[tuple[int, bool]]] = (
            deque()
        )  # of the controller itself, (byte, as if by the mouse)
        self._levels = [False, False]
        self.reset()

    def attach(self, ports: PortSpace) -> None:
        """Ports 0x60 and 0x64. BusError."""
        ports.add(Range("8042 data", DATA, 1, self._read_data, self._write_data))
        ports.add(Range("8042 command", COMMAND, 1, self._read_status, self._write_command))

    def reset(self) -> None:
        """As after power on: translation on, interrupts off."""
        self.keyboard.reset()
        self.mouse.reset()
        self._answers.clear()
        self._mode = TRANSLATE | SYSTEM
        self._last = self._status = 0
        self._from_aux = self._full = False
        self._break = False  # set 2's break prefix was seen
        self._waiting = 0
        self._a20_wanted = True
        self._settle()

    # -- from outside ---------------------------------------------------------------------------------------------

    def key(self, name: str, pressed: bool) -> None:
        """A key goes down or up. KeyError: no key has that name."""
        self.keyboard.key(name, pressed)
        self._fill()

    def move_mouse(self, dx: int, dy: int, wheel: int = 0, buttons: int | None = None) -> None:
        """See Mouse.move."""
        self.mouse.move(dx, dy, wheel, buttons)
        self._fill()

    @property
    def drained(self) -> bool:
        """The guest has read everything that was typed."""
        return not self._full and not self.keyboard.queue and not self.mouse.queue

    # -- output buffer --------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """The next byte goes into the output buffer if that is empty."""
        while not self._full:
            if self._answers:
                self._put(*self._answers.popleft())
            elif self.keyboard.queue and not self._mode & KEYBOARD_OFF:
                byte = self.keyboard.queue.popleft()
                if self._mode & TRANSLATE:
                    if byte == 0xF0:
                        self._break = True
                        continue
                    byte = TRANSLATION[byte] | (0x80 if self._break else 0)
                    self._break = False
                self._put(byte, False)
            elif self.mouse.queue and not self._mode & AUX_OFF:
                self._put(self.mouse.queue.popleft(), True)
            else:
                break
        self._settle()

    def _put(self, byte: int, aux: bool) -> None:
        self._last, self._from_aux, self._full = byte, aux, True

    def _settle(self) -> None:
        wanted = AUX_INTERRUPT if self._from_aux else KEYBOARD_INTERRUPT
        for index in (0, 1):
            level = self._full and index == self._from_aux and bool(self._mode & wanted)
            if level != self._levels[index]:
                self._levels[index] = level
                self._lines[index](level)

    # -- ports ----------------------------------------------------------------------------------------------------

    def _read_data(self, offset: int, size: int) -> int:
        value = self._last
        if self._full:
            self._full = False
            self._settle()
            self._fill()
        return value

    def _read_status(self, offset: int, size: int) -> int:
        full = (OUTPUT_FULL | (AUX_FULL if self._from_aux else 0)) if self._full else 0
        return full | self._mode & SYSTEM | self._status | NOT_LOCKED

    def _answer(self, value: int, aux: bool = False) -> None:
        if len(self._answers) < 16:
            self._answers.append((value, aux))
        self._fill()

    def _output_port(self) -> int:
        full = 0x10 if self._full and not self._from_aux else 0
        return RUN | self._a20.on << 1 | full | (0x20 if self._full and self._from_aux else 0) | 0xC0

    def _set_output(self, value: int) -> None:
        self._a20.keyboard(bool(value & A20_BIT))
        if not value & RUN:
            self._do_reset()

    def _write_data(self, offset: int, size: int, value: int) -> None:
        self._status = 0
        waiting, self._waiting = self._waiting, 0
        if not waiting:
            self._mode &= ~KEYBOARD_OFF
            self.keyboard.command(value)
        elif waiting == 0x60:
            self._mode = value
        elif waiting == 0xD1:
            self._set_output(value)
        elif waiting in (0xD2, 0xD3):
            self._answer(value, waiting == 0xD3)
        elif waiting == 0xD4:
            self._mode &= ~AUX_OFF
            self.mouse.command(value)
        self._fill()

    def _write_command(self, offset: int, size: int, value: int) -> None:
        self._status = WAS_COMMAND
        self._waiting = 0
        if value == 0x20:
            self._answer(self._mode)
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4) or 0x60 < value < 0x80:
            self._waiting = value
        elif 0x20 < value < 0x40:
            self._answer(0)
        elif value in (0xA7, 0xA8):
            self._mode = self._mode & ~AUX_OFF | (AUX_OFF if value == 0xA7 else 0)
        elif value in (0xAD, 0xAE):
            self._mode = self._mode & ~KEYBOARD_OFF | (KEYBOARD_OFF if value == 0xAD else 0)
        elif value in (0xA9, 0xAB):  # tests of the two interfaces: no error
            self._answer(0)
        elif value == 0xAA:
            self._mode |= SYSTEM
            self._answer(0x55)
        elif value == 0xC0:
            self._answer(0x80)
        elif value == 0xD0:
            self._answer(self._output_port())
        elif value in (0xDD, 0xDF):
            self._a20.keyboard(value == 0xDF)
        elif value >= 0xF0 and not value & RUN:
            self._do_reset()
        self._fill()
