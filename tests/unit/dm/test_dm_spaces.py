"""Ranges of a device model's devices that the guest's process has no room for: refused as any other that overlaps."""

from __future__ import annotations

from typing import Any, cast

import pytest

from domains.dm.server import IoreqServer, Spaces
from domains.native.domain import HypercallError
from drivers.pc.bus import BusError, Range
from drivers.pc.pci import BAR0, COMMAND, CONFIG_ADDRESS, CONFIG_DATA, ENABLE, Bar, PciBus, PciFunction
from drivers.pc.system import ResetControl

IOAPIC = 0xFEC00000


class Server:
    """As the guest's process: an I/O APIC, and ports of interrupt controllers."""

    def __init__(self) -> None:
        self.known: set[tuple[int, int]] = set()

    def port_range(self, wanted: Range, added: bool) -> None:
        self._change(wanted, added, 0x20)

    def memory_range(self, wanted: Range, added: bool) -> None:
        self._change(wanted, added, IOAPIC)

    def _change(self, wanted: Range, added: bool, taken: int) -> None:
        if added and wanted.start <= taken < wanted.end:
            raise HypercallError(22, "dm_op")
        (self.known.add if added else self.known.remove)((wanted.start, wanted.end))


@pytest.fixture
def spaces() -> Spaces:
    made = Spaces()
    made.announce(cast(IoreqServer, Server()))
    return made


def at(start: int, length: int) -> Range:
    return Range("test", start, length, lambda offset, size: 7, lambda offset, size, value: None)


def test_it_is_a_bus_error_and_the_range_is_not_there(spaces: Spaces) -> None:
    for _ in range(2):
        with pytest.raises(BusError, match="cannot be there"):
            spaces.ports.add(at(0x1C, 16))
        with pytest.raises(BusError, match="cannot be there"):
            spaces.mmio.add(at(IOAPIC - 0x1000, 0x2000))
    assert spaces.ports.read(0x1C, 1) == 0xFF
    assert spaces.mmio.read(IOAPIC, 1) == 0xFF
    assert (spaces.ports.ranges, spaces.mmio.ranges) == ((), ())
    spaces.ports.add(at(0x24, 4))
    assert spaces.ports.read(0x24, 1) == 7


def test_a_guest_that_puts_a_bar_over_the_io_apic_goes_on(spaces: Spaces) -> None:
    lines: list[str] = []
    bus = PciBus(spaces.ports, spaces.mmio, lambda *pin: None, ResetControl(lambda hard: None), lines.append)
    bus.attach()
    bar = Bar(0x1000, lambda offset, size: 7, lambda offset, size, value: None)
    function = PciFunction("card", vendor=1, device=2, class_code=0xFF0000, bars={0: bar})
    bus.add(4, 0, function)

    def write(offset: int, value: int) -> None:
        spaces.ports.write(CONFIG_ADDRESS, 4, ENABLE | 4 << 11 | offset)
        spaces.ports.write(CONFIG_DATA, 4, value)

    write(BAR0, IOAPIC)
    write(COMMAND, 2)
    assert "cannot be there" in lines[-1]
    assert function.bar_address(0) is None
    write(BAR0, 0xF0000000)
    assert spaces.mmio.read(0xF0000000, 1) == 7
    server: Any = spaces.server
    assert (0xF0000000, 0xF0001000) in server.known
