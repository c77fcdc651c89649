"""Each rule of the ring by itself: what a back end refuses and how, what a frontend does not believe, the ledger's own checks."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.abi.io import blkif
from drivers.block.backend import Backend
from drivers.block.frontend import DiskError, Features, Frontend
from drivers.block.ledger import Ledger, LedgerError
from drivers.block.ports import Op
from drivers.block.requests import Disk, Request, indirect_pages, parse
from drivers.block.wire import (
    RESPONSE,
    X86_32,
    X86_64,
    Abi,
    Segment,
    pack_discard,
    pack_indirect,
    pack_request,
    pack_segments,
)
from drivers.xenbus.paged_ring import PagedRing
from tests.unit.block.block_machine import FakeDisk, Grants, Machine

ERROR, UNSUPPORTED, OKAY = blkif.BLKIF_RSP_ERROR, blkif.BLKIF_RSP_EOPNOTSUPP, blkif.BLKIF_RSP_OKAY
DISK = Disk(1000, discard=True)
WHOLE: Segment = (9, 0, 7)


def test_the_64_bit_layout_is_that_of_the_header() -> None:
    segments = [(n, n % 8, 7) for n in range(11)]
    made = pack_request(X86_64, 1, 0x1122334455667788, 77, segments, 51712)
    seen = blkif.BLKIF_REQUEST.unpack(made)
    assert (seen.operation, seen.nr_segments, seen.handle, seen.id, seen.sector_number) == (
        *(1, 11, 51712),
        *(0x1122334455667788, 77),
    )
    assert [tuple(part) for part in seen.seg] == segments
    other = blkif.BLKIF_REQUEST_INDIRECT.unpack(pack_indirect(X86_64, 0, 5, 6, 256, [3], 9).ljust(112, b"\0"))
    assert (other.operation, other.indirect_op, other.nr_segments, other.id) == (6, 0, 256, 5)
    assert (other.sector_number, other.handle, other.indirect_grefs[0]) == (6, 9, 3)
    discard = blkif.BLKIF_REQUEST_DISCARD.unpack(pack_discard(X86_64, 1, 5, 6, 1 << 40))
    assert (discard.flag, discard.id, discard.sector_number, discard.nr_sectors) == (1, 5, 6, 1 << 40)
    assert blkif.BLKIF_RESPONSE.pack(blkif.blkif_response(7, 1, -2))[:12] == RESPONSE.pack(7, 1, -2)


def test_the_32_bit_layout_has_no_padding() -> None:
    assert (
        pack_request(X86_32, 0, 1, 2, [WHOLE])[:28]
        == struct.pack("<BBHQQIBB", 0, 1, 0, 1, 2, 9, 0, 7) + b"\0\0"
    )
    assert pack_indirect(X86_32, 1, 1, 2, 20, [3])[:28] == struct.pack("<BBHQQHxxI", 6, 1, 20, 1, 2, 0, 3)


def seen(raw: bytes, disk: Disk = DISK, abi: Abi = X86_64, indirect: bytes = b"") -> Request:
    return parse(raw.ljust(abi.slot, b"\0"), indirect, abi, disk)


@pytest.mark.parametrize("abi", [X86_64, X86_32])
@pytest.mark.parametrize(
    ("op", "sector", "segments", "status"),
    [
        (0, 0, [WHOLE], None),
        (0, 992, [WHOLE], None),
        (0, 993, [WHOLE], ERROR),  # one sector beyond the end
        (0, (1 << 64) - 8, [WHOLE], ERROR),  # wraps in 64 bits
        (0, 0, [], ERROR),
        (1, 0, [], ERROR),
        (0, 0, [(9, 3, 2)], ERROR),  # first behind last
        (0, 0, [(9, 0, 8)], ERROR),  # beyond the page
        (0, 0, [(9, 255, 255)], ERROR),
        (1, 5, [(9, 7, 7), (10, 0, 0)], None),
        (3, 0, [], None),
        (2, 0, [], None),
        (2, 0, [WHOLE], None),
        (4, 0, [WHOLE], UNSUPPORTED),
        (7, 0, [WHOLE], UNSUPPORTED),
        (255, 0, [WHOLE], UNSUPPORTED),
    ],
)
def test_what_is_checked(abi: Abi, op: int, sector: int, segments: list[Segment], status: int | None) -> None:
    request = seen(pack_request(abi, op, 42, sector, segments), abi=abi)
    assert (request.id, request.op, request.status) == (42, op, status)
    if status is None:
        assert request.sectors == sum(last - first + 1 for _, first, last in segments)


def test_too_many_segments() -> None:
    raw = bytearray(pack_request(X86_64, 0, 1, 0, [WHOLE] * 11))
    raw[1] = 12
    assert seen(bytes(raw)).status == ERROR


def test_read_only_disks_refuse_writes_and_discards() -> None:
    disk = Disk(1000, read_only=True, cdrom=True, removable=True, discard=True)
    assert disk.info == blkif.VDISK_CDROM | blkif.VDISK_REMOVABLE | blkif.VDISK_READONLY
    assert seen(pack_request(X86_64, 0, 1, 0, [WHOLE]), disk).status is None
    for raw in (pack_request(X86_64, 1, 1, 0, [WHOLE]), pack_request(X86_64, 2, 1, 0, [WHOLE])):
        assert seen(raw, disk).status == ERROR
    assert seen(pack_discard(X86_64, 0, 1, 0, 8), disk).status == ERROR


def test_what_is_not_offered_is_not_supported() -> None:
    disk = Disk(1000, flush=False, barrier=False, discard=False, max_indirect=0)
    assert seen(pack_request(X86_64, 3, 1, 0), disk).status == UNSUPPORTED
    assert seen(pack_request(X86_64, 2, 1, 0, [WHOLE]), disk).status == UNSUPPORTED
    assert seen(pack_discard(X86_64, 0, 1, 0, 8), disk).status == UNSUPPORTED
    assert seen(pack_indirect(X86_64, 0, 1, 0, 1, [9]), disk, indirect=pack_segments([WHOLE])).status == ERROR


def test_discards() -> None:
    assert seen(pack_discard(X86_64, 0, 1, 990, 10)).kind is Op.DISCARD
    assert seen(pack_discard(X86_64, 0, 1, 990, 11)).status == ERROR
    assert seen(pack_discard(X86_64, 0, 1, 8, (1 << 64) - 8)).status == ERROR
    assert seen(pack_discard(X86_64, 0, 1, 0, 0)).status == OKAY
    assert seen(pack_discard(X86_64, 2, 1, 0, 8)).status == ERROR
    assert not seen(pack_discard(X86_64, 1, 1, 0, 8)).secure  # to be ignored where discard-secure is 0
    assert seen(pack_discard(X86_64, 1, 1, 0, 8), Disk(1000, discard=True, discard_secure=True)).secure


def test_sectors_of_4096_bytes() -> None:
    disk = Disk(800, sector_size=4096)
    request = seen(pack_request(X86_64, 0, 1, 99, [(9, 0, 0)]), disk)
    assert (request.sector, request.sectors, request.segments) == (792, 8, [(9, 0, 4096)])
    assert seen(pack_request(X86_64, 0, 1, 100, [(9, 0, 0)]), disk).status == ERROR
    assert seen(pack_request(X86_64, 0, 1, 0, [(9, 0, 1)]), disk).status == ERROR
    with pytest.raises(ValueError, match="whole number"):
        Disk(801, sector_size=4096)


@pytest.mark.parametrize(("op", "count"), [(2, 1), (6, 1), (0, 0), (0, 257), (1, 65535)])
def test_indirect_requests_that_are_in_error_read_no_pages(op: int, count: int) -> None:
    raw = pack_indirect(X86_64, op, 1, 0, count, [5, 6]).ljust(112, b"\0")
    assert indirect_pages(raw, X86_64, DISK) == []
    assert parse(raw, b"", X86_64, DISK).status == ERROR


def test_indirect_requests() -> None:
    raw = pack_indirect(X86_64, 1, 1, 0, 20, [5]).ljust(112, b"\0")
    assert indirect_pages(raw, X86_64, DISK) == [(5, 160)]
    request = parse(raw, pack_segments([WHOLE] * 20), X86_64, DISK)
    assert (request.op, request.status, request.sectors) == (1, None, 160)
    assert parse(raw, pack_segments([WHOLE] * 19), X86_64, DISK).status == ERROR


# ---------------------------------------------------------------- hostile frontends


class Rig:
    """A back end and a ring that the test writes."""

    def __init__(self, *, persistent: bool = False, abi: Abi = X86_64) -> None:
        self.grants = Grants()
        self.store = FakeDisk(1000, self.grants, random.Random(0))
        self.ring = PagedRing([memoryview(bytearray(4096))], abi.slot)
        self.ring.init()
        ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, self.ring.size))))
        self.notified = 0
        self.back = Backend(DISK, self.store, self.grants, ledger, abi=abi, persistent=persistent)
        self.back.connect([self.ring], [self._notify], b"")
        self.prod = 0
        self.cons = 0

    def _notify(self) -> None:
        self.notified += 1

    def put(self, raw: bytes) -> None:
        self.ring.write_slot(self.prod, raw[: self.ring.entry_size])
        self.prod += 1
        self.ring.push_requests(self.prod)

    def run(self) -> list[tuple[int, int, int]]:
        self.back.poll()
        while (result := self.store.step()) is not None:
            self.back.complete([result])
        return self.answers()

    def answers(self) -> list[tuple[int, int, int]]:
        found = []
        while self.cons != self.ring.rsp_prod:
            found.append(RESPONSE.unpack_from(self.ring.read_slots(self.cons, 1)))
            self.cons = (self.cons + 1) & 0xFFFFFFFF
        return found

    def page(self, *, readonly: bool = False) -> int:
        pages = self.grants.allocate(1)
        return self.grants.grant(pages, readonly)[0]


@pytest.mark.parametrize("persistent", [False, True])
def test_bad_grants_fail_the_request_and_leave_nothing_mapped(persistent: bool) -> None:
    rig = Rig(persistent=persistent)
    good, frozen = rig.page(), rig.page(readonly=True)
    rig.put(pack_request(X86_64, 0, 1, 0, [(good, 0, 7), (99999, 0, 7)]))
    rig.put(pack_request(X86_64, 0, 2, 0, [(frozen, 0, 7)]))  # a read into a read-only frame
    rig.put(pack_request(X86_64, 0, 3, 0, [(good, 0, 7)]))
    rig.put(pack_indirect(X86_64, 0, 4, 0, 12, [77777]))
    assert sorted(rig.run()) == [(1, 0, ERROR), (2, 0, ERROR), (3, 0, OKAY), (4, 0, ERROR)]
    assert len(rig.grants.mapped) == (1 if persistent else 0)
    rig.back.close()
    assert rig.back.drained
    assert not rig.grants.mapped


@pytest.mark.parametrize("persistent", [False, True])
def test_requests_whose_frames_cannot_be_mapped_now_wait_and_keep_their_order(persistent: bool) -> None:
    """GNTST_eagain: no error; flush and barrier wait behind what is put off, and so does what is behind them."""
    rig = Rig(persistent=persistent)
    refs = [rig.page() for _ in range(3)]
    rig.grants.put_off = lambda: True
    rig.put(pack_request(X86_64, 1, 1, 0, [(refs[0], 0, 7)]))  # a write
    rig.put(pack_request(X86_64, 3, 2, 0, []))  # a flush
    rig.put(pack_request(X86_64, 0, 3, 8, [(refs[1], 0, 7)]))  # a read
    rig.put(pack_request(X86_64, 2, 4, 16, [(refs[2], 0, 7)]))  # a barrier
    assert rig.run() == []
    assert [request.id for request in rig.back.queues[0].waiting] == [1, 2, 3, 4]
    for _ in range(3):
        rig.back.retry()
        assert rig.run() == []
    rig.put(pack_discard(X86_64, 0, 5, 24, 8))
    assert rig.run() == []
    assert not rig.grants.mapped
    assert not rig.back.drained
    rig.back.close()
    assert not rig.back.drained, "what was taken is finished first"
    rig.grants.put_off = lambda: False
    rig.back.retry()
    answers = []
    while (result := rig.store.step()) is not None:
        rig.back.complete([result])
        answers += rig.answers()
    order = [ident for ident, _, _ in answers]
    assert sorted(order) == [1, 2, 3, 4, 5]
    assert {status for _, _, status in answers} == {OKAY}
    assert order.index(1) < order.index(2)
    assert order[3:] == [4, 5], "nothing passes the barrier"
    assert rig.back.drained
    assert not rig.back.queues[0].put_off


def test_a_producer_index_that_overruns_the_ring_ends_the_connection_only() -> None:
    rig = Rig()
    rig.put(pack_request(X86_64, 3, 1, 0))
    rig.back.poll()
    rig.ring.req_prod = 34
    rig.back.poll()
    assert rig.back.error is not None
    assert "32 slots" in rig.back.error
    rig.ring.req_prod = 2
    rig.back.poll()
    assert len(rig.store.queue) == 1  # nothing is taken any more, what was taken ends
    rig.back.close()
    assert not rig.back.drained
    result = rig.store.step()
    assert result is not None
    rig.back.complete([result])
    assert rig.back.drained


def test_a_frontend_that_publishes_for_ever_does_not_hold_the_back_end() -> None:
    """Requests in error are answered at once, and it puts as many in again as soon as they are: others get their turn in between."""
    rig = Rig()
    published = 0

    def again() -> None:
        nonlocal published
        published += 32
        if published > 32 * 100:
            raise AssertionError("it is still being served")
        rig.prod += 32
        rig.ring.push_requests(rig.prod)

    for _ in range(32):
        rig.put(pack_request(X86_64, 99, 1, 0))
    rig.back.queues[0].notify = again  # type: ignore[misc]  # it is woken by another thread in truth
    assert rig.back.poll()
    assert rig.back.queues[0].unfinished
    before = published
    assert rig.back.poll()
    assert published > before
    rig.back.queues[0].notify = rig._notify  # type: ignore[misc]  # it stops
    rig.back.poll()
    assert not rig.back.queues[0].unfinished
    assert rig.back.error is None


def test_a_producer_index_that_goes_back_is_an_overrun() -> None:
    rig = Rig()
    for _ in range(5):
        rig.put(pack_request(X86_64, 3, 1, 0))
    rig.run()
    rig.ring.req_prod = 2
    rig.back.poll()
    assert rig.back.error is not None


@given(
    st.binary(min_size=1, max_size=112 * 32),
    st.integers(0, 40),
    st.booleans(),
    st.sampled_from([X86_64, X86_32]),
)
@settings(max_examples=150, deadline=None)
def test_garbage_in_the_ring_is_answered_once_or_ends_the_connection(
    data: bytes, count: int, persistent: bool, abi: Abi
) -> None:
    rig = Rig(persistent=persistent, abi=abi)
    rig.page(), rig.page()
    data = (data * (112 * 32 // len(data) + 1))[: 112 * 32]
    for at in range(32):
        raw = bytearray(data[at * 112 : at * 112 + 112])
        raw[0] %= 9
        if raw[0] == 6:
            raw[1] %= 3
        rig.ring.write_slot(at, bytes(raw[: abi.slot]))
    rig.ring.req_prod = count
    answers = rig.run()
    if count > 32:
        assert rig.back.error is not None
        assert answers == []
    else:
        assert len(answers) == count
        assert rig.back.error is None
    rig.back.close()
    assert rig.back.drained
    assert not rig.grants.mapped


def test_requests_are_copied_before_they_are_checked() -> None:
    """A slot that changes after it was taken changes nothing."""
    rig = Rig()
    ref = rig.page()
    rig.put(pack_request(X86_64, 1, 1, 0, [(ref, 0, 7)]))
    rig.back.poll()
    rig.ring.write_slot(0, pack_request(X86_64, 1, 1, 999, [(5, 0, 7)]))
    assert rig.store.queue[0].sector == 0
    assert rig.run() == [(1, 1, OKAY)]


def test_every_batch_is_notified_unless_the_event_index_is_trusted() -> None:
    rig = Rig()
    rig.ring.rsp_event = 1000  # as a frontend whose store has not come out yet leaves it
    rig.put(pack_request(X86_64, 3, 1, 0))
    rig.run()
    assert rig.notified == 1


def test_a_failed_flush_does_not_carry_out_its_write() -> None:
    rig = Rig()
    rig.store.fail = lambda command: command.op is Op.FLUSH
    rig.put(pack_request(X86_64, 2, 1, 0, [(rig.page(), 0, 7)]))
    assert rig.run() == [(1, 2, ERROR)]
    assert not rig.store.stable
    assert not rig.store.cache


def test_completions_of_unknown_tokens_are_nothing() -> None:
    rig = Rig()
    rig.back.complete([(12345, True)])
    assert rig.answers() == []


def test_a_disk_of_large_blocks_needs_large_sectors() -> None:
    rig = Rig()
    rig.store.block_size = 4096
    ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, 32))))
    with pytest.raises(ValueError, match="blocks of 4096"):
        Backend(DISK, rig.store, rig.grants, ledger)


# ---------------------------------------------------------------- a frontend that does not trust


def front() -> tuple[Frontend, PagedRing, list[int]]:
    ring = PagedRing([memoryview(bytearray(4096))], 112)
    ring.init()
    found: list[int] = []
    user = Frontend(Grants())
    user.connect([ring], [lambda: None], Features(1000, flush=True))
    user.read(0, 8, lambda status, data: found.append(status))
    return user, ring, found


def answer(ring: PagedRing, index: int, ident: int, op: int, status: int) -> None:
    ring.write_slot(index, RESPONSE.pack(ident, op, status))
    ring.rsp_prod = index + 1


@pytest.mark.parametrize(
    ("ident", "op", "status"), [(2, 0, 0), (0, 0, 0), (1 << 63, 0, 0), (1, 1, 0), (1, 0, 5), (1, 0, -32768)]
)
def test_a_response_that_answers_nothing_stops_the_frontend(ident: int, op: int, status: int) -> None:
    user, ring, found = front()
    answer(ring, 0, ident, op, status)
    user.poll()
    assert user.error is not None
    assert found == []


def test_a_batch_is_published_and_told_once() -> None:
    """What is asked inside `batch` and in answers' callbacks goes out together, with one notification."""
    ring = PagedRing([memoryview(bytearray(4096))], 112)
    ring.init()
    published: list[int] = []
    user = Frontend(Grants())
    user.connect([ring], [lambda: published.append(ring.req_prod)], Features(1000))

    def two_more(status: int, data: bytes) -> None:
        for _ in range(2):
            user.read(9, 1, lambda *_: None)

    with user.batch():
        for sector in range(4):
            user.read(sector, 1, two_more)
        assert (ring.req_prod, published) == (0, [])
    assert (ring.req_prod, published) == (4, [4])
    ring.req_event = 5
    for index in range(3):
        ring.write_slot(index, RESPONSE.pack(index + 1, 0, 0))
    ring.rsp_prod = 3
    assert user.poll() == 3
    assert (ring.req_prod, published) == (10, [4, 10])


def test_a_second_response_to_the_same_request_stops_the_frontend() -> None:
    user, ring, found = front()
    user.read(8, 8, lambda status, data: found.append(status))
    answer(ring, 0, 1, 0, 0)
    answer(ring, 1, 1, 0, 0)
    user.poll()
    assert found == [0]
    assert user.error is not None


@pytest.mark.parametrize("index", [2, 33, 0xFFFFFFFF])
def test_more_responses_than_requests_stop_the_frontend(index: int) -> None:
    user, ring, _ = front()
    ring.rsp_prod = index
    user.poll()
    assert user.error is not None
    assert user.pending == 1


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(-3, 1)), max_size=20),
    st.integers(0, 1 << 32),
)
@settings(max_examples=100, deadline=None)
def test_garbage_from_the_back_end(answers: list[tuple[int, int, int]], jump: int) -> None:
    user, ring, found = front()
    for at, parts in enumerate(answers):
        answer(ring, at, *parts)
        user.poll()
    ring.rsp_prod = jump & 0xFFFFFFFF
    user.poll()
    assert len(found) <= 1


def test_a_page_that_the_back_end_keeps_is_not_used_again() -> None:
    machine = Machine(1)
    machine.front.write(0, bytes(512), lambda status, data: None)
    machine.grants.map_frames([(ref, False) for ref in list(machine.grants.table)])
    _drive(machine)
    assert machine.front.leaked == 1


def _drive(machine: Machine) -> None:
    while machine.turn():
        pass


def test_a_frontend_refuses_what_cannot_be() -> None:
    user, _, _ = front()

    def nothing(status: int, data: bytes) -> None: ...

    with pytest.raises(DiskError):
        user.read(993, 8, nothing)
    with pytest.raises(DiskError):
        user.read(0, 0, nothing)
    with pytest.raises(DiskError):
        user.write(0, b"x", nothing)
    with pytest.raises(DiskError):
        user.discard(0, 8, nothing)
    with pytest.raises(DiskError):
        user.write(0, bytes(512), nothing, barrier=True)


# ---------------------------------------------------------------- the ledger


def ledger_with_one() -> tuple[memoryview, PagedRing]:
    memory = memoryview(bytearray(Ledger.bytes_needed(1, 32)))
    ring = PagedRing([memoryview(bytearray(4096))], 112)
    ring.init()
    ledger = Ledger(memory)
    ledger.begin(1, 32, b"blob")
    ledger.queues[0].take([(0, b"r" * 112, b"")], 1)
    return memory, ring


def test_a_ledger_gives_back_what_it_was_given() -> None:
    memory, ring = ledger_with_one()
    again = Ledger(memory)
    assert again.reopen() == b"blob"
    found = again.queues[0].recover(ring)
    assert (found.req_cons, found.rsp_prod, [record.raw for record in found.redo]) == (1, 0, [b"r" * 112])


def test_every_changed_byte_of_a_record_is_noticed() -> None:
    memory, ring = ledger_with_one()
    start = bytes(memory).index(b"r" * 112)
    for at in range(start - 16, start + 112):
        memory[at] ^= 0x40
        again = Ledger(memory)
        again.reopen()
        with pytest.raises(LedgerError):
            again.queues[0].recover(ring)
        memory[at] ^= 0x40


def test_a_ring_that_lies_about_its_responses_is_noticed() -> None:
    memory, ring = ledger_with_one()
    ring.rsp_prod = 1
    again = Ledger(memory)
    again.reopen()
    with pytest.raises(LedgerError):
        again.queues[0].recover(ring)


def test_a_head_of_another_version_or_none_is_no_connection() -> None:
    memory, _ = ledger_with_one()
    for copy in (0, 2048):
        memory[copy + 8] = 9
    assert Ledger(memory).reopen() is None
    assert Ledger(memoryview(bytearray(8192))).reopen() is None


def test_a_ledger_has_room_or_says_so() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Ledger(memoryview(bytearray(Ledger.bytes_needed(1, 32)))).begin(2, 32, b"")


@given(st.binary(min_size=64, max_size=64), st.integers(0, 1 << 20))
@settings(max_examples=100, deadline=None)
def test_garbage_in_a_ledger_is_an_error_at_most(noise: bytes, where: int) -> None:
    memory, ring = ledger_with_one()
    at = where % (len(memory) - 64)
    memory[at : at + 64] = noise
    again = Ledger(memory)
    try:
        if again.reopen() is not None:
            again.queues[0].recover(ring)
    except LedgerError:
        pass
