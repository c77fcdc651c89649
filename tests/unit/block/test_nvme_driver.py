"""The NVMe driver against a small device of the test's own: setting up, splitting, completions, loss, shutdown."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.block.ports import Command, Op
from drivers.hw.nvme import spec
from drivers.hw.nvme.driver import SECOND, NvmeDriver, State
from drivers.hw.nvme.driver_io import Namespace, entries, errno_of
from drivers.hw.nvme.driver_queue import Buffer, Entry

SPACE = Namespace(1, 1 << 20, 9, False, 32, True, True, True)


class Memory:
    """Guest frames of the driver's, and frames of others at high addresses."""

    def __init__(self) -> None:
        self.data = bytearray(4096 * 2048)
        self.next = 1
        self.live = 0

    def allocate(self, pages: int) -> Buffer:
        start = self.next * 4096
        self.next += pages
        self.live += pages
        return Buffer(memoryview(self.data)[start : start + pages * 4096], start)

    def free(self, buffer: Buffer) -> None:
        self.live -= len(buffer.view) // 4096


class Device:
    """Enough of a controller: register semantics of 3.1, the admin commands of a driver, commands by PRP."""

    def __init__(self, memory: Memory, *, mdts: int = 5, shift: int = 9, cache: bool = True) -> None:
        self.memory = memory
        self.identity = (mdts, shift, cache)
        self.regs: dict[int, int] = {}
        self.command = self.msix = 0
        self.dead = self.stuck = self.never_ready = False
        self.sqs: dict[int, list[int]] = {}  # base, size, head, cq
        self.cqs: dict[int, list[int]] = {}  # base, size, tail, phase
        self.raised: list[int] = []
        self.seen: list[tuple[int, list[int], int, int, int]] = []  # opcode, pages, lba, blocks, cdw12
        self.disk: dict[int, bytes] = {}
        self.status = 0
        self.rng = random.Random(1)
        self.hold: list[tuple[int, int]] | None = None

    def config_read(self, offset: int, size: int) -> int:
        if self.dead:
            return (1 << 8 * size) - 1
        if offset == 8:
            return spec.PCI_CLASS << 8
        table = {
            0: 0x12341234,
            4: self.command,
            0x34: 0x40,
            0x40: 0x5005,
            0x50: 0x11 | self.msix << 16,
        }
        return table.get(offset, 0)

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == 4:
            self.command = value
        elif offset == 0x52:
            self.msix = value

    def read(self, offset: int, size: int) -> int:
        if self.dead or not self.command & 2:
            return (1 << 8 * size) - 1
        if offset == spec.REG_CAP:
            return 63 | spec.CAP_CQR | 4 << spec.CAP_TO_SHIFT | spec.CAP_CSS_NVM
        if offset == spec.REG_CSTS:
            control = self.regs.get(spec.REG_CC, 0)
            ready = control & 1 and not self.never_ready
            return int(ready) | (spec.SHST_COMPLETE << 2 if control & spec.CC_SHN_MASK else 0)
        return self.regs.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.regs[offset] = value
        if offset == spec.REG_CC:
            self.sqs, self.cqs = {}, {}
            if value & 1:
                assert value >> 16 & 0xFF == 0x46
                self.sqs[0] = [self.regs[spec.REG_ASQ], (self.regs[spec.REG_AQA] & 0xFFF) + 1, 0, 0]
                self.cqs[0] = [self.regs[spec.REG_ACQ], (self.regs[spec.REG_AQA] >> 16) + 1, 0, 1]

    def doorbells(self, values: Sequence[tuple[int, int]], *, wake: bool = True) -> None:
        for offset, value in values:
            number = (offset - spec.DOORBELL_OFFSET) // 4
            if number & 1 or self.dead or self.stuck:
                continue
            queue = self.sqs[number // 2]
            assert value < queue[1]
            while queue[2] != value:
                raw = bytes(self.memory.data[queue[0] + queue[2] * 64 :][:64])
                queue[2] = (queue[2] + 1) % queue[1]
                self.carry_out(number // 2, spec.COMMAND.unpack(raw))

    def carry_out(self, qid: int, command: spec.Command) -> None:
        result = 0
        status = 0
        if qid == 0:
            if command.opcode == spec.AdminOpcode.IDENTIFY:
                self.identify(command)
            elif command.opcode == spec.AdminOpcode.SET_FEATURES:
                result = 1 << 16 | 1  # two of each
            elif command.opcode == spec.AdminOpcode.CREATE_CQ:
                assert command.prp1 % 4096 == 0
                assert command.cdw11 & 3 == 3
                self.cqs[command.cdw10 & 0xFFFF] = [command.prp1, (command.cdw10 >> 16) + 1, 0, 1]
            elif command.opcode == spec.AdminOpcode.CREATE_SQ:
                place = [command.prp1, (command.cdw10 >> 16) + 1, 0, command.cdw11 >> 16]
                self.sqs[command.cdw10 & 0xFFFF] = place
        else:
            self.note(command)
            status = self.status
        if self.hold is not None and qid:
            self.hold.append((qid, command.cid))
        else:
            self.complete(qid, command.cid, status, result)

    def complete(self, qid: int, cid: int, status: int = 0, result: int = 0) -> None:
        queue = self.cqs[self.sqs[qid][3]]
        entry = spec.COMPLETION.pack(spec.Completion(result, 0, 0, qid, cid, status << 1 | queue[3]))
        self.memory.data[queue[0] + queue[2] * 16 : queue[0] + queue[2] * 16 + 16] = entry
        queue[2] += 1
        if queue[2] == queue[1]:
            queue[2], queue[3] = 0, queue[3] ^ 1
        self.raised.append(qid)

    def identify(self, command: spec.Command) -> None:
        mdts, shift, cache = self.identity
        page = bytearray(4096)
        if command.cdw10 == spec.Cns.CONTROLLER:
            page[77] = mdts
            struct.pack_into("<H", page, 520, spec.ONCS_DSM | spec.ONCS_WRITE_ZEROES)
            page[525] = cache
        else:
            struct.pack_into("<Q", page, 0, 1 << 20)
            struct.pack_into("<I", page, 128, shift << 16)
        self.memory.data[command.prp1 : command.prp1 + 4096] = page

    def note(self, command: spec.Command) -> None:
        opcode = command.opcode
        pages = [command.prp1]
        blocks = (command.cdw12 & 0xFFFF) + 1
        if opcode in (spec.IoOpcode.READ, spec.IoOpcode.WRITE):
            left = (blocks << self.identity[1]) - (4096 - command.prp1 % 4096)
            if 0 < left <= 4096:
                pages.append(command.prp2)
            elif left > 4096:
                count = -(-left // 4096)
                pages += struct.unpack_from(f"<{count}Q", self.memory.data, command.prp2)
            assert all(page % 4096 == 0 for page in pages[1:])
        elif opcode == spec.IoOpcode.DATASET_MANAGEMENT:
            part = spec.DSM_RANGE.unpack(bytes(self.memory.data[command.prp1 :][:16]))
            blocks, pages = part.blocks, [part.lba]
        self.seen.append((opcode, pages, command.cdw10 | command.cdw11 << 32, blocks, command.cdw12))


class Rig:
    def __init__(self, *, queues: int = 1, depth: int = 8, **device: int) -> None:
        self.memory = Memory()
        self.device = Device(self.memory, **device)  # type: ignore[arg-type]  # passed through
        self.results: list[tuple[int, bool]] = []
        self.ready = 0
        self.lose_when_ready = False
        """The shell waits for xenstored when it is told, and hears meanwhile that the device was reset."""
        self.lost: list[str] = []
        self.driver = NvmeDriver(
            self.device,
            self.memory,
            on_complete=self.results.extend,
            on_ready=self._ready,
            on_lost=self.lost.append,
            queues=queues,
            depth=depth,
            timeout=5 * SECOND,
        )

    def _ready(self) -> None:
        self.ready += 1
        if self.lose_when_ready:
            self.lose_when_ready = False
            self.driver.lose("the device was reset")

    def up(self) -> Rig:
        self.driver.start(0)
        self.poll(1, 20)
        assert self.driver.state is State.READY, self.driver.reason
        return self

    def poll(self, now: int, times: int = 3) -> None:
        for _ in range(times):
            self.driver.poll(now)


def test_setting_up() -> None:
    rig = Rig(queues=5).up()
    assert rig.ready == 1
    assert (rig.driver.sectors, rig.driver.block_size) == (1 << 20, 512)
    assert rig.device.command & 6 == 6
    assert rig.device.msix & 0x8000
    assert set(rig.device.sqs) == {0, 1, 2}  # the device gave two


def test_many_commands_through_a_small_queue_wrap_and_complete_once() -> None:
    rig = Rig(depth=4).up()
    rig.driver.submit([Command(n, Op.READ, n * 8, 8, [(1 << 32 | n << 12, 4096)]) for n in range(50)])
    rig.poll(2, 40)
    assert sorted(rig.results) == [(n, True) for n in range(50)]
    assert sorted(seen[1][0] for seen in rig.device.seen) == [1 << 32 | n << 12 for n in range(50)]


def test_completions_out_of_order_by_interrupt() -> None:
    rig = Rig().up()
    rig.device.hold = []
    rig.driver.submit([Command(n, Op.WRITE, n, 1, [(1 << 32, 512)], fua=n == 1) for n in range(3)])
    for qid, cid in reversed(rig.device.hold):
        rig.device.complete(qid, cid)
        rig.driver.interrupt(0)
    assert rig.results == [(2, True), (1, True), (0, True)]
    assert [bool(seen[4] & spec.IO_FUA) for seen in rig.device.seen] == [False, True, False]


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=256),
    st.sampled_from([1, 2, 8, 513]),
)
def test_splitting_keeps_every_byte_and_the_rules_of_prps(parts: list[tuple[int, int]], limit: int) -> None:
    extents = []
    for at, (first, second) in enumerate(parts):
        low, high = min(first, second), max(first, second)
        extents.append((1 << 32 | at << 12 | low * 512, (high - low + 1) * 512))
    sectors = sum(length for _, length in extents) // 512
    space = Namespace(1, 1 << 20, 9, False, limit, True, True, True)
    made = entries(Command(1, Op.READ, 100, sectors, extents), space)
    assert isinstance(made, list)
    back: list[int] = []
    lba = 100
    for entry in made:
        assert entry.cdw10 == lba
        blocks = (entry.cdw12 & 0xFFFF) + 1
        lba += blocks
        assert len(entry.pages) <= limit
        assert all(page % 4096 == 0 for page in entry.pages[1:])
        left = blocks
        for page in entry.pages:
            here = min(left, (4096 - page % 4096) // 512)
            back += [page + 512 * n for n in range(here)]
            left -= here
        assert left == 0
    assert back == [iova + 512 * n for iova, length in extents for n in range(length // 512)]


def test_whole_pages_in_a_row_need_no_list_where_there_are_sgls() -> None:
    """One descriptor; what is not in a row, not whole, or short enough for two PRPs, has PRPs as ever."""
    space = Namespace(1, 1 << 20, 9, False, 32, True, True, True, sgl=True)
    pages = [(1 << 32 | n << 12, 4096) for n in range(40)]

    def made(extents: list[tuple[int, int]], op: Op = Op.READ) -> list[tuple[int, int, int]]:
        sectors = sum(length for _, length in extents) // 512
        found = entries(Command(1, op, 8, sectors, extents, fua=True), space)
        assert isinstance(found, list)
        assert sum((entry.cdw12 & 0xFFFF) + 1 for entry in found) == sectors
        assert all(bool(entry.cdw12 & spec.IO_FUA) for entry in found)
        return [(entry.pages[0], len(entry.pages), entry.run) for entry in found]

    assert made(pages[:32]) == [(1 << 32, 1, 32 << 12)]
    assert made(pages[5:8], Op.WRITE) == [(pages[5][0], 1, 3 << 12)]
    assert made(pages[:2]) == [(1 << 32, 2, 0)]
    assert made(pages[:33]) == [(1 << 32, 32, 0), (pages[32][0], 1, 0)], "more than one command may have"
    assert made([*pages[:3], pages[4]]) == [(1 << 32, 4, 0)]
    assert made([*pages[:3], (pages[3][0], 512)]) == [(1 << 32, 4, 0)]
    assert made([(1 << 32 | 512, 3584), *pages[1:4]]) == [(1 << 32 | 512, 4, 0)]
    queue = Rig().up().driver._queues[0]
    cid = queue.put(Entry(1, 1, (pages[5][0],), 0, 0, 7, run=3 << 12))
    raw = bytes(queue.sq.view[(queue.tail - 1) * 64 : queue.tail * 64])
    found = spec.COMMAND.unpack(raw)
    assert (found.cid, found.flags, found.prp1, found.prp2) == (cid, spec.FLAG_SGL, pages[5][0], 3 << 12)


def test_whole_pages_are_one_command_with_a_list() -> None:
    rig = Rig().up()
    extents = [(1 << 32 | n << 12, 4096) for n in range(32)]
    rig.driver.submit([Command(1, Op.WRITE, 0, 256, extents)])
    rig.poll(2)
    assert [(seen[0], seen[1]) for seen in rig.device.seen] == [(1, [iova for iova, _ in extents])]
    assert rig.results == [(1, True)]


def test_one_failing_part_fails_the_command() -> None:
    rig = Rig().up()
    rig.device.status = spec.Status.LBA_OUT_OF_RANGE
    rig.driver.submit([Command(1, Op.READ, 0, 2, [(1 << 32, 512), (2 << 32, 512)])])
    rig.poll(2)
    assert len(rig.device.seen) == 2
    assert rig.results == [(1, False)]
    assert rig.driver.last_errno == errno_of(spec.Status.LBA_OUT_OF_RANGE) == 22


def test_flush_discard_and_zeroes() -> None:
    rig = Rig().up()
    rig.driver.submit(
        [
            Command(1, Op.FLUSH, 0, 0),
            Command(2, Op.DISCARD, 64, 128),
            Command(3, Op.WRITE_ZEROES, 0, (1 << 16) + 5),
            Command(4, Op.DISCARD, 0, 8, secure=True),
        ]
    )
    rig.poll(2)
    assert dict(rig.results) == {1: True, 2: True, 3: True, 4: False}
    assert [(s[0], s[3]) for s in rig.device.seen] == [(0, 1), (9, 128), (8, 65536), (8, 5)]
    assert rig.device.seen[1][1] == [64]


def test_without_a_volatile_cache_a_flush_is_done_at_once() -> None:
    rig = Rig(cache=0).up()
    rig.driver.submit([Command(1, Op.FLUSH, 0, 0)])
    assert rig.driver.wants_poll
    rig.poll(2)
    assert rig.results == [(1, True)]
    assert not rig.device.seen


@pytest.mark.parametrize(
    "command",
    [
        Command(1, Op.READ, (1 << 20) - 1, 2, [(0, 1024)]),
        Command(1, Op.READ, 0, 8, [(0, 512)]),
        Command(1, Op.READ, 0, 0),
        Command(1, Op.READ, 0, 1, [(2, 512)]),
    ],
)
def test_commands_that_cannot_be(command: Command) -> None:
    assert isinstance(entries(command, SPACE), int)


def test_blocks_of_4096_bytes() -> None:
    space = Namespace(1, 100, 12, False, 32, True, True, True)
    made = entries(Command(1, Op.READ, 16, 8, [(1 << 32, 4096)]), space)
    assert made == [Entry(spec.IoOpcode.READ, 1, [1 << 32], 2, 0, 0)]
    assert isinstance(entries(Command(1, Op.READ, 1, 8, [(0, 4096)]), space), int)


def test_a_timeout_resets_and_comes_back() -> None:
    rig = Rig().up()
    rig.device.stuck = True
    rig.driver.submit([Command(1, Op.READ, 0, 8, [(1 << 32, 4096)])])
    rig.poll(4 * SECOND)
    assert not rig.lost
    rig.driver.poll(6 * SECOND + 2)
    assert len(rig.lost) == 1
    rig.device.stuck = False
    rig.driver.submit([Command(2, Op.READ, 0, 8, [(1 << 32, 4096)])])  # forgotten: it is not ready
    rig.driver.lose("the test's rings are empty again")
    rig.poll(7 * SECOND, 20)
    assert rig.driver.state is State.READY
    assert rig.ready == 2
    rig.driver.submit([Command(3, Op.READ, 0, 8, [(1 << 32, 4096)])])
    rig.poll(7 * SECOND)
    assert rig.results == [(3, True)]


def test_a_device_that_is_reset_while_its_user_is_told_that_it_is_ready_is_set_up_again() -> None:
    """Seed 6553 of the second campaign: the end of the first setting up took the second one's steps away, and it was STARTING for ever."""
    rig = Rig()
    rig.lose_when_ready = True
    rig.up()
    assert rig.ready == 2
    rig.driver.submit([Command(3, Op.READ, 0, 8, [(1 << 32, 4096)])])
    rig.poll(2)
    assert rig.results == [(3, True)]


def test_resets_leak_no_memory() -> None:
    rig = Rig().up()
    live = rig.memory.live
    for now in range(1, 6):
        rig.driver.lose("once more")
        rig.poll(now * SECOND, 20)
    assert (rig.ready, rig.memory.live) == (6, live)


@pytest.mark.parametrize("what", ["unknown", "twice"])
def test_completions_of_nothing_reset_the_device(what: str) -> None:
    rig = Rig().up()
    rig.device.hold = []
    rig.driver.submit([Command(1, Op.READ, 0, 8, [(1 << 32, 4096)])])
    qid, cid = rig.device.hold[0]
    if what == "twice":
        rig.device.complete(qid, cid)
        rig.device.complete(qid, cid)
    else:
        rig.device.complete(qid, cid ^ 1)
    rig.driver.interrupt(0)
    assert rig.driver.resets == 1
    assert rig.lost


def test_a_device_that_is_not_there() -> None:
    rig = Rig()
    rig.device.dead = True
    rig.driver.start(0)
    rig.poll(9 * SECOND)
    assert not rig.lost
    rig.poll(11 * SECOND)
    assert rig.driver.state is State.FAILED
    assert "answer" in rig.driver.reason
    rig.device.dead = False
    rig.up()


def test_a_device_that_never_becomes_ready() -> None:
    rig = Rig()
    rig.device.never_ready = True
    rig.driver.start(0)
    rig.poll(1 * SECOND)
    rig.poll(3 * SECOND)
    assert rig.driver.state is State.FAILED
    assert "enable" in rig.driver.reason


def test_shutdown() -> None:
    rig = Rig().up()
    rig.driver.shutdown(2)
    rig.poll(3)
    assert rig.driver.state is State.OFF
    assert rig.memory.live == 0
    assert rig.device.regs[spec.REG_CC] == 0


class Hostile(Device):
    """A device process that is not to be trusted: registers and identity as given."""

    def __init__(self, memory: Memory, capabilities: int, controller: bytes, space: bytes) -> None:
        super().__init__(memory)
        self.capabilities = capabilities
        self.pages = (controller, space)

    def read(self, offset: int, size: int) -> int:
        if offset == spec.REG_CAP and self.command & 2:
            return self.capabilities
        return super().read(offset, size)

    def doorbells(self, values: Sequence[tuple[int, int]], *, wake: bool = True) -> None:
        stride = 4 << (self.capabilities >> spec.CAP_DSTRD_SHIFT & 0xF)
        scale = stride // 4
        at = spec.DOORBELL_OFFSET
        super().doorbells([(at + (offset - at) // scale, value) for offset, value in values])

    def identify(self, command: spec.Command) -> None:
        page = self.pages[command.cdw10 == spec.Cns.NAMESPACE].ljust(4096, b"\0")
        self.memory.data[command.prp1 : command.prp1 + 4096] = page


GOOD_CAP = 63 | spec.CAP_CQR | 4 << spec.CAP_TO_SHIFT | spec.CAP_CSS_NVM


def namespace(blocks: int, shift: int, flbas: int = 0) -> bytes:
    """An identify namespace page."""
    page = bytearray(4096)
    struct.pack_into("<Q", page, 0, blocks)
    page[26] = flbas
    for entry in range(16):
        struct.pack_into("<I", page, 128 + 4 * entry, shift << 16)
    return bytes(page)


def attempt(capabilities: int, controller: bytes, space: bytes) -> NvmeDriver:
    """What becomes of the driver."""
    rig = Rig()
    device = Hostile(rig.memory, capabilities, controller, space)
    rig.device = device
    rig.driver.port = device  # type: ignore[misc]  # before anything was done with the other
    rig.driver.start(0)
    rig.poll(1, 20)
    return rig.driver


@pytest.mark.parametrize("depth", [0, 1, 63])
def test_a_device_with_tiny_queues(depth: int) -> None:
    """One entry makes no queue (NVM Express: at least two): it is refused, and nothing is raised."""
    driver = attempt(GOOD_CAP & ~0xFFFF | depth, b"", namespace(1 << 20, 9))
    assert driver.state is (State.READY if depth else State.FAILED)


@pytest.mark.parametrize("blocks", [0, (1 << 64) - 1, 1 << 63, 1 << 55, 1 << 50])
def test_a_device_of_an_impossible_size(blocks: int) -> None:
    """More sectors than a disk can have would be an error only where the disk is offered: the device is refused."""
    assert attempt(GOOD_CAP, b"", namespace(blocks, 12)).state is State.FAILED


@given(
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=600),
    st.one_of(st.binary(max_size=200), st.builds(namespace, st.integers(0, 1 << 40), st.integers(0, 40))),
)
def test_a_device_that_says_anything(capabilities: int, controller: bytes, space: bytes) -> None:
    """It works, or it is refused; the driver domain, which has other disks, goes on."""
    driver = attempt(capabilities | spec.CAP_CSS_NVM, controller, space)
    assert driver.state in (State.READY, State.FAILED, State.STARTING)
    if driver.state is State.READY:
        assert 0 < driver.sectors < 1 << 55
