"""A hostile guest against all devices at once: random accesses from fixed seeds raise nothing, and reach only the guest's memory."""

from __future__ import annotations

import random

import pytest

from drivers.pc.acpi_pm import AcpiPm
from drivers.pc.bus import MmioSpace, PortSpace, earliest
from drivers.pc.fabric import Fabric
from drivers.pc.fw_cfg import FwCfg
from drivers.pc.hpet import Hpet
from drivers.pc.i440fx import I440fx
from drivers.pc.i8042 import I8042
from drivers.pc.ide_cd import OpticalDrive
from drivers.pc.ide_disk import Disk
from drivers.pc.ide_pci import IdeFunction
from drivers.pc.ioapic import IoApic
from drivers.pc.pci import PciBus
from drivers.pc.pci_setup import set_up_pci
from drivers.pc.pic import PicPair
from drivers.pc.piix3 import Piix3Isa
from drivers.pc.pit import Pit
from drivers.pc.rtc import Rtc
from drivers.pc.system import A20, Port92, ResetControl
from drivers.pc.uart import Uart
from drivers.pc.vga import VRAM, Vga
from drivers.pc.vga_render import render
from drivers.pc.xen_platform import XenPlatform
from tests.unit.pc.ide_host import Memory
from tests.unit.pc.pc_rig import Ram, Time, Wire

STEPS = 25_000


class Pc:
    """Every device, no processor."""

    def __init__(self) -> None:
        self.time, self.ram = Time(1), Ram()
        self.ports, self.mmio = PortSpace(), MmioSpace()
        self.pic = PicPair(Wire())
        self.ioapic = IoApic(lambda message: None)
        fabric = Fabric(self.pic.set_line, self.ioapic.set_input)
        self.bus = PciBus(self.ports, self.mmio, fabric.set_intx, ResetControl(lambda hard: None))
        self.disk, self.disc = Memory(64 << 10), Memory(64 << 10, read_only=True)
        self.ide = IdeFunction(self.ram, (fabric.isa_line(14), fabric.isa_line(15)), lambda: 0)
        self.ide.plug(0, Disk(self.disk, serial="1"))
        self.ide.plug(2, OpticalDrive(self.disc, serial="2"))
        self.vga = Vga(bytearray(VRAM), b"\x55\xaa")
        a20 = A20(lambda on: None)
        self.pm = AcpiPm(self.time, fabric.isa_line(9), lambda kind: None)
        self.pit = Pit(self.time, fabric.isa_line(0))
        self.rtc = Rtc(self.time, fabric.isa_line(8), 1_700_000_000)
        self.hpet = Hpet(self.time, self.ioapic.set_input, lambda n, level: fabric.set_isa(n, level))
        self.keyboard = I8042(fabric.isa_line(1), fabric.isa_line(12), a20, lambda: None)
        platform = XenPlatform(self.time, lambda mask: None, lambda line: None)
        uart = Uart(fabric.isa_line(4), lambda byte: None)
        fw_cfg = FwCfg(self.ram, {"a": b"bc"}, ram_size=1 << 20, vcpus=1)
        for device in (
            self.pic,
            self.pit,
            self.rtc,
            uart,
            self.keyboard,
            self.pm,
            self.ide,
            self.vga,
            platform,
            fw_cfg,
            Port92(a20, lambda: None),
        ):
            device.attach(self.ports)
        self.bus.attach()
        self.vga.attach_window(self.mmio)
        self.ioapic.attach(self.mmio)
        self.hpet.attach(self.mmio)
        for slot, function, target in (
            (0, 0, I440fx()),
            (1, 0, Piix3Isa(fabric.set_route)),
            (1, 1, self.ide),
            (1, 3, self.pm),
            (2, 0, self.vga),
            (3, 0, platform),
        ):
            self.bus.add(slot, function, target)
        self.timed = (self.pit, self.rtc, self.pm, self.hpet)


@pytest.mark.parametrize("seed", range(6))
def test_random_accesses(seed: int) -> None:
    dice = random.Random(seed)
    pc = Pc()
    set_up_pci(pc.ports)
    before = bytes(pc.disc.data)
    interesting = (
        0,
        1,
        2,
        3,
        0x10,
        0x20,
        0x28,
        0xA0,
        0xC8,
        0xCA,
        0xEC,
        0xEF,
        0xFF,
        0x25,
        0x35,
        0x34,
        0x36,
        0xB0,
        0x80,
        0x1C001,
    )
    ranges = list(pc.ports.ranges)
    for step in range(STEPS):
        if step % 500 == 0:
            ranges = list(pc.ports.ranges)
        size = dice.choice((1, 1, 1, 2, 4))
        where = dice.choice(ranges)
        port = min(where.start + dice.randrange(where.length), 0xFFFF)
        value = dice.choice((dice.choice(interesting), dice.getrandbits(32))) & (1 << 8 * size) - 1
        kind = dice.random()
        if kind < 0.45:
            pc.ports.write(port, size, value)
        elif kind < 0.75:
            result = pc.ports.read(port, size)
            assert 0 <= result < 1 << 8 * size, hex(port)
        elif kind < 0.85:
            size = dice.choice((1, 2, 4, 8))
            base = dice.choice((0xA0000, 0xFEC0_0000, 0xFED0_0000, dice.choice(pc.mmio.ranges).start))
            address = base + dice.choice((dice.randrange(0x40), dice.randrange(0x20000)))
            if dice.random() < 0.5:
                pc.mmio.write(address, size, dice.getrandbits(8 * size))
            else:
                assert 0 <= pc.mmio.read(address, size) < 1 << 8 * size
        elif kind < 0.88:
            pc.ports.read_string(port, size, dice.randrange(300))
        elif kind < 0.91:
            pc.ports.write_string(port, size, dice.randbytes(size * dice.randrange(300)))
        elif kind < 0.93:
            pc.keyboard.key(dice.choice(("a", "pause", "up")), dice.random() < 0.5)
            pc.keyboard.move_mouse(
                dice.randrange(-500, 500), dice.randrange(-500, 500), dice.randrange(-9, 9), dice.randrange(8)
            )
        elif kind < 0.94:
            pc.pic.acknowledge()
            pc.ioapic.end_of_interrupt(dice.randrange(256))
        else:
            pc.time.ns += dice.choice((1, 1000, 1_000_000, 3_000_000_000))
            for device in pc.timed:
                device.expire(pc.time.ns)
            at = earliest(pc.timed)
            assert at is None or at >= 0
        if step % 5000 == 0:
            picture = render(pc.vga, pc.time.ns)
            assert len(picture.rgb) == 3 * picture.width * picture.height
    assert pc.disc.data == before, "a read-only medium is not written"
    assert len(pc.ports.ranges) < 100
    pc.bus.reset()
    pc.keyboard.reset()
    assert pc.mmio.ranges == tuple(r for r in pc.mmio.ranges if r.name in ("VGA window", "I/O APIC", "HPET"))


def test_pictures_of_random_registers() -> None:
    """Whatever a guest puts into the registers, the picture has the size that it says, within bounds."""
    dice = random.Random(1)
    vga = Vga(bytearray(VRAM))
    ports = PortSpace()
    vga.attach(ports)
    for _ in range(150):
        for port, count in ((0x3C4, 5), (0x3D4, 0x19), (0x3CE, 9)):
            for index in range(count):
                ports.write(port, 2, index | dice.getrandbits(8) << 8)
        ports.read(0x3DA, 1)
        for index in range(21):
            ports.write(0x3C0, 1, index)
            ports.write(0x3C0, 1, dice.getrandbits(8))
        ports.write(0x3C0, 1, 0x20)
        if dice.random() < 0.3:
            for index in (1, 2, 3, 4, 6, 8, 9):
                ports.write(0x1CE, 2, index)
                ports.write(0x1CF, 2, dice.choice((0x41, 800, 640, 32, 8, 4, dice.getrandbits(16))))
        picture = render(vga, dice.getrandbits(40))
        assert len(picture.rgb) == 3 * picture.width * picture.height
        assert picture.width <= 2560
        assert picture.height <= 1600
        ports.write(0x1CE, 2, 4)
        ports.write(0x1CF, 2, 0)
