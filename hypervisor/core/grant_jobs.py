"""Jobs of the grant tables: work that waits for other processes, written as generators, with locks on what it moves.

A job names the frames and grant entries it is about; it starts when none of them is in the hands of another job, and
takes all of them at once, so that no two jobs can wait for each other. Jobs that want the same thing go in the order
of their arrival. While a job runs it yields lists of orders and gets their outcomes; nothing in here blocks, and each
order has a deadline, so each job ends.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Collection, Generator, Hashable
from dataclasses import dataclass, field
from typing import Final

from bus.addresses import DomId
from hypervisor.core.grant_ports import GrantOutbox

ORDER_TIMEOUT_NS: Final = 1_000_000_000
"""How long a granter has for a map or an unmap (docs/architecture.md, section 4)."""
UNDO_TIMEOUT_NS: Final = 60_000_000_000
"""How long a granter that missed a map's deadline has to say that it is back where it was. Nobody waits for it: the
frames of that map alone stay locked, and who asks for them meanwhile is refused at once."""


@dataclass(slots=True)
class OrderSpec:
    """An order to be given: its items' count tells how many results are to come back."""

    domain: DomId
    kind: str
    body: dict[str, object]
    count: int
    windows: tuple[tuple[int, bool], ...] = ()
    timeout_ns: int = ORDER_TIMEOUT_NS
    charged: bool = False
    """Somebody else waits for the answer: the time that it takes is the domain's to account for."""


@dataclass(slots=True)
class Outcome:
    """What became of an order: one status an item (0 or a negative GNTST_*) if the process answered."""

    results: list[int] | None
    why: str = ""
    """Without results: "expired", "dead", "refused" or "malformed"."""


Steps = Generator[list[OrderSpec], list[Outcome], None]


@dataclass(slots=True)
class Job:
    """One piece of work. `keys` is asked each time the job may start; `run` is called when they are all free."""

    domain: DomId
    """For whom it is done."""
    keys: Callable[[], Collection[Hashable]]
    run: Callable[[Job], Steps]
    refuse: Callable[[], bool] = lambda: False
    """Asked while the job waits: True if it ended itself instead of waiting on."""
    held: set[Hashable] = field(default_factory=set)
    steps: Steps | None = None
    waiting: int = 0
    outcomes: list[Outcome | None] = field(default_factory=list)


def decode_results(count: int, rc: int, data: bytes) -> list[int] | None:
    """Statuses of a process's answer: `count` little-endian int16. None unless it has exactly that form.

    Positive values are errors as well (nobody defined them): they become GNTST_general_error."""
    if rc != 0 or len(data) != 2 * count:
        return None
    return [value if value <= 0 else -1 for value in struct.unpack(f"<{count}h", data)]


class Jobs:
    """Runs jobs. `now` is the time of the call that is being served."""

    def __init__(
        self,
        outbox: GrantOutbox,
        has_process: Callable[[DomId], bool],
        took: Callable[[DomId, int, int], None] = lambda domain, now, ns: None,
    ) -> None:
        """`took` is told of each order that is charged: (domain, time of the answer, ns since it was given)."""
        self.now = 0
        self._took = took
        self._outbox = outbox
        self._has_process = has_process
        self._locked: dict[Hashable, Job] = {}
        self._queue: deque[Job] = deque()
        self._ready: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._pumping = False
        self._released = False

    # -- for jobs -------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Start the job, now if its keys are free, else as soon as they are."""
        self._queue.append(job)
        self._released = True
        self.pump()

    @property
    def holds_any(self) -> bool:
        """A job has something in its hands."""
        return bool(self._locked)

    def is_locked(self, key: Hashable) -> bool:
        """A job has this in its hands."""
        return key in self._locked

    def hand_over(self, job: Job, keys: Collection[Hashable], to: Job) -> None:
        """Give locks of a running job to another, which is started at once."""
        for key in keys:
            if self._locked.get(key) is job:
                self._locked[key] = to
                job.held.discard(key)
                to.held.add(key)
        self._begin(to)

    def unlock(self, keys: Collection[Hashable]) -> None:
        """Let go of locks early."""
        for key in keys:
            self._locked.pop(key, None)
        self._released = True

    def recheck(self) -> None:
        """Ask the waiting jobs again whether they still want to wait."""
        self._released = True
        self.pump()

    @property
    def active(self) -> int:
        """Jobs that wait or run."""
        return len(self._queue) + len(self._jobs)

    def jobs_of(self, domain: DomId) -> int:
        """Jobs that wait or run for this domain."""
        return sum(1 for job in [*self._queue, *self._jobs.values()] if job.domain == domain)

    # -- the machine ----------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Go on until nothing can go on. Called at the end of each entry into the grant tables; re-entrant calls
        return at once and leave the work to the outer one."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._ready or self._released:
                while self._ready:
                    self._resume(self._ready.popleft())
                if self._released:
                    self._released = False
                    self._start_waiting()
        finally:
            self._pumping = False

    def _start_waiting(self) -> None:
        wanted: set[Hashable] = set()
        still: deque[Job] = deque()
        queue, self._queue = self._queue, deque()
        while queue:
            job = queue.popleft()
            keys = set(job.keys())
            if keys.isdisjoint(wanted) and not any(key in self._locked for key in keys):
                for key in keys:
                    self._locked[key] = job
                job.held = keys
                self._begin(job)
            elif not job.refuse():
                wanted |= keys
                still.append(job)
        still.extend(self._queue)
        self._queue = still

    def _begin(self, job: Job) -> None:
        self._jobs[id(job)] = job
        job.steps = job.run(job)
        self._advance(job, None)

    def _resume(self, job: Job) -> None:
        outcomes = [outcome for outcome in job.outcomes if outcome is not None]
        job.outcomes = []
        self._advance(job, outcomes)

    def _advance(self, job: Job, outcomes: list[Outcome] | None) -> None:
        assert job.steps is not None
        try:
            orders = next(job.steps) if outcomes is None else job.steps.send(outcomes)
        except StopIteration:
            self._end(job)
            return
        except Exception:
            self._end(job)  # a bug of ours: nobody waits for its locks for ever
            raise
        job.outcomes = [None] * len(orders)
        job.waiting = len(orders)
        if not orders:
            self._ready.append(job)
        for index, order in enumerate(orders):
            self._give(job, index, order)

    def _give(self, job: Job, index: int, order: OrderSpec) -> None:
        began = self.now

        def settle(now: int, outcome: Outcome) -> None:
            self.now = max(self.now, now)
            if order.charged:
                self._took(order.domain, self.now, self.now - began)
            job.outcomes[index] = outcome
            job.waiting -= 1
            if not job.waiting:
                self._ready.append(job)
                self.pump()

        def done(now: int, rc: int, data: bytes) -> None:
            results = decode_results(order.count, rc, data)
            settle(now, Outcome(results, "" if results is not None else "malformed"))

        if not self._has_process(order.domain):
            settle(self.now, Outcome(None, "dead"))  # nobody is there to answer
            return
        self._outbox.ask(
            self.now,
            order.domain,
            order.kind,
            order.body,
            done,
            lambda now, why: settle(now, Outcome(None, why)),
            timeout_ns=order.timeout_ns,
            windows=order.windows,
        )

    def _end(self, job: Job) -> None:
        del self._jobs[id(job)]
        for key in job.held:
            if self._locked.get(key) is job:
                del self._locked[key]
        job.held = set()
        self._released = True
