"""drivers/pc/pci, i440fx, piix3, fabric, pci_setup: enumeration, sizing, decoding, routing, as kernels and hvmloader do it."""

from __future__ import annotations

import pytest

from drivers.pc.acpi_pm import AcpiPm
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.fabric import Fabric, gsi_of, link_of
from drivers.pc.i440fx import I440fx, Segment
from drivers.pc.pci import Bar, PciBus, PciFunction
from drivers.pc.pci_setup import set_up_pci
from drivers.pc.pic import PicPair
from drivers.pc.piix3 import Piix3Isa
from drivers.pc.system import ResetControl
from drivers.pc.xen_platform import XenPlatform
from tests.unit.pc.pc_rig import Time, Wire


class Store:
    """A BAR's content."""

    def __init__(self) -> None:
        self.cells: dict[int, int] = {}

    def read(self, offset: int, size: int) -> int:
        return self.cells.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.cells[offset] = value


class Bus:
    """A bus and its ports."""

    def __init__(self) -> None:
        self.ports, self.mmio = PortSpace(), MmioSpace()
        self.pins: dict[tuple[int, int], bool] = {}
        self.resets: list[bool] = []
        self.log: list[str] = []
        self.bus = PciBus(
            self.ports,
            self.mmio,
            lambda device, pin, level: self.pins.update({(device, pin): level}),
            ResetControl(self.resets.append),
            self.log.append,
        )
        self.bus.attach()

    def get(self, device: int, offset: int, size: int = 4, function: int = 0, bus: int = 0) -> int:
        self.ports.write(0xCF8, 4, 1 << 31 | bus << 16 | device << 11 | function << 8 | offset & 0xFC)
        return self.ports.read(0xCFC + (offset & 3), size)

    def set(self, device: int, offset: int, value: int, size: int = 4, function: int = 0) -> None:
        self.ports.write(0xCF8, 4, 1 << 31 | device << 11 | function << 8 | offset & 0xFC)
        self.ports.write(0xCFC + (offset & 3), size, value)


def card(io: Store, memory: Store, pin: int = 1, rom: bytes = b"") -> PciFunction:
    return PciFunction(
        "card", vendor=0x1234, device=0x5678, class_code=0x020000, pin=pin, rom=rom,
        bars={0: Bar(0x20, io.read, io.write, io=True), 2: Bar(0x1000, memory.read, memory.write, wide=True)},
    )  # fmt: skip


@pytest.fixture
def bus() -> Bus:
    return Bus()


def test_linux_checks_for_mechanism_1(bus: Bus) -> None:
    """pci_check_type1: a byte to 0xCFB, then the address reads back as it was written."""
    bus.ports.write(0xCFB, 1, 1)
    bus.ports.write(0xCF8, 4, 0x8000_0000)
    assert bus.ports.read(0xCF8, 4) == 0x8000_0000
    bus.ports.write(0xCF8, 4, 0xFFFF_FFFF)
    assert bus.ports.read(0xCF8, 4) == 0x80FF_FFFC


def test_nothing_is_ones(bus: Bus) -> None:
    bus.bus.add(0, 0, I440fx())
    assert bus.get(3, 0) == 0xFFFF_FFFF
    assert bus.get(0, 0, function=1) == 0xFFFF_FFFF
    assert bus.get(0, 0, bus=1) == 0xFFFF_FFFF
    assert bus.get(0, 0) == 0x1237_8086
    bus.ports.write(0xCF8, 4, 0)
    assert bus.ports.read(0xCFC, 4) == 0xFFFF_FFFF, "not enabled"


def test_parts_of_a_register(bus: Bus) -> None:
    bus.bus.add(0, 0, I440fx())
    assert [bus.get(0, offset, 1) for offset in range(4)] == [0x86, 0x80, 0x37, 0x12]
    assert bus.get(0, 2, 2) == 0x1237
    assert bus.get(0, 0x2C) == 0x1100_1AF4
    assert bus.get(0, 0xA, 2) == 0x0600


def test_reset_by_cf9_does_not_touch_the_address(bus: Bus) -> None:
    bus.ports.write(0xCF8, 4, 0x8000_0808)
    bus.ports.write(0xCF9, 1, 2)
    bus.ports.write(0xCF9, 1, 6)
    assert bus.resets == [True]
    assert bus.ports.read(0xCF9, 1) == 6
    assert bus.ports.read(0xCF8, 4) == 0x8000_0808
    assert bus.ports.read(0xCFA, 1) == 0xFF


def test_bars_are_sized_and_decoded_where_software_says(bus: Bus) -> None:
    io, memory = Store(), Store()
    bus.bus.add(3, 0, card(io, memory))
    bus.set(3, 0x10, 0xFFFF_FFFF)
    assert bus.get(3, 0x10) == 0xFFFF_FFE1
    bus.set(3, 0x18, 0xFFFF_FFFF)
    bus.set(3, 0x1C, 0xFFFF_FFFF)
    assert (bus.get(3, 0x18), bus.get(3, 0x1C)) == (0xFFFF_F004, 0xFFFF_FFFF)
    assert bus.get(3, 0x14) == 0
    bus.set(3, 0x10, 0xC041)
    bus.set(3, 0x18, 0x8000_0000)
    bus.set(3, 0x1C, 1)
    assert not bus.ports.ranges[2:]
    bus.set(3, 4, 0x3, 2)
    bus.ports.write(0xC044, 4, 0x11223344)
    bus.mmio.write(0x1_8000_0010, 4, 7)
    assert io.cells == {4: 0x11223344}
    assert memory.cells == {0x10: 7}
    bus.set(3, 0x10, 0xD001)
    assert bus.ports.read(0xC044, 4) == 0xFFFF_FFFF
    assert bus.ports.read(0xD004, 4) == 0x11223344
    bus.set(3, 4, 0, 2)
    assert bus.ports.read(0xD004, 4) == 0xFFFF_FFFF
    assert bus.mmio.ranges == ()


def test_sizing_with_decoding_on_hits_nothing_else(bus: Bus) -> None:
    io, memory = Store(), Store()
    bus.bus.add(3, 0, card(io, memory))
    bus.set(3, 4, 3, 2)
    bus.set(3, 0x10, 0xFFFF_FFFF)
    bus.set(3, 0x18, 0xFFFF_FFFF)
    bus.set(3, 0x1C, 0xFFFF_FFFF)
    assert bus.mmio.ranges == ()
    assert len(bus.ports.ranges) == 2


def test_bars_that_overlap_wait_their_turn(bus: Bus) -> None:
    first, second = Store(), Store()
    bus.bus.add(3, 0, card(first, Store()))
    bus.bus.add(4, 0, card(second, Store()))
    for device in (3, 4):
        bus.set(device, 0x10, 0xC001)
        bus.set(device, 4, 1, 2)
    bus.ports.write(0xC000, 4, 1)
    assert (first.cells, second.cells) == ({0: 1}, {})
    assert "card BAR 0 at 0xc000 overlaps card BAR 0" in bus.log[0]
    bus.set(3, 0x10, 0xC101)
    bus.ports.write(0xC000, 4, 2)
    assert second.cells == {0: 2}
    bus.bus.remove(4, 0)
    assert bus.ports.read(0xC000, 4) == 0xFFFF_FFFF
    assert bus.get(4, 0) == 0xFFFF_FFFF


def test_a_bar_never_covers_a_fixed_device(bus: Bus) -> None:
    bus.bus.add(3, 0, card(Store(), Store()))
    bus.set(3, 0x10, 0xCE1)
    bus.set(3, 4, 1, 2)
    assert bus.get(3, 0) == 0x5678_1234, "the configuration ports still answer"


def test_the_rom(bus: Bus) -> None:
    bus.bus.add(3, 0, card(Store(), Store(), rom=b"\x55\xaa" + bytes(3000)))
    bus.set(3, 0x30, 0xFFFF_FFFE)
    assert bus.get(3, 0x30) == 0xFFFF_F000
    bus.set(3, 0x30, 0xF000_0000)
    bus.set(3, 4, 2, 2)
    assert bus.mmio.read(0xF000_0000, 2) == 0xFFFF
    bus.set(3, 0x30, 0xF000_0001)
    assert bus.mmio.read(0xF000_0000, 2) == 0xAA55
    bus.mmio.write(0xF000_0000, 2, 0)
    assert bus.mmio.read(0xF000_0000, 2) == 0xAA55
    assert bus.mmio.read(0xF000_0FFE, 1) == 0xFF


def test_pins_status_and_the_bit_that_silences(bus: Bus) -> None:
    device = card(Store(), Store(), pin=2)
    bus.bus.add(5, 0, device)
    device.set_interrupt(True)
    assert bus.pins == {(5, 1): True}
    assert bus.get(5, 6, 2) & 8
    bus.set(5, 4, 0x400, 2)
    assert bus.pins == {(5, 1): False}
    assert bus.get(5, 6, 2) & 8
    bus.set(5, 4, 0, 2)
    assert bus.pins == {(5, 1): True}
    bus.bus.remove(5, 0)
    assert bus.pins == {(5, 1): False}


def test_read_only_and_cleared_by_one(bus: Bus) -> None:
    device = card(Store(), Store())
    bus.bus.add(3, 0, device)
    bus.set(3, 0, 0)
    bus.set(3, 0x3C, 0x0B0B, 2)
    assert (bus.get(3, 0), bus.get(3, 0x3C, 2)) == (0x5678_1234, 0x010B)
    device.data[7] = 0x30
    bus.set(3, 6, 0x1000, 2)
    assert bus.get(3, 6, 2) == 0x2000


def test_places_and_bars_that_cannot_be(bus: Bus) -> None:
    bus.bus.add(3, 0, card(Store(), Store()))
    for device, function in ((3, 0), (32, 0), (1, 8)):
        with pytest.raises(ValueError, match="not free"):
            bus.bus.add(device, function, card(Store(), Store()))
    store = Store()
    for index, bar in (
        (0, Bar(24, store.read, store.write)),
        (5, Bar(32, store.read, store.write, wide=True)),
        (0, Bar(8, store.read, store.write)),
    ):
        with pytest.raises(ValueError, match="not possible"):
            PciFunction("bad", vendor=1, device=1, class_code=0, bars={index: bar})


def test_pam(bus: Bus) -> None:
    """SeaBIOS' make_bios_writable: 0x30 to PAM0, 0x33 to the others."""
    told: list[list[Segment]] = []
    host = I440fx(told.append)
    bus.bus.add(0, 0, host)
    assert not any(s.read_memory or s.write_memory for s in host.segments())
    bus.set(0, 0x59, 0x30, 1)
    assert told[-1][-1] == Segment(0xF0000, 0x100000, True, True)
    assert told[-1][0] == Segment(0xC0000, 0xC4000, False, False)
    for offset in range(0x5A, 0x60):
        bus.set(0, offset, 0x31, 1)
    assert [s.write_memory for s in told[-1]] == [False, True] * 6 + [True]
    assert len(told) == 7
    bus.set(0, 0x59, 0x30, 1)
    assert len(told) == 7
    bus.bus.reset()
    assert told[-1] == [Segment(s.start, s.end, False, False) for s in told[-1]]
    assert sum(s.end - s.start for s in host.segments()) == 0x40000


def test_routes(bus: Bus) -> None:
    told: list[tuple[int, int]] = []
    bus.bus.add(1, 0, Piix3Isa(lambda link, line: told.append((link, line))))
    assert bus.get(1, 0x60) == 0x8080_8080
    bus.set(1, 0x60, 0x0B0A_0A05)
    bus.set(1, 0x61, 0x80, 1)
    bus.set(1, 0x60, 13, 1)
    assert told == [(0, 5), (1, 10), (2, 10), (3, 11), (1, 0), (0, 0)]
    bus.bus.reset()
    assert told[-2:] == [(2, 0), (3, 0)]


def test_the_fabric_joins_sources_of_a_line() -> None:
    pic: dict[int, bool] = {}
    apic: dict[int, bool] = {}
    fabric = Fabric(lambda n, level: pic.update({n: level}), lambda n, level: apic.update({n: level}))
    assert gsi_of(3, 0) == 28
    assert (gsi_of(31, 3), link_of(3, 2)) == (16 + (31 * 4 + 3 + 3) % 32, 1)
    fabric.set_route(3, 10)
    fabric.set_intx(3, 0, True)
    assert (pic, apic) == ({10: True}, {28: True, 10: True})
    isa = fabric.isa_line(10)
    isa(True)
    fabric.set_intx(3, 0, False)
    assert pic == {10: True}
    assert apic[28] is False
    isa(False)
    assert pic == {10: False}
    fabric.set_intx(7, 0, True)  # the same link as device 3
    fabric.set_route(3, 11)
    assert (pic[10], pic[11]) == (False, True)
    fabric.set_route(3, 0)
    assert pic[11] is False
    fabric.set_isa(0, True)
    assert (pic[0], apic[2]) == (True, True)
    fabric.set_gsi(28, True)
    fabric.set_intx(3, 0, True)
    fabric.set_intx(3, 0, False)
    assert apic[28] is True
    fabric.set_gsi(28, False)
    assert apic[28] is False
    for nowhere in (-1, 2, 48):
        fabric.set_gsi(nowhere, True)
    assert not {-1, 2, 48} & pic.keys()
    assert not {-1, 48} & apic.keys()
    for bad in (2, 16):
        with pytest.raises(IndexError):
            fabric.isa_line(bad)
    with pytest.raises(IndexError):
        fabric.set_route(0, 16)


def test_hvmloaders_setup(bus: Bus) -> None:
    routes: dict[int, int] = {}
    pic = PicPair(Wire())
    pic.attach(bus.ports)
    bus.bus.add(0, 0, I440fx())
    bus.bus.add(1, 0, Piix3Isa(lambda link, line: routes.update({link: line})))
    bus.bus.add(1, 3, AcpiPm(Time(), Wire(), lambda kind: None))
    bus.bus.add(2, 0, XenPlatform(Time(), lambda mask: None, lambda line: None))
    bus.bus.add(3, 0, card(Store(), Store(), rom=bytes(4096)))
    assert set_up_pci(bus.ports) == []
    assert routes == {0: 5, 1: 10, 2: 11, 3: 5}
    assert [pic.level_triggered(n) for n in (5, 10, 11, 9)] == [True, True, True, False]
    assert bus.get(2, 0x14) == 0xF000_0008, "the largest is first"
    assert bus.get(2, 0x10) == 0xC001
    assert bus.get(3, 0x10) == 0xC101
    assert bus.get(3, 0x18) & ~0xF in (0xF100_0000, 0xF100_1000)
    assert bus.get(3, 0x30) in (0xF100_0000, 0xF100_1000)
    assert bus.get(2, 0x3C, 1) == 11
    assert bus.get(3, 4, 2) & 7 == 7
    assert bus.ports.read(0xB004, 2) == 1
    assert bus.get(1, 0x3C, 1, function=3) == 9
    for number in range(12):
        bus.bus.add(8 + number, 0, XenPlatform(Time(), lambda mask: None, lambda line: None))
    assert set_up_pci(bus.ports)[:2] == [
        "00:13.0: no room for BAR at 0x14 of 0x1000000 bytes",
        "00:03.0: no room for BAR at 0x18 of 0x1000 bytes",
    ]
