"""Ring sizes and offsets are the header's, and the notification arithmetic is that of its macros, across wrap-around."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.io import ring
from bus.abi.io.blkif import BLKIF_REQUEST
from bus.abi.io.netif import NETIF_RX_REQUEST, NETIF_TX_REQUEST

INDEX = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("entry", "size"),
    [(BLKIF_REQUEST.size, 32), (NETIF_TX_REQUEST.size, 256), (NETIF_RX_REQUEST.size, 256), (4032, 1)],
)
def test_sizes_are_those_of_xen(entry: int, size: int) -> None:
    assert ring.ring_size(entry) == size
    assert ring.slot_offset(size - 1, entry, size) + entry <= 4096


def test_multi_page_rings() -> None:
    assert ring.ring_size(BLKIF_REQUEST.size, 4 * 4096) == 128


@pytest.mark.parametrize(("entry", "room"), [(0, 4096), (-1, 4096), (5000, 4096), (8, 64)])
def test_a_ring_without_a_slot_is_an_error(entry: int, room: int) -> None:
    with pytest.raises(ValueError, match="no slot"):
        ring.ring_size(entry, room)


@given(INDEX, st.integers(0, 256), INDEX)
def test_must_notify_is_the_macro(old: int, count: int, event: int) -> None:
    """(RING_IDX)(new - event) < (RING_IDX)(new - old), with 32-bit unsigned arithmetic."""
    new = ring.add(old, count)
    u32 = ctypes.c_uint32
    assert ring.must_notify(old, new, event) == (u32(new - event).value < u32(new - old).value)


@given(INDEX, st.integers(1, 256), st.integers(0, 300))
def test_must_notify_means_that_the_event_index_was_passed(old: int, count: int, ahead: int) -> None:
    """The other end asks for index old + 1 + ahead: it is told exactly when that entry is published."""
    event = ring.add(old, 1 + ahead)
    assert ring.must_notify(old, ring.add(old, count), event) == (ahead < count)


@given(INDEX, INDEX, INDEX)
def test_a_backend_never_takes_more_than_the_ring_holds(req_prod: int, req_cons: int, rsp_prod: int) -> None:
    assert 0 <= ring.unconsumed_requests(req_prod, req_cons, rsp_prod, 32) <= 32


def test_overflow_by_a_hostile_peer_is_seen() -> None:
    assert not ring.request_prod_overflow(5, ring.add(5, -32), 32)
    assert ring.request_prod_overflow(5, ring.add(5, -33), 32)
    assert not ring.response_prod_overflow(10, 10, 32)
    assert ring.response_prod_overflow(9, 10, 32)
