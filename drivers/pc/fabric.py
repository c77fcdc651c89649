"""How interrupt lines reach the controllers, as Xen joins them: ISA lines, PCI pins by four links, and pins of their own on the I/O APIC.

A PCI pin reaches two places: interrupt `gsi` 16 to 47 of the I/O APIC, (device * 4 + device / 8 + pin) mod 32 + 16, and link (device + pin)
mod 4, which PIIX3's PIRQ registers route to an ISA line. ISA line 0 is the I/O APIC's input 2. A line is high while any of its sources
is. Source: Xen, xen/include/asm-x86/hvm/irq.h (hvm_pci_intx_gsi, hvm_pci_intx_link, hvm_isa_irq_to_gsi).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.bus import Line
from drivers.pc.pic import CASCADE, LINES

LINKS: Final = 4
GSIS: Final = 48
NO_ROUTE: Final = 0

Set = Callable[[int, bool], None]
"""(number of an input, level)."""


def gsi_of(device: int, pin: int) -> int:
    """The I/O APIC's input of a PCI pin (0 is INTA)."""
    return ((device << 2) + (device >> 3) + pin & 31) + 16


def link_of(device: int, pin: int) -> int:
    """The link of a PCI pin."""
    return device + pin & 3


class Fabric:
    """`pic` and `ioapic` drive an input of the controllers; either may ignore what it does not have."""

    def __init__(self, pic: Set, ioapic: Set) -> None:
        self._pic: Final = pic
        self._ioapic: Final = ioapic
        self._isa_devices = 0
        self._others: Final = [
            0
        ]  # GSIs that sources without a line or a pin pull, for each such source; the first is `set_gsi`
        self._pins: Final = [0] * GSIS  # set of (device, pin) as bits of device * 4 + pin, by GSI
        self._links: Final = [0] * LINKS
        self._routes: Final = [NO_ROUTE] * LINKS
        self._isa = 0

    def isa_line(self, number: int) -> Line:
        """The line of an ISA device. IndexError."""
        if not 0 <= number < LINES or number == CASCADE:
            raise IndexError(f"interrupt line {number}")
        return lambda level: self.set_isa(number, level)

    def set_isa(self, number: int, level: bool) -> None:
        """An ISA device drives its line."""
        bit = 1 << number
        self._isa_devices = self._isa_devices | bit if level else self._isa_devices & ~bit
        self._settle(number)

    def set_gsi(self, number: int, level: bool) -> None:
        """Somebody who is no device (Xen: HVM_PARAM_CALLBACK_IRQ) drives an interrupt by its global number, beside the devices there.
        The cascade, and what is no interrupt: nothing."""
        self._drive(0, number, level)

    def source(self) -> Set:
        """A further source that drives interrupts by their global numbers, each beside whoever else does."""
        index = len(self._others)
        self._others.append(0)
        return lambda number, level: self._drive(index, number, level)

    def _drive(self, source: int, number: int, level: bool) -> None:
        if not 0 <= number < GSIS or number == CASCADE:
            return
        bit, before = 1 << number, self._high(number)
        self._others[source] = self._others[source] | bit if level else self._others[source] & ~bit
        if number < LINES:
            self._settle(number)
        else:
            self._follow(number, before)

    def _high(self, gsi: int) -> bool:
        """Any source of an input of the I/O APIC alone is."""
        return bool(self._pins[gsi]) or any(others >> gsi & 1 for others in self._others)

    def _follow(self, gsi: int, before: bool) -> None:
        if self._high(gsi) != before:
            self._ioapic(gsi, not before)

    def set_intx(self, device: int, pin: int, level: bool) -> None:
        """A PCI function drives a pin (XEN_DMOP_set_pci_intx_level)."""
        bit, gsi, link = 1 << (device << 2 | pin), gsi_of(device, pin), link_of(device, pin)
        before = self._high(gsi)
        self._pins[gsi] = self._pins[gsi] | bit if level else self._pins[gsi] & ~bit
        self._links[link] = self._links[link] | bit if level else self._links[link] & ~bit
        self._follow(gsi, before)
        if self._routes[link] != NO_ROUTE:
            self._settle(self._routes[link])

    def set_route(self, link: int, number: int) -> None:
        """Link 0 to 3 goes to that ISA line, or to none (0) (XEN_DMOP_set_pci_link_route). IndexError."""
        if not 0 <= number < LINES:
            raise IndexError(f"interrupt line {number}")
        before, self._routes[link] = self._routes[link], number
        for changed in {before, number} - {NO_ROUTE}:
            self._settle(changed)

    def _settle(self, number: int) -> None:
        level = any(lines >> number & 1 for lines in (self._isa_devices, *self._others)) or any(
            route == number and pulling
            for route, pulling in zip(self._routes, self._links, strict=True)
            if route != NO_ROUTE
        )
        bit = 1 << number
        if bool(self._isa & bit) == level:
            return
        self._isa = self._isa | bit if level else self._isa & ~bit
        if number != CASCADE:
            self._pic(number, level)
        self._ioapic(number or 2, level)
