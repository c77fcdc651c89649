"""A full HVM guest's own devices on its PCI bus, in front of the device model's."""

from __future__ import annotations

import struct

import pytest

from domains.hvm.pci_root import PciOverlay, free_device
from drivers.pc.assigned import AssignedFunction
from drivers.pc.bus import MmioSpace, PortSpace, Range
from drivers.pc.pci_setup import MMIO_BASE, MMIO_END

BAR = 0x4000


class Device:
    """Registers of a made-up device with one wide BAR and no capabilities."""

    def __init__(self) -> None:
        self.config = bytearray(256)
        struct.pack_into("<HH", self.config, 0, 0x1B36, 0x0010)
        struct.pack_into("<I", self.config, 8, 0x01080200)
        struct.pack_into("<I", self.config, 0x10, 4)
        self.writes: list[tuple[int, int, int, int]] = []

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, bar: int, offset: int, size: int) -> int:
        return 0x1000 + offset

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.writes.append((bar, offset, size, value))

    def take_vector(self, entry: int, on: bool) -> bool:
        return True


class Pc:
    """The overlay before ports that stand for the device model's."""

    def __init__(self, *bdfs: int) -> None:
        self.model: list[tuple[int, int, int | None]] = []
        ports, self.mmio = PortSpace(), MmioSpace()

        def read(offset: int, size: int) -> int:
            self.model.append((0xCF8 + offset, size, None))
            return 0x12378086

        ports.add(
            Range(
                "model",
                0xCF8,
                8,
                read,
                lambda o, s, v: self.model.append((0xCF8 + o, s, v)),
                4,
                aligned=False,
            )
        )
        self.devices = [Device() for _ in bdfs]
        self.lines: list[str] = []
        functions = {
            bdf: AssignedFunction(f"{bdf:#x}", device, [(0, BAR)], 0, lambda address, data: None)
            for bdf, device in zip(bdfs, self.devices, strict=True)
        }
        self.overlay = PciOverlay(functions, ports, self.mmio, self.lines.append)

    def read(self, device: int, offset: int, size: int = 4) -> int:
        self.overlay.ports.write(0xCF8, 4, 1 << 31 | device << 11 | offset & 0xFC)
        return self.overlay.ports.read(0xCFC + (offset & 3), size)

    def write(self, device: int, offset: int, value: int, size: int = 4) -> None:
        self.overlay.ports.write(0xCF8, 4, 1 << 31 | device << 11 | offset & 0xFC)
        self.overlay.ports.write(0xCFC + (offset & 3), size, value)


def test_configuration_accesses_are_shared_out() -> None:
    pc = Pc(0x0100)
    assert pc.read(4, 0) == 0x00101B36
    assert pc.read(4, 2, 2) == 0x0010
    assert pc.model == [(0xCF8, 4, 1 << 31 | 4 << 11)] * 2, (
        "the address goes to the device model as well, the data does not"
    )
    assert pc.read(0, 0) == 0x12378086
    assert pc.model[-1] == (0xCFC, 4, None)
    pc.overlay.ports.write(0xCF8, 4, 4 << 11)  # not enabled
    pc.overlay.ports.read(0xCFC, 4)
    assert pc.model[-1] == (0xCFC, 4, None)
    pc.overlay.ports.write(0xCF8, 4, 1 << 31 | 1 << 16 | 4 << 11)  # another bus
    pc.overlay.ports.read(0xCFC, 4)
    assert pc.model[-1] == (0xCFC, 4, None)
    pc.overlay.ports.write(0xCF9, 1, 6)
    assert pc.model[-1] == (0xCF9, 1, 6)


def test_bars_are_decoded_at_the_end_of_the_window_once_the_guest_says_so() -> None:
    pc = Pc(0x0100, 0x0200)
    first, second = (pc.read(device, 0x10) & ~15 for device in (4, 5))
    assert (first, second) == (MMIO_END - BAR, MMIO_END - 2 * BAR)
    assert pc.mmio.read(first + 8, 4) == 0xFFFFFFFF
    pc.write(4, 4, 6, 2)
    assert pc.mmio.read(first + 8, 4) == 0x1008
    pc.mmio.write(first + 16, 4, 7)
    assert pc.devices[0].writes == [(0, 16, 4, 7)]
    assert pc.devices[0].config_read(4, 2) == 6, "the device itself may do DMA now"
    pc.write(4, 0x10, 0xF8000000)
    assert pc.mmio.read(0xF8000008, 4) == 0x1008


def test_places_on_the_bus() -> None:
    """Bus 0 keeps its number unless an emulated device has it."""
    assert free_device(0x0028, {0, 1, 2, 3}) == 5
    assert free_device(0x0010, {0, 1, 2, 3}) == 4
    assert free_device(0x0128, set()) == 1
    with pytest.raises(ValueError, match="no room"):
        free_device(0x0100, set(range(32)))
    assert MMIO_BASE < MMIO_END
