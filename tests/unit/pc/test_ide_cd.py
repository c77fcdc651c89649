"""drivers/pc/ide_cd: packets by PIO and DMA as SeaBIOS and Linux's sr send them, media changes, sense data."""

from __future__ import annotations

import struct

import pytest

from drivers.hw.nvme.media import Media
from drivers.pc.ide_cd import OpticalDrive
from drivers.pc.ide_disk import Disk
from tests.unit.pc.ide_host import BUFFER, PRD, Host, Memory, pattern

BLOCKS = 300


@pytest.fixture
def medium() -> Memory:
    made = Memory(BLOCKS * 2048, read_only=True)
    made.data[:] = pattern(BLOCKS * 4)
    return made


@pytest.fixture
def host(medium: Memory) -> Host:
    return Host(OpticalDrive(medium, serial="QM00003"))


def drive_of(host: Host) -> OpticalDrive:
    drive = host.ide.optical(0)
    assert drive is not None
    return drive


def sense(host: Host) -> tuple[int, int, int]:
    host.packet(bytes((3, 0, 0, 0, 18)))
    data = host.answer()
    assert len(data) == 18
    return data[2], data[12], data[13]


def refused(host: Host) -> tuple[int, int, int]:
    status = host.settled()
    assert status & 1
    key = host.get(1) >> 4
    found = sense(host)
    assert found[0] == key
    return found


def read10(lba: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, count, 0)


def test_signature_and_identify(host: Host) -> None:
    assert [host.get(r) for r in (4, 5)] == [0x14, 0xEB]
    host.taskfile(0xEC)
    assert host.settled() & 1
    assert [host.get(r) for r in (2, 3, 4, 5)] == [1, 1, 0x14, 0xEB]
    host.taskfile(0xA1)
    assert host.settled() & 8
    words = struct.unpack("<256H", host.take(512))
    assert words[0] == 0x85C0
    host.set(7, 0x08)
    assert [host.get(r) for r in (4, 5)] == [0x14, 0xEB]
    assert not host.irq.level


def test_seabios_boots_from_it(host: Host, medium: Memory) -> None:
    """atapi: inquiry, test unit ready, capacity, then one block at a time with byte count limit 2048."""
    host.packet(bytes((0x12, 0, 0, 0, 36)))
    data = host.answer()
    assert (data[0], data[1] & 0x80, data[8:32]) == (5, 0x80, b"DomicileDVD-ROM         ")
    host.packet(bytes(12))
    assert host.settled() == 0x50
    host.packet(bytes((0x25,)))
    assert struct.unpack(">II", host.answer()) == (BLOCKS - 1, 2048)
    host.packet(read10(17, 1), limit=2048)
    assert host.answer() == medium.data[17 * 2048 : 18 * 2048]


def test_a_file_of_less_than_a_block_is_no_medium_to_read() -> None:
    host = Host(OpticalDrive(Memory(512, read_only=True), serial="1"))
    for packet in (bytes((0x25,)), bytes(12), read10(0, 1), bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 12))):
        host.packet(packet)
        assert refused(host) == (2, 0x30, 0)


def test_pio_comes_in_pieces_of_the_limit(host: Host, medium: Memory) -> None:
    host.packet(struct.pack(">BBIIBB", 0xA8, 0, 10, 100, 0, 0), limit=0x8000)
    before = host.irq.rises
    assert host.answer() == medium.data[10 * 2048 : 110 * 2048]
    assert host.irq.rises - before == 7, "64 and 36 blocks in pieces of 16, and the end"
    host.packet(bytes((0x12, 0, 0, 0, 36)), limit=10)
    assert len(host.answer()) == 36


def test_dma(host: Host, medium: Memory) -> None:
    host.descriptors((BUFFER, 0x10000), (BUFFER + 0x10000, 0x8800))
    host.prepare(True)
    host.packet(read10(3, 49), dma=True)
    host.start()
    assert host.settled() == 0x50
    assert host.get(2) & 3 == 3
    assert host.ram.data[BUFFER : BUFFER + 49 * 2048] == medium.data[3 * 2048 : 52 * 2048]
    host.stop()
    host.descriptors((BUFFER, 36))
    host.prepare(True)
    host.packet(bytes((0x12, 0, 0, 0, 36)), dma=True)
    host.start()
    assert host.settled() == 0x50
    assert host.ram.data[BUFFER + 8 : BUFFER + 16] == b"Domicile"


def test_a_long_read_from_a_slow_medium_is_short_accesses() -> None:
    """READ(12) of 64 MiB by DMA, 100 ms for each 128 KiB: 52 s in all. The access that starts it, as each other, is over after a piece."""
    blocks = 1 << 15
    medium = Memory(blocks * 2048, read_only=True)
    medium.data[-4:] = b"last"
    host = Host(OpticalDrive(medium, serial="1"))
    host.slow = 100_000_000
    host.ram.data.extend(bytes((64 << 20) + BUFFER - len(host.ram.data)))
    pieces = [(BUFFER + at, 0x10000) for at in range(0, 64 << 20, 0x10000)]
    host.descriptors(*pieces)
    assert PRD + 8 * len(pieces) <= BUFFER
    host.prepare(True)
    host.packet(struct.pack(">BBIIBB", 0xA8, 0, 0, blocks, 0, 0), dma=True)
    assert host.ide.next_deadline() is None
    before = host.ns
    host.start()
    assert host.ns - before <= 200_000_000
    steps = 0
    while (due := host.ide.next_deadline()) is not None:
        assert due <= host.ns
        assert (host.alternate & 0x88, host.master_status & 7, host.irq.level) == (8, 1, False), "it goes on"
        before = host.ns
        host.ide.expire(host.ns)
        assert host.ns - before <= 200_000_000
        steps += 1
    assert steps >= 511
    assert host.settled() == 0x50
    assert host.master_status & 7 == 4
    assert host.ram.data[BUFFER + (64 << 20) - 4 : BUFFER + (64 << 20)] == b"last"


@pytest.mark.parametrize("end", ["stop", "reset", "device reset", "unplug", "bus mastering off", "error"])
def test_a_transfer_that_is_under_way_can_be_ended(host: Host, medium: Memory, end: str) -> None:
    """It moves no further byte, and the drive is as usual after a reset."""
    host.slow = 1 << 30
    host.descriptors((BUFFER, 0x10000), (BUFFER + 0x10000, 0x10000), (BUFFER + 0x20000, 0x10000))
    host.prepare(True)
    host.packet(read10(0, 96), dma=True)
    host.start()
    assert host.ide.next_deadline() is not None
    moved = bytes(host.ram.data)
    medium.data[:] = bytes(len(medium.data))
    drive = drive_of(host)
    if end == "stop":
        host.ports.write(host.master, 1, 8)
        host.start()  # the same transfer does not begin again
    elif end == "reset":
        host.ports.write(host.control, 1, 4)
        host.ports.write(host.control, 1, 0)
    elif end == "device reset":
        host.set(7, 0x08)
    elif end == "unplug":
        host.ide.channels[0].unplug(0)
    elif end == "bus mastering off":
        host.config(4, 1)
    else:
        medium.bad = set(range(BLOCKS * 4))
    for _ in range(5):
        host.ide.expire(0)
    assert host.ide.next_deadline() is None
    assert host.ram.data == moved or end == "error", "what was read before has come"
    if end in ("bus mastering off", "error"):
        assert host.settled() & 1
        assert host.master_status & 3 == (2 if end != "error" else 0)
        return
    assert not host.irq.level
    if end == "unplug":
        host.ide.plug(0, drive)
    host.stop()
    host.ports.write(host.control, 1, 4)
    host.ports.write(host.control, 1, 0)
    host.slow = 0
    host.descriptors((BUFFER, 2048))
    host.prepare(True)
    host.packet(read10(0, 1), dma=True)
    host.start()
    assert host.settled() == 0x50
    assert not any(host.ram.data[BUFFER : BUFFER + 2048])


def test_reading_what_is_not_there(host: Host, medium: Memory) -> None:
    host.packet(read10(BLOCKS - 1, 2))
    assert refused(host) == (5, 0x21, 0)
    host.packet(bytes((0xFF,)))
    assert refused(host) == (5, 0x20, 0)
    assert sense(host) == (0, 0, 0), "sense data are given once"
    medium.bad = {400}
    host.packet(read10(90, 20))
    assert refused(host) == (3, 0x11, 0)
    host.descriptors((BUFFER, 0xA000))
    host.prepare(True)
    host.packet(read10(90, 20), dma=True)
    host.start()
    assert refused(host) == (3, 0x11, 0)


def test_an_empty_drive() -> None:
    host = Host(OpticalDrive(None, serial="x"))
    for packet in (bytes(12), bytes((0x25,)), read10(0, 1), bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 12))):
        host.packet(packet)
        assert refused(host) == (2, 0x3A, 0)


def test_changing_the_medium(host: Host, medium: Memory) -> None:
    drive = drive_of(host)
    assert drive.eject() is medium
    host.packet(bytes(12))
    assert refused(host) == (2, 0x3A, 0)
    other = Memory(2048 * 10)
    drive.insert(other)
    with pytest.raises(ValueError, match="medium in the drive"):
        drive.insert(other)
    host.packet(bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)))
    assert host.answer()[4:6] == b"\x02\x02", "new medium, present"
    host.packet(bytes(12))
    assert refused(host) == (6, 0x28, 0)
    host.packet(bytes((0x25,)))
    assert struct.unpack(">II", host.answer())[0] == 9
    host.packet(bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)))
    assert host.answer()[4] == 0


def test_the_guest_ejects_and_locks(host: Host, medium: Memory) -> None:
    drive = drive_of(host)
    out: list[Media] = []
    drive.on_eject = out.append
    host.packet(bytes((0x1E, 0, 0, 0, 1)))
    assert host.settled() == 0x50
    assert drive.eject() is None
    host.packet(bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)))
    assert host.answer()[4] == 1, "eject request"
    host.packet(bytes((0x1B, 0, 0, 0, 2)))
    assert refused(host) == (5, 0x53, 2)
    host.packet(bytes((0x1E, 0, 0, 0, 0)))
    host.settled()
    host.packet(bytes((0x1B, 0, 0, 0, 2)))
    assert host.settled() == 0x50
    assert out == [medium]
    assert drive.tray_open
    host.packet(bytes((0x1B, 0, 0, 0, 3)))
    host.settled()
    assert not drive.tray_open


def test_table_of_contents(host: Host) -> None:
    host.packet(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 100)))
    data = host.answer()
    assert struct.unpack(">H", data[:2])[0] == len(data) - 2 == 18
    assert data[5:7] == b"\x14\x01"
    assert data[14] == 0xAA
    assert struct.unpack(">I", data[16:20])[0] == BLOCKS
    host.packet(bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 100)))
    assert host.answer()[8:12] == bytes((0, 0, 6, 0)), "300 + 150 frames"
    host.packet(bytes((0x43, 0, 1, 0, 0, 0, 0, 0, 12)))
    assert len(host.answer()) == 12
    host.packet(bytes((0x43, 2, 2, 0, 0, 0, 0, 0, 200)))
    assert len(host.answer()) == 48
    host.packet(bytes((0x43, 0, 5, 0, 0, 0, 0, 0, 12)))
    assert refused(host) == (5, 0x24, 0)


def test_mode_sense_and_configuration(host: Host) -> None:
    host.packet(bytes((0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128)))
    data = host.answer()
    assert struct.unpack(">H", data[:2])[0] == len(data) - 2
    assert data[8:10] == b"\x2a\x14"
    host.packet(bytes((0x5A, 0, 0x3F, 0, 0, 0, 0, 0, 4)))
    assert len(host.answer()) == 4, "as much as was asked for"
    host.packet(bytes((0x5A, 0, 0x0D, 0, 0, 0, 0, 0, 128)))
    assert refused(host) == (5, 0x24, 0)
    host.packet(bytes((0x46, 0, 0, 0, 0, 0, 0, 0, 200)))
    data = host.answer()
    assert struct.unpack(">IHH", data[:8]) == (len(data) - 4, 0, 8)
    host.packet(bytes((0x46, 2, 0, 0x10, 0, 0, 0, 0, 200)))
    assert len(host.answer()) == 8 + 4 + 8
    host.packet(bytes((0x51, 0, 0, 0, 0, 0, 0, 0, 34)))
    assert len(host.answer()) == 34
    host.packet(bytes((0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8)))
    assert len(host.answer()) == 8


def test_read_cd_gives_user_data_only(host: Host, medium: Memory) -> None:
    host.packet(bytes((0xBE, 0, 0, 0, 0, 5, 0, 0, 1, 0x10)))
    assert host.answer() == medium.data[5 * 2048 : 6 * 2048]
    host.packet(bytes((0xBE, 0, 0, 0, 0, 5, 0, 0, 1, 0xF8)))
    assert refused(host) == (5, 0x24, 0)
    host.packet(bytes((0x2B, 0, 0, 0, 1, 0)))
    assert host.settled() == 0x50
    host.packet(bytes((0x2B, 0, 0, 0, 2, 0)))
    assert refused(host) == (5, 0x21, 0)


def test_unplugging_leaves_optical_drives(host: Host) -> None:
    host.ide.plug(1, Disk(Memory(4096), serial="d"))
    assert len(host.ide.unplug_disks()) == 1
    host.packet(bytes(12))
    assert host.settled() == 0x50


def test_a_string_takes_an_odd_block_in_whole_accesses(host: Host) -> None:
    host.packet(bytes((0x12, 0, 0, 0, 35)), limit=64)
    assert host.settled() & 8
    data = host.ports.read_string(0x1F0, 2, 18)
    assert (len(data), data[8:16], data[35]) == (36, b"Domicile", 0)
    assert host.settled() == 0x50
