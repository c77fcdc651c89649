"""What a back end is about to answer, in memory that outlives its process.

A response lies in the slot of its request. A process that dies between writing responses and publishing them leaves slots that are neither:
its successor cannot read the requests, and must not publish half of the responses. So they are noted here first, all of one batch; whoever
comes next writes them once more and publishes them, or finds that this was done.

Layout of the page of one ring (little-endian 32-bit words): key (4 words; the first is 0 where the page is free), 1 while the rest holds,
first index, count, bytes of each; from byte 64 on the responses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from bus.abi.io.ring import distance
from drivers.xenbus.paged_ring import PagedRing

_KEY: Final = struct.Struct("<IIII")
_HEAD: Final = struct.Struct("<III")
_VALID: Final = 4
_HEAD_AT: Final = 20
_DATA_AT: Final = 64
PAGE: Final = 4096
USED: Final = 0x4A4E4554
"""First word of a page that belongs to a ring."""


class Journal:
    """One ring's."""

    def __init__(self, page: memoryview) -> None:
        """4096 bytes."""
        if len(page) != PAGE:
            raise ValueError(f"a journal of {len(page)} bytes")
        self._page: Final = page.cast("B")
        self._words: Final = self._page[:_DATA_AT].cast("I")

    @property
    def key(self) -> tuple[int, int, int] | None:
        """(domain, handle, ring) that it belongs to; None: it is free."""
        used, domain, handle, ring = _KEY.unpack_from(self._page, 0)
        return (domain, handle, ring) if used == USED else None

    def take(self, domain: int, handle: int, ring: int) -> None:
        """It belongs to that ring from now on, and is empty."""
        self._words[_VALID] = 0
        _KEY.pack_into(self._page, 0, 0, domain, handle, ring)
        self._words[0] = USED

    def free(self) -> None:
        """It belongs to nobody."""
        self._words[0] = 0

    def note(self, old: int, answers: Sequence[bytes]) -> None:
        """The responses from index `old` on, all of one size, are about to be written and published."""
        size = len(answers[0])
        self._page[_DATA_AT : _DATA_AT + size * len(answers)] = b"".join(answers)
        _HEAD.pack_into(self._page, _HEAD_AT, old, len(answers), size)
        self._words[_VALID] = 1

    def done(self) -> None:
        """They are published."""
        self._words[_VALID] = 0

    def recover(self, ring: PagedRing) -> int:
        """A successor: publish what was about to be; how many responses. What is noted of another state of the ring is forgotten."""
        count = 0
        if self._words[_VALID] == 1:
            old, noted, size = _HEAD.unpack_from(self._page, _HEAD_AT)
            fits = 0 < noted <= ring.size and 0 < size <= ring.entry_size and _DATA_AT + noted * size <= PAGE
            if fits and ring.rsp_prod == old and noted <= distance(ring.req_prod, old) <= ring.size:
                for index in range(noted):
                    at = _DATA_AT + index * size
                    ring.write_slot(old + index, bytes(self._page[at : at + size]))
                ring.push_responses(old + noted, old)
                count = noted
        self._words[_VALID] = 0
        return count


class Journals:
    """The pages that there are for all rings of a driver domain. They are found by their keys, also by a successor."""

    def __init__(self, memory: memoryview) -> None:
        """Pages in a row."""
        self._all: Final = [Journal(memory[at : at + PAGE]) for at in range(0, len(memory), PAGE)]

    def of(self, domain: int, handle: int, ring: int, *, keep: bool) -> Journal:
        """The ring's journal; what is in it stays if `keep`. ValueError if there is none left."""
        key = (domain, handle, ring)
        free: Journal | None = None
        for journal in self._all:
            if journal.key == key:
                if not keep:
                    journal.take(*key)
                return journal
            if free is None and journal.key is None:
                free = journal
        if free is None:
            raise ValueError(f"more than {len(self._all)} rings")
        free.take(*key)
        return free

    def drop(self, domain: int, handle: int) -> None:
        """That interface has no rings any more."""
        for journal in self._all:
            key = journal.key
            if key is not None and key[:2] == (domain, handle):
                journal.free()
