"""drivers/pc/ide, ide_disk, ide_pci with a hard disk: addresses, PIO, DMA, errors, resets, settings."""

from __future__ import annotations

import struct

import pytest

from drivers.pc.ide_disk import Disk
from tests.unit.pc.ide_host import BUFFER, Host, Memory, pattern

SECTORS = 2048


@pytest.fixture
def medium() -> Memory:
    made = Memory(SECTORS * 512)
    made.data[:] = pattern(SECTORS)
    return made


@pytest.fixture
def host(medium: Memory) -> Host:
    return Host(Disk(medium, serial="QM00001"))


def identify(host: Host, unit: int = 0) -> tuple[int, ...]:
    host.taskfile(0xEC, unit=unit)
    assert host.settled() == 0x58
    words = struct.unpack("<256H", host.take(512))
    assert not host.irq.level
    assert host.get(7) == 0x50
    return words


def test_identify(host: Host) -> None:
    words = identify(host)
    assert words[0] & 0x8000 == 0
    assert (words[1], words[3], words[6]) == (2, 16, 63)
    assert words[60] | words[61] << 16 == SECTORS
    assert words[100] == SECTORS
    assert words[83] & 0xC000 == 0x4000
    assert words[83] & 0x400
    raw = struct.pack("<256H", *words)
    assert bytes(raw[i ^ 1] for i in range(54, 94)).decode().rstrip() == "Domicile HARDDISK"
    assert bytes(raw[i ^ 1] for i in range(20, 40)).decode().rstrip() == "QM00001"
    assert sum(raw) & 0xFF == 0, "checksum (word 255)"


def test_pio_read_gives_an_interrupt_for_each_sector(host: Host, medium: Memory) -> None:
    host.taskfile(0x20, lba=100, count=3)
    data = b""
    for _ in range(3):
        assert host.settled() == 0x58
        data += host.take(512)
    assert data == medium.data[100 * 512 : 103 * 512]
    assert not host.irq.level
    assert host.get(7) == 0x50
    assert (host.get(3), host.get(2)) == (102, 0)


def test_four_bytes_at_a_time(host: Host, medium: Memory) -> None:
    host.taskfile(0x20, lba=7, count=1)
    host.settled()
    assert host.take(512, 4) == medium.data[7 * 512 : 8 * 512]


def test_count_0_is_256(host: Host, medium: Memory) -> None:
    host.taskfile(0x20, lba=0, count=0)
    data = b""
    while host.alternate & 8:
        data += host.take(512)
    assert data == medium.data[: 256 * 512]


def test_pio_write(host: Host, medium: Memory) -> None:
    host.taskfile(0x30, lba=5, count=2)
    assert not host.irq.level, "no interrupt before the first sector"
    assert host.get(7) == 0x58
    host.give(b"A" * 512)
    assert host.settled() == 0x58
    assert medium.data[5 * 512 : 6 * 512] == b"A" * 512
    host.give(b"B" * 512, 4)
    assert host.settled() == 0x50
    assert medium.data[6 * 512 : 7 * 512] == b"B" * 512
    assert medium.durable == 0


def test_multiple(host: Host, medium: Memory) -> None:
    host.taskfile(0xC4, lba=0, count=1)
    assert host.settled() & 1, "no block size yet"
    host.taskfile(0xC6, count=3)
    assert host.settled() & 1
    host.taskfile(0xC6, count=8)
    assert host.settled() == 0x50
    assert identify(host)[59] == 0x108
    host.taskfile(0xC4, lba=10, count=12)
    assert host.settled() == 0x58
    first = host.take(8 * 512)
    assert host.settled() == 0x58
    assert first + host.take(4 * 512) == medium.data[10 * 512 : 22 * 512]
    assert not host.irq.level
    host.taskfile(0xC5, lba=1, count=9)
    host.give(b"x" * 8 * 512)
    assert host.settled() == 0x58
    host.give(b"y" * 512)
    assert host.settled() == 0x50
    assert medium.data[512 : 10 * 512] == b"x" * 8 * 512 + b"y" * 512


def test_chs(host: Host, medium: Memory) -> None:
    host.taskfile(0x20, lba=1 << 8 | 1, count=1, device=3)  # cylinder 1, head 3, sector 1
    host.settled()
    assert struct.unpack("<I", host.take(512)[:4])[0] == (1 * 16 + 3) * 63
    host.taskfile(0x91, count=32, device=7)  # 8 heads of 32 sectors
    assert host.settled() == 0x50
    host.taskfile(0x20, lba=1 << 8 | 2, count=1, device=7)
    host.settled()
    assert struct.unpack("<I", host.take(512)[:4])[0] == (1 * 8 + 7) * 32 + 1
    words = identify(host)
    assert words[54:57] == (8, 8, 32)
    for bad in (1 << 8, 1 << 8 | 33):
        host.taskfile(0x20, lba=bad, count=1, device=0)
        assert host.settled() & 1
        assert host.get(1) == 0x10


def test_48_bits(host: Host, medium: Memory) -> None:
    host.extended(0x24, 1000, 2)
    data = b""
    while host.alternate & 8:
        data += host.take(512)
    assert data == medium.data[1000 * 512 : 1002 * 512]
    host.settled()
    host.extended(0x24, 1 << 40, 1)
    assert host.settled() & 1
    assert host.get(1) == 0x10
    host.ports.write(host.control, 1, 0x80)
    assert host.get(5) == 1, "the high bytes are behind HOB"
    host.set(2, 0)
    assert host.get(5) == 0


def test_the_end_of_the_disk(host: Host) -> None:
    host.taskfile(0x20, lba=SECTORS - 1, count=1)
    assert host.settled() == 0x58
    host.take(512)
    for code, count in ((0x20, 2), (0x30, 2), (0xC8, 2), (0x40, 2)):
        host.taskfile(code, lba=SECTORS - 1, count=count)
        assert host.settled() == 0x51
        assert host.get(1) == 0x10
    host.taskfile(0x40, lba=SECTORS - 2, count=2)
    assert host.settled() == 0x50


def test_dma_read_scatters(host: Host, medium: Memory) -> None:
    host.descriptors((BUFFER + 2, 510), (BUFFER + 0x2000, 1024), (BUFFER + 0x1000, 514))
    host.prepare(True)
    host.taskfile(0xC8, lba=20, count=4)
    assert not host.irq.level
    host.start()
    assert host.irq.level
    assert host.master_status & 7 == 4, "interrupt, and not active: the table is used up"
    assert host.settled() == 0x50
    want = medium.data[20 * 512 : 24 * 512]
    ram = host.ram.data
    got = (
        ram[BUFFER + 2 : BUFFER + 512]
        + ram[BUFFER + 0x2000 : BUFFER + 0x2400]
        + ram[BUFFER + 0x1000 : BUFFER + 0x1202]
    )
    assert got == want
    host.stop()
    assert host.master_status & 7 == 0


def test_the_start_bit_may_come_first(host: Host, medium: Memory) -> None:
    host.descriptors((BUFFER, 512))
    host.prepare(True)
    host.start()
    assert host.master_status & 1
    host.taskfile(0xC8, lba=3, count=1)
    assert host.settled() == 0x50
    assert host.ram.data[BUFFER : BUFFER + 512] == medium.data[3 * 512 : 4 * 512]


def test_dma_write_of_much(host: Host, medium: Memory) -> None:
    content = bytes(range(256)) * 2 * 600
    host.ram.write(BUFFER, content)
    host.descriptors(
        *((BUFFER + at, min(0x10000, len(content) - at)) for at in range(0, len(content), 0x10000))
    )
    host.prepare(False)
    host.extended(0x35, 100, 600)
    host.start()
    assert host.settled() == 0x50
    assert medium.data[100 * 512 : 700 * 512] == content
    assert medium.data[700 * 512 : 701 * 512] == pattern(701)[700 * 512 :]


def test_a_table_longer_than_the_transfer_stays_active(host: Host) -> None:
    host.descriptors((BUFFER, 4096))
    host.prepare(True)
    host.taskfile(0xC8, lba=0, count=1)
    host.start()
    assert host.master_status & 7 == 5
    host.stop()
    assert host.master_status & 7 == 0


def test_a_table_that_is_too_short_gives_no_interrupt(host: Host, medium: Memory) -> None:
    host.descriptors((BUFFER, 512))
    host.prepare(False)
    host.ram.write(BUFFER, b"Z" * 512)
    host.taskfile(0xCA, lba=0, count=2)
    host.start()
    assert not host.irq.level
    assert host.master_status & 7 == 0
    assert host.alternate & 8
    assert medium.data[:1024] == b"Z" * 512 + pattern(2)[512:]
    host.ports.write(host.control, 1, 4)
    host.ports.write(host.control, 1, 0)
    assert host.get(7) == 0x50


@pytest.mark.parametrize("where", ["descriptor", "buffer", "master"])
def test_dma_outside_the_guest_ends_with_an_error(host: Host, medium: Memory, where: str) -> None:
    before = bytes(medium.data)
    host.descriptors((0xF000_0000 if where == "buffer" else BUFFER, 512))
    host.prepare(False)
    if where == "descriptor":
        host.ports.write(host.master + 4, 4, 0xF000_0000)
    if where == "master":
        host.config(4, 1)
    host.taskfile(0xCA, lba=0, count=1)
    host.start()
    assert host.master_status & 7 == 6
    assert host.settled() & 1
    assert medium.data == before


def test_a_wrong_direction_moves_nothing(host: Host, medium: Memory) -> None:
    before = bytes(host.ram.data[BUFFER : BUFFER + 512])
    host.descriptors((BUFFER, 512))
    host.prepare(False)
    host.taskfile(0xC8, lba=1, count=1)
    host.start()
    assert host.ram.data[BUFFER : BUFFER + 512] == before
    assert not host.irq.level


def test_media_errors(host: Host, medium: Memory) -> None:
    medium.bad = {30}
    host.taskfile(0x20, lba=29, count=3)
    assert host.settled() == 0x58
    host.take(512)
    assert host.settled() == 0x51
    assert (host.get(1), host.get(3)) == (0x40, 30)
    host.descriptors((BUFFER, 2048))
    host.prepare(True)
    host.taskfile(0xC8, lba=28, count=4)
    host.start()
    assert host.settled() == 0x51
    assert host.get(1) == 0x40
    assert host.master_status & 1 == 0
    host.taskfile(0x30, lba=30, count=1)
    host.give(bytes(512))
    assert host.settled() == 0x51
    host.taskfile(0xE7)
    assert host.settled() == 0x51
    medium.bad.clear()
    host.taskfile(0xEA)
    assert host.settled() == 0x50
    assert medium.flushes == 1
    drive = host.ide.channels[0].drives[0]
    assert isinstance(drive, Disk)
    assert len(drive.errors) == 4


def test_write_cache_and_fua(host: Host, medium: Memory) -> None:
    host.taskfile(0xEF, feature=0x82)
    assert host.settled() == 0x50
    assert medium.flushes == 1
    assert not identify(host)[85] & 0x20
    host.taskfile(0x30, lba=0, count=1)
    host.give(bytes(512))
    assert medium.durable == 1
    host.settled()
    host.taskfile(0xEF, feature=0x02)
    host.settled()
    host.descriptors((BUFFER, 512))
    host.prepare(False)
    host.extended(0x3D, 0, 1)
    host.start()
    assert medium.durable == 2


def test_a_disk_that_may_not_be_written() -> None:
    host = Host(Disk(Memory(8192, read_only=True), serial="x"))
    for code in (0x30, 0xCA, 0xC5):
        host.taskfile(code, lba=0, count=1)
        assert host.settled() == 0x51
        assert host.get(1) == 4


@pytest.mark.parametrize("code", [0x00, 0xB0, 0xF5, 0xA0, 0xA1, 0x08, 0xF8, 0xFF])
def test_what_is_not_there_is_aborted(host: Host, code: int) -> None:
    host.taskfile(code, count=1)
    assert host.settled() == 0x51
    assert host.get(1) == 4


def test_transfer_modes(host: Host) -> None:
    for mode, word, value in ((0x22, 63, 0x0407), (0x45, 88, 0x203F), (0x0C, 88, 0x203F), (0x20, 63, 0x0107)):
        host.taskfile(0xEF, feature=3, count=mode)
        assert host.settled() == 0x50
        assert identify(host)[word] == value
    for bad in (0x23, 0x46, 0x0D, 0x70):
        host.taskfile(0xEF, feature=3, count=bad)
        assert host.settled() == 0x51


def test_power_and_settings(host: Host) -> None:
    host.taskfile(0xE5)
    assert host.settled() == 0x50
    assert host.get(2) == 0xFF
    for code in (0x10, 0xE0, 0xE1, 0x70):
        host.taskfile(code)
        assert host.settled() == 0x50


def test_nien_holds_the_line_down(host: Host) -> None:
    host.ports.write(host.control, 1, 2)
    host.taskfile(0xE7)
    assert not host.irq.level
    host.ports.write(host.control, 1, 0)
    assert host.irq.level
    host.get(7)
    assert not host.irq.level


def test_the_alternate_status_leaves_the_interrupt(host: Host) -> None:
    host.taskfile(0xE7)
    assert host.alternate == 0x50
    assert host.irq.level


def test_soft_reset_and_signature(host: Host) -> None:
    host.taskfile(0xC6, count=8)
    host.ports.write(host.control, 1, 4)
    assert host.alternate & 0x80
    host.ports.write(host.control, 1, 0)
    assert [host.get(r) for r in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]
    assert host.get(7) == 0x50
    assert identify(host)[59] == 0


def test_diagnostics(host: Host) -> None:
    host.set(6, 0xB0)
    host.set(7, 0x90)
    assert host.settled() == 0x50
    assert host.get(1) == 1
    assert host.get(6) & 0x10 == 0


def test_nobody_there() -> None:
    host = Host()
    for unit in (0xA0, 0xB0):
        host.set(6, unit)
        host.set(7, 0xEC)
        assert host.get(7) == 0
        assert host.alternate == 0
        assert not host.irq.level


def test_no_slave_beside_a_master(host: Host) -> None:
    host.set(6, 0xB0)
    host.set(2, 0x55)
    host.set(7, 0xEC)
    assert host.get(7) == 0
    assert not host.irq.level
    assert host.get(2) == 0x55
    host.set(6, 0xA0)
    assert host.get(7) == 0x50


def test_two_disks(medium: Memory) -> None:
    other = Memory(512 * 512)
    host = Host(Disk(medium, serial="a"), Disk(other, serial="b"))
    assert identify(host, 1)[60] == 512
    host.taskfile(0x30, lba=1, count=1, unit=1)
    host.give(b"S" * 512)
    assert host.settled() == 0x50
    assert other.data[512:1024] == b"S" * 512
    assert medium.data == pattern(SECTORS)
    assert identify(host)[60] == SECTORS


def test_the_other_channel(medium: Memory) -> None:
    host = Host(None, None, Disk(medium, serial="c")).secondary()
    host.descriptors((BUFFER, 512))
    host.prepare(True)
    host.taskfile(0xC8, lba=9, count=1)
    host.start()
    assert host.settled() == 0x50
    assert host.master_status & 4
    assert host.ports.read(0xC002, 1) & 4 == 0
    assert host.irqs[0].rises == 0
    assert host.ram.data[BUFFER : BUFFER + 512] == medium.data[9 * 512 : 10 * 512]


def test_data_port_out_of_turn(host: Host) -> None:
    assert host.ports.read(0x1F0, 2) == 0xFFFF
    host.ports.write(0x1F0, 2, 5)
    host.taskfile(0x30, lba=0, count=1)
    assert host.ports.read(0x1F0, 2) == 0xFFFF
    host.taskfile(0xE7)
    assert host.get(7) & 8, "commands during a transfer are ignored"


def test_unplugging(medium: Memory) -> None:
    host = Host(Disk(medium, serial="a"), None, Disk(Memory(1024), serial="b"))
    host.taskfile(0x20, lba=0, count=2)
    gone = host.ide.unplug_disks(keep_first=True)
    assert len(gone) == 1
    assert host.get(7) & 8
    host.ide.unplug_disks()
    assert not host.irq.level
    assert host.get(7) == 0
    host.ide.plug(0, Disk(medium, serial="a"))
    with pytest.raises(ValueError, match="taken"):
        host.ide.plug(0, Disk(medium, serial="a"))


@pytest.mark.parametrize("size", [2, 4])
def test_strings_of_accesses(host: Host, medium: Memory, size: int) -> None:
    """REP INSW of sectors and of more than is there; REP OUTSW."""
    host.taskfile(0x20, lba=3, count=3)
    data = host.ports.read_string(0x1F0, size, 1024 // size)
    assert data == medium.data[3 * 512 : 5 * 512]
    assert host.irq.level
    assert host.get(7) == 0x58
    assert (
        host.ports.read_string(0x1F0, size, 514 // size + 1)[:516]
        == medium.data[5 * 512 : 6 * 512] + b"\xff" * 4
    )
    host.taskfile(0x30, lba=8, count=2)
    host.ports.write_string(0x1F0, size, b"Q" * 1024 + b"R" * 8)
    assert host.settled() == 0x50
    assert medium.data[8 * 512 : 11 * 512] == b"Q" * 1024 + pattern(11)[10 * 512 :]
    assert host.ports.read_string(0x1F7, 1, 3) == b"\x50" * 3
    host.ports.write_string(0x1F3, 1, b"\x01\x02")
    assert host.get(3) == 2


def test_strings_where_nothing_is() -> None:
    host = Host()
    assert host.ports.read_string(0x1F0, 2, 2) == b"\xff" * 4
    host.ports.write_string(0x1F0, 2, b"abcd")
    assert host.ports.read_string(0x80, 1, 2) == b"\xff\xff"
    host.ports.write_string(0x80, 1, b"ab")
    assert host.ports.unclaimed[0x80] == 4
