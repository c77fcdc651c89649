"""PS/2 keyboard and mouse, as they speak to the 8042. Bytes in by `command`, bytes out by a bounded queue.

Sources: IBM PS/2 Hardware Interface Technical Reference; Microsoft's IntelliMouse (wheel, identifier 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Final

from drivers.pc.keys import scan_codes

COUNTER_MAX: Final = 255
"""Of a mouse that does not report: nine bits with their sign, and no overflow kept."""
QUEUE: Final = 256
ACK, RESEND, SELF_TEST, ECHO = 0xFA, 0xFE, 0xAA, 0xEE
OVERRUN: Final = {1: 0xFF, 2: 0x00}


class Device(ABC):
    """What both have: a queue, and a command that waits for its argument."""

    def __init__(self) -> None:
        self.queue: Final[deque[int]] = deque()
        self._waiting = 0

    def answer(self, *data: int) -> None:
        """Bytes for the host, if there is room."""
        if len(self.queue) + len(data) <= QUEUE:
            self.queue.extend(data)

    @abstractmethod
    def command(self, value: int) -> None:
        """A byte from the host."""


class Keyboard(Device):
    """A keyboard of 102 keys, scan code sets 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.leds = 0
        self.scanning = True
        self.scan_set = 2

    def _defaults(self) -> None:
        self.scan_set, self.scanning = 2, True

    def reset(self) -> None:
        """As after power on."""
        self.queue.clear()
        self._waiting = self.leds = 0
        self._defaults()

    def key(self, name: str, pressed: bool) -> None:
        """A key goes down or up (a name of `keys.SCAN1`). KeyError. Dropped while the host has switched scanning off."""
        codes = scan_codes(name, pressed, self.scan_set)
        if not self.scanning or not codes:
            return
        if len(self.queue) + len(codes) > QUEUE - 16:  # room for answers
            if not self.queue or self.queue[-1] != OVERRUN[self.scan_set]:
                self.answer(OVERRUN[self.scan_set])
            return
        self.queue.extend(codes)

    def command(self, value: int) -> None:
        """See Device."""
        waiting, self._waiting = self._waiting, 0
        if waiting == 0xED:
            self.leds = value & 7
            self.answer(ACK)
        elif waiting == 0xF0:
            if value == 0:
                self.answer(ACK, self.scan_set)
            elif value in (1, 2):
                self.scan_set = value
                self.answer(ACK)
            else:
                self.answer(RESEND)
        elif waiting == 0xF3:
            self.answer(ACK)
        elif value in (0xED, 0xF0, 0xF3):
            self._waiting = value
            self.answer(ACK)
        elif value == 0xEE:
            self.answer(ECHO)
        elif value == 0xF2:
            self.answer(ACK, 0xAB, 0x83)
        elif value == 0xF4:
            self.scanning = True
            self.answer(ACK)
        elif value in (0xF5, 0xF6):
            self._defaults()
            self.scanning = value == 0xF6
            self.answer(ACK)
        elif value == 0xFF:
            self.reset()
            self.answer(ACK, SELF_TEST)
        else:
            self.answer(RESEND)


class Mouse(Device):
    """Two buttons and a third, a wheel once the host has asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self._knocks: deque[int] = deque(maxlen=3)
        self._buttons = 0
        self._x = self._y = self._wheel = 0
        self.reset()

    def reset(self) -> None:
        """As after power on."""
        self.queue.clear()
        self._waiting = 0
        self.wheel = False
        self._defaults()

    def _defaults(self) -> None:
        self.rate, self.resolution = 100, 2
        self.scaling = self.reporting = self.remote = False
        self._x = self._y = self._wheel = 0

    def move(self, dx: int, dy: int, wheel: int = 0, buttons: int | None = None) -> None:
        """It moved: right, up, wheel up; buttons: bit 0 left, 1 right, 2 middle. None: as they were."""
        if buttons is not None:
            changed = buttons != self._buttons
            self._buttons = buttons & 7
        else:
            changed = False
        self._x, self._y, self._wheel = self._x + dx, self._y + dy, self._wheel + wheel
        if not self.reporting:  # the counters stand at their ends
            self._x, self._y = (max(-COUNTER_MAX, min(n, COUNTER_MAX)) for n in (self._x, self._y))
            self._wheel = max(-8, min(self._wheel, 7))
        if self.reporting and not self.remote and (changed or self._x or self._y or self._wheel):
            self._report(force=changed)

    def _report(self, force: bool) -> None:
        size = 4 if self.wheel else 3
        while (force or self._x or self._y or (self._wheel and self.wheel)) and len(
            self.queue
        ) + size <= QUEUE - 16:
            force = False
            x, y = max(-255, min(self._x, 255)), max(-255, min(self._y, 255))
            wheel = max(-8, min(self._wheel, 7))
            self._x, self._y, self._wheel = self._x - x, self._y - y, self._wheel - wheel
            first = 8 | self._buttons | (0x10 if x < 0 else 0) | (0x20 if y < 0 else 0)
            self.queue.extend((first, x & 0xFF, y & 0xFF))
            if self.wheel:
                self.queue.append(-wheel & 0xFF)
        if not self.wheel:
            self._wheel = 0

    def command(self, value: int) -> None:
        """See Device."""
        waiting, self._waiting = self._waiting, 0
        if waiting == 0xF3:
            self.rate = value
            self._knocks.append(value)
            if tuple(self._knocks) == (200, 100, 80):
                self.wheel = True
            self.answer(ACK)
        elif waiting == 0xE8:
            self.resolution = value & 3
            self.answer(ACK)
        elif value in (0xE8, 0xF3):
            self._waiting = value
            self.answer(ACK)
        elif value in (0xE6, 0xE7):
            self.scaling = value == 0xE7
            self.answer(ACK)
        elif value == 0xE9:
            status = self._buttons & 1 | self.scaling << 4 | self.reporting << 5 | self.remote << 6
            self.answer(ACK, status, self.resolution, self.rate)
        elif value in (0xEA, 0xF0):
            self.remote = value == 0xF0
            self.answer(ACK)
        elif value == 0xEB:
            self.answer(ACK)
            self._report(force=True)
        elif value == 0xF2:
            self.answer(ACK, 3 if self.wheel else 0)
        elif value in (0xF4, 0xF5):
            self.reporting = value == 0xF4
            self.answer(ACK)
        elif value == 0xF6:
            self._defaults()
            self.answer(ACK)
        elif value == 0xFF:
            self.reset()
            self.answer(ACK, SELF_TEST, 0)
        else:
            self.answer(RESEND)
