"""I/O commands: the bytes that move, every PRP shape, and the status of what cannot be done."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.devices.nvme.model import BURST
from drivers.hw.nvme import spec
from drivers.hw.nvme.media import MediaError, RawMedia
from drivers.hw.nvme.spec import IoOpcode, Status
from tests.unit.nvme.nvme_host import DATA, PAGE, Host, raw_file


@pytest.fixture
def host() -> Host:
    made = Host()
    made.enable()
    made.io_queue()
    return made


def content(host: Host, offset: int, length: int) -> bytes:
    """What the medium holds."""
    data = bytearray(length)
    host.media[1].read(offset, memoryview(data))
    return bytes(data)


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(1, 512),
    lba=st.integers(0, 1000),
    offset=st.integers(0, 1023).map(lambda n: 4 * n),
    list_offset=st.integers(0, 511).map(lambda n: 8 * n),
    seed=st.integers(0, 255),
)
def test_write_then_read_moves_exactly_the_bytes(
    blocks: int, lba: int, offset: int, list_offset: int, seed: int
) -> None:
    """Any length, buffer offset and place of the PRP list (chained lists among them): the medium gets the buffer's bytes, and reading
    them elsewhere gives them back and touches nothing beside them."""
    host = Host()
    host.enable()
    host.io_queue()
    length = blocks * 512
    data = bytes((seed + i * 7 + (i >> 9)) & 0xFF for i in range(length))
    host.memory[DATA + offset : DATA + offset + length] = data
    where = {"cdw10": lba, "cdw12": blocks - 1, "nsid": 1}
    prps = host.prps(DATA + offset, length, 0x90000 + list_offset)
    assert host.status(1, IoOpcode.WRITE, **where, **prps) == Status.SUCCESS
    assert content(host, lba * 512, length) == data
    target = DATA + 0x100000 + offset
    host.memory[target - 16 : target + length + 16] = b"\xee" * (length + 32)
    prps = host.prps(target, length, 0x90000 + list_offset)
    assert host.status(1, IoOpcode.READ, **where, **prps) == Status.SUCCESS
    assert host.memory[target - 16 : target + length + 16] == b"\xee" * 16 + data + b"\xee" * 16
    assert host.model.controller.staging.in_use == 16  # the pages for completion entries only


@pytest.mark.parametrize(
    ("opcode", "fields", "status"),
    [
        (IoOpcode.READ, {"cdw10": 2048}, Status.LBA_OUT_OF_RANGE),
        (IoOpcode.READ, {"cdw10": 2047, "cdw12": 1}, Status.LBA_OUT_OF_RANGE),
        (IoOpcode.READ, {"cdw10": 0xFFFF_FFFF, "cdw11": 0xFFFF_FFFF}, Status.LBA_OUT_OF_RANGE),
        (IoOpcode.READ, {"cdw12": 512}, Status.INVALID_FIELD),
        (IoOpcode.READ, {"nsid": 0}, Status.INVALID_NAMESPACE),
        (IoOpcode.READ, {"nsid": 2}, Status.INVALID_NAMESPACE),
        (IoOpcode.READ, {"nsid": spec.NSID_ALL}, Status.INVALID_NAMESPACE),
        (IoOpcode.READ, {"prp1": DATA + 2}, Status.INVALID_PRP_OFFSET),
        (IoOpcode.READ, {"prp1": DATA + 4, "cdw12": 7, "prp2": DATA + 0x2004}, Status.INVALID_PRP_OFFSET),
        (IoOpcode.READ, {"cdw12": 63, "prp2": 0x90004}, Status.INVALID_PRP_OFFSET),
        (IoOpcode.READ, {"cdw12": 63, "prp2": 0x91000}, Status.INVALID_PRP_OFFSET),
        (IoOpcode.READ, {"flags": 0x80}, Status.INVALID_FIELD),
        (IoOpcode.READ, {"flags": 1}, Status.INVALID_FIELD),
        (IoOpcode.WRITE, {"cdw10": 2048}, Status.LBA_OUT_OF_RANGE),
        (IoOpcode.WRITE_ZEROES, {"cdw10": 2000, "cdw12": 48}, Status.LBA_OUT_OF_RANGE),
        (IoOpcode.FLUSH, {"nsid": 9}, Status.INVALID_NAMESPACE),
        (IoOpcode.WRITE_UNCORRECTABLE, {}, Status.INVALID_OPCODE),
        (IoOpcode.VERIFY, {}, Status.INVALID_OPCODE),
        (0x7F, {}, Status.INVALID_OPCODE),
        (0xFF, {}, Status.INVALID_OPCODE),
    ],
)
def test_what_cannot_be_done_has_its_status(
    host: Host, opcode: int, fields: dict[str, int], status: int
) -> None:
    """Each wrong field gets the specification's status, with 'do not retry', and the next command works."""
    host.memory[0x91000:0x91008] = (DATA + 8).to_bytes(8, "little")  # a list whose entry has an offset
    done = host.do(1, opcode, **{"nsid": 1, "prp1": DATA, **fields})
    assert spec.status_of(done.status) == status
    assert done.status & spec.STATUS_DNR
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == Status.SUCCESS


def test_dma_fault_costs_its_own_command_only(host: Host) -> None:
    """32 reads and writes at once, some with addresses that the IOMMU refuses: those fail, the others' data and entries arrive."""
    host.holes = {(DATA >> 12) + n for n in (3, 4, 17, 31)}
    commands = []
    for n in range(32):
        host.memory[DATA + n * PAGE : DATA + (n + 1) * PAGE] = bytes([n]) * PAGE
        opcode = IoOpcode.WRITE if n % 2 else IoOpcode.READ
        commands.append(host.command(opcode, nsid=1, prp1=DATA + n * PAGE, cdw10=8 * n, cdw12=7))
        host.put(1, commands[-1])
    host.ring(1)
    done = {entry.cid: spec.status_of(entry.status) for entry in host.reap(1)}
    for n, command in enumerate(commands):
        bad = n in (3, 4, 17, 31)
        assert done[command.cid] == (Status.DATA_TRANSFER_ERROR if bad else Status.SUCCESS), n
        if n % 2:
            assert content(host, n * PAGE, PAGE) == (bytes(PAGE) if bad else bytes([n]) * PAGE)
    assert not host.model.controller.csts & spec.CSTS_CFS


def test_prp_list_that_cannot_be_read(host: Host) -> None:
    """The command fails with a data transfer error, not the controller."""
    host.holes = {0x90}
    done = host.do(1, IoOpcode.READ, nsid=1, prp1=DATA, prp2=0x90000, cdw12=63)
    assert spec.status_of(done.status) == Status.DATA_TRANSFER_ERROR
    assert not done.status & spec.STATUS_DNR


def test_write_zeroes_discard_and_compare(host: Host) -> None:
    """Zeroes in the range and nowhere else; several ranges of one deallocate; compare sees one wrong byte."""
    host.media[1].write(0, memoryview(b"\xaa" * 65536), False)
    assert host.status(1, IoOpcode.WRITE_ZEROES, nsid=1, cdw10=1, cdw12=9 | spec.IO_DEAC) == 0
    assert content(host, 0, 6144) == b"\xaa" * 512 + bytes(5120) + b"\xaa" * 512
    ranges = spec.DSM_RANGE.pack(spec.DsmRange(0, 8, 16)) + spec.DSM_RANGE.pack(spec.DsmRange(0, 8, 32))
    host.memory[DATA : DATA + 32] = ranges
    dsm = {"nsid": 1, "prp1": DATA, "cdw10": 1, "cdw11": spec.DSM_DEALLOCATE}
    assert host.status(1, IoOpcode.DATASET_MANAGEMENT, **dsm) == 0
    assert content(host, 16 * 512, 4096) == content(host, 32 * 512, 4096) == bytes(4096)
    assert content(host, 24 * 512, 4096) == b"\xaa" * 4096
    host.memory[DATA + 16 : DATA + 32] = spec.DSM_RANGE.pack(spec.DsmRange(0, 9, 2040))
    assert host.status(1, IoOpcode.DATASET_MANAGEMENT, **dsm) == Status.LBA_OUT_OF_RANGE
    host.memory[DATA : DATA + 512] = b"\xaa" * 512
    compare = {"nsid": 1, "prp1": DATA, "cdw10": 60}
    assert host.status(1, IoOpcode.COMPARE, **compare) == 0
    host.memory[DATA + 511] = 0xAB
    assert host.status(1, IoOpcode.COMPARE, **compare) == Status.COMPARE_FAILURE


class _Watched(RawMedia):
    """Counts what makes data durable; fails on demand."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: MediaError | None = None
        inner = raw_file(1 << 20)
        super().__init__(os.dup(inner._fd))
        inner.close()

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        self.calls.append(f"write {offset} {durable}")
        if self.fail is not None:
            raise self.fail
        super().write(offset, data, durable)

    def read(self, offset: int, target: memoryview) -> None:
        if self.fail is not None:
            raise self.fail
        super().read(offset, target)

    def flush(self) -> None:
        self.calls.append("flush")
        super().flush()


def test_flush_fua_and_write_cache() -> None:
    """Flush reaches the medium, of one namespace or of all; FUA, and every write with the cache off, is durable by itself; turning the
    cache off writes it out first."""
    one, two = _Watched(), _Watched()
    host = Host({1: one, 2: two})
    host.enable()
    host.io_queue()
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA) == 0
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA, cdw12=spec.IO_FUA) == 0
    assert host.status(1, IoOpcode.FLUSH, nsid=2) == 0
    assert (one.calls, two.calls) == (["write 0 False", "write 0 True"], ["flush"])
    assert host.status(1, IoOpcode.FLUSH, nsid=spec.NSID_ALL) == 0
    assert (one.calls[2:], two.calls[1:]) == (["flush"], ["flush"])
    assert host.status(0, spec.AdminOpcode.SET_FEATURES, cdw10=6, cdw11=0) == 0
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA) == 0
    assert one.calls[3:] == ["flush", "write 0 True"]


def test_media_errors_become_statuses() -> None:
    """Unrecovered read, write fault, capacity exceeded; none of them stops the controller."""
    medium = _Watched()
    host = Host({1: medium})
    host.enable()
    host.io_queue()
    medium.fail = MediaError("broken")
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == Status.UNRECOVERED_READ
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA) == Status.WRITE_FAULT
    medium.fail = MediaError("full", full=True)
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA) == Status.CAPACITY_EXCEEDED
    medium.fail = None
    assert host.status(1, IoOpcode.WRITE, nsid=1, prp1=DATA) == 0


def test_read_only_namespace() -> None:
    """Everything that changes it is refused, reads are not."""
    medium = raw_file(1 << 20)
    medium.read_only = True
    host = Host({1: medium})
    host.enable()
    host.io_queue()
    for opcode, fields in (
        (IoOpcode.WRITE, {}),
        (IoOpcode.WRITE_ZEROES, {}),
        (IoOpcode.DATASET_MANAGEMENT, {"cdw11": spec.DSM_DEALLOCATE}),
    ):
        assert host.status(1, opcode, nsid=1, prp1=DATA, **fields) == Status.NAMESPACE_WRITE_PROTECTED
    assert host.status(1, IoOpcode.READ, nsid=1, prp1=DATA) == 0


def test_more_commands_than_staging_memory_holds() -> None:
    """62 reads of the largest transfer need 15.5 MiB of buffers; with 4 MiB of staging memory they wait their turn, and all are right."""
    host = Host()
    host.media[1].write(0, memoryview(bytes(range(256)) * 4096), False)
    host.enable()
    host.io_queue()
    prps = host.prps(DATA, 1 << 18)
    for _ in range(62):
        host.put(1, host.command(IoOpcode.READ, nsid=1, cdw12=511, **prps))
    host.ring(1)
    assert [spec.status_of(entry.status) for entry in host.reap(1)] == [0] * 62
    assert host.memory[DATA : DATA + (1 << 18)] == bytes(range(256)) * 1024


def test_round_trips_are_few(host: Host) -> None:
    """One DMA message fetches the entries of 32 reads; data, completions and the interrupt go out together, a burst at a time: others
    work on these while the media do the rest."""
    for n in range(32):
        host.put(1, host.command(IoOpcode.READ, nsid=1, prp1=DATA + n * PAGE, cdw10=8 * n, cdw12=7))
    before, host.raised = host.batches, []
    host.ring(1)
    assert len(host.reap(1, ring=False)) == 32
    assert host.batches - before == 1 + 32 // BURST
    assert host.raised == [1] * (32 // BURST)
