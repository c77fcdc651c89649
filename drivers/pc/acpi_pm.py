"""ACPI power management: the PIIX4 function 8086:7113 that Xen's machines have, with its fixed hardware.

PM1 event and control block, PM timer of 32 bits at 3.579545 MHz, SMI command port 0xB2, general purpose events 0 to 15 at 0xAFE0. The
PM1 block is where configuration register 0x40 says (Xen's firmware: 0xB000); the general purpose events do not move. Registers and
function are apart (`AcpiRegisters`, `PmFunction`): a guest that reads the timer all the time has them beside its vCPU, at the
address that firmware gives them, and the function in its device model. `AcpiPm` is both together.

SCI_EN is 1 from reset on: Xen's FADT names no SMI command, so the machine is always in ACPI mode; the SMI command port takes 0xF1
and 0xF0 all the same. SLP_EN with SLP_TYP 0 is S5. Not there: the SMBus, device traps, sleep button, S3.
Sources: ACPI 5.0, 4.8; Intel 82371AB (PIIX4), 7; Xen, public/hvm/ioreq.h for the addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.abi.hvm.ioreq import ACPI_GPE0_BLK_ADDRESS_V1, ACPI_GPE0_BLK_LEN_V1
from drivers.pc.bus import BusError, Clock, Line, MmioSpace, PortSpace, Range
from drivers.pc.pci import PciFunction

FREQUENCY: Final = 3_579_545
SECOND: Final = 1_000_000_000
BLOCK: Final = 0x40
STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
TIMER_EVENT, GLOBAL, POWER_BUTTON, RTC_EVENT, WAKE = 1, 1 << 5, 1 << 8, 1 << 10, 1 << 15
EVENTS: Final = TIMER_EVENT | GLOBAL | POWER_BUTTON | RTC_EVENT
SCI_EN: Final = 1
SLP_EN: Final = 1 << 13
S5: Final = 0
APM: Final = 0xB2
ACPI_ON, ACPI_OFF = 0xF1, 0xF0
PMBASE, PMREGMISC = 0x40, 0x80
SCI_IRQ: Final = 9


class PmFunction(PciFunction):
    """00:01.3: configuration space alone."""

    def __init__(self) -> None:
        super().__init__("82371AB PM", vendor=0x8086, device=0x7113, class_code=0x068000, revision=3, pin=1)
        self.data[6:8] = (0x0280).to_bytes(2, "little")
        self.data[PMBASE] = 1
        self.mask[PMBASE : PMBASE + 2] = b"\xc0\xff"
        self.mask[PMREGMISC] = 1
        self.mask[0x41:0x43] = b"\xff\x00"
        for offset in (*range(0x44, 0x80), 0x90, 0x91, 0xD2, 0xD3):
            self.mask[offset] = 0xFF
        self.data[0x90] = 1
        self.data[0x5B] = (
            2  # APMC_EN: firmware takes it that system management mode is set up already; there is none
        )

    def connect(
        self, ports: PortSpace, mmio: MmioSpace, intx: Line | None, others: Callable[[], None]
    ) -> None:
        """See PciFunction; its interrupt is the SCI, not a PCI pin."""
        super().connect(ports, mmio, None, others)


class AcpiRegisters:
    """The fixed hardware. `sci` is ISA line 9. `sleep` is told of SLP_TYP when SLP_EN is written. Implements Timed."""

    def __init__(self, now: Clock, sci: Line, sleep: Callable[[int], None]) -> None:
        self._now: Final = now
        self._sci: Final = sci
        self._sleep: Final = sleep
        self._gpe_status = self._gpe_enable = 0
        self._apm = [0, 0]
        self._sci_level = False
        self._status = self._enable = 0
        self._control = SCI_EN
        self._seen = self._ticks()

    def attach(self, ports: PortSpace) -> None:
        """Ports 0xB2, 0xB3, 0xAFE0 to 0xAFE3. BusError."""
        ports.add(Range("APM", APM, 2, self._read_apm, self._write_apm))
        ports.add(
            Range("GPE0", ACPI_GPE0_BLK_ADDRESS_V1, ACPI_GPE0_BLK_LEN_V1, self._read_gpe, self._write_gpe)
        )

    def block(self, base: int) -> Range:
        """The PM1 block for that port."""
        return Range("ACPI PM1", base, BLOCK, self.read, self.write, 4)

    def reset(self) -> None:
        """Events off, the timer goes on."""
        self._status = self._enable = self._gpe_status = self._gpe_enable = 0
        self._control = SCI_EN
        self._update()

    # -- events ---------------------------------------------------------------------------------------------------

    def _ticks(self) -> int:
        return self._now() * FREQUENCY // SECOND

    def _catch_up(self) -> None:
        """The timer's status is set when its highest bit changes."""
        now = self._ticks()
        if now >> 31 != self._seen >> 31:
            self._status |= TIMER_EVENT
        self._seen = now

    def _update(self) -> None:
        level = bool(self._control & SCI_EN) and bool(
            self._status & self._enable & EVENTS or self._gpe_status & self._gpe_enable
        )
        if level != self._sci_level:
            self._sci_level = level
            self._sci(level)

    def next_deadline(self) -> int | None:
        """See Timed: only while the timer's event is wanted."""
        if not self._enable & TIMER_EVENT or self._sci_level:
            return None
        turn = ((self._seen >> 31) + 1) << 31
        return -(-turn * SECOND // FREQUENCY)

    def expire(self, now: int) -> None:
        """See Timed."""
        self._catch_up()
        self._update()

    def press_power_button(self) -> None:
        """What `xl shutdown -F` does: the operating system is asked to shut down."""
        self._status |= POWER_BUTTON
        self._update()

    def raise_gpe(self, number: int) -> None:
        """General purpose event 0 to 15."""
        self._gpe_status |= 1 << number & 0xFFFF
        self._update()

    # -- ports ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """From the PM1 block."""
        if offset == TIMER and size == 4:
            return self._ticks() & 0xFFFF_FFFF
        self._catch_up()
        word = self._status | self._enable << 16 | self._control << 32 | (self._ticks() & 0xFFFF_FFFF) << 64
        self._update()
        return word >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """To the PM1 block."""
        self._catch_up()
        for index in range(offset, min(offset + size, TIMER)):
            byte = value & 0xFF
            value >>= 8
            shift = 8 * (index & 1)
            if index < ENABLE:
                self._status &= ~(byte << shift)
            elif index < CONTROL:
                self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & EVENTS
            elif index < CONTROL + 2:
                self._control = (self._control & ~(0xFF << shift) | byte << shift) & 0x1C03
                if shift and byte << shift & SLP_EN:
                    self._sleep(self._control >> 10 & 7)
        self._update()

    def _read_apm(self, offset: int, size: int) -> int:
        return self._apm[offset]

    def _write_apm(self, offset: int, size: int, value: int) -> None:
        self._apm[offset] = value
        if offset == 0 and value in (ACPI_ON, ACPI_OFF):
            self._control = self._control & ~SCI_EN | (value == ACPI_ON)
            self._update()

    def _read_gpe(self, offset: int, size: int) -> int:
        return (self._gpe_status | self._gpe_enable << 16) >> 8 * offset & 0xFF

    def _write_gpe(self, offset: int, size: int, value: int) -> None:
        shift = 8 * (offset & 1)
        if offset < 2:
            self._gpe_status &= ~(value << shift)
        else:
            self._gpe_enable = self._gpe_enable & ~(0xFF << shift) | value << shift
        self._update()


class AcpiPm(PmFunction):
    """The function and the registers, whose PM1 block moves as it says. Implements Timed."""

    def __init__(self, now: Clock, sci: Line, sleep: Callable[[int], None]) -> None:
        super().__init__()
        self.registers: Final = AcpiRegisters(now, sci, sleep)
        self._block: Range | None = None
        self._space: PortSpace | None = None
        self.on_write = self._written

    def attach(self, ports: PortSpace) -> None:
        """See AcpiRegisters."""
        self.registers.attach(ports)

    def connect(
        self, ports: PortSpace, mmio: MmioSpace, intx: Line | None, others: Callable[[], None]
    ) -> None:
        """See PciFunction."""
        super().connect(ports, mmio, intx, others)
        self._space = ports
        self._written(PMBASE, 4)

    def disconnect(self) -> None:
        """See PciFunction."""
        super().disconnect()
        if self._block is not None and self._space is not None:
            self._space.remove(self._block)
        self._block = self._space = None

    def reset(self) -> None:
        """See PciFunction."""
        super().reset()
        self._written(PMBASE, 4)
        self.registers.reset()

    def _written(self, offset: int, size: int) -> None:
        if self._space is None:
            return
        base = (self.data[PMBASE] | self.data[PMBASE + 1] << 8) & 0xFFC0
        wanted = base if self.data[PMREGMISC] & 1 and base else None
        if self._block is not None:
            if self._block.start == wanted:
                return
            self._space.remove(self._block)
            self._block = None
        if wanted is not None:
            new = self.registers.block(wanted)
            try:
                self._space.add(new)
            except BusError as error:
                self.log(str(error))
            else:
                self._block = new

    def press_power_button(self) -> None:
        """See AcpiRegisters."""
        self.registers.press_power_button()

    def raise_gpe(self, number: int) -> None:
        """See AcpiRegisters."""
        self.registers.raise_gpe(number)

    def next_deadline(self) -> int | None:
        """See Timed."""
        return self.registers.next_deadline()

    def expire(self, now: int) -> None:
        """See Timed."""
        self.registers.expire(now)
