"""Shared rings of split drivers: sizes, offsets, notification arithmetic (io/ring.h).

A ring page begins with a header of 64 bytes: req_prod, req_event, rsp_prod, rsp_event (32 bits each,
free-running), then padding; then a power of two of slots, each the union of a request and a response. The
frontend writes req_prod and rsp_event, the backend rsp_prod and req_event.
"""

from __future__ import annotations

import _thread
from typing import Final

SRING_HEADER: Final = 64
"""Bytes before the first slot."""
REQ_PROD: Final = 0
REQ_EVENT: Final = 4
RSP_PROD: Final = 8
RSP_EVENT: Final = 12
MASK32: Final = 0xFFFFFFFF

NOT_IN_HEADER: Final = ("SRING_HEADER", "REQ_PROD", "REQ_EVENT", "RSP_PROD", "RSP_EVENT", "MASK32")


def ring_size(entry_size: int, ring_bytes: int = 4096) -> int:
    """Slots of a ring: `__RING_SIZE`, the largest power of two that fits behind the header. ValueError if
    none does."""
    slots = (ring_bytes - SRING_HEADER) // entry_size if entry_size > 0 else 0
    if slots < 1:
        raise ValueError(f"no slot of {entry_size} bytes fits a ring of {ring_bytes}")
    return 1 << (slots.bit_length() - 1)


def slot_offset(index: int, entry_size: int, size: int) -> int:
    """Byte offset of the slot of free-running `index` in a ring of `size` slots."""
    return SRING_HEADER + (index & (size - 1)) * entry_size


def add(index: int, count: int = 1) -> int:
    """`index + count` as 32 bits."""
    return (index + count) & MASK32


def distance(producer: int, consumer: int) -> int:
    """`producer - consumer` as 32 bits: how many entries lie between the two indexes."""
    return (producer - consumer) & MASK32


def must_notify(old: int, new: int, event: int) -> bool:
    """After a producer index went from `old` to `new`: did it pass the other end's event index?"""
    return distance(new, event) < distance(new, old)


def unconsumed_requests(req_prod: int, req_cons: int, rsp_prod_pvt: int, size: int) -> int:
    """Requests that a backend may take now; never more than it holds, whatever the frontend wrote."""
    return min(distance(req_prod, req_cons), max(0, size - distance(req_cons, rsp_prod_pvt)))


def free_requests(req_prod_pvt: int, rsp_cons: int, size: int) -> int:
    """Slots that a frontend may still fill."""
    return size - distance(req_prod_pvt, rsp_cons)


def request_prod_overflow(req_prod: int, rsp_prod_pvt: int, size: int) -> bool:
    """The frontend claims more requests than the ring holds: it is broken or hostile."""
    return distance(req_prod, rsp_prod_pvt) > size


def response_prod_overflow(rsp_prod: int, rsp_cons: int, size: int) -> bool:
    """The backend claims more responses than the ring holds."""
    return distance(rsp_prod, rsp_cons) > size


_fence = _thread.allocate_lock()


def full_barrier() -> None:
    """A store before this is seen by other processes before a load after it is done (`xen_mb`).

    Taking a lock is a locked instruction, which is a full barrier on x86; Python has no other.
    """
    with _fence:
        pass


class SharedRing:
    """A ring page as 32-bit words and slots.

    Indexes are stored and loaded as one machine word: `struct` writes byte by byte, and the other end could
    see half of an index. All indexes read from here were written by somebody else and must be checked.
    """

    def __init__(self, page: memoryview, entry_size: int) -> None:
        """`page` must be contiguous, and writable for an end that produces."""
        octets = page.cast("B")
        self.size: Final = ring_size(entry_size, len(octets))
        self.entry_size: Final = entry_size
        self._octets: Final = octets
        self._words: Final = octets[:SRING_HEADER].cast("I")

    def init(self) -> None:
        """`SHARED_RING_INIT`, by the frontend before it tells anybody of the ring."""
        self._octets[:SRING_HEADER] = bytes(SRING_HEADER)
        self._words[REQ_EVENT // 4] = self._words[RSP_EVENT // 4] = 1

    @property
    def req_prod(self) -> int:
        return self._words[0]

    @property
    def req_event(self) -> int:
        return self._words[1]

    @req_event.setter
    def req_event(self, value: int) -> None:
        self._words[1] = value & MASK32

    @property
    def rsp_prod(self) -> int:
        return self._words[2]

    @property
    def rsp_event(self) -> int:
        return self._words[3]

    @rsp_event.setter
    def rsp_event(self, value: int) -> None:
        self._words[3] = value & MASK32

    def read_slot(self, index: int) -> bytes:
        """A copy of the slot: what is checked is what is used."""
        start = slot_offset(index, self.entry_size, self.size)
        return bytes(self._octets[start : start + self.entry_size])

    def write_slot(self, index: int, data: bytes) -> None:
        """Write the first bytes of the slot. ValueError if `data` is longer than a slot."""
        if len(data) > self.entry_size:
            raise ValueError(f"{len(data)} bytes do not fit a slot of {self.entry_size}")
        start = slot_offset(index, self.entry_size, self.size)
        self._octets[start : start + len(data)] = data

    def push_requests(self, req_prod_pvt: int) -> bool:
        """Publish requests up to `req_prod_pvt`; True if the backend must be notified."""
        old = self._words[0]
        full_barrier()
        self._words[0] = req_prod_pvt & MASK32
        full_barrier()
        return must_notify(old, req_prod_pvt & MASK32, self._words[1])

    def push_responses(self, rsp_prod_pvt: int) -> bool:
        """Publish responses up to `rsp_prod_pvt`; True if the frontend must be notified."""
        old = self._words[2]
        full_barrier()
        self._words[2] = rsp_prod_pvt & MASK32
        full_barrier()
        return must_notify(old, rsp_prod_pvt & MASK32, self._words[3])

    def final_check_for_requests(self, req_cons: int, rsp_prod_pvt: int) -> int:
        """Requests left; if none, ask to be notified of the next one and look once more."""
        left = unconsumed_requests(self._words[0], req_cons, rsp_prod_pvt, self.size)
        if not left:
            self._words[1] = add(req_cons)
            full_barrier()
            left = unconsumed_requests(self._words[0], req_cons, rsp_prod_pvt, self.size)
        return left

    def final_check_for_responses(self, rsp_cons: int) -> int:
        """Responses left; if none, ask to be notified of the next one and look once more."""
        left = distance(self._words[2], rsp_cons)
        if not left:
            self._words[3] = add(rsp_cons)
            full_barrier()
            left = distance(self._words[2], rsp_cons)
        return left
