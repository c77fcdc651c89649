"""High precision event timer with three comparators of 64 bits, as Xen's, at 62.5 MHz.

One shot and periodic, level and edge, legacy replacement (timer 0 is interrupt 0, timer 1 is interrupt 8, and PIT and RTC are cut off:
`on_legacy` tells the owner to). Not there: delivery by memory write (FSB). Periodic interrupts that come late are one, and there is at
most one every 50 us. Source: IA-PC HPET Specification 1.0a.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import Clock, MmioSpace, Range

ADDRESS: Final = 0xFED0_0000
SIZE: Final = 0x400
TIMERS: Final = 3
PERIOD: Final = 16
"""ns of a tick."""
CAPABILITIES: Final = (PERIOD * 1_000_000) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS - 1) << 8 | 1
ENABLE, LEGACY = 1, 2
LEVEL, INTERRUPT, PERIODIC, PERIODIC_CAN, WIDE_CAN, SET_VALUE, NARROW = 2, 4, 8, 0x10, 0x20, 0x40, 0x100
ROUTE: Final = 0x00F0_0000
"""Inputs 20 to 23 of the I/O APIC."""
FIXED_BITS: Final = ROUTE << 32 | PERIODIC_CAN | WIDE_CAN
WRITABLE: Final = 0x3F4E
MIN_PERIOD: Final = 50_000
ALL: Final = (1 << 64) - 1


class Hpet:
    """The block. `gsi(number, level)` drives inputs of the I/O APIC, each high while one of the timers that are routed there is; `isa(number, level)` interrupts 0 and 8 in legacy mode."""

    def __init__(
        self,
        now: Clock,
        gsi: Callable[[int, bool], None],
        isa: Callable[[int, bool], None],
        on_legacy: Callable[[bool], None] = lambda on: None,
    ) -> None:
        self._now: Final = now
        self._gsi: Final = gsi
        self._isa: Final = isa
        self._on_legacy: Final = on_legacy
        self._set_initial()

    def _set_initial(self) -> None:
        self._config = self._status = 0
        self._counter = 0  # while it stands
        self._base = 0  # guest time of counter 0 while it runs
        self._timers = [FIXED_BITS] * TIMERS
        self._compare = [ALL] * TIMERS
        self._period = [0] * TIMERS
        self._next: list[int | None] = [None] * TIMERS  # ticks, as they count without end
        self._last = [-MIN_PERIOD] * TIMERS
        self._pulled: list[int | None] = [None] * TIMERS  # the input that each timer pulls

    def attach(self, mmio: MmioSpace) -> None:
        """Its registers. BusError."""
        mmio.add(Range("HPET", ADDRESS, SIZE, self.read, self.write, 8))

    def reset(self) -> None:
        """Stopped, at 0."""
        for number in range(TIMERS):
            self._drive(number, False)
        was = self._config & LEGACY
        self._set_initial()
        if was:
            self._on_legacy(False)

    # -- time -----------------------------------------------------------------------------------------------------

    def _ticks(self, now: int) -> int:
        return (now - self._base) // PERIOD if self._config & ENABLE else self._counter

    def _mask(self, number: int) -> int:
        return 0xFFFF_FFFF if self._timers[number] & NARROW else ALL

    def _arm(self, number: int) -> None:
        """When it fires next follows from its comparator."""
        if not self._config & ENABLE or not self._timers[number] & INTERRUPT:
            self._next[number] = None
            return
        ticks = self._ticks(self._now())
        self._next[number] = ticks + (self._compare[number] - ticks & self._mask(number))

    def next_deadline(self) -> int | None:
        """See Timed."""
        found: int | None = None
        for number, ticks in enumerate(self._next):
            if ticks is not None:
                at = max(self._base + ticks * PERIOD, self._last[number] + MIN_PERIOD)
                found = at if found is None or at < found else found
        return found if found is None or found < 1 << 63 else None

    def expire(self, now: int) -> None:
        """See Timed."""
        for number in range(TIMERS):
            due = self._next[number]
            if due is None or now < self._base + due * PERIOD or now < self._last[number] + MIN_PERIOD:
                continue
            period = self._period[number] & self._mask(number)
            if self._timers[number] & PERIODIC and period:
                passed = (self._ticks(now) - due) // period + 1
                self._next[number] = due + passed * period
                self._compare[number] = self._compare[number] + passed * period & self._mask(number)
            else:
                self._next[number] = due + self._mask(number) + 1
            self._last[number] = now
            self._fire(number)

    def _fire(self, number: int) -> None:
        if self._timers[number] & LEVEL:
            self._status |= 1 << number
            self._drive(number, True)
        else:
            self._drive(number, True)
            self._drive(number, False)

    def _drive(self, number: int, level: bool) -> None:
        if self._config & LEGACY and number < 2:
            self._isa(0 if number == 0 else 8, level)
            return
        route = self._timers[number] >> 9 & 31
        if ROUTE >> route & 1:
            before = route in self._pulled
            self._pulled[number] = route if level else None
            if (route in self._pulled) != before:
                self._gsi(route, level)

    # -- registers ------------------------------------------------------------------------------------------------

    def _register(self, offset: int) -> int:
        if offset == 0x000:
            return CAPABILITIES
        if offset == 0x010:
            return self._config
        if offset == 0x020:
            return self._status
        if offset == 0x0F0:
            return self._ticks(self._now()) & ALL
        number, kind = divmod(offset - 0x100, 0x20)
        if 0 <= number < TIMERS:
            if kind == 0:
                return self._timers[number]
            if kind == 8:
                return self._compare[number] & self._mask(number)
        return 0

    def read(self, offset: int, size: int) -> int:
        """4 or 8 bytes; smaller ones too."""
        return self._register(offset & ~7) >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """4 or 8 bytes."""
        if size < 4:
            return
        shift, place = 8 * (offset & 7), offset & ~7
        mask = ((1 << 8 * size) - 1) << shift
        if place == 0x020:
            self._end(value << shift)
            return
        new = self._register(place) & ~mask | value << shift & mask
        if place == 0x010:
            self._configure(new & (ENABLE | LEGACY))
        elif place == 0x0F0:
            self._set_counter(new)
        elif 0x100 <= place < 0x100 + 0x20 * TIMERS:
            number, kind = divmod(place - 0x100, 0x20)
            if kind == 0:
                self._set_timer(number, new)
            elif kind == 8:
                self._set_comparator(number, new)

    def _end(self, value: int) -> None:
        for number in range(TIMERS):
            if value & self._status & 1 << number:
                self._status &= ~(1 << number)
                self._drive(number, False)

    def _lower(self) -> None:
        """Routes are about to change: what is asserted goes low where it is."""
        for number in range(TIMERS):
            if self._status & 1 << number:
                self._drive(number, False)

    def _raise(self) -> None:
        """And is asserted where it is to be now, unless its timer's interrupt is off."""
        for number in range(TIMERS):
            if self._status & 1 << number and self._timers[number] & INTERRUPT:
                self._drive(number, True)

    def _configure(self, value: int) -> None:
        now = self._now()
        before = self._config
        if value & ENABLE and not before & ENABLE:
            self._base = now - self._counter * PERIOD
        elif before & ENABLE and not value & ENABLE:
            self._counter = self._ticks(now) & ALL
        moved = (value ^ before) & LEGACY
        if moved:
            self._lower()
        self._config = value
        if moved:
            self._on_legacy(bool(value & LEGACY))
            self._raise()
        if (value ^ before) & ENABLE:
            for number in range(TIMERS):
                self._arm(number)

    def _set_counter(self, value: int) -> None:
        """While it stands; while it runs, the specification has the result undefined, and nothing happens."""
        if not self._config & ENABLE:
            self._counter = value

    def _set_timer(self, number: int, value: int) -> None:
        old = self._timers[number]
        if old & LEVEL and not value & LEVEL:
            self._end(1 << number)
        self._lower()
        self._timers[number] = value & WRITABLE & ~0x4000 | FIXED_BITS
        self._raise()
        if (old ^ value) & (INTERRUPT | NARROW | PERIODIC):
            self._arm(number)

    def _set_comparator(self, number: int, value: int) -> None:
        timer = self._timers[number]
        if timer & PERIODIC:
            self._period[number] = value
            if not timer & SET_VALUE:
                return
            self._timers[number] = timer & ~SET_VALUE
        self._compare[number] = value & self._mask(number)
        self._arm(number)
