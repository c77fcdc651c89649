"""MC146818A real-time clock with 128 bytes of CMOS memory (ports 0x70, 0x71), interrupt 8.

Time, alarm with wildcards, periodic interrupt, update-ended interrupt, update-in-progress, 12 and 24 hours, BCD and binary, century
at 0x32. The time is never counted: it is guest time plus an offset, and setting the clock changes the offset. Not there: the square
wave output, daylight saving, the time bases other than 32.768 kHz (the clock stands still with those). The day of the week follows
from the date.

What firmware finds in the other bytes is `cmos_for_firmware`'s. Sources: Motorola MC146818A data sheet; 82371SB, section 2.5.6; for
the bytes SeaBIOS, src/hw/rtc.h, as QEMU's pc.c writes them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from drivers.pc.bus import Clock, Line, PortSpace, Range

PORT: Final = 0x70
SIZE: Final = 128
SECOND: Final = 1_000_000_000
DAY: Final = 86_400
UPDATE: Final = 244_000
"""ns before a second's end in which an update is in progress."""
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, MONTHDAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D = range(10, 14)
CENTURY: Final = 0x32
_TIME: Final = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, MONTHDAY, MONTH, YEAR, CENTURY))
A_IN_PROGRESS: Final = 0x80
B_24H, B_BINARY, B_UPDATE, B_ALARM, B_PERIODIC, B_SET = 2, 4, 0x10, 0x20, 0x40, 0x80
IRQF: Final = 0x80
RUNNING: Final = 0x20
"""The divider's bits of register A for a 32.768 kHz crystal."""
VALID: Final = 0x80
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MAX_DAYS: Final = (datetime(9999, 12, 31, tzinfo=UTC) - EPOCH).days


def _days(year: int, month: int, day: int) -> int:
    """Days since 1970; what is out of range is brought into it, as nobody promises what such a clock does."""
    first = datetime(max(1, min(year, 9999)), max(1, min(month, 12)), 1, tzinfo=UTC)
    return (first - EPOCH).days + max(day, 1) - 1


class Rtc:
    """The clock. Implements Timed. `epoch` is the date at guest time 0, in seconds since 1970."""

    def __init__(self, now: Clock, irq: Line, epoch: int) -> None:
        self._now: Final = now
        self._irq: Final = irq
        self._offset = epoch * SECOND
        self.memory: Final = bytearray(SIZE)
        """The bytes; those of the time are brought up to date when they are read by port."""
        self._index = 0
        self._level = False
        self._seen = now()
        """Up to this time register C's flags are right."""
        self._frozen_phase: int | None = None  # ns in the second while it stands still
        self.nmi_masked = False
        self.memory[REG_A] = RUNNING | 6
        self.memory[REG_B] = B_24H
        self.memory[REG_D] = VALID

    def attach(self, ports: PortSpace) -> None:
        """Ports 0x70 and 0x71. BusError."""
        ports.add(Range("RTC", PORT, 2, self._read, self._write))

    def reset(self) -> None:
        """The reset pin: interrupts off, flags away; time and memory stay."""
        self.memory[REG_B] &= B_24H | B_BINARY | B_SET
        self._flags(self._now())
        self.memory[REG_C] = 0
        self._drive()

    # -- time -----------------------------------------------------------------------------------------------------

    @property
    def standing(self) -> bool:
        """No update happens."""
        return self._frozen_phase is not None

    def _wall(self, now: int) -> int:
        return now + self._offset

    @property
    def seconds(self) -> int:
        """The date, in seconds since 1970. While software sets it: what the registers say."""
        if self.standing:
            return self._from_registers()
        return self._wall(self._now()) // SECOND

    def shift(self, seconds: int) -> None:
        """Who has set the machine's clock moves this one too. While software sets it, it stays as it is."""
        if not self.standing:
            self._flags(self._now())
            self._offset += seconds * SECOND

    def _code(self, value: int) -> int:
        return value if self.memory[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.memory[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def _code_hour(self, hour: int) -> int:
        if self.memory[REG_B] & B_24H:
            return self._code(hour)
        return self._code((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.memory[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _to_registers(self, now: int) -> None:
        seconds = self._wall(now) // SECOND
        date = EPOCH + timedelta(days=max(0, min(seconds // DAY, MAX_DAYS)), seconds=seconds % DAY)
        memory, code = self.memory, self._code
        memory[SECONDS], memory[MINUTES] = code(date.second), code(date.minute)
        memory[HOURS] = self._code_hour(date.hour)
        memory[WEEKDAY] = code(date.isoweekday() % 7 + 1)
        memory[MONTHDAY], memory[MONTH] = code(date.day), code(date.month)
        memory[YEAR], memory[CENTURY] = code(date.year % 100), code(date.year // 100)

    def _from_registers(self) -> int:
        memory, decode = self.memory, self._decode
        year = decode(memory[CENTURY]) * 100 + decode(memory[YEAR])
        days = _days(year, decode(memory[MONTH]), decode(memory[MONTHDAY]))
        clock = (
            self._decode_hour(memory[HOURS]) * 3600 + decode(memory[MINUTES]) * 60 + decode(memory[SECONDS])
        )
        return days * DAY + clock

    def _may_run(self) -> bool:
        return not self.memory[REG_B] & B_SET and self.memory[REG_A] & 0x70 == RUNNING

    def _control(self, register: int, value: int) -> None:
        """Register A or B: the clock may stop or go on."""
        now = self._now()
        self._flags(now)
        if register == REG_B and value & B_SET:
            value &= ~B_UPDATE
        old_divider = self.memory[REG_A] & 0x70
        if self._frozen_phase is None:
            self._to_registers(now)
            phase = self._wall(now) % SECOND
        else:
            phase = self._frozen_phase
        seconds = self._from_registers() if self.standing else self._wall(now) // SECOND
        self.memory[register] = value
        if register == REG_A and old_divider & 0x60 == 0x60 and value & 0x70 == RUNNING:
            phase = SECOND // 2  # out of reset the first update comes half a second later
        if not self._may_run():
            self._frozen_phase = phase
        elif self.standing:
            self._frozen_phase = None
            self._offset = seconds * SECOND + phase - now
        self._drive()

    # -- flags and interrupts -------------------------------------------------------------------------------------

    def _period(self) -> int:
        """Clocks of 32.768 kHz between two periodic interrupts; 0: none."""
        rate = self.memory[REG_A] & 15
        if not rate or self.memory[REG_A] & 0x70 != RUNNING:
            return 0
        return 1 << (rate - 1 if rate > 2 else rate + 6)

    def _next_alarm(self, after: int) -> int | None:
        """First second after `after` (both since 1970) that the alarm matches."""
        memory = self.memory

        def wanted(register: int, count: int) -> range | tuple[int, ...]:
            raw = memory[register]
            if raw & 0xC0 == 0xC0:
                return range(count)
            value = self._decode_hour(raw) if register == HOURS_ALARM else self._decode(raw)
            return (value,) if value < count else ()

        hours, minutes, seconds = (
            wanted(HOURS_ALARM, 24),
            wanted(MINUTES_ALARM, 60),
            wanted(SECONDS_ALARM, 60),
        )
        if not (hours and minutes and seconds):
            return None
        first = after + 1
        day, clock = first - first % DAY, first % DAY
        for hour in hours:
            if hour < clock // 3600:
                continue
            for minute in minutes:
                if hour * 60 + minute < clock // 60:
                    continue
                start = (hour * 60 + minute) * 60
                for second in seconds:
                    if start + second >= clock:
                        return day + start + second
        return day + DAY + (hours[0] * 60 + minutes[0]) * 60 + seconds[0]

    def _flags(self, now: int) -> None:
        """Register C gets what happened since it was last looked at."""
        before, self._seen = self._seen, max(now, self._seen)
        found = 0
        period = self._period()
        if period and now * 32_768 // SECOND // period != before * 32_768 // SECOND // period:
            found |= B_PERIODIC
        if not self.standing:
            old, new = self._wall(before) // SECOND, self._wall(now) // SECOND
            if new > old:
                found |= B_UPDATE
                alarm = self._next_alarm(old)
                if alarm is not None and alarm <= new:
                    found |= B_ALARM
        self.memory[REG_C] |= found

    def _drive(self) -> None:
        memory = self.memory
        level = bool(memory[REG_C] & memory[REG_B] & (B_UPDATE | B_ALARM | B_PERIODIC))
        memory[REG_C] = memory[REG_C] & 0x70 | (IRQF if level else 0)
        if level != self._level:
            self._level = level
            self._irq(level)

    def next_deadline(self) -> int | None:
        """See Timed. While the interrupt is up nothing new can be told."""
        enabled = self.memory[REG_B] & (B_UPDATE | B_ALARM | B_PERIODIC)
        if not enabled or self._level:
            return None
        found: list[int] = []
        period = self._period()
        if enabled & B_PERIODIC and period:
            following = (self._seen * 32_768 // SECOND // period + 1) * period
            found.append(-(-following * SECOND // 32_768))
        if not self.standing:
            second = self._wall(self._seen) // SECOND
            if enabled & B_UPDATE:
                found.append((second + 1) * SECOND - self._offset)
            if enabled & B_ALARM:
                alarm = self._next_alarm(second)
                if alarm is not None:
                    found.append(alarm * SECOND - self._offset)
        return min(found, default=None)

    def expire(self, now: int) -> None:
        """See Timed."""
        if now > self._seen:
            self._flags(now)
            self._drive()

    # -- ports ----------------------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int) -> int:
        if not offset:
            return 0xFF
        index = self._index
        if index in _TIME:
            if not self.standing:
                self._to_registers(self._now())
        elif index == REG_A:
            phase = self._wall(self._now()) % SECOND
            busy = not self.standing and phase >= SECOND - UPDATE
            return self.memory[REG_A] | (A_IN_PROGRESS if busy else 0)
        elif index == REG_C:
            self._flags(self._now())
            self._drive()
            value = self.memory[REG_C]
            self.memory[REG_C] = 0
            self._drive()
            return value
        return self.memory[index]

    def _write(self, offset: int, size: int, value: int) -> None:
        if not offset:
            self._index = value & 0x7F
            self.nmi_masked = bool(value & 0x80)
            return
        index = self._index
        if index == REG_A:
            self._control(REG_A, value & 0x7F)
        elif index == REG_B:
            self._control(REG_B, value)
        elif index in _TIME:
            now = self._now()
            if self.standing:
                self.memory[index] = value
                return
            self._flags(now)
            self._to_registers(now)
            self.memory[index] = value
            self._offset = self._from_registers() * SECOND + self._wall(now) % SECOND - now
        elif index not in (REG_C, REG_D):
            if index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                self._flags(self._now())
            self.memory[index] = value


BOOT_CODES: Final = {"a": 1, "c": 2, "d": 3, "n": 4}
"""Of xl.cfg's `boot=`: floppy, disk, optical drive, network."""


def cmos_for_firmware(memory: bytearray, *, low_memory: int, high_memory: int, boot: str, vcpus: int) -> None:
    """Fill in what SeaBIOS reads. `low_memory` is the end of RAM below 4 GiB in bytes, `high_memory` its size above.

    `boot`: up to three letters of BOOT_CODES. ValueError for others.
    """
    if len(boot) > 3 or any(letter not in BOOT_CODES for letter in boot):
        raise ValueError(f"boot order {boot!r}: up to three letters of {''.join(BOOT_CODES)}")
    base, extended = min(low_memory >> 10, 640), max(0, min((low_memory >> 10) - 1024, 0xFFFF))
    above_16m = max(0, min((low_memory >> 16) - 256, 0xFFFF))
    memory[0x14] = 0x06  # equipment: VGA or better (video bits 0), coprocessor, PS/2 mouse
    memory[0x15], memory[0x16] = base & 0xFF, base >> 8
    for low, high in ((0x17, 0x18), (0x30, 0x31)):
        memory[low], memory[high] = extended & 0xFF, extended >> 8
    memory[0x34], memory[0x35] = above_16m & 0xFF, above_16m >> 8
    memory[0x5B:0x5E] = (high_memory >> 16 & 0xFFFFFF).to_bytes(3, "little")
    memory[0x5F] = min(vcpus, 256) - 1
    codes = [BOOT_CODES[letter] for letter in boot] + [0, 0, 0]
    memory[0x3D] = codes[0] | codes[1] << 4
    memory[0x38] = codes[2] << 4 | 1  # bit 0: a floppy's boot sector needs no signature
