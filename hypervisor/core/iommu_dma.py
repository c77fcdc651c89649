"""DMA itself: bytes move between a device's staging memory and frames, in the step in which they were translated.

Two copies a byte: the device process to or from staging memory that it shares with the hypervisor, and the hypervisor
between that and the frame. A batch (`bus.messages.device.Dma`) is carried out item by item, in order; each item is all or
nothing, and the first that faults ends the batch. Batches of one device complete in order. If a frame is on its way into
a grant window or home, the item waits for it and is translated anew, so that what was revoked meanwhile is a fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from bus.addresses import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Bdf, DomId, Mfn
from bus.trace import NOBODY, Kind, Trace, off
from hypervisor.core.iommu import DmaFault, Iommu, Piece
from hypervisor.core.iommu_faults import FaultReason
from hypervisor.core.iommu_interrupts import InterruptEntry

MAX_WAITS: Final = 8
"""How often one item waits for frames on the move before it is refused."""
MAX_BATCHES: Final = 256
"""Batches of one device that may be under way; more are refused."""
MAX_ITEMS: Final = 1024
MAX_VECTORS: Final = 64
NO_FAULT: Final = -1
FAULT_VECTOR: Final = 0xFFFF
"""`DmaResult.fault`: all items were carried out, but a vector was refused."""
FAULT_EPOCH: Final = 0xFFFE
"""The batch is of an earlier epoch, or of a device without an owner: nothing was carried out."""


class Staging(Protocol):
    """A device's staging memory, as the hypervisor has it mapped. The shell copies straight between the mappings."""

    size: int
    """Bytes; fixed when it was made (sealed)."""

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        """Copy from the staging memory into a frame, from `offset` in it on, and those that follow it."""

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        """Copy from frames into the staging memory."""


class StillFrames(Protocol):
    """What DMA needs of the grant tables (`GrantTables`)."""

    @property
    def any_moving(self) -> bool:
        """There are frames that nobody may touch just now."""

    def moving(self, mfn: Mfn) -> bool:
        """This is one of them."""

    def when_still(self, now: int, mfns: set[Mfn], domain: DomId, run: Callable[[bool], None]) -> None:
        """Call `run` when that is over; with False if it will not be."""


class DmaItem(NamedTuple):
    """`length` bytes between `iova` and the staging memory at `position`; `write`: the device writes memory."""

    iova: int
    length: int
    write: bool
    position: int


@dataclass(frozen=True, slots=True)
class DmaBatch:
    """What a device asks in one message. `epoch` is what the device was told, the PCI address what its link says."""

    bdf: Bdf
    epoch: int
    items: Sequence[tuple[int, int, bool, int]]
    """`DmaItem`s (plain tuples, for speed)."""
    vectors: list[int]
    """MSI-X entries to raise after the last item."""
    token: int = 0
    """The device's, for the trace."""


@dataclass(frozen=True, slots=True)
class DmaResult:
    """The answer to the device: `fault` is NO_FAULT, the index of the item that faulted, FAULT_VECTOR or FAULT_EPOCH."""

    fault: int
    reason: FaultReason | None = None
    iova: int = 0


@dataclass(slots=True)
class _Running:
    batch: DmaBatch
    staging: Staging
    done: Callable[[DmaResult], None]
    next: int = 0
    waits: int = MAX_WAITS


class DmaService:
    """Carries out batches. `written` is told which frames were written (the first, and how many that follow each other: translated
    code of them is stale), `interrupt` of each vector that goes to a domain."""

    def __init__(
        self,
        iommu: Iommu,
        frames: StillFrames,
        written: Callable[[Mfn, int], None],
        interrupt: Callable[[int, InterruptEntry], None] = lambda now, entry: None,
        *,
        trace: Trace | None = None,
        owner: Callable[[Mfn], DomId | None] = lambda mfn: None,
        tell_written: Callable[[], None] = lambda: None,
    ) -> None:
        """`owner` of a frame: for the trace. `tell_written`: what `written` was told of, has to be known before more is written."""
        self._tell_written = tell_written
        self._iommu = iommu
        self._frames = frames
        self._written = written
        self._interrupt = interrupt
        self._trace = trace or off()
        self._owner = owner
        self._queues: dict[Bdf, deque[_Running]] = {}

    def submit(self, now: int, batch: DmaBatch, staging: Staging, done: Callable[[DmaResult], None]) -> None:
        """Carry the batch out and call `done`: at once, unless one of its frames, or an earlier batch, must be waited
        for. It never raises for what a device says."""
        # No two items of a batch share staging memory; a device that says so wants the hypervisor busy.
        total = sum([length for _, length, _, _ in batch.items])
        if len(batch.items) > MAX_ITEMS or len(batch.vectors) > MAX_VECTORS or total > staging.size:
            done(self._refused(now, batch, 0, FaultReason.MALFORMED))
            return
        queue = self._queues.setdefault(batch.bdf, deque())
        if len(queue) >= MAX_BATCHES:
            done(self._refused(now, batch, 0, FaultReason.MALFORMED))
            return
        queue.append(_Running(batch, staging, done))
        if len(queue) == 1:
            self._go_on(now, batch.bdf)

    def waiting(self, bdf: Bdf) -> int:
        """Batches of the device that are under way."""
        return len(self._queues.get(bdf, ()))

    def _refused(self, now: int, batch: DmaBatch, index: int, reason: FaultReason) -> DmaResult:
        item = DmaItem(*batch.items[index]) if index < len(batch.items) else DmaItem(0, 0, False, 0)
        if self._trace.on[0] and index < len(batch.items):
            self._note(batch, index, None, reason)
        fault = self._iommu.refuse(now, batch.bdf, item.iova, item.write, reason)
        return DmaResult(index, fault.reason, fault.iova)

    def _go_on(self, now: int, bdf: Bdf) -> None:
        """Carry out batches of a device, one after the other, until one has to wait."""
        queue = self._queues.get(bdf, deque())
        while queue:
            result = self._run(now, queue[0])
            if result is None:
                return
            queue.popleft().done(result)
        self._queues.pop(bdf, None)

    def _run(self, now: int, running: _Running) -> DmaResult | None:
        """Carry the head of a queue out as far as it goes. None: it waits, and goes on by itself."""
        iommu, batch, staging = self._iommu, running.batch, running.staging
        while running.next < len(batch.items):
            item = batch.items[running.next]
            position = item[3]
            try:
                (pieces,) = iommu.translate(now, batch.bdf, batch.epoch, (item[:3],))
            except DmaFault as fault:
                if self._trace.on[0]:
                    self._note(batch, running.next, None, fault.reason)
                stale = fault.reason is FaultReason.CONTEXT_NOT_PRESENT
                return DmaResult(FAULT_EPOCH if stale else running.next, fault.reason, fault.iova)
            if position < 0 or position + item[1] > staging.size:
                return self._refused(now, batch, running.next, FaultReason.MALFORMED)
            if self._frames.any_moving and (moving := self._moving(pieces)):
                return self._wait(now, running, moving)
            if self._trace.on[0]:
                self._note(batch, running.next, pieces, None)
            self._move(batch.bdf, item, pieces, staging)
            running.next += 1
            running.waits = MAX_WAITS
        return self._raise_vectors(now, batch)

    def _note(
        self, batch: DmaBatch, index: int, pieces: list[Piece] | None, reason: FaultReason | None
    ) -> None:
        """Steps 2 and 3 of an item, for the trace: what was asked, and where each piece of it is; or the fault."""
        item = DmaItem(*batch.items[index])
        place = index << 1 | item.write
        domain = self._iommu.device(batch.bdf).domain
        track = NOBODY if domain is None else domain
        if reason is not None:
            values = (batch.token, place, item.iova, item.length, 0, reason << 16 | NOBODY)
            self._trace.add(Kind.DMA, track, batch.bdf, *values)
        iova = item.iova
        for first, start, whole in pieces or ():
            end = start + whole
            for step in range(0, end, PAGE_SIZE):  # a record a frame
                mfn, offset = Mfn(first + (step >> PAGE_SHIFT)), max(start - step, 0)
                length = min(PAGE_SIZE, end - step) - offset
                owner = self._owner(mfn)
                machine = mfn << PAGE_SHIFT | offset
                verdict = NOBODY if owner is None else int(owner)
                self._trace.add(
                    Kind.DMA, track, batch.bdf, batch.token, place, iova, length, machine, verdict
                )
                iova += length

    def _moving(self, pieces: list[Piece]) -> set[Mfn]:
        """Those of the frames that are on their way."""
        frames = (Mfn(piece.mfn + step) for piece in pieces for step in range(piece.frames))
        return {mfn for mfn in frames if self._frames.moving(mfn)}

    def _wait(self, now: int, running: _Running, moving: set[Mfn]) -> DmaResult | None:
        batch = running.batch
        domain = self._iommu.device(batch.bdf).domain
        item = DmaItem(*batch.items[running.next])
        reason = FaultReason.NO_WRITE_PERMISSION if item.write else FaultReason.NO_READ_PERMISSION
        if not running.waits or domain is None:
            return self._refused(now, batch, running.next, reason)
        running.waits -= 1

        def still(arrived: bool) -> None:
            if not arrived:
                result = self._refused(now, batch, running.next, reason)
                self._queues[batch.bdf].popleft().done(result)
            self._go_on(now, batch.bdf)

        self._frames.when_still(now, moving, domain, still)
        return None

    def _move(
        self, bdf: Bdf, item: tuple[int, int, bool, int], pieces: list[Piece], staging: Staging
    ) -> None:
        device = self._iommu.device(bdf)
        _, whole, write, position = item
        device.requests += 1
        if write:
            for mfn, offset, length in pieces:
                staging.to_frames(position, mfn, offset, length)
                position += length
                self._written(mfn, (offset + length + PAGE_MASK) >> PAGE_SHIFT)
            self._tell_written()  # the next item may be the completion that says so
            device.bytes_written += whole
            return
        for mfn, offset, length in pieces:
            staging.from_frames(mfn, offset, position, length)
            position += length
        device.bytes_read += whole

    def _raise_vectors(self, now: int, batch: DmaBatch) -> DmaResult:
        for vector in batch.vectors:
            try:
                entry = self._iommu.raise_vector(now, batch.bdf, batch.epoch, vector)
            except DmaFault as fault:
                stale = fault.reason is FaultReason.CONTEXT_NOT_PRESENT
                return DmaResult(FAULT_EPOCH if stale else FAULT_VECTOR, fault.reason, fault.iova)
            if self._trace.on[0]:
                self._trace.add(Kind.INTERRUPT, entry.domain, batch.bdf, vector, entry.domain, entry.pirq)
            self._interrupt(now, entry)
        return DmaResult(NO_FAULT)
