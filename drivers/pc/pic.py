"""Two 8259A interrupt controllers, cascaded as in a PC, with the edge/level control registers of PIIX3 (ELCR).

All modes that the 8259A has in a PC are there: rotation, special mask, poll, automatic EOI, special fully nested mode. Not there:
the 8085's CALL sequence (ICW4 bit 0 clear), single mode, buffered mode; they are taken and make no difference.

An edge stays in the request register if its line drops again before the acknowledge (the 8259A would then give a spurious interrupt
7): the devices here may pulse their lines. Sources: Intel 8259A data sheet; 82371SB (PIIX3), sections 2.5.5 and 2.5.6 (ELCR1, ELCR2).
"""

from __future__ import annotations

from typing import Final

from drivers.pc.bus import Line, PortSpace, Range

MASTER: Final = 0x20
SLAVE: Final = 0xA0
ELCR: Final = 0x4D0
ELCR_MASK: Final = 0xDEF8
"""Lines 0, 1, 2, 8 and 13 are always edge triggered."""
CASCADE: Final = 2
LINES: Final = 16
SPURIOUS: Final = 7


class _Chip:
    """One 8259A."""

    def __init__(self, cascade: int) -> None:
        self.cascade = (
            cascade  # its inputs that come from another chip: not masked out in special fully nested mode
        )
        self.elcr = 0
        self.reset()

    def reset(self) -> None:
        self.lines = self.latched = self.imr = self.isr = 0
        self.base = 0
        self.step = 0  # of the initialization; 0: it is done
        self.wants_icw4 = False
        self.lowest = 7
        self.read_isr = self.poll = self.special_mask = False
        self.auto_eoi = self.rotate_auto = self.special_nested = False

    @property
    def irr(self) -> int:
        return self.latched & ~self.elcr | self.lines & self.elcr

    def drive(self, bit: int, level: bool) -> None:
        if level:
            if not self.lines & bit:
                self.latched |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit

    def _order(self, bits: int) -> int:
        """The number, 0 first, of the highest priority among `bits`; 8 for none."""
        first = self.lowest + 1
        rotated = (bits | bits << 8) >> (first & 7) & 0xFF
        return (rotated & -rotated).bit_length() - 1 if rotated else 8

    def pending(self) -> int:
        """The line to be served now, -1 for none."""
        elcr = self.elcr
        requests = (self.latched & ~elcr | self.lines & elcr) & ~self.imr
        if not requests:
            return -1
        blocked = self.isr
        if not blocked:
            return self._order(requests) + self.lowest + 1 & 7
        if self.special_mask:
            blocked &= ~self.imr
        if self.special_nested:
            blocked &= ~self.cascade
        rank = self._order(requests)
        if rank >= self._order(blocked):
            return -1
        return rank + self.lowest + 1 & 7

    def take(self, line: int) -> None:
        """The acknowledge of that line."""
        bit = 1 << line
        self.latched &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_auto:
            self.lowest = line

    def _highest_in_service(self) -> int:
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        rank = self._order(serving)
        return -1 if rank == 8 else rank + self.lowest + 1 & 7

    def command(self, value: int) -> None:
        if value & 0x10:  # ICW1
            elcr, lines = self.elcr, self.lines
            self.reset()
            self.elcr, self.lines = elcr, lines
            self.step, self.wants_icw4 = 2, bool(value & 1)
        elif value & 8:  # OCW3
            if value & 2:
                self.read_isr = bool(value & 1)
            self.poll = bool(value & 4)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._ocw2(value >> 5, value & 7)

    def _ocw2(self, code: int, line: int) -> None:
        if code in (0, 4):
            self.rotate_auto = code == 4
        elif code in (1, 5):  # non-specific EOI, and rotate
            serving = self._highest_in_service() if self.isr else -1
            if serving >= 0:
                self.isr &= ~(1 << serving)
                if code == 5:
                    self.lowest = serving
        elif code in (3, 7):  # specific EOI, and rotate
            self.isr &= ~(1 << line)
            if code == 7:
                self.lowest = line
        elif code == 6:
            self.lowest = line

    def data(self, value: int) -> None:
        if self.step == 0:
            self.imr = value
        elif self.step == 2:
            self.base = value & 0xF8
            self.step = 3
        elif self.step == 3:
            self.step = 4 if self.wants_icw4 else 0
        else:
            self.special_nested = bool(value & 0x10)
            self.auto_eoi = bool(value & 2)
            self.step = 0

    def read(self, offset: int) -> int:
        """Not in poll mode."""
        if offset:
            return self.imr
        return self.isr if self.read_isr else self.irr


class PicPair:
    """Interrupts 0 to 15. `intr` is called with the level of the processor's INTR input when that changes."""

    def __init__(self, intr: Line) -> None:
        self._intr: Final = intr
        self._master = _Chip(1 << CASCADE)
        self._slave = _Chip(0)
        self.asserted = False
        """The level of INTR."""

    def attach(self, ports: PortSpace) -> None:
        """Its ports: 0x20, 0xA0, 0x4D0. BusError."""
        ports.add(Range("8259A master", MASTER, 2, self._read_master, self._write_master))
        ports.add(Range("8259A slave", SLAVE, 2, self._read_slave, self._write_slave))
        ports.add(Range("ELCR", ELCR, 2, self._read_elcr, self._write_elcr))

    def reset(self) -> None:
        """As after power on; lines keep their level."""
        for chip in (self._master, self._slave):
            lines = chip.lines
            chip.reset()
            chip.elcr, chip.lines = 0, lines
        self._settle()

    def line(self, number: int) -> Line:
        """Input `number` (not 2, the cascade). IndexError."""
        if not 0 <= number < LINES or number == CASCADE:
            raise IndexError(f"interrupt line {number}")
        return lambda level: self.set_line(number, level)

    def set_line(self, number: int, level: bool) -> None:
        """Drive input `number`."""
        chip = self._slave if number & 8 else self._master
        if bool(chip.lines & 1 << (number & 7)) != level:
            chip.drive(1 << (number & 7), level)
            self._settle()

    def level_triggered(self, number: int) -> bool:
        """By the ELCR."""
        chip = self._slave if number & 8 else self._master
        return bool(chip.elcr & 1 << (number & 7))

    def acknowledge(self) -> int:
        """The processor's interrupt acknowledge cycle: the vector. With nothing to serve it is the spurious interrupt of line 7."""
        master, slave = self._master, self._slave
        line = master.pending()
        if line < 0:
            vector = master.base | SPURIOUS
        elif line == CASCADE:
            master.take(line)
            inner = slave.pending()
            if inner < 0:
                vector = slave.base | SPURIOUS
            else:
                slave.take(inner)
                vector = slave.base | inner
        else:
            master.take(line)
            vector = master.base | line
        self._settle()
        return vector

    def pending_vector(self) -> int | None:
        """The vector that an acknowledge would give now; None while INTR is low."""
        line = self._master.pending()
        if line < 0:
            return None
        if line != CASCADE:
            return self._master.base | line
        inner = self._slave.pending()
        return self._slave.base | (SPURIOUS if inner < 0 else inner)

    def _settle(self) -> None:
        """The cascade and INTR follow from the chips' state."""
        master = self._master
        bit = 1 << CASCADE
        if self._slave.pending() >= 0:
            # Each interrupt of the slave is a new edge of its output: with one in service, another one must be seen too.
            master.latched |= bit
            master.lines |= bit
        else:
            master.latched &= ~bit
            master.lines &= ~bit
        level = master.pending() >= 0
        if level != self.asserted:
            self.asserted = level
            self._intr(level)

    def _read(self, chip: _Chip, offset: int) -> int:
        if not chip.poll:
            return chip.read(offset)
        chip.poll = False
        line = chip.pending()
        if line < 0:
            return 0
        chip.take(line)
        self._settle()
        return 0x80 | line

    def _write(self, chip: _Chip, offset: int, value: int) -> None:
        if offset:
            chip.data(value)
        else:
            chip.command(value)
        self._settle()

    def _read_master(self, offset: int, size: int) -> int:
        return self._read(self._master, offset)

    def _write_master(self, offset: int, size: int, value: int) -> None:
        self._write(self._master, offset, value)

    def _read_slave(self, offset: int, size: int) -> int:
        return self._read(self._slave, offset)

    def _write_slave(self, offset: int, size: int, value: int) -> None:
        self._write(self._slave, offset, value)

    def _read_elcr(self, offset: int, size: int) -> int:
        return (self._slave if offset else self._master).elcr

    def _write_elcr(self, offset: int, size: int, value: int) -> None:
        (self._slave if offset else self._master).elcr = value & ELCR_MASK >> 8 * offset & 0xFF
        self._settle()
