"""The trace page of a process: a sealed memfd with the ring of `bus.trace`, and counters that others may look at.

The hypervisor makes it, keeps it for as long as the domain or device is there (also across a restart of its process), hands it to
the process with its other descriptors (`trace`), and gives the control domain a read-only descriptor.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from typing import Final

from bus import sealed
from bus.trace import COUNTERS_AT, MAGIC, ON_WORD, RECORD_SIZE, RING_AT, Trace

RECORDS: Final = 1 << 15
SIZE: Final = RING_AT + RECORDS * RECORD_SIZE
"""2 MiB and two pages; sparse: what was never written costs nothing."""
SLOTS: Final = 64
VALUES: Final = 7
NAME: Final = "trace"
"""Of its descriptor in `Begin`."""


class Page:
    """The hypervisor's hold on a page."""

    def __init__(self, name: str) -> None:
        """Makes it. OSError if memory is short."""
        self.fd: Final = sealed.create(f"domicile-trace-{name}", SIZE)
        self._map: Final = mmap.mmap(self.fd, SIZE)
        self.memory: Final = memoryview(self._map)
        self.memory[:8] = MAGIC.to_bytes(8, "little")

    def switch(self, on: bool) -> None:
        """Somebody watches, or nobody does."""
        self.memory[8 * ON_WORD : 8 * ON_WORD + 8] = int(on).to_bytes(8, "little")

    def close(self) -> None:
        """Give it back; others may still have it."""
        self.memory.release()
        self._map.close()
        os.close(self.fd)


def of_process(fds: Mapping[str, int]) -> tuple[Trace, Counters]:
    """The trace and the counters of this process, which has that page (or none: then nobody watches, and nobody looks)."""
    fd = fds.get(NAME)
    if fd is None:
        memory = memoryview(bytearray(RING_AT + RECORD_SIZE))
    else:
        sealed.check(fd, SIZE)
        memory = memoryview(mmap.mmap(fd, SIZE))
    return Trace(memory, time.monotonic_ns), Counters(memory)


def map_read_only(fd: int) -> memoryview:
    """A page of another process, to look at. The descriptor stays the caller's. ValueError if it is none."""
    sealed.check(fd, SIZE)
    return memoryview(mmap.mmap(fd, SIZE, prot=mmap.PROT_READ))


class Counters:
    """Slots of a key (not 0) and `VALUES` counters. One process writes, others look: each number is whole."""

    def __init__(self, memory: memoryview) -> None:
        """On a page."""
        self._words: Final = memory[COUNTERS_AT:RING_AT].cast("Q")

    def slot(self, key: int) -> memoryview | None:
        """The counters of `key` (to count with), new ones at 0; None if all slots are taken."""
        words, free = self._words, -1
        for number in range(SLOTS):
            at = number * (VALUES + 1)
            if words[at] == key:
                return words[at + 1 : at + 1 + VALUES]
            if words[at] == 0 and free < 0:
                free = at
        if free < 0:
            return None
        for index in range(VALUES):
            words[free + 1 + index] = 0
        words[free] = key
        return words[free + 1 : free + 1 + VALUES]

    def drop(self, key: int) -> None:
        """Nobody counts that any more."""
        for number in range(SLOTS):
            if self._words[number * (VALUES + 1)] == key:
                self._words[number * (VALUES + 1)] = 0

    def read(self) -> dict[int, Sequence[int]]:
        """All of them, by key."""
        words = self._words.tolist()
        step = VALUES + 1
        return {words[at]: words[at + 1 : at + step] for at in range(0, SLOTS * step, step) if words[at] != 0}
