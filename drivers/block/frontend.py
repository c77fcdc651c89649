"""blkfront without I/O: reads, writes, flushes and discards as ring requests, and the data in granted pages.

The back end is not trusted: its producer index, the ids, operations and statuses of its responses are checked
(as Linux does since XSA-391), and a page whose grant cannot be ended is never used again (XSA-396). What breaks the
rules sets `error`; the device is then of no use until it is connected anew.

Data are copied between the caller and pages of the frontend's own: with persistent grants these stay granted (and are
used again in LIFO order), without they are granted for one request, read-only where the back end only reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from bus.abi.io.blkif import (
    BLKIF_DISCARD_SECURE,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from bus.abi.io.ring import MASK32, distance, full_barrier
from drivers.block.wire import (
    RESPONSE,
    SEGMENTS_PER_PAGE,
    X86_64,
    Abi,
    Segment,
    pack_discard,
    pack_indirect,
    pack_request,
    pack_segments,
)
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import PAGE, Page, PageSource


@dataclass(frozen=True, slots=True)
class Features:
    """What the back end told of the disk and itself, and what was agreed."""

    sectors: int
    """In units of sector_size."""
    sector_size: int = 512
    read_only: bool = False
    flush: bool = False
    barrier: bool = False
    discard: bool = False
    discard_secure: bool = False
    max_indirect: int = 0
    persistent: bool = False


class DiskError(OSError):
    """A request that the back end refused, or that cannot be made."""


Done = Callable[[int, bytes], None]
"""Called with BLKIF_RSP_* and, of a read, the data."""


@dataclass(slots=True)
class _Whole:
    """What a caller asked for: perhaps several requests."""

    done: Done
    parts: int
    status: int = BLKIF_RSP_OKAY
    data: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class _Part:
    """One request, also while it is under way: it can be made again on another ring."""

    whole: _Whole
    op: int
    sector: int
    count: int
    data: bytes = b""
    flag: int = 0
    pages: list[Page] = field(default_factory=list)
    refs: list[int] = field(default_factory=list)
    indirect: list[Page] = field(default_factory=list)
    indirect_refs: list[int] = field(default_factory=list)


class FrontQueue:
    """One ring of the frontend's."""

    def __init__(self, ring: PagedRing, notify: Callable[[], None]) -> None:
        self.ring: Final = ring
        self.notify: Final = notify
        self.prod = 0
        self.cons = 0
        self.shadow: dict[int, _Part] = {}


class Frontend:
    """A virtual disk as its user sees it."""

    def __init__(self, pages: PageSource, *, abi: Abi = X86_64) -> None:
        self._pages: Final = pages
        self._abi: Final = abi
        self._queues: list[FrontQueue] = []
        self._todo: deque[_Part] = deque()
        self._pool: list[tuple[Page, int]] = []  # persistent: page and grant
        self._serial = 0
        self._turn = 0
        self._plugged = 0
        self.features = Features(0)
        self.error: str | None = None
        self.leaked = 0
        """Pages that the back end would not let go of."""

    # ------------------------------------------------------------------ connection

    @property
    def pending(self) -> int:
        """Requests not answered yet."""
        return len(self._todo) + sum(len(queue.shadow) for queue in self._queues)

    def connect(
        self, rings: Sequence[PagedRing], notify: Sequence[Callable[[], None]], features: Features
    ) -> None:
        """Use these rings (initialised, published, and the back end is Connected). What was not answered before is
        asked again, in the order in which it was asked. ValueError for features that make no sense."""
        if (
            features.sector_size < 512
            or features.sector_size > PAGE
            or features.sector_size & (features.sector_size - 1)
        ):
            raise ValueError(f"sectors of {features.sector_size} bytes")
        if any(ring.entry_size != self._abi.slot for ring in rings) or not rings:
            raise ValueError("rings of another ABI")
        self.disconnect()
        self.features, self.error = features, None
        self._queues = [FrontQueue(ring, call) for ring, call in zip(rings, notify, strict=True)]
        self._fill()

    def disconnect(self) -> None:
        """The back end is gone, or all of us were suspended: nothing is under way any more. Its mappings have ended."""
        parts: list[tuple[int, _Part]] = []
        for queue in self._queues:
            parts += queue.shadow.items()
        self._queues = []
        for _, part in sorted(parts, key=lambda entry: entry[0], reverse=True):
            self._release(part, keep=False)
            self._todo.appendleft(part)
        pool, self._pool = self._pool, []
        self._end([page for page, _ in pool], [ref for _, ref in pool])

    # ------------------------------------------------------------------ requests

    def read(self, sector: int, count: int, done: Done) -> None:
        """Read `count` sectors. DiskError if they are not on the disk."""
        self._transfer(BLKIF_OP_READ, sector, count, b"", done)

    def write(self, sector: int, data: bytes, done: Done, *, barrier: bool = False) -> None:
        """Write whole sectors. With `barrier` it is one request between all earlier and all later ones, and on stable
        storage. DiskError if it cannot be done."""
        size = self.features.sector_size
        if len(data) % size or self.features.read_only:
            raise DiskError(
                f"{len(data)} bytes to a disk of {size}-byte sectors, read-only {self.features.read_only}"
            )
        if barrier and (not self.features.barrier or len(data) > BLKIF_MAX_SEGMENTS_PER_REQUEST * PAGE):
            raise DiskError("such a barrier cannot be had")
        op = BLKIF_OP_WRITE_BARRIER if barrier else BLKIF_OP_WRITE
        self._transfer(op, sector, len(data) // size, data, done)

    def flush(self, done: Done) -> None:
        """Every write completed before is on stable storage when this is done. DiskError if it is not offered."""
        if not self.features.flush:
            raise DiskError("the back end cannot flush")
        self._todo.append(_Part(_Whole(done, 1), BLKIF_OP_FLUSH_DISKCACHE, 0, 0))
        self._fill()

    def discard(self, sector: int, count: int, done: Done, *, secure: bool = False) -> None:
        """The sectors are not needed any more. DiskError if it is not offered."""
        if not self.features.discard or (secure and not self.features.discard_secure):
            raise DiskError("the back end cannot discard so")
        self._check(sector, count)
        flag = BLKIF_DISCARD_SECURE if secure else 0
        self._todo.append(_Part(_Whole(done, 1), BLKIF_OP_DISCARD, sector, count, flag=flag))
        self._fill()

    def _check(self, sector: int, count: int) -> None:
        if count < 1 or sector < 0 or sector + count > self.features.sectors:
            raise DiskError(f"{count} sectors at {sector} of {self.features.sectors}")

    def _transfer(self, op: int, sector: int, count: int, data: bytes, done: Done) -> None:
        self._check(sector, count)
        size = self.features.sector_size
        per_request = self._segments(op) * (PAGE // size)
        whole = _Whole(done, -(-count // per_request))
        for start in range(0, count, per_request):
            step = min(per_request, count - start)
            part = _Part(whole, op, sector + start, step, data[start * size : (start + step) * size])
            self._todo.append(part)
        self._fill()

    def _segments(self, op: int) -> int:
        if op == BLKIF_OP_WRITE_BARRIER:
            return BLKIF_MAX_SEGMENTS_PER_REQUEST
        return max(BLKIF_MAX_SEGMENTS_PER_REQUEST, min(self.features.max_indirect, 256))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What is asked inside is published together, with one notification, at the end."""
        self._plugged += 1
        try:
            yield
        finally:
            self._plugged -= 1
            self._fill()

    def _fill(self) -> None:
        """Put what waits into rings that have room, and publish."""
        if self.error is not None or not self._queues or self._plugged:
            return
        touched: list[FrontQueue] = []
        full = 0
        while self._todo and full < len(self._queues):
            queue = self._queues[self._turn % len(self._queues)]
            self._turn += 1
            if distance(queue.prod, queue.cons) >= queue.ring.size:
                full += 1
                continue
            full = 0
            part = self._todo[0]
            if self._split(part):
                continue
            try:
                slot = self._prepare(part)
            except MemoryError:
                if not any(other.shadow for other in self._queues) and not touched:
                    raise
                break  # some will come back
            self._todo.popleft()
            self._serial += 1
            queue.ring.write_slot(queue.prod, self._pack(part, self._serial, slot))
            queue.shadow[self._serial] = part
            queue.prod = (queue.prod + 1) & MASK32
            if queue not in touched:
                touched.append(queue)
        for queue in touched:
            if queue.ring.push_requests(queue.prod):
                queue.notify()

    def _split(self, part: _Part) -> bool:
        """A part made for another back end may be too long for this one: make several of it."""
        if part.op not in (BLKIF_OP_READ, BLKIF_OP_WRITE):
            return False
        size = self.features.sector_size
        limit = self._segments(part.op) * (PAGE // size)
        if part.count <= limit:
            return False
        self._todo.popleft()
        pieces = [
            _Part(
                part.whole,
                part.op,
                part.sector + at,
                min(limit, part.count - at),
                part.data[at * size : (at + limit) * size],
            )
            for at in range(0, part.count, limit)
        ]
        part.whole.parts += len(pieces) - 1
        self._todo.extendleft(reversed(pieces))
        return True

    def _prepare(self, part: _Part) -> list[Segment]:
        size = self.features.sector_size
        length = part.count * size if part.op not in (BLKIF_OP_DISCARD, BLKIF_OP_FLUSH_DISKCACHE) else 0
        need = -(-length // PAGE)
        if not need:
            return []
        indirect = need > BLKIF_MAX_SEGMENTS_PER_REQUEST
        number = -(-need // SEGMENTS_PER_PAGE) if indirect else 0
        persistent = self.features.persistent
        if persistent:
            missing = need + number - len(self._pool)
            if missing > 0:
                fresh = self._pages.allocate(missing)
                self._pool += zip(fresh, self._pages.grant(fresh, False), strict=True)
            # In the order in which they were granted: what was mapped in a row stays in a row, and is one piece of DMA.
            chosen = self._pool[-(need + number) :]
            del self._pool[-(need + number) :]
            part.pages = [page for page, _ in chosen[:need]]
            part.refs = [ref for _, ref in chosen[:need]]
            part.indirect = [page for page, _ in chosen[need:]]
            part.indirect_refs = [ref for _, ref in chosen[need:]]
        else:
            fresh = self._pages.allocate(need + number)
            part.pages, part.indirect = fresh[:need], fresh[need:]
        if part.op != BLKIF_OP_READ:
            whole, data = length & ~(PAGE - 1), memoryview(part.data)
            for at, page in zip(range(0, whole, PAGE), part.pages, strict=False):
                page.data[:] = data[at : at + PAGE]
            if whole < length:
                part.pages[-1].data[: length - whole] = data[whole:]
        if not persistent:
            part.refs = self._pages.grant(part.pages, part.op != BLKIF_OP_READ)
        last = PAGE // size - 1
        segments: list[Segment] = [(ref, 0, last) for ref in part.refs]
        segments[-1] = (part.refs[-1], 0, (length - (need - 1) * PAGE) // size - 1)
        if indirect:
            for at, page in enumerate(part.indirect):
                packed = pack_segments(segments[at * SEGMENTS_PER_PAGE : (at + 1) * SEGMENTS_PER_PAGE])
                page.data[: len(packed)] = packed
            if not persistent:
                part.indirect_refs = self._pages.grant(part.indirect, True)
        return segments

    def _pack(self, part: _Part, ident: int, segments: Sequence[Segment]) -> bytes:
        if part.op == BLKIF_OP_DISCARD:
            return pack_discard(self._abi, part.flag, ident, part.sector, part.count)
        if part.indirect_refs:
            return pack_indirect(self._abi, part.op, ident, part.sector, len(segments), part.indirect_refs)
        return pack_request(self._abi, part.op, ident, part.sector, segments)

    # ------------------------------------------------------------------ responses

    def poll(self) -> int:
        """Take responses; how many. Calls back their askers, each as soon as its data is copied: it is forgotten before the next is, and
        memory is used again while it is warm. What they ask is published together."""
        finished: list[tuple[_Part, int]] = []
        for queue in self._queues:
            while self.error is None:
                produced = queue.ring.rsp_prod
                count = distance(produced, queue.cons)
                if count == 0:
                    if not queue.ring.ask_for_responses(queue.cons):
                        break
                    continue
                if count > distance(queue.prod, queue.cons):
                    self.error = f"{count} responses to {distance(queue.prod, queue.cons)} requests"
                    break
                full_barrier()
                data = queue.ring.read_slots(queue.cons, count)
                for at in range(0, len(data), self._abi.slot):
                    ident, op, status = RESPONSE.unpack_from(data, at)
                    part = queue.shadow.get(ident)
                    if part is None:
                        self.error = f"a response to {ident}, which was not asked or is answered"
                        break
                    if op != part.op or status not in (BLKIF_RSP_OKAY, BLKIF_RSP_ERROR, BLKIF_RSP_EOPNOTSUPP):
                        self.error = f"a response of operation {op}, status {status} to operation {part.op}"
                        break
                    del queue.shadow[ident]
                    queue.cons = (queue.cons + 1) & MASK32
                    finished.append((part, status))
        with self.batch():
            for part, status in finished:
                self._finish(part, status)
        return len(finished)

    def _finish(self, part: _Part, status: int) -> None:
        """Its pages are free again, and its asker has its data if that was its last part."""
        whole = part.whole
        if part.op == BLKIF_OP_READ and status == BLKIF_RSP_OKAY:
            length = part.count * self.features.sector_size
            whole.data[part.sector] = b"".join([page.data for page in part.pages])[:length]  # one copy
        self._release(part, keep=True)
        whole.parts -= 1
        whole.status = whole.status or status
        if not whole.parts:
            ok = whole.status == BLKIF_RSP_OKAY
            data = b"".join([whole.data.pop(at) for at in sorted(whole.data)]) if ok else b""
            whole.done(whole.status, data)

    def _release(self, part: _Part, *, keep: bool) -> None:
        pages, refs = part.pages + part.indirect, part.refs + part.indirect_refs
        part.pages, part.refs, part.indirect, part.indirect_refs = [], [], [], []
        if keep and self.features.persistent:
            self._pool += zip(pages, refs, strict=True)
        else:
            self._end(pages, refs)

    def _end(self, pages: Sequence[Page], refs: Sequence[int]) -> None:
        if not pages:
            return
        back: list[Page] = []
        for page, ended in zip(pages, self._pages.end(refs), strict=True):
            if ended:
                back.append(page)
            else:
                self.leaked += 1
        self._pages.free(back)
