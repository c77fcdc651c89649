"""drivers/pc/xen_platform and fw_cfg: Linux's unplug sequence, the log, SeaBIOS' reading of items by port and DMA."""

from __future__ import annotations

import struct

import pytest

from drivers.pc.bus import PortSpace
from drivers.pc.fw_cfg import FwCfg
from drivers.pc.xen_platform import XenPlatform
from tests.unit.pc.pc_rig import SECOND, Ram, Time


class Platform:
    """The device at its fixed ports."""

    def __init__(self, refused: set[tuple[int, int]] | None = None) -> None:
        self.time, self.ports = Time(), PortSpace()
        self.unplugged: list[int] = []
        self.lines: list[str] = []
        self.device = XenPlatform(
            self.time, self.unplugged.append, self.lines.append, lambda *who: who in (refused or set())
        )
        self.device.attach(self.ports)


def test_linux_unplugs() -> None:
    """arch/x86/xen/platform-pci-unplug.c: magic, protocol, product 3, build, magic, mask."""
    platform = Platform()
    assert platform.ports.read(0x10, 2) == 0x49D2
    assert platform.ports.read(0x12, 1) == 1
    platform.ports.write(0x12, 2, 3)
    platform.ports.write(0x10, 4, 0xFF)
    assert platform.ports.read(0x10, 2) == 0x49D2
    platform.ports.write(0x10, 2, 3)
    assert platform.unplugged == [3]


def test_a_build_that_is_refused() -> None:
    platform = Platform({(3, 0xFF)})
    platform.ports.write(0x12, 2, 3)
    platform.ports.write(0x10, 4, 0xFF)
    assert platform.ports.read(0x10, 2) == 0xD249
    platform.ports.write(0x10, 4, 0xFE)
    assert platform.ports.read(0x10, 2) == 0x49D2


def test_the_log_is_lines_and_limited() -> None:
    platform = Platform()
    for byte in b"hello \xffworld\n":
        platform.ports.write(0x12, 1, byte)
    assert platform.lines == ["hello ?world"]
    for byte in b"x" * 5000 + b"\n" * 100:
        platform.ports.write(0x12, 1, byte)
    assert len(platform.lines) == 20
    assert len(platform.lines[1]) == 1024
    platform.time.ns += SECOND
    for byte in b"later\n":
        platform.ports.write(0x12, 1, byte)
    assert platform.lines[-1] == "later"
    assert platform.unplugged == []


def test_the_old_ways_through_the_bar() -> None:
    platform = Platform()
    bar = platform.device.bars[0]
    bar.write(4, 4, 1)
    bar.write(8, 1, 1)
    bar.write(8, 1, 2)
    bar.write(8, 1, 3)
    for byte in b"hi\n":
        bar.write(1, 1, byte)
    assert platform.unplugged == [3, 1, 2]
    assert platform.lines == ["hi"]
    assert platform.device.bars[1].read(0x100, 4) == 0


class Firmware:
    """fw_cfg with two files."""

    def __init__(self) -> None:
        self.ram, self.ports = Ram(), PortSpace()
        files = {
            "etc/sercon-port": struct.pack("<Q", 0x3F8),
            "bootorder": b"/pci@i0cf8/ide@1,1/drive@0/disk@0\n\0",
        }
        FwCfg(self.ram, files, ram_size=1 << 28, vcpus=2).attach(self.ports)

    def select(self, item: int) -> None:
        self.ports.write(0x510, 2, item)

    def take(self, count: int) -> bytes:
        return bytes(self.ports.read(0x511, 1) for _ in range(count))

    def dma(self, control: int, length: int, address: int, at: int = 0x1000) -> int:
        """As SeaBIOS: the low half of the address last."""
        self.ram.write(at, struct.pack(">IIQ", control, length, address))
        self.ports.write(0x518, 4, int.from_bytes(struct.pack(">I", at), "little"))
        return int(struct.unpack(">I", self.ram.read(at, 4))[0])


@pytest.fixture
def firmware() -> Firmware:
    return Firmware()


def test_items_by_port(firmware: Firmware) -> None:
    firmware.select(0)
    assert firmware.take(6) == b"QEMU\0\0"
    firmware.select(5)
    assert firmware.take(2) == b"\2\0"
    firmware.select(0x7777)
    assert firmware.take(1) == b"\0"


def test_the_directory_and_a_file(firmware: Firmware) -> None:
    firmware.select(0x19)
    assert firmware.take(4) == b"\0\0\0\2"
    size, number, _, name = struct.unpack(">IHH56s", firmware.take(64))
    assert name.rstrip(b"\0") == b"bootorder"
    firmware.select(number)
    assert firmware.take(size).startswith(b"/pci@i0cf8")


def test_dma(firmware: Firmware) -> None:
    assert (
        struct.pack("<I", firmware.ports.read(0x514, 4)) + struct.pack("<I", firmware.ports.read(0x518, 4))
        == b"QEMU CFG"
    )
    firmware.select(1)
    assert firmware.take(4)[0] & 2
    assert firmware.dma(0x19 << 16 | 8 | 2, 4, 0x2000) == 0
    assert firmware.ram.read(0x2000, 4) == b"\0\0\0\2"
    assert firmware.dma(4, 64, 0) == 0
    assert firmware.dma(2, 64, 0x2000) == 0
    assert firmware.ram.read(0x2008, 15) == b"etc/sercon-port"
    assert firmware.dma(2, 16, 0x2000) == 0
    assert firmware.ram.read(0x2000, 16) == bytes(16), "zeroes behind the end"


def test_dma_that_is_refused(firmware: Firmware) -> None:
    assert firmware.dma(0x19 << 16 | 8 | 16, 4, 0x2000) == 1
    assert firmware.dma(0x19 << 16 | 8 | 2, 4, 1 << 40) == 1
    assert firmware.dma(0x19 << 16 | 8 | 2, 0xFFFF_FFFF, 0x2000) == 1
    before = bytes(firmware.ram.data)
    firmware.ports.write(0x514, 4, 0xFFFF_FFFF)
    firmware.ports.write(0x518, 4, 0xFFFF_FFFF)
    assert firmware.ram.data == before


def test_files_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 to 55"):
        FwCfg(Ram(), {"x" * 56: b""}, ram_size=1, vcpus=1)
    with pytest.raises(ValueError, match="at most"):
        FwCfg(Ram(), {str(n): b"" for n in range(300)}, ram_size=1, vcpus=1)
