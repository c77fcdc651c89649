"""Deliberately broken copies of drivers and of the hypervisor: what the shipped scenarios must find.

Each replaces one method, or two, for the time of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from bus.abi.io.blkif import BLKIF_RSP_OKAY
from drivers.block.backend import Backend, Queue
from drivers.block.grant_pool import GrantPool
from drivers.block.ledger import Ledger, QueueLedger, Recovered
from drivers.block.ports import Op
from drivers.block.requests import Request
from drivers.hw.nvme.io import MediaOp, MediaResult
from drivers.xenbus.paged_ring import PagedRing
from simulation.mutant import Mutant, Undo, patched
from simulation.net_mutants import NETWORK_MUTANTS


def _flush_not_forwarded() -> list[Undo]:
    import domains.devices.nvme.model as model

    real = model.Disks.perform

    def perform(self: Any, request: Any, staging: memoryview) -> Any:
        if request.op is MediaOp.FLUSH:
            return MediaResult.OK
        return real(self, request, staging)

    return patched(model.Disks, "perform", perform)


def _response_before_flush() -> list[Undo]:
    real = Backend._submit

    def submit(self: Backend, queue: Queue, ready: list[Request]) -> list[Request]:
        refused = real(self, queue, ready)
        tokens = [
            token for token, (_, request) in self._active.items() if request in ready and request.kind is None
        ]
        self.complete(
            [(token, True) for token in tokens]
        )  # the device has the command, and will surely do it
        return refused

    return patched(Backend, "_submit", submit)


def _unmap_before_dma() -> list[Undo]:
    real = Backend._submit

    def submit(self: Backend, queue: Queue, ready: list[Request]) -> list[Request]:
        refused = real(self, queue, ready)
        queue.pool.release([request for request in ready if request not in refused])
        return refused

    return patched(Backend, "_submit", submit)


def _lost_ledger_write() -> list[Undo]:
    def submitted(self: QueueLedger, slots: list[int]) -> None:
        for slot in slots:
            self._states[slot] = 0  # FREE: a successor does not know of it

    return patched(QueueLedger, "submitted", submitted)


def _no_recovery() -> list[Undo]:
    real = QueueLedger.recover

    def recover(self: QueueLedger, ring: PagedRing) -> Recovered:
        found = real(self, ring)
        return found._replace(redo=found.redo[:-1]) if found.redo else found

    return patched(QueueLedger, "recover", recover)


def _double_response() -> list[Undo]:
    real = QueueLedger.recover

    def recover(self: QueueLedger, ring: PagedRing) -> Recovered:
        found = real(self, ring)
        return found._replace(rsp_prod=(found.rsp_prod - 1) & 0xFFFFFFFF) if found.rsp_prod else found

    return patched(QueueLedger, "recover", recover)


def _silent_resume() -> list[Undo]:
    def resume(self: Backend, rings: Sequence[PagedRing], notify: Sequence[Callable[[], None]]) -> None:
        self._check_rings(rings)
        self._attach(rings, notify)
        found = [queue.ledger.recover(queue.ring) for queue in self.queues]
        for queue, one in zip(self.queues, found, strict=True):
            self._take_over(queue, one)
        for queue in self.queues:
            self._start(queue)
            self._step("resumed")
            # Neither a look at the ring nor a notification: the old process may have died between publishing and notifying.

    return patched(Backend, "resume", resume)


def _missing_recheck() -> list[Undo]:
    def ask(self: PagedRing, req_cons: int, fence: Callable[[], None]) -> bool:
        self.req_event = (req_cons + 1) & 0xFFFFFFFF
        return False

    def poll(self: Backend, queue: Queue) -> bool:
        produced = queue.ring.req_prod
        count = (produced - queue.req_cons) & 0xFFFFFFFF
        queue.look_again = False
        if count and self.error is None and not self.closing:
            queue.ring.req_event = 0  # asked before the last look: what comes in between is not announced
            self._take(queue, count)
        return bool(count)

    return patched(PagedRing, "ask_for_requests", ask) + patched(Backend, "_poll", poll)


def _error_as_success() -> list[Undo]:
    real = Backend.complete

    def complete(self: Backend, results: Sequence[tuple[int, bool]]) -> None:
        real(self, [(token, True) for token, _ in results])

    return patched(Backend, "complete", complete)


def _reset_forgets() -> list[Undo]:
    def storage_reset(self: Backend) -> None:
        for queue in self.queues:
            mine = [request for owner, request in self._active.values() if owner is queue]
            for request in mine:
                request.status = BLKIF_RSP_OKAY  # "it was surely done before"
                queue.active -= 1
                queue.active_writes -= request.kind is Op.WRITE
                queue.ledger.completed(request.slot, BLKIF_RSP_OKAY)
            self._active = {token: entry for token, entry in self._active.items() if entry[0] is not queue}
            if mine:
                queue.pool.release(mine)
                self._answer(queue, mine)
                self._start(queue)

    return patched(Backend, "storage_reset", storage_reset)


def _pages_not_unmapped_at_death() -> list[Undo]:
    def begin(self: Ledger, queues: int, slots: int, blob: bytes, power_losses: int = 0) -> None:
        self._open(queues, slots)  # the head is written later, it is thought: nothing is found after a death
        for queue in self.queues:
            queue.clear()

    return patched(Ledger, "begin", begin)


def _power_loss_untold() -> list[Undo]:
    return patched(Ledger, "saw_power_losses", lambda self, count: None)


def _debt_never_paid() -> list[Undo]:
    real = Ledger.set_lost
    return patched(Ledger, "set_lost", lambda self, lost: real(self, self.lost | lost))


def _notify_before_publish() -> list[Undo]:
    """As with a missing barrier: who is notified may look before there is anything to see."""
    real_push, real_answer = PagedRing.push_responses, Backend._answer

    def push(self: PagedRing, produced: int, old: int) -> bool:
        queue = answering.get(id(self))
        if queue is not None:
            queue.notify()
        real_push(self, produced, old)
        return False

    answering: dict[int, Queue] = {}

    def answer(self: Backend, queue: Queue, requests: list[Request]) -> None:
        answering[id(queue.ring)] = queue
        try:
            real_answer(self, queue, requests)
        finally:
            del answering[id(queue.ring)]

    return patched(PagedRing, "push_responses", push) + patched(Backend, "_answer", answer)


def _answered_before_unmap() -> list[Undo]:
    real_release, real_answer = GrantPool.release, Backend._answer
    late: dict[int, list[Request]] = {}

    def release(self: GrantPool, requests: list[Request]) -> None:
        if all(request.status is not None for request in requests):
            late.setdefault(id(self), []).extend(requests)
        else:
            real_release(self, requests)

    def answer(self: Backend, queue: Queue, requests: list[Request]) -> None:
        real_answer(self, queue, requests)
        real_release(queue.pool, late.pop(id(queue.pool), []))

    return patched(GrantPool, "release", release) + patched(Backend, "_answer", answer)


MUTANTS: Final = {
    mutant.name: mutant
    for mutant in (
        Mutant(
            "flush-not-forwarded",
            "the disk says that a flush is done and does nothing",
            20,
            _flush_not_forwarded,
        ),
        Mutant(
            "response-before-flush",
            "the back end answers a flush before the device has flushed",
            40,
            _response_before_flush,
        ),
        Mutant(
            "unmap-before-dma",
            "frames are unmapped as soon as the command is submitted",
            20,
            _unmap_before_dma,
        ),
        Mutant("lost-ledger-write", "a submitted request is not in the ledger", 20, _lost_ledger_write),
        Mutant("request-not-redone", "a successor redoes all requests but the last", 20, _no_recovery),
        Mutant(
            "double-response",
            "a successor writes a response again that the frontend has seen",
            20,
            _double_response,
        ),
        Mutant("silent-resume", "a successor neither looks at the ring nor notifies", 20, _silent_resume),
        Mutant("missing-recheck", "no second look after asking for a notification", 20, _missing_recheck),
        Mutant("error-as-success", "an error of the device is told as success", 150, _error_as_success),
        Mutant(
            "reset-forgets",
            "after a reset of the device, what was under way counts as done",
            20,
            _reset_forgets,
        ),
        Mutant(
            "power-loss-untold",
            "a flush after a power cut is answered well though writes before it are gone",
            40,
            _power_loss_untold,
        ),
        Mutant(
            "debt-never-paid",
            "after a power cut every flush and every write fails, not one each",
            40,
            _debt_never_paid,
        ),
        Mutant("ledger-without-head", "the ledger's head is not written", 20, _pages_not_unmapped_at_death),
        Mutant(
            "notify-before-publish",
            "the frontend is notified of responses, and then they are published",
            120,
            _notify_before_publish,
        ),
        Mutant(
            "answered-before-unmap",
            "a request is answered before its frames are unmapped",
            20,
            _answered_before_unmap,
        ),
        *NETWORK_MUTANTS,
    )
}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """Run with that mutant; '' is the product as it is. KeyError if there is none of that name."""
    undo = MUTANTS[name].patches() if name else []
    try:
        yield
    finally:
        for owner, attribute, value in undo:
            setattr(owner, attribute, value)
