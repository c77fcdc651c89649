"""A host's side of IDE: commands by PIO and by bus master DMA, as Linux's libata and SeaBIOS issue them."""

from __future__ import annotations

import struct

from drivers.hw.nvme.media import MediaError
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.ide import Drive
from drivers.pc.ide_pci import IdeFunction
from drivers.pc.pci import PciBus
from drivers.pc.system import ResetControl
from tests.unit.pc.pc_rig import Ram, Wire

PRD, BUFFER = 0x1000, 0x10000


class Memory:
    """A medium in memory that fails on request. Implements Media."""

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.size = size
        self.read_only = read_only
        self.bad: set[int] = set()
        self.durable = 0
        self.flushes = 0
        self.closed = False

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size
        if any(offset <= sector * 512 < offset + length for sector in self.bad):
            raise MediaError("a bad sector")

    def read(self, offset: int, target: memoryview) -> None:
        self._check(offset, len(target))
        target[:] = self.data[offset : offset + len(target)]

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        self._check(offset, len(data))
        self.data[offset : offset + len(data)] = data
        self.durable += durable

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        raise AssertionError

    def discard(self, offset: int, length: int) -> None:
        raise AssertionError

    def flush(self) -> None:
        if self.bad:
            raise MediaError("flush failed")
        self.flushes += 1

    def used(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True


def pattern(sectors: int) -> bytearray:
    """Each sector has its number in every doubleword."""
    return bytearray(b"".join(struct.pack("<I", n) * 128 for n in range(sectors)))


class Host:
    """A machine with the IDE function at 00:01.1, BMIDE at 0xC000."""

    def __init__(self, *drives: Drive | None) -> None:
        self.ram = Ram()
        self.ns = 0
        self.slow = 0
        """A look at the clock takes so many ns: a piece of a transfer does."""
        self.ports = PortSpace()
        self.irqs = (Wire(), Wire())
        self.ide = IdeFunction(self.ram, self.irqs, self._now)
        bus = PciBus(self.ports, MmioSpace(), lambda *pin: None, ResetControl(lambda hard: None))
        bus.attach()
        bus.add(1, 1, self.ide)
        self.ide.attach(self.ports)
        for place, drive in enumerate(drives):
            if drive is not None:
                self.ide.plug(place, drive)
        for offset, value in ((0x20, 0xC001), (4, 5)):
            self.config(offset, value)
        self.base, self.control, self.master, self.irq = 0x1F0, 0x3F6, 0xC000, self.irqs[0]

    def _now(self) -> int:
        self.ns += self.slow
        return self.ns

    def config(self, offset: int, value: int) -> None:
        self.ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | 1 << 8 | offset)
        self.ports.write(0xCFC, 4, value)

    def secondary(self) -> Host:
        self.base, self.control, self.master, self.irq = 0x170, 0x376, 0xC008, self.irqs[1]
        return self

    def get(self, register: int) -> int:
        return self.ports.read(self.base + register, 1)

    def set(self, register: int, value: int) -> None:
        self.ports.write(self.base + register, 1, value)

    @property
    def alternate(self) -> int:
        return self.ports.read(self.control, 1)

    def taskfile(
        self, code: int, *, lba: int = 0, count: int = 0, feature: int = 0, unit: int = 0, device: int = 0x40
    ) -> None:
        """28 bits."""
        self.set(6, 0xA0 | unit << 4 | device | (lba >> 24 & 15 if device & 0x40 else 0))
        for register, value in ((1, feature), (2, count), (3, lba), (4, lba >> 8), (5, lba >> 16)):
            self.set(register, value & 0xFF)
        self.set(7, code)

    def extended(self, code: int, lba: int, count: int, unit: int = 0) -> None:
        """48 bits: the high bytes first."""
        self.set(6, 0xE0 | unit << 4)
        for shift in (1, 0):
            self.set(2, count >> 8 * shift & 0xFF)
            for index in range(3):
                self.set(3 + index, lba >> 8 * index + 24 * shift & 0xFF)
        self.set(7, code)

    def settled(self) -> int:
        """The interrupt was there; the status, which ends it."""
        assert self.irq.level, "no interrupt"
        status = self.get(7)
        assert not self.irq.level
        return status

    def take(self, length: int, size: int = 2) -> bytes:
        return b"".join(
            self.ports.read(self.base, size).to_bytes(size, "little") for _ in range(length // size)
        )

    def give(self, data: bytes, size: int = 2) -> None:
        for at in range(0, len(data), size):
            self.ports.write(self.base, size, int.from_bytes(data[at : at + size], "little"))

    def descriptors(self, *pieces: tuple[int, int], last: bool = True) -> None:
        """A PRD table of (address, length)."""
        for index, (address, length) in enumerate(pieces):
            flag = 0x8000 if last and index == len(pieces) - 1 else 0
            self.ram.write(PRD + 8 * index, struct.pack("<IHH", address, length & 0xFFFF, flag))

    def prepare(self, to_memory: bool) -> None:
        """Linux's ata_bmdma_setup."""
        self.ports.write(self.master + 4, 4, PRD)
        self.ports.write(self.master, 1, 8 if to_memory else 0)
        self.ports.write(self.master + 2, 1, self.ports.read(self.master + 2, 1) | 6)

    def start(self) -> None:
        self.ports.write(self.master, 1, self.ports.read(self.master, 1) | 1)

    @property
    def master_status(self) -> int:
        return self.ports.read(self.master + 2, 1)

    def stop(self) -> None:
        self.ports.write(self.master, 1, self.ports.read(self.master, 1) & ~1)
        self.ports.write(self.master + 2, 1, 6)

    def packet(self, packet: bytes, *, limit: int = 0xFFFE, dma: bool = False) -> None:
        """PACKET and its twelve bytes."""
        self.set(6, 0xA0)
        self.set(1, dma)
        self.set(4, limit & 0xFF)
        self.set(5, limit >> 8)
        self.set(7, 0xA0)
        assert self.get(7) & 0x88 == 8
        assert self.get(2) & 3 == 1
        self.give(packet.ljust(12, b"\0"))

    def answer(self) -> bytes:
        """PIO data of a packet command, to its end."""
        data = b""
        while self.settled() & 8:
            assert self.get(2) & 3 == 2
            length = self.get(4) | self.get(5) << 8
            data += self.take(length + 1 & ~1)[:length]
        assert self.get(2) & 3 == 3
        return data
