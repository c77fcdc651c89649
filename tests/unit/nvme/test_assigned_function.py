"""A device given to a guest (`drivers.pc.assigned`): the real NVMe controller behind the guest's own PCI bus."""

from __future__ import annotations

import struct

import pytest

from drivers.hw.nvme import spec
from drivers.pc.assigned import AssignedFunction, DeviceError
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.pci import PciBus
from drivers.pc.system import ResetControl
from tests.unit.nvme.nvme_host import Host

BAR = 0xE000_0000
ADMIN_CAP = 0x84
ENABLE, MASK = 1 << 15, 1 << 14


class Device:
    """The controller, and who took which vector."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.taken: set[int] = set()
        self.refuses: set[int] = set()

    def config_read(self, offset: int, size: int) -> int:
        return self.host.config(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.host.config(offset, size, value)

    def read(self, bar: int, offset: int, size: int) -> int:
        assert bar == 0
        return self.host.read(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        assert bar == 0
        self.host.write(offset, value, size)

    def take_vector(self, entry: int, on: bool) -> bool:
        if entry in self.refuses:
            return False
        (self.taken.add if on else self.taken.discard)(entry)
        return True


class Guest:
    """A guest's view: ports 0xCF8 and 0xCFC, memory, and the messages that its local APICs got."""

    def __init__(self) -> None:
        self.host = Host()
        self.device = Device(self.host)
        self.ports, self.mmio = PortSpace(), MmioSpace()
        self.messages: list[tuple[int, int]] = []
        bus = PciBus(self.ports, self.mmio, lambda device, pin, level: None, ResetControl(lambda hard: None))
        bus.attach()
        self.function = AssignedFunction(
            "nvme",
            self.device,
            [(bar.index, bar.size) for bar in self.host.kind.bars],
            self.host.kind.vectors,
            lambda address, data: self.messages.append((address, data)),
        )
        bus.add(4, 0, self.function)

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        self.ports.write(0xCF8, 4, 1 << 31 | 4 << 11 | offset & 0xFC)
        if value is None:
            return self.ports.read(0xCFC + (offset & 3), size)
        self.ports.write(0xCFC + (offset & 3), size, value)
        return 0

    def decode(self) -> None:
        self.config(0x10, 4, BAR)
        self.config(0x14, 4, 0)
        self.config(4, 2, 6)

    def program(self, entry: int, address: int, data: int, *, masked: bool = False) -> None:
        at = BAR + self.table() + 16 * entry
        for offset, value in ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data), (12, int(masked))):
            self.mmio.write(at + offset, 4, value)

    def table(self) -> int:
        return self.config(ADMIN_CAP + 4, 4) & ~7

    def raised(self) -> list[int]:
        """Pass on what the device raised, as the hypervisor does: taken vectors only."""
        found, self.host.raised = self.host.raised, []
        for entry in found:
            assert entry in self.device.taken, "the IOMMU would have refused it"
            self.function.message(entry)
        return found


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_the_header_is_the_devices_and_bars_are_sized_and_placed(guest: Guest) -> None:
    assert guest.config(0, 4) == guest.host.config(0, 4)
    assert guest.config(8, 4) >> 8 == 0x010802
    guest.config(0x10, 4, 0xFFFFFFFF)
    size = guest.host.kind.bars[0].size
    assert guest.config(0x10, 4) == (-size & 0xFFFFFFF0) | 4
    guest.decode()
    assert guest.mmio.read(BAR + spec.REG_VS, 4) == guest.host.read(spec.REG_VS)
    assert guest.mmio.read(BAR, 8) == guest.host.read(0, 8)
    guest.config(4, 2, 0)
    assert guest.mmio.read(BAR + spec.REG_VS, 4) == 0xFFFFFFFF, "memory decoding is off"


def test_capabilities_are_the_devices(guest: Guest) -> None:
    at, kinds = guest.config(0x34, 1), []
    while at:
        kinds.append(guest.config(at, 1))
        at = guest.config(at + 1, 1)
    assert kinds == [1, 0x10, 0x11]
    assert guest.config(6, 2) & 0x10


def identify(guest: Guest) -> None:
    guest.host.put(0, guest.host.command(spec.AdminOpcode.IDENTIFY, prp1=0x100000, cdw10=1))
    guest.host.ring(0)


def start(guest: Guest) -> None:
    """The controller runs, with entry 0 programmed by the guest."""
    guest.decode()
    guest.config(ADMIN_CAP + 2, 2, ENABLE | MASK)
    guest.program(0, 0xFEE0_1000, 0x41)
    guest.config(ADMIN_CAP + 2, 2, ENABLE)
    guest.host.enable(msix=False)


def test_an_interrupt_is_the_message_that_the_guest_programmed(guest: Guest) -> None:
    start(guest)
    identify(guest)
    assert guest.raised() == [0]
    assert guest.messages == [(0xFEE0_1000, 0x41)]
    guest.program(0, 0xFEE0_2000, 0x55)
    identify(guest)
    guest.raised()
    assert guest.messages[1:] == [(0xFEE0_2000, 0x55)]
    assert guest.mmio.read(BAR + guest.table() + 8, 4) == 0x55


def test_a_masked_vector_waits_and_comes_once(guest: Guest) -> None:
    start(guest)
    guest.mmio.write(BAR + guest.table() + 12, 4, 1)
    identify(guest)
    assert guest.raised() == []
    guest.mmio.write(BAR + guest.table() + 12, 4, 0)
    assert guest.raised() == [0]
    assert len(guest.messages) == 1
    # One that was under way when the guest masked it.
    guest.mmio.write(BAR + guest.table() + 12, 4, 1)
    guest.function.message(0)
    assert len(guest.messages) == 1
    guest.mmio.write(BAR + guest.table() + 12, 4, 0)
    assert len(guest.messages) == 2


def test_vectors_are_taken_when_asked_for_and_given_back(guest: Guest) -> None:
    guest.decode()
    guest.program(3, 0xFEE0_0000, 0x30)
    assert guest.device.taken == set(), "MSI-X is off"
    guest.config(ADMIN_CAP + 2, 2, ENABLE)
    assert guest.device.taken == {3}
    guest.device.refuses.add(2)
    guest.program(2, 0xFEE0_0000, 0x31)
    assert guest.device.taken == {3}
    guest.config(ADMIN_CAP + 2, 2, 0)
    assert guest.device.taken == set()
    guest.function.message(3)
    assert guest.messages == []


def test_a_function_level_reset_forgets_the_guests_table(guest: Guest) -> None:
    start(guest)
    express = 0x48
    assert guest.config(express, 1) == 0x10
    guest.config(express + 8, 2, 1 << 15)
    assert guest.device.taken == set()
    assert guest.config(4, 2) & 7 == 0
    assert guest.config(ADMIN_CAP + 2, 2) & ENABLE == 0
    guest.decode()
    assert guest.mmio.read(BAR + guest.table() + 12, 4) == 1
    assert guest.mmio.read(BAR + spec.REG_CC, 4) & 1 == 0


class Config(Device):
    """Configuration space that is whatever the test wants."""

    def __init__(self, words: dict[int, int]) -> None:
        self.words = words

    def config_read(self, offset: int, size: int) -> int:
        data = b"".join(struct.pack("<I", self.words.get(at, 0)) for at in range(0, 256, 4))
        return int.from_bytes(data[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        return


GOOD = {0: 0x0010_1B36, 8: 0x01080201, 0x34: 0x40}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({0: 0xFFFFFFFF}, "no device answers"),
        (GOOD | {0x10: 1}, "BAR 0 is of I/O ports"),
        (GOOD | {0x40: 0x4001}, "does not end"),
        (GOOD | {0x40: 0x000F_0011, 0x44: 5}, "not in its BARs"),
        (GOOD | {0x40: 0x07FF_0011, 0x44: 0x3FF0}, "not in its BARs"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused_by_name(words: dict[int, int], why: str) -> None:
    with pytest.raises(DeviceError, match=f"odd.*{why}"):
        AssignedFunction("odd", Config(words), [(0, 0x4000)], 2048, lambda address, data: None)


def test_vectors_of_a_driver_domain_are_the_hypervisors_to_program() -> None:
    """What a PV guest writes to the capability and the table is dropped; MSI-X goes on when a vector is mapped, and stays on."""
    guest = Guest()
    host = guest.host
    bars = [(bar.index, bar.size) for bar in host.kind.bars]
    function = AssignedFunction(
        "pv", guest.device, bars, host.kind.vectors, lambda address, data: None, own_vectors=False
    )
    control = ADMIN_CAP + 2
    function.config_write(control, 2, ENABLE | MASK)
    assert not host.config(control, 2) & (ENABLE | MASK)
    function.enable_vectors()
    assert host.config(control, 2) & (ENABLE | MASK) == ENABLE
    host.config(control, 2, 0)  # a new life of the device
    function.device_was_reset()
    assert host.config(control, 2) & ENABLE
    assert not guest.device.taken
