"""A shared ring of one or several pages that need not lie side by side (multi-page rings of blkif.h).

The arithmetic is that of `bus.abi.io.ring`; a slot may cross from one page into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from bus.abi.io import ring
from bus.abi.io.ring import MASK32, SRING_HEADER

MAX_ORDER: Final = 4
"""Largest `ring-page-order`: 16 pages."""


class PagedRing:
    """Indexes are stored and loaded as one machine word: `struct` writes byte by byte, and the other end could see half of an
    index. Those read from here were written by somebody else and must be checked."""

    def __init__(self, pages: Sequence[memoryview], entry_size: int) -> None:
        """`pages`: 2^n views of 4096 bytes, n <= 4. ValueError for anything else."""
        count = len(pages)
        if count == 0 or count & (count - 1) or count > 1 << MAX_ORDER:
            raise ValueError(f"a ring of {count} pages")
        self._pages: Final = [page.cast("B") for page in pages]
        if any(len(page) != 4096 for page in self._pages):
            raise ValueError("a ring page has 4096 bytes")
        self._words: Final = self._pages[0][:SRING_HEADER].cast("I")
        self.entry_size: Final = entry_size
        self.size: Final = ring.ring_size(entry_size, 4096 * count)

    def init(self) -> None:
        """`SHARED_RING_INIT`, by the frontend."""
        self._pages[0][:SRING_HEADER] = bytes(SRING_HEADER)
        self._words[1] = self._words[3] = 1

    @property
    def req_prod(self) -> int:
        return self._words[0]

    @req_prod.setter
    def req_prod(self, value: int) -> None:
        self._words[0] = value & MASK32

    @property
    def req_event(self) -> int:
        return self._words[1]

    @req_event.setter
    def req_event(self, value: int) -> None:
        self._words[1] = value & MASK32

    @property
    def rsp_prod(self) -> int:
        return self._words[2]

    @rsp_prod.setter
    def rsp_prod(self, value: int) -> None:
        self._words[2] = value & MASK32

    @property
    def rsp_event(self) -> int:
        return self._words[3]

    @rsp_event.setter
    def rsp_event(self, value: int) -> None:
        self._words[3] = value & MASK32

    def read_slots(self, index: int, count: int) -> bytes:
        """One private copy of `count` slots from free-running `index` on: what is checked is what is used."""
        entry, first = self.entry_size, index & (self.size - 1)
        until_wrap = min(count, self.size - first)
        data = self._read(SRING_HEADER + first * entry, until_wrap * entry)
        if until_wrap < count:
            data += self._read(SRING_HEADER, (count - until_wrap) * entry)
        return data

    def _read(self, start: int, length: int) -> bytes:
        if start + length <= 4096:
            return bytes(self._pages[0][start : start + length])
        parts = []
        while length:
            page, offset = divmod(start, 4096)
            step = min(length, 4096 - offset)
            parts.append(bytes(self._pages[page][offset : offset + step]))
            start, length = start + step, length - step
        return b"".join(parts)

    def write_slot(self, index: int, data: bytes) -> None:
        """Write the first bytes of the slot. ValueError if `data` is longer than a slot."""
        if len(data) > self.entry_size:
            raise ValueError(f"{len(data)} bytes do not fit a slot of {self.entry_size}")
        start = ring.slot_offset(index, self.entry_size, self.size)
        offset = start & 4095
        end = offset + len(data)
        if end <= 4096:  # nearly always
            self._pages[start >> 12][offset:end] = data
            return
        while data:
            page, offset = divmod(start, 4096)
            part = data[: 4096 - offset]
            self._pages[page][offset : offset + len(part)] = part
            start, data = start + len(part), data[len(part) :]

    def push_requests(self, req_prod_pvt: int) -> bool:
        """Publish requests; True if the backend asked to be notified."""
        old = self._words[0]
        ring.full_barrier()
        self.req_prod = req_prod_pvt
        ring.full_barrier()
        return ring.must_notify(old, req_prod_pvt & MASK32, self._words[1])

    def push_responses(self, rsp_prod_pvt: int, old: int) -> bool:
        """Publish responses from `old` on; True if the frontend asked to be notified."""
        ring.full_barrier()
        self.rsp_prod = rsp_prod_pvt
        ring.full_barrier()
        return ring.must_notify(old, rsp_prod_pvt & MASK32, self._words[3])

    def ask_for_requests(self, req_cons: int, fence: Callable[[], None]) -> bool:
        """Ask to be notified of the next request; True if one is there already."""
        self.req_event = ring.add(req_cons)
        fence()
        return self._words[0] != req_cons

    def ask_for_responses(self, rsp_cons: int) -> bool:
        """Ask to be notified of the next response; True if one is there already."""
        self.rsp_event = ring.add(rsp_cons)
        ring.full_barrier()
        return self._words[2] != rsp_cons

    def release(self) -> None:
        """Let go of the pages (their memory may be unmapped afterwards)."""
        self._words.release()
        for page in self._pages:
            page.release()
