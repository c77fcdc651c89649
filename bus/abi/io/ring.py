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
