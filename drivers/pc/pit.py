"""8254 timer with its three counters, and port 0x61: gate and output of counter 2, speaker, refresh toggle.

All six modes, binary and BCD, counter latch, status latch, read-back. A counter is not counted: its state is computed from the time
at which it was last started. Counter 0's output is interrupt 0; its gate and counter 1's are always high.

Two things differ from the chip: loading takes no clock, and periodic interrupts that come late, because nobody looked, are one and
not many (`missed` counts them). Interrupts come at most every 50 us. Sources: Intel 8254 data sheet; 82371SB, section 2.5.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import Clock, Line, PortSpace, Range

FREQUENCY: Final = 1_193_182
"""Hz."""
SECOND: Final = 1_000_000_000
PORT: Final = 0x40
CONTROL_PORT: Final = 0x61
MIN_PERIOD: Final = 50_000
"""ns between two interrupts."""
REFRESH: Final = 15_085
"""ns: the refresh toggle's half period."""
RATES: Final = (2, 3)
TRIGGERED: Final = (1, 5)
LOW_THEN_HIGH: Final = 3


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 15) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    value %= 10_000
    return value % 10 | value // 10 % 10 << 4 | value // 100 % 10 << 8 | value // 1000 << 12


class Counter:
    """One of the three."""

    def __init__(self, now: Clock, changed: Callable[[], None]) -> None:
        self._now: Final = now
        self._changed: Final = changed
        self.mode = 3
        self.access = LOW_THEN_HIGH
        self.bcd = False
        self.gate = True
        self.count = 0x10000
        self.running = False
        self.started = 0
        """Time at which it had `count`."""
        self._stopped_at = 0  # clocks that had passed when the gate stopped it
        self._next: int | None = None  # a new count that waits for the end of the cycle
        self._next_at = 0
        self._low: int | None = None  # first byte of a two-byte write
        self._high_next = False
        self._latch: int | None = None
        self._status: int | None = None
        self.loaded = False

    # -- time -----------------------------------------------------------------------------------------------------

    def _ticks(self, now: int) -> int:
        """Clocks since it had its full count."""
        if not self.running:
            return self._stopped_at
        return (now - self.started) * FREQUENCY // SECOND

    def when(self, ticks: int) -> int:
        """The time at which `_ticks` gets to that number."""
        return self.started - (-ticks * SECOND // FREQUENCY)

    def _settle(self, now: int) -> None:
        if self._next is not None and now >= self._next_at:
            self.started, self.count, self._next = self._next_at, self._next, None

    def output(self, now: int) -> bool:
        """Level of OUT."""
        self._settle(now)
        if not self.loaded:
            return self.mode != 0
        ticks = self._ticks(now)
        if self.mode == 0:
            return ticks >= self.count
        if self.mode == 1:
            return ticks >= self.count if self.running else True
        if self.mode == 2:
            return not self.gate or ticks % self.count != self.count - 1
        if self.mode == 3:
            return not self.gate or ticks % self.count < (self.count + 1) // 2
        return not self.running or ticks != self.count

    def value(self, now: int) -> int:
        """The counting element, as it is read."""
        self._settle(now)
        ticks, count = self._ticks(now), self.count
        if self.mode == 2:
            left = count - ticks % count
        elif self.mode == 3:
            left = count - 2 * ticks % count
        else:
            left = count - ticks
        return _to_bcd(left) if self.bcd else left & 0xFFFF

    def rising(self, now: int) -> int | None:
        """When OUT rises the next time after `now`."""
        self._settle(now)
        if not self.loaded or not self.running:
            return None
        if self.mode in RATES:
            if self._next is not None:
                return self._next_at
            return self.when((self._ticks(now) // self.count + 1) * self.count)
        at = self.when(self.count + 1 if self.mode in (4, 5) else self.count)
        return at if at > now else None

    # -- programming ----------------------------------------------------------------------------------------------

    def control(self, value: int) -> None:
        """A control word for it that is not a latch command."""
        self.access = value >> 4 & 3
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = bool(value & 1)
        self._low = self._latch = self._status = self._next = None
        self._high_next = False
        self.loaded = self.running = False
        self._stopped_at = 0
        self._changed()

    def latch_count(self) -> None:
        """Once: a second latch before it was read is ignored."""
        if self._latch is None:
            self._latch = self.value(self._now())

    def latch_status(self) -> None:
        """Likewise."""
        if self._status is None:
            now = self._now()
            null = not self.loaded or self._next is not None
            self._status = (
                self.output(now) << 7 | null << 6 | self.access << 4 | self.mode << 1 | int(self.bcd)
            )

    def read(self) -> int:
        """Of its port: status latch, count latch, count."""
        if self._status is not None:
            status, self._status = self._status, None
            return status
        value = self._latch if self._latch is not None else self.value(self._now())
        if self.access == LOW_THEN_HIGH:
            self._high_next = not self._high_next
            if self._high_next:
                return value & 0xFF
            self._latch = None
            return value >> 8
        self._latch = None
        return value >> 8 if self.access == 2 else value & 0xFF

    def write(self, value: int) -> None:
        """To its port: a count, or half of it."""
        if self.access == 1:
            self._load(value)
        elif self.access == 2:
            self._load(value << 8)
        elif self._low is None:
            self._low = value
            if self.mode == 0:  # counting stops, OUT goes low
                self.loaded = self.running = False
                self._stopped_at = 0
                self._changed()
        else:
            low, self._low = self._low, None
            self._load(low | value << 8)

    def _load(self, raw: int) -> None:
        count = (_from_bcd(raw) or 10_000) if self.bcd else (raw or 0x10000)
        now = self._now()
        self._settle(now)
        if self.mode in RATES and self.loaded and self.running:
            self._next, self._next_at = count, self.when((self._ticks(now) // self.count + 1) * self.count)
        elif self.mode in TRIGGERED and self.loaded and self.running:
            self._next, self._next_at = count, 1 << 63  # from the next trigger on
        else:
            self.count, self._next, self.loaded = count, None, True
            self._stopped_at = count + 2 if self.mode in TRIGGERED else 0
            self.running = self.gate and self.mode not in TRIGGERED
            self.started = now
        self._changed()

    def set_gate(self, level: bool) -> None:
        """The level of GATE."""
        if level == self.gate:
            return
        now = self._now()
        self._settle(now)
        ticks = self._ticks(now)
        self.gate = level
        if not self.loaded:
            return
        if self.mode in TRIGGERED:
            if level:
                if self._next is not None:
                    self.count, self._next = self._next, None
                self.running, self.started = True, now
        elif level:
            back = self._stopped_at if self.mode not in RATES else 0
            self.running, self.started = True, now - back * SECOND // FREQUENCY
        else:
            self._stopped_at, self.running = ticks, False
            if self._next is not None and self.mode in RATES:
                self.count, self._next = self._next, None
        self._changed()


class Pit:
    """The timer and port 0x61. Implements Timed (for counter 0)."""

    def __init__(self, now: Clock, irq: Line) -> None:
        self._now: Final = now
        self._irq: Final = irq
        self.counters: Final = (
            Counter(now, self._rearm),
            Counter(now, lambda: None),
            Counter(now, lambda: None),
        )
        self._deadline: int | None = None
        self._last = -MIN_PERIOD
        self.missed = 0
        """Periods of counter 0 that passed without an interrupt of their own."""
        self._port61 = 0
        self.reset()

    def attach(self, ports: PortSpace) -> None:
        """Ports 0x40 to 0x43, 0x61. BusError."""
        ports.add(Range("8254", PORT, 4, self._read, self._write))
        ports.add(Range("port 61", CONTROL_PORT, 1, self._read61, self._write61))

    def reset(self) -> None:
        """Counters wait to be programmed; 0x61 is 0 (counter 2's gate is low)."""
        for counter in self.counters:
            counter.control(0x36)
        self._port61 = 0
        self.counters[2].set_gate(False)

    # -- time -----------------------------------------------------------------------------------------------------

    def _rearm(self) -> None:
        now = self._now()
        counter = self.counters[0]
        at = counter.rising(now)
        self._deadline = None if at is None else max(at, self._last + MIN_PERIOD)
        self._irq(counter.mode == 0 and counter.output(now))

    def next_deadline(self) -> int | None:
        """See Timed."""
        return self._deadline

    def expire(self, now: int) -> None:
        """See Timed."""
        at = self._deadline
        if at is None or now < at:
            return
        counter = self.counters[0]
        self._last = now
        if counter.mode in RATES:
            period = counter.when(counter.count) - counter.started
            self.missed += (now - at) // period
            following = counter.rising(now)
            self._deadline = None if following is None else max(following, now + MIN_PERIOD)
        else:
            self._deadline = None
        self._irq(False)
        self._irq(True)
        if counter.mode:
            self._irq(False)

    @property
    def speaker(self) -> int:
        """Frequency that the loudspeaker gives, Hz; 0: it is off."""
        counter = self.counters[2]
        on = self._port61 & 3 == 3 and counter.loaded and counter.mode in RATES
        return FREQUENCY // counter.count if on else 0

    # -- ports ----------------------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int) -> int:
        return self.counters[offset].read() if offset < 3 else 0xFF

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset < 3:
            self.counters[offset].write(value)
            return
        which = value >> 6
        if which == 3:  # read-back
            for number, counter in enumerate(self.counters):
                if value & 2 << number:
                    if not value & 0x20:
                        counter.latch_count()
                    if not value & 0x10:
                        counter.latch_status()
        elif value & 0x30:
            self.counters[which].control(value)
        else:
            self.counters[which].latch_count()

    def _read61(self, offset: int, size: int) -> int:
        now = self._now()
        refresh = now // REFRESH & 1
        return self._port61 | refresh << 4 | self.counters[2].output(now) << 5

    def _write61(self, offset: int, size: int, value: int) -> None:
        self._port61 = value & 0xF
        self.counters[2].set_gate(bool(value & 1))
