"""blkback without I/O: rings of one virtual disk, from a frontend's requests to storage and back.

A request's life: copied from the ring, checked, in the ledger (taken) -> frames mapped, submitted -> completed ->
frames let go of -> answered. Each step works on batches: one hypercall maps, one unmaps, one store publishes.

Order (each queue by itself, as blkif.h leaves it)
    A flush starts when all writes of its queue taken before it are completed. A barrier starts when everything
    taken before it is completed, and nothing behind it starts before it is. Everything else runs in any order.

Wake-ups
    To the frontend: by default every batch of responses is notified, whatever the event index says: an MFENCE of a
    guest in stock Unicorn orders nothing, so its event index may come too late (docs/vcpu.md). This project's vCPU makes
    MFENCE a fence (docs/vcpu.md): `trust_event_index=True` is right for it, and saves a doorbell now and then.
    From the frontend: it may decide by an old req_event not to notify, and its requests become visible only after our
    last look. The `fence` between our store and that look can be a membarrier; and the shell calls `poll` once more a
    millisecond after it returned False (`look_again`), when every store buffer has long drained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bus.abi.grant_table import GNTST_eagain, GNTST_okay
from bus.abi.io.blkif import BLKIF_OP_INDIRECT, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from bus.abi.io.ring import MASK32, distance, full_barrier
from drivers.block.grant_pool import GrantPool
from drivers.block.ledger import (
    FLUSH_OWES,
    WRITE_OWES,
    Hook,
    Ledger,
    LedgerError,
    QueueLedger,
    Recovered,
)
from drivers.block.ports import Command, GrantMapper, Op, Storage
from drivers.block.requests import Disk, Request, indirect_pages, parse
from drivers.block.watch import DiskTrace
from drivers.block.wire import RESPONSE, X86_64, Abi
from drivers.xenbus.paged_ring import PagedRing

ROUNDS: Final = 4
"""Rings full of requests that one `poll` takes: a frontend can publish as fast as requests that are in error are answered."""
PERSISTENT_LIMIT: Final = 1056
"""Default bound of persistent grants of a queue (what Linux's back end allows)."""


@dataclass(slots=True)
class Counters:
    """What happened, for `block-list` and tests."""

    requests: int = 0
    errors: int = 0
    notifications: int = 0
    batches: int = 0
    redone: int = 0


class Queue:
    """One ring."""

    def __init__(self, backend: Backend, number: int, ring: PagedRing, notify: Callable[[], None]) -> None:
        self.number: Final = number
        self.ring: Final = ring
        self.notify: Final = notify
        self.ledger: QueueLedger = backend.ledger.queues[number]
        self.pool = GrantPool(backend.mapper, persistent=backend.persistent, limit=backend.persistent_limit)
        self.req_cons = 0
        self.rsp_prod = 0
        self.waiting: deque[Request] = deque()
        self.active = 0
        self.active_writes = 0
        self.barrier = False
        """One is under way."""
        self.look_again = False
        self.unfinished = False
        """There was more than one `poll` takes: poll again when others had their turn."""
        self.put_off = False
        """The frontend's domain is slow to let its frames be mapped, and the hypervisor does not wait for it now: `retry` later."""


class Backend:
    """A virtual disk's back end. The shell makes it when the rings are mapped, calls `poll` when a channel is notified
    and `complete` when storage has answered, and closes it."""

    def __init__(
        self,
        disk: Disk,
        storage: Storage,
        mapper: GrantMapper,
        ledger: Ledger,
        *,
        abi: Abi = X86_64,
        persistent: bool = False,
        persistent_limit: int = PERSISTENT_LIMIT,
        trust_event_index: bool = False,
        fence: Callable[[], None] = full_barrier,
        hook: Hook | None = None,
        watch: DiskTrace | None = None,
    ) -> None:
        """`hook` is called with the name of each step: tests crash there. `watch` notes and counts what happens."""
        if storage.block_size > disk.sector_size or disk.sectors > storage.sectors:
            raise ValueError(
                f"sectors of {disk.sector_size} bytes on blocks of {storage.block_size}, "
                f"{disk.sectors} sectors of {storage.sectors}"
            )
        self.disk: Final = disk
        self.storage: Final = storage
        self.mapper: Final = mapper
        self.ledger: Final = ledger
        self.abi: Final = abi
        self.persistent: Final = persistent
        self.persistent_limit: Final = persistent_limit
        self.counters: Final = Counters()
        self.queues: list[Queue] = []
        self.error: str | None = None
        """Why the frontend is served no more: it broke the ring. The shell writes it to xenstore and closes."""
        self.closing = False
        self._trust: Final = trust_event_index
        self._fence: Final = fence
        self._hook: Final = hook
        self._watch: Final = watch or DiskTrace()
        self._on: Final = self._watch.trace.on
        self._active: dict[int, tuple[Queue, Request]] = {}
        self._token = 0
        self._writes_done = 0
        self._told = 0
        """FLUSH_OWES, WRITE_OWES: which answer of the present batch says that writes were lost."""

    # ------------------------------------------------------------------ coming up

    def connect(self, rings: Sequence[PagedRing], notify: Sequence[Callable[[], None]], blob: bytes) -> None:
        """Serve new rings. `blob` is kept in the ledger for a successor. ValueError if the ledger has no room."""
        self._check_rings(rings)
        self.ledger.begin(len(rings), rings[0].size, blob, self.storage.unsafe_shutdowns)
        self._attach(rings, notify)
        for queue in self.queues:
            # What a frontend published before we came counts; the indexes of both ends start at 0.
            self._poll(queue)

    def resume(self, rings: Sequence[PagedRing], notify: Sequence[Callable[[], None]]) -> None:
        """Go on where a process that died left off (`ledger.reopen` was called, the rings are those that its blob
        names, and its DMA is fenced off). Frames that it had mapped are not known here: the shell has had them unmapped.
        LedgerError if ring and ledger contradict each other: the frontend must connect anew."""
        self._check_rings(rings)
        if len(rings) != len(self.ledger.queues) or any(
            ring.size != queue.slots for ring, queue in zip(rings, self.ledger.queues, strict=True)
        ):
            raise LedgerError("the ledger is of other rings")
        self.ledger.saw_power_losses(self.storage.unsafe_shutdowns)
        self._attach(rings, notify)
        recovered = [queue.ledger.recover(queue.ring) for queue in self.queues]
        pairs = list(zip(self.queues, recovered, strict=True))
        pairs.sort(key=lambda pair: all(record.status == BLKIF_RSP_OKAY for record in pair[1].answers))
        for queue, found in pairs:  # a failure of any queue is told first (`QueueLedger.recover`)
            self._take_over(queue, found)
        for queue in self.queues:
            self._start(queue)
            self._step("resumed")
            self._poll(queue)
            self.counters.notifications += 1
            queue.notify()  # the old process may have died between publishing and notifying

    def _check_rings(self, rings: Sequence[PagedRing]) -> None:
        if self.queues:
            raise ValueError("it is connected already")
        if any(ring.entry_size != self.abi.slot or ring.size != rings[0].size for ring in rings):
            raise ValueError("rings of another ABI, or of different sizes")

    def _attach(self, rings: Sequence[PagedRing], notify: Sequence[Callable[[], None]]) -> None:
        self.queues = [
            Queue(self, number, ring, call)
            for number, (ring, call) in enumerate(zip(rings, notify, strict=True))
        ]

    def _take_over(self, queue: Queue, found: Recovered) -> None:
        queue.req_cons, queue.rsp_prod = found.req_cons, found.rsp_prod
        done: list[Request] = []
        for record in found.answers:
            request = parse(record.raw, record.segments, self.abi, self.disk)
            request.slot, request.index, request.status = record.slot, record.index, record.status
            done.append(request)
        for record in found.redo:
            request = parse(record.raw, record.segments, self.abi, self.disk)
            request.slot, request.index = record.slot, record.index
            if request.status is None:
                queue.waiting.append(request)
            else:
                queue.ledger.completed(request.slot, request.status)
                done.append(request)
        self.counters.redone += len(found.redo)
        if done:
            self._answer(queue, done)

    # ------------------------------------------------------------------ from the ring

    def poll(self, number: int = 0) -> bool:
        """Take what the frontend has published. True if something was taken; else the shell may `poll` once more a
        little later if the queue's `look_again` is set."""
        return self._poll(self.queues[number])

    def _poll(self, queue: Queue) -> bool:
        took = 0
        ring = queue.ring
        queue.unfinished = False
        while self.error is None and not self.closing:
            produced = ring.req_prod
            count = distance(produced, queue.req_cons)
            if count == 0:
                if not ring.ask_for_requests(queue.req_cons, self._fence):
                    break
                continue
            if distance(produced, queue.rsp_prod) > ring.size:
                self.error = (
                    f"queue {queue.number}: {count} requests published where {ring.size} slots are, "
                    f"{distance(queue.req_cons, queue.rsp_prod)} of them in use"
                )
                break
            if took >= ROUNDS * ring.size:
                queue.unfinished = True
                break
            full_barrier()  # the slots are read after the index
            self._take(queue, count)
            took += count
        queue.look_again = not took
        return bool(took)

    def _take(self, queue: Queue, count: int) -> None:
        abi, disk, entry = self.abi, self.disk, self.abi.slot
        data = queue.ring.read_slots(queue.req_cons, count)
        raws = [data[at : at + entry] for at in range(0, len(data), entry)]
        indirect = [b""] * count
        wanted: list[tuple[int, int]] = []
        spans: list[tuple[int, int]] = []
        for at, raw in enumerate(raws):
            if raw[0] == BLKIF_OP_INDIRECT and (pages := indirect_pages(raw, abi, disk)):
                wanted += pages
                spans.append((at, len(pages)))
        if wanted:
            read = self.mapper.read_frames(wanted)
            start = 0
            for at, number in spans:
                parts = read[start : start + number]
                start += number
                # A page that is not granted leaves no segments, and `parse` says that this is an error.
                indirect[at] = b"".join(part if isinstance(part, bytes) else b"" for part in parts)
        first = queue.req_cons
        self._step("copied")
        slots = queue.ledger.take(
            [((first + at) & MASK32, raws[at], indirect[at]) for at in range(count)], (first + count) & MASK32
        )
        queue.req_cons = (first + count) & MASK32
        self._step("taken")
        self.counters.requests += count
        failed: list[Request] = []
        for at, slot in enumerate(slots):
            request = parse(raws[at], indirect[at], abi, disk)
            request.slot, request.index = slot, (first + at) & MASK32
            if self._on[0]:
                self._watch.taken(queue.number, request)
            if request.status is None:
                queue.waiting.append(request)
            else:
                queue.ledger.completed(slot, request.status)
                failed.append(request)
        if failed:
            self._answer(queue, failed)
        self._start(queue)

    # ------------------------------------------------------------------ to storage

    def _start(self, queue: Queue) -> None:
        """Submit what may start now."""
        while True:
            queue.put_off = False
            ready: list[Request] = []
            active, writes, waiting = queue.active, queue.active_writes, queue.waiting
            while waiting and not queue.barrier:
                request = waiting[0]
                if (request.barrier and active) or (request.flush and writes):
                    break
                waiting.popleft()
                ready.append(request)
                active += 1
                writes += request.kind is Op.WRITE
                queue.barrier = request.barrier
            if not ready:
                return
            refused = self._submit(queue, ready)
            if not refused:
                return
            for request in refused:
                queue.barrier = queue.barrier and not request.barrier
                queue.ledger.completed(request.slot, BLKIF_RSP_ERROR)
                request.status = BLKIF_RSP_ERROR
            self._answer(queue, refused)
            if queue.put_off:
                return

    def retry(self) -> None:
        """Submit what was put off. For the shell, now and then."""
        for queue in self.queues:
            if queue.put_off:
                self._start(queue)

    def _submit(self, queue: Queue, ready: list[Request]) -> list[Request]:
        """Those whose frames could not be mapped are returned; those that are put off wait on, in front, as they did before."""
        to_map = [request for request in ready if request.segments and request.mapped is None]
        refused: list[Request] = []
        if to_map:
            statuses = queue.pool.map(to_map, [request.kind is Op.READ for request in to_map])
            if any(statuses):
                pairs = list(zip(to_map, statuses, strict=True))
                refused = [request for request, status in pairs if status not in (GNTST_okay, GNTST_eagain)]
                later = [request for request, status in pairs if status == GNTST_eagain]
                ready = [request for request in ready if request not in refused and request not in later]
                if later:
                    queue.put_off = True
                    queue.barrier = queue.barrier and not any(request.barrier for request in later)
                    queue.waiting.extendleft(reversed(later))
            self._step("mapped")
        queue.ledger.submitted([request.slot for request in ready])
        commands: list[Command] = []
        for request in ready:
            commands.append(self._command(queue, request))
            queue.active += 1
            queue.active_writes += request.kind is Op.WRITE
        if commands:
            self._step("submitting")
            self.storage.submit(commands)
            self._step("submitted")
        return refused

    def _command(self, queue: Queue, request: Request) -> Command:
        token = self._token = self._token + 1
        self._active[token] = (queue, request)
        if self._on[0]:
            self._watch.command(queue.number, request, token)
        if request.flush or request.kind is None:
            request.stamp = self._writes_done
            return Command(token, Op.FLUSH, 0, 0)
        return Command(
            token,
            request.kind,
            request.sector,
            request.sectors,
            request.mapped or (),
            request.op > 1 and request.kind is Op.WRITE,  # a write with a flush or barrier
            request.secure,
        )

    # ------------------------------------------------------------------ from storage

    def complete(self, results: Sequence[tuple[int, bool]]) -> None:
        """Storage has carried out commands: (token, successful). Tokens from before a reset are ignored."""
        done: dict[Queue, list[Request]] = {}
        more: list[Command] = []
        for token, fine in results:
            entry = self._active.pop(token, None)
            if entry is None:
                continue
            queue, request = entry
            if request.flush:  # the flush before the data, or a flush without any
                fine = fine and self._flushed(request)
                if fine and request.kind is not None:
                    request.flush = False
                    more.append(self._command(queue, request))
                    continue
            elif fine and request.kind is not Op.READ and self.ledger.lost & WRITE_OWES & ~self._told:
                fine = False
                self._told |= WRITE_OWES
            elif fine and request.kind is not Op.READ:
                self._writes_done += 1
                if not self.ledger.dirty:
                    self.ledger.wrote()
                    self._step("dirty")
            request.status = BLKIF_RSP_OKAY if fine else BLKIF_RSP_ERROR
            queue.active -= 1
            queue.active_writes -= request.kind is Op.WRITE
            if request.barrier:
                queue.barrier = False
            queue.ledger.completed(request.slot, request.status, self._told)
            if self._told:
                # A process that dies before the line above has not told anybody; after it, its successor knows that it has.
                if self._told & FLUSH_OWES:
                    self.ledger.flushed(clean=True)
                self.ledger.set_lost(self.ledger.lost & ~self._told)
                queue.ledger.settled(request.slot)
                self._told = 0
            done.setdefault(queue, []).append(request)
        if more:
            self.storage.submit(more)
        # What failed is told first: a flush that succeeded after the one that says that writes were lost is not answered before it.
        ordered = sorted(
            done.items(), key=lambda pair: all(each.status == BLKIF_RSP_OKAY for each in pair[1])
        )
        for queue, requests in ordered:
            self._step("completed")
            queue.pool.release(requests)
            self._step("unmapped")
            self._answer(queue, requests)
            self._start(queue)
            self._poll(queue)
        if self.closing:
            self._finish()

    def _flushed(self, request: Request) -> bool:
        ledger = self.ledger
        if ledger.lost & FLUSH_OWES:
            # Writes that we called completed are gone: this is the flush that has to say so. Linux takes the failure of a flush without
            # data for "not supported" and goes on (blkfront), so a write has to say it too; one with data says it for both.
            self._told |= FLUSH_OWES | (WRITE_OWES if request.kind is not None else 0)
            return False
        ledger.flushed(clean=request.stamp == self._writes_done)
        self._step("flushed")
        return True

    def storage_reset(self) -> None:
        """Storage has forgotten all commands and works again: submit them anew. If its count of power losses has grown, writes since
        the last flush may be gone: if some were answered, the next flush and the next write fail."""
        self.ledger.saw_power_losses(self.storage.unsafe_shutdowns)
        lost, self._active = self._active, {}
        for queue in self.queues:
            mine = [request for owner, request in lost.values() if owner is queue]
            if not mine:
                continue
            base = (queue.req_cons - (1 << 31)) & MASK32
            mine.sort(key=lambda request: distance(request.index, base))
            for request in mine:
                request.flush = request.op in (
                    2,
                    3,
                )  # also one whose flush was done: the write comes after it again
            queue.active = queue.active_writes = 0
            queue.barrier = False
            queue.waiting.extendleft(reversed(mine))
            self.counters.redone += len(mine)
            self._start(queue)

    # ------------------------------------------------------------------ to the ring

    def _answer(self, queue: Queue, requests: list[Request]) -> None:
        ring, ledger = queue.ring, queue.ledger
        slots = [request.slot for request in requests]
        old = index = queue.rsp_prod
        ledger.answering(slots, old)
        self._step("placed")
        for request in requests:
            status = request.status
            assert status is not None
            self.counters.errors += status != BLKIF_RSP_OKAY
            self._watch.count(request)
            if self._on[0]:
                self._watch.answered(queue.number, request)
            ring.write_slot(index, RESPONSE.pack(request.id, request.op, status))
            index += 1
        self._step("written")
        queue.rsp_prod = index & MASK32
        wanted = ring.push_responses(queue.rsp_prod, old)
        self._step("published")
        ledger.answered(slots, queue.rsp_prod)
        self._step("answered")
        self.counters.batches += 1
        if wanted or not self._trust:
            self.counters.notifications += 1
            queue.notify()
            self._step("notified")

    # ------------------------------------------------------------------ going down

    @property
    def drained(self) -> bool:
        """Nothing of the frontend is under way or mapped: its rings may be unmapped, and Closed written."""
        return (
            not self._active
            and not any(queue.waiting for queue in self.queues)
            and not any(queue.pool.held for queue in self.queues)
        )

    def close(self) -> None:
        """Take no more requests; those that were taken are finished. Wait for `drained` before the rings go. Idempotent."""
        self.closing = True
        self._finish()

    def _finish(self) -> None:
        if self._active or any(queue.waiting for queue in self.queues):
            return
        for queue in self.queues:
            queue.pool.close()
        self.ledger.end()

    def _step(self, name: str) -> None:
        if self._hook is not None:
            self._hook(name)
