"""DMA of the controller: units of items that succeed or fail together, in few large batches.

A batch stops at its first fault (docs/decisions/0004-devices.md). The unit that faulted is told so; those after it go out
again in a batch of their own, so that one bad address costs one command and not its neighbours.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from bus.trace import Kind, Purpose, Trace, off

Item = tuple[int, int, bool, int]
"""(I/O virtual address, bytes, to memory?, position in the staging memory), as in `bus.messages.device.Dma`."""

MAX_ITEMS: Final = 1024
MAX_BATCHES: Final = 16
"""Batches under way; more units wait."""
MAX_ITEM: Final = 1 << 20
NO_FAULT: Final = -1
BAD_VECTOR: Final = 0xFFFF


class DmaBatch(NamedTuple):
    """Effect: carry out the items in order, then raise the vectors; answer with `Controller.dma_done`."""

    token: int
    items: list[Item]
    vectors: list[int]


class Unit:
    """Items that belong together: at most MAX_ITEMS. Exactly one of `ok` and `bad` is called, unless a reset comes first."""

    __slots__ = ("bad", "items", "ok", "tag")

    def __init__(
        self,
        items: list[Item],
        ok: Callable[[], None],
        bad: Callable[[], None],
        tag: tuple[Purpose, int, int],
    ) -> None:
        """`tag`: what for, and for which command (queue, identifier; several: the first): for the trace."""
        self.tag = tag
        self.items = items
        self.ok = ok
        self.bad = bad


class _Batch:
    __slots__ = ("dead", "units", "vectors")

    def __init__(self, units: list[Unit], vectors: list[int]) -> None:
        self.units = units
        self.vectors = vectors
        self.dead = False


def merge(segments: list[tuple[int, int]], to_memory: bool, position: int) -> list[Item]:
    """Items for (address, length) runs and a contiguous buffer; neighbours in address become one item."""
    if len(segments) == 1:
        address, length = segments[0]
        if length <= MAX_ITEM:
            return [(address, length, to_memory, position)]
    items: list[Item] = []
    start, size, at = -1, 0, position
    for address, length in segments:
        if address == start + size and size and size + length <= MAX_ITEM:
            size += length
            continue
        if size:
            items.append((start, size, to_memory, at))
            at += size
        start, size = address, length
    if size:
        items.append((start, size, to_memory, at))
    return items


class DmaEngine:
    """Units in, batches out."""

    def __init__(self, trace: Trace | None = None) -> None:
        self._trace = trace or off()
        self._tokens = itertools.count(1)
        self._groups: deque[tuple[list[Unit], list[int], bool]] = deque()
        self._flying: dict[int, _Batch] = {}
        self.faults = 0
        self.lost_vectors = 0

    @property
    def flying(self) -> int:
        """Batches under way."""
        return len(self._flying)

    @property
    def room(self) -> bool:
        """Another batch could go out now."""
        return len(self._flying) < MAX_BATCHES

    def add(self, units: list[Unit], vectors: list[int] | None = None, alone: bool = False) -> None:
        """Units that must go in one batch, in order; then the vectors. `alone`: with nothing else in that batch."""
        if units or vectors:
            self._groups.append((units, vectors or [], alone))

    def take(self) -> list[DmaBatch]:
        """The batches that may go out now; groups share a batch while they fit."""
        out: list[DmaBatch] = []
        while self._groups and len(self._flying) < MAX_BATCHES:
            units: list[Unit] = []
            items: list[Item] = []
            vectors: list[int] = []
            while self._groups:
                more, more_vectors, alone = self._groups[0]
                count = sum(len(unit.items) for unit in more)
                if (items or vectors) and (
                    alone or len(items) + count > MAX_ITEMS or len(vectors) + len(more_vectors) > 64
                ):
                    break
                self._groups.popleft()
                units += more
                for unit in more:
                    items += unit.items
                vectors += [vector for vector in more_vectors if vector not in vectors]
                if alone:
                    break
            token = next(self._tokens)
            if self._trace.on[0]:
                self._note(token, units)
            self._flying[token] = _Batch(units, vectors)
            out.append(DmaBatch(token, items, vectors))
        return out

    def _note(self, token: int, units: list[Unit]) -> None:
        index = 0
        for unit in units:
            purpose, queue, command = unit.tag
            for iova, length, write, _ in unit.items:
                place = index << 1 | write
                self._trace.add(Kind.REQUEST, queue, 0, token, place, iova, length, command, purpose)
                index += 1

    def done(self, token: int, fault: int) -> bool:
        """The answer to a batch (DmaDone). False: it was of before a reset, or unknown."""
        if self._trace.on[0]:
            self._trace.add(Kind.ANSWER, 0, 0, token, fault)
        batch = self._flying.pop(token, None)
        if batch is None or batch.dead:
            return False
        if fault == BAD_VECTOR and len(batch.vectors) > 1:
            # One of them was refused, and those after it were not tried: each goes alone.
            for vector in batch.vectors:
                self.add([], [vector], alone=True)
        elif fault == BAD_VECTOR:
            self.lost_vectors += 1
        if fault in (NO_FAULT, BAD_VECTOR):
            for unit in batch.units:
                unit.ok()
            return True
        self.faults += 1
        seen = 0
        for index, unit in enumerate(batch.units):
            seen += len(unit.items)
            if fault < seen:
                if index + 1 < len(batch.units) or batch.vectors:
                    self._groups.appendleft((batch.units[index + 1 :], batch.vectors, False))
                for before in batch.units[:index]:
                    before.ok()
                unit.bad()
                return True
        # A fault beyond the items (a stale epoch, or an answer that makes no sense): nothing more comes of this batch.
        for unit in batch.units:
            unit.bad()
        return True

    def reset(self) -> None:
        """Forget what waits; what is under way is answered by `done`, and comes to nothing."""
        self._groups.clear()
        for batch in self._flying.values():
            batch.dead = True
