"""The board of a full HVM guest beside its vCPUs: what is hot (interrupt controllers, timers, clock), and the way of everything else
to the device model.

Ports and addresses that the device model's ioreq server asked for (`domains.hvm.model`) are ranges here like those of the devices
that live here; where nobody is, reads give ones and writes are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.abi.hvm.ioreq import ACPI_PM1A_EVT_BLK_ADDRESS_V1
from domains.hvm.interrupts import Interrupts
from drivers.pc.acpi_pm import S5, SCI_IRQ, AcpiRegisters
from drivers.pc.bus import Clock, Line, MmioSpace, PortSpace, Timed, earliest
from drivers.pc.fabric import LINKS, Fabric
from drivers.pc.hpet import Hpet
from drivers.pc.ioapic import IoApic, Message, decode_msi
from drivers.pc.pci_setup import ELCR
from drivers.pc.pci_setup import LINES as LINK_LINES
from drivers.pc.pic import CASCADE, PicPair
from drivers.pc.pit import Pit
from drivers.pc.rtc import Rtc
from drivers.pc.system import A20, SEABIOS_DEBUG, XEN_DEBUG, DebugPort, Port92, PostCode

ISA_LINES: Final = 16
PIT_LINE, RTC_LINE = 0, 8
SECOND: Final = 1_000_000_000
MAX_LINE: Final = 200
"""Bytes of one line of a debug port's log."""


class DebugLog:
    """Bytes of a debug port as lines of the log."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log: Final = log
        self._line = bytearray()

    def put(self, byte: int) -> None:
        """One byte."""
        if byte != 10:
            self._line.append(byte if 32 <= byte < 127 or byte == 9 else 63)
        if byte == 10 or len(self._line) >= MAX_LINE:
            self._log(self._line.decode("ascii"))
            self._line.clear()


class Board:
    """See the module. `now` is guest time, `wall` the time of day in ns since 1970; `reset`: the machine is to start anew; `a20`:
    address line 20 changed; `power_off`: sleep state S5."""

    def __init__(
        self,
        now: Clock,
        wall: Clock,
        interrupts: Interrupts,
        log: Callable[[str], None],
        reset: Callable[[], None],
        a20: Callable[[bool], None],
        power_off: Callable[[], None],
    ) -> None:
        self._interrupts: Final = interrupts
        self.ports: Final = PortSpace()
        self.mmio: Final = MmioSpace()
        self.pic: Final = PicPair(self._intr)
        self.ioapic: Final = IoApic(self._message)
        self.fabric: Final = Fabric(self._pic_line, self.ioapic.set_input)
        self._cut_off = False  # the HPET has interrupts 0 and 8 to itself
        self._timer_levels = {PIT_LINE: False, RTC_LINE: False}
        self.pit: Final = Pit(now, self._timer_line(PIT_LINE))
        self.rtc: Final = Rtc(now, self._timer_line(RTC_LINE), (wall() - now()) // SECOND)
        self.hpet: Final = Hpet(now, self.fabric.source(), self.fabric.set_isa, self._legacy)
        self.a20: Final = A20(a20)

        def sleep(kind: int) -> None:
            if kind == S5:
                power_off()
            else:
                log(f"sleep state with SLP_TYP {kind} is not built")

        self.acpi: Final = AcpiRegisters(now, self.fabric.isa_line(SCI_IRQ), sleep)
        self.acpi.attach(self.ports)
        self.ports.add(self.acpi.block(ACPI_PM1A_EVT_BLK_ADDRESS_V1))
        debug = DebugLog(log)
        for device in (
            self.pic,
            self.pit,
            self.rtc,
            Port92(self.a20, reset),
            PostCode(),
            DebugPort(XEN_DEBUG, debug.put),
            DebugPort(SEABIOS_DEBUG, debug.put),
        ):
            device.attach(self.ports)
        self.ioapic.attach(self.mmio)
        self.hpet.attach(self.mmio)
        triggers = sum(1 << line for line in set(LINK_LINES))
        self.ports.write(ELCR, 1, triggers & 0xFF)  # as hvmloader leaves it
        self.ports.write(ELCR + 1, 1, triggers >> 8)
        self._timed: Final[list[Timed]] = [self.pit, self.rtc, self.hpet, self.acpi]

    def _timer_line(self, number: int) -> Line:
        """The line of the PIT or the RTC, which the HPET can cut off."""

        def drive(level: bool) -> None:
            self._timer_levels[number] = level
            if not self._cut_off:
                self.fabric.set_isa(number, level)

        return drive

    def _legacy(self, on: bool) -> None:
        """The HPET's legacy replacement (IA-PC HPET 1.0a, 2.3.5)."""
        self._cut_off = on
        for number, level in self._timer_levels.items():
            self.fabric.set_isa(number, level and not on)

    def _intr(self, level: bool) -> None:
        self._interrupts.changed = True
        if level:
            self._interrupts.states[0].wake()

    def _message(self, message: Message) -> None:
        self._interrupts.message(
            message.vector, message.mode, message.destination, logical=message.logical, level=message.level
        )

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC ended a level-triggered interrupt."""
        self._interrupts.changed = True
        self._interrupts.follow_upcall()
        self.ioapic.end_of_interrupt(vector)

    def gsi_line(self, number: int, level: bool) -> None:
        """Drive an interrupt by its global number, beside its devices: an ISA line, or an input of the I/O APIC alone. Others than
        these: nothing."""
        self._interrupts.changed = True
        self.fabric.set_gsi(number, level)

    def callback_pin(self, device: int, pin: int, level: bool) -> None:
        """Drive a PCI pin beside what the device itself does there."""
        self.fabric.set_intx(device, pin, level)

    def _pic_line(self, number: int, level: bool) -> None:
        self._interrupts.changed = True
        self.pic.set_line(number, level)

    # --- what the device model does (checked: its numbers are anything)

    def isa_line(self, number: int, level: bool) -> bool:
        """Drive an ISA interrupt line. False: there is none of that number."""
        if not 0 <= number < ISA_LINES or number == CASCADE:
            return False
        self.fabric.set_isa(number, level)
        return True

    def pci_line(self, device: int, pin: int, level: bool) -> bool:
        """Drive an interrupt pin of a PCI device. False: there is none."""
        if not 0 <= device < 32 or not 0 <= pin < 4:
            return False
        self.fabric.set_intx(device, pin, level)
        return True

    def set_link(self, link: int, line: int) -> bool:
        """Route one of the four PCI links to an ISA interrupt; 0: to none. False: there is no such."""
        if not 0 <= link < LINKS or not 0 <= line < ISA_LINES or line == CASCADE:
            return False
        self.fabric.set_route(link, line)
        return True

    def a20_by_keyboard(self, level: bool) -> bool:
        """The keyboard controller's output for address line 20."""
        self.a20.keyboard(level)
        return True

    def msi(self, address: int, data: int) -> bool:
        """An interrupt message (SDM volume 3, 11.11). False if it is none."""
        message = decode_msi(address, data)
        if message is None:
            return False
        self._message(message)
        return True

    # --- time

    def next_deadline(self) -> int | None:
        """When a timer is due next, ns of guest time."""
        return earliest(self._timed)

    def expire(self, now: int) -> None:
        """Do what is due."""
        for device in self._timed:
            device.expire(now)
