"""Frontend and back end over one machine with crashes, suspends and power cuts: each request is answered once, data
are what was written, what a flush covered survives; and each of a list of mutants is found by these very tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.block.backend import Backend, Queue
from drivers.block.grant_pool import GrantPool
from drivers.block.ledger import FLUSH_OWES, WRITE_OWES, Ledger, QueueLedger, Recovered
from drivers.block.ports import Command, Op
from drivers.block.requests import Request
from drivers.block.wire import X86_32, X86_64
from drivers.xenbus.paged_ring import PagedRing
from tests.unit.block.block_machine import Crash, Machine, Trouble, race, scenario

OPTIONS: list[dict[str, Any]] = [
    {"queues": queues, "pages": pages, "persistent": persistent, "max_indirect": indirect, "abi": abi}
    for queues, pages, persistent, indirect, abi in [
        (1, 1, False, 64, X86_64),
        (1, 1, True, 64, X86_64),
        (2, 2, True, 256, X86_64),
        (3, 1, False, 0, X86_32),
        (1, 4, False, 32, X86_32),
    ]
]


@given(
    st.integers(0, 1 << 32),
    st.sampled_from(OPTIONS),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([0.0, 0.0, 0.3, 0.8]),
)
@settings(max_examples=80, deadline=None)
def test_random_lives(seed: int, options: dict[str, Any], crash: float, slow: float) -> None:
    """Also of a frontend whose domain is slow to let its frames be mapped, which the hypervisor does not wait for then."""
    scenario(seed, crash=crash, slow=slow, **options)


POINTS = {
    *("copied", "ledger.record.torn", "ledger.record", "ledger.taken", "ledger.consumer", "taken", "mapped"),
    *("ledger.submitted", "submitting", "submitted", "dirty", "flushed", "ledger.completed", "completed"),
    *("unmapped", "ledger.answer", "ledger.answering", "placed", "written", "published", "ledger.answered"),
    *("answered", "notified", "recover.place", "recover.freed", "resumed", "head.torn", "head.written"),
}


def test_every_crash_point_is_met() -> None:
    """A crash between each two steps happens in these lives, and the list above is the whole list."""
    crashed: set[str] = set()
    seen: set[str] = set()
    for seed in range(100):
        machine = scenario(seed, crash=0.5, suspend=0.05, **OPTIONS[seed % len(OPTIONS)])
        crashed |= set(machine.crashes)
        seen |= machine.seen
    assert seen == POINTS
    assert sorted(POINTS - crashed) == []


@pytest.mark.parametrize(
    "point", sorted(POINTS - {"recover.place", "recover.freed", "resumed", "head.torn", "head.written"})
)
def test_a_crash_at_each_point_by_itself(point: str) -> None:
    """Eight writes, a flush, eight reads; the process dies the first time and the second time it comes to the point."""
    for skip in (0, 1):
        machine = Machine(3, persistent=False)
        left = [skip]

        def hook(name: str, machine: Machine = machine, left: list[int] = left) -> None:
            if name == point:
                left[0] -= 1
                if left[0] == -1:
                    machine.fuse = 0
            Machine.hook(machine, name)

        machine.hook = hook  # the machine's own, with an aim
        assert machine.back is not None
        machine.back._hook = hook  # type: ignore[misc]  # the first process as well
        machine.back.ledger.hook = machine.back.ledger.queues[0].hook = hook
        for _ in range(8):
            machine.write()
        machine.settle()
        machine.flush()
        machine.settle()
        for _ in range(8):
            machine.read()
        machine.settle()
        assert machine.crashes[:1] == [point] or skip
        machine.check_medium()


# ---------------------------------------------------------------- mutants


def no_recheck(self: PagedRing, req_cons: int, fence: Callable[[], None]) -> bool:
    self.req_event = req_cons + 1
    return False


def early_flush(original: Any) -> Any:
    def submit(self: Backend, queue: Queue, ready: list[Request]) -> list[Request]:
        """Flushes are answered at once."""
        for request in [r for r in ready if r.flush and r.kind is None]:
            ready.remove(request)
            request.status = 0
            queue.ledger.completed(request.slot, 0)
            self._answer(queue, [request])
        result: list[Request] = original(self, queue, ready)
        return result

    return submit


def no_order(self: Backend, queue: Queue) -> None:
    """A barrier is an ordinary write without a flush."""
    ready = list(queue.waiting)
    queue.waiting.clear()
    for request in ready:
        request.flush = request.flush and request.kind is None
        if request.barrier:
            request.op, request.barrier = 1, False
    if ready:
        self._submit(queue, ready)


def lost_write(original: Any) -> Any:
    def take(self: QueueLedger, requests: list[tuple[int, bytes, bytes]], req_cons: int) -> list[int]:
        """The record is not written (the state word is)."""
        records, self._records = self._records, memoryview(bytearray(len(self._records)))  # type: ignore[misc]  # a mutant
        try:
            slots: list[int] = original(self, requests, req_cons)
            return slots
        finally:
            self._records = records  # type: ignore[misc]  # a mutant

    return take


def late_consumer(original: Any) -> Any:
    def recover(self: QueueLedger, ring: PagedRing) -> Recovered:
        """All that was answered and published is answered again."""
        found: Recovered = original(self, ring)
        return found._replace(rsp_prod=found.rsp_prod - 1 & 0xFFFFFFFF)

    return recover


def forgets_redo(original: Any) -> Any:
    def recover(self: QueueLedger, ring: PagedRing) -> Recovered:
        found: Recovered = original(self, ring)
        return found._replace(redo=[])

    return recover


def no_answers(original: Any) -> Any:
    def recover(self: QueueLedger, ring: PagedRing) -> Recovered:
        found: Recovered = original(self, ring)
        return found._replace(answers=[])

    return recover


def keeps_grants(self: GrantPool) -> None:
    self._held.clear()


def unmaps_late(original: Any) -> Any:
    def release(self: GrantPool, requests: list[Request]) -> None:
        """Frames are never let go of."""
        for request in requests:
            request.iovas = []
        original(self, requests)

    return release


def unmaps_early(original: Any) -> Any:
    def map_(self: GrantPool, requests: list[Request], writes: list[bool]) -> list[int]:
        """Frames are let go of before the device is done."""
        good: list[int] = original(self, requests, writes)
        mapped = [request.mapped for request in requests]
        self.release(requests)
        for request, extents in zip(requests, mapped, strict=True):
            request.mapped = extents
        return good

    return map_


def no_ledger_state(self: QueueLedger, slot: int, status: int) -> None:
    """Completed requests are marked free before they are answered."""
    self._states[slot] = 0


def wrong_status(original: Any) -> Any:
    def command(self: Backend, queue: Queue, request: Request) -> Command:
        made: Command = original(self, queue, request)
        if made.op is Op.FLUSH and request.kind is not None:
            request.flush = False  # skips the flush in front of a barrier's data
            return made._replace(
                op=Op.WRITE, sector=request.sector, sectors=request.sectors, extents=request.mapped or ()
            )
        return made

    return command


def wrapped(owner: type, name: str, maker: Callable[[Any], Any]) -> tuple[type, str, Any]:
    return owner, name, maker(getattr(owner, name))


MUTANTS: dict[str, tuple[type, str, Any]] = {
    "no re-check after asking for a notification": (PagedRing, "ask_for_requests", no_recheck),
    "a flush is answered before it is done": wrapped(Backend, "_submit", early_flush),
    "barriers order nothing": (Backend, "_start", no_order),
    "a barrier's flush is left out": wrapped(Backend, "_command", wrong_status),
    "the ledger's record is not written": wrapped(QueueLedger, "take", lost_write),
    "responses are given twice after a crash": wrapped(QueueLedger, "recover", late_consumer),
    "requests are not carried out again": wrapped(QueueLedger, "recover", forgets_redo),
    "computed answers are forgotten": wrapped(QueueLedger, "recover", no_answers),
    "persistent grants are kept after close": (GrantPool, "close", keeps_grants),
    "frames are not unmapped": wrapped(GrantPool, "release", unmaps_late),
    "frames are unmapped too early": wrapped(GrantPool, "map", unmaps_early),
    "the ledger forgets what is completed": (QueueLedger, "completed", no_ledger_state),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    for seed in range(60):
        try:
            race()
            scenario(seed, crash=0.3, suspend=0.05, **OPTIONS[seed % len(OPTIONS)])
        except Exception:  # whatever a mutant breaks: it is seen
            return
    pytest.fail("not found in 60 lives")


def test_the_machine_itself_finds_nothing_wrong() -> None:
    """The same lives as for the mutants, without a mutant."""
    race()
    race(queues=2)
    for seed in range(60):
        scenario(seed, crash=0.3, suspend=0.05, **OPTIONS[seed % len(OPTIONS)])


# ---------------------------------------------------------------- resets of the device


@pytest.mark.parametrize("seed", range(10))
def test_a_reset_of_the_device_repeats_what_was_under_way(seed: int) -> None:
    machine = Machine(seed)
    for _ in range(30):
        machine.write()
        if machine.rng.random() < 0.3:
            machine.flush()
        for _ in range(machine.rng.randrange(3)):
            machine.turn()
        if machine.rng.random() < 0.3:
            for _ in range(machine.rng.randrange(3)):
                machine.store.step()  # done, but its completion never came
            machine.store.queue.clear()
            machine.guarded(lambda back: back.storage_reset())
    machine.settle()
    machine.check_medium()


def test_a_flush_after_lost_writes_fails_once() -> None:
    """A device that lost power with answered writes in its cache: the next flush must not claim them, even if the
    back end dies before it says so."""
    machine = Machine(1)
    answers: list[int] = []
    machine.front.write(0, bytes(512), lambda status, data: answers.append(status))
    _drive(machine)
    machine.store.power_cut()
    machine.guarded(lambda back: back.storage_reset())
    machine.restart()
    for _ in range(2):
        machine.front.flush(lambda status, data: answers.append(status))
        _drive(machine)
    assert answers == [0, -1, 0]


def test_a_successor_sees_a_power_cut_that_came_while_nobody_looked() -> None:
    """The device's count of power losses is in the ledger: the next process compares."""
    machine = Machine(1)
    answers: list[int] = []
    machine.front.write(0, bytes(512), lambda status, data: answers.append(status))
    _drive(machine)
    machine.store.power_cut()
    machine.restart()
    for _ in range(2):
        machine.front.flush(lambda status, data: answers.append(status))
        _drive(machine)
    assert answers == [0, -1, 0]


def _ask(machine: Machine, answers: list[tuple[str, int]], what: str) -> None:
    def done(status: int, data: bytes) -> None:
        answers.append((what, status))

    if what == "f":
        machine.front.flush(done)
    else:
        machine.front.write(0, bytes(512), done)
    _drive(machine)


def test_a_write_after_lost_writes_fails_once_too() -> None:
    """For those who do not hear a flush that fails (Linux): once, in whatever order."""
    for order in ("fww", "wfw", "wwf"):
        machine = Machine(1)
        answers: list[tuple[str, int]] = []
        ask = partial(_ask, machine, answers)
        ask("w")
        machine.store.power_cut()
        machine.guarded(lambda back: back.storage_reset())
        for what in order:
            ask(what)
        failed = [what for what, status in answers if status]
        assert sorted(failed) == ["f", "w"]
        assert answers[-1][1] == (0 if order != "wwf" else -1)


class Apart(SimpleNamespace):
    """A namespace that is itself alone."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # SimpleNamespace has none


def test_of_completions_at_once_the_queue_with_the_failure_is_answered_first() -> None:
    """A flush that tells of lost writes, and a good one of another queue after it: the good one is not published before it."""
    queues = [
        Apart(
            number=number,
            active=2,
            active_writes=0,
            ledger=SimpleNamespace(completed=lambda *_: None, settled=lambda slot: None),
            pool=SimpleNamespace(release=lambda requests: None),
        )
        for number in range(2)
    ]

    def request(flush: bool) -> SimpleNamespace:
        kind = None if flush else Op.READ
        return SimpleNamespace(flush=flush, kind=kind, status=None, barrier=False, slot=0, stamp=0)

    ledger = SimpleNamespace(lost=FLUSH_OWES, dirty=True, flushed=lambda clean: None)
    ledger.set_lost = lambda lost: setattr(ledger, "lost", lost)
    told: list[int] = []
    back = SimpleNamespace(
        _active={
            1: (queues[0], request(False)),
            2: (queues[1], request(True)),
            3: (queues[0], request(True)),
        },
        ledger=ledger,
        _told=0,
        _writes_done=0,
        closing=False,
        _step=lambda name: None,
        _start=lambda queue: None,
        _poll=lambda queue: None,
        _answer=lambda queue, requests: told.append(queue.number),
    )
    back._flushed = lambda request: Backend._flushed(cast(Backend, back), request)
    Backend.complete(cast(Backend, back), [(1, True), (2, True), (3, True)])
    assert told == [1, 0]


@pytest.mark.parametrize("order", ["ffww", "wwff", "fwfw", "wfwf"])
@pytest.mark.parametrize("told", [FLUSH_OWES, WRITE_OWES])
@pytest.mark.parametrize("where", ["completed", "before", "after"])
def test_who_dies_as_it_tells_of_lost_writes_has_told_it_once(
    monkeypatch: pytest.MonkeyPatch, told: int, where: str, order: str
) -> None:
    """Right after the failure is in the ledger, before or after the debt is crossed out: the successor answers it, and owes the rest."""
    machine = Machine(1)
    answers: list[tuple[str, int]] = []
    ask = partial(_ask, machine, answers)
    ask("w")
    machine.store.power_cut()
    machine.guarded(lambda back: back.storage_reset())
    deaths: list[str] = []

    def die(name: str) -> None:
        if not deaths:
            deaths.append(name)
            raise Crash(name)

    def completed(self: QueueLedger, slot: int, status: int, now: int = 0) -> None:
        real_completed(self, slot, status, now)
        if where == "completed" and now & told:
            die("completed")

    def set_lost(self: Ledger, lost: int) -> None:
        dying = bool(self.lost & ~lost & told) and not deaths
        if dying and where == "before":
            die("before")
        real_lost(self, lost)
        if dying and where == "after":
            die("after")

    real_completed, real_lost = QueueLedger.completed, Ledger.set_lost
    monkeypatch.setattr(QueueLedger, "completed", completed)
    monkeypatch.setattr(Ledger, "set_lost", set_lost)
    for each in order:
        ask(each)
    assert deaths == [where]
    assert sorted(kind for kind, status in answers if status) == ["f", "w"]


def test_a_power_cut_after_one_that_was_told_is_owed_again() -> None:
    """What a slot says that it told is of that cut alone."""
    machine = Machine(1)
    answers: list[tuple[str, int]] = []
    ask = partial(_ask, machine, answers)
    for _ in range(2):
        ask("w")
        machine.store.power_cut()
        machine.restart()
        for what in "fwfw":
            ask(what)
    assert [what for what, status in answers if status] == ["f", "w", "f", "w"]


def test_a_power_cut_with_nothing_unflushed_fails_no_flush() -> None:
    machine = Machine(1)
    answers: list[int] = []
    machine.front.write(0, bytes(512), lambda status, data: answers.append(status))
    _drive(machine)
    machine.front.flush(lambda status, data: answers.append(status))
    _drive(machine)
    machine.store.power_cut()
    machine.guarded(lambda back: back.storage_reset())
    machine.front.flush(lambda status, data: answers.append(status))
    _drive(machine)
    assert answers == [0, 0, 0]


def _drive(machine: Machine) -> None:
    while machine.turn():
        pass


def test_persistent_grants_are_bounded_and_cost_no_hypercalls() -> None:
    machine = Machine(5, persistent=True, persistent_limit=16, max_indirect=0)
    for _ in range(100):
        machine.write(40)
        machine.settle()
        assert len(machine.grants.mapped) <= 16
    before = machine.grants.maps
    for _ in range(50):
        machine.write(40)
        machine.settle()
    assert machine.grants.maps == before
    machine.close()


def test_a_persistent_pool_smaller_than_one_request() -> None:
    machine = Machine(6, persistent=True, persistent_limit=3)
    for _ in range(60):
        machine.write()
        machine.read()
        machine.turn()
    machine.settle()
    machine.close()
    with pytest.raises(Trouble):  # the test double does notice what is not mapped
        machine.grants.dma(1 << 32, 512, None)


def test_requests_of_one_batch_are_mapped_by_one_hypercall() -> None:
    machine = Machine(7)
    asked: Sequence[int] = range(20)
    for at in asked:
        machine.front.write(at * 8, bytes(4096), lambda status, data: None)
    before = machine.grants.maps
    machine.guarded(lambda back: back.poll())
    assert machine.grants.maps == before + 1
    assert len(machine.store.queue) == 20
