"""A ring of pages: two ends, notifications, slots that cross pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.io import ring
from drivers.xenbus.paged_ring import PagedRing

INDEX = st.integers(0, 2**32 - 1)


@given(INDEX, st.lists(st.integers(1, 8), max_size=20))
def test_two_ends_exchange_entries_and_no_notification_is_lost(start: int, batches: list[int]) -> None:
    """A frontend and a backend from any starting index; the backend sleeps unless notified."""
    page = memoryview(bytearray(4096))
    front, back = PagedRing([page], 112), PagedRing([page], 112)
    front.init()
    page[:16] = b"".join(
        value.to_bytes(4, "little") for value in (start, ring.add(start), start, ring.add(start))
    )
    req_prod = req_cons = rsp_prod = rsp_cons = start
    for batch in batches:
        for _ in range(batch):
            front.write_slot(req_prod, req_prod.to_bytes(4, "little"))
            req_prod = ring.add(req_prod)
        assert front.push_requests(req_prod), "the backend had asked for the next request"
        old = rsp_prod
        while ring.unconsumed_requests(back.req_prod, req_cons, rsp_prod, back.size):
            assert int.from_bytes(back.read_slots(req_cons, 1)[:4], "little") == req_cons
            back.write_slot(rsp_prod, back.read_slots(req_cons, 1))
            req_cons, rsp_prod = ring.add(req_cons), ring.add(rsp_prod)
        assert not back.ask_for_requests(req_cons, ring.full_barrier)
        assert req_cons == req_prod
        assert back.push_responses(rsp_prod, old), "the frontend had asked for the next response"
        rsp_cons = ring.add(rsp_cons, ring.distance(front.rsp_prod, rsp_cons))
        assert not front.ask_for_responses(rsp_cons)
        assert rsp_cons == rsp_prod
        assert ring.free_requests(req_prod, rsp_cons, front.size) == front.size


def test_a_busy_end_is_not_notified() -> None:
    shared = PagedRing([memoryview(bytearray(4096))], 12)
    shared.init()
    assert shared.push_requests(1)
    assert not shared.push_requests(2), "the backend has not asked again"
    shared.req_event = 4
    assert not shared.push_requests(3)
    assert shared.push_requests(4)
    assert (shared.req_prod, shared.req_event, shared.rsp_prod, shared.rsp_event) == (4, 4, 0, 1)


def test_a_slot_is_not_overrun() -> None:
    shared = PagedRing([memoryview(bytearray(4096))], 12)
    with pytest.raises(ValueError, match="do not fit"):
        shared.write_slot(0, bytes(13))


@given(INDEX, st.integers(1, 16))
def test_slots_come_back_as_they_were_written(start: int, count: int) -> None:
    """Also those that lie in two pages, and around the ring's end; their neighbours stay."""
    pages = [memoryview(bytearray(4096)) for _ in range(2)]
    shared = PagedRing(pages, 112)
    data = [bytes([number + 1]) * 112 for number in range(count)]
    for number, slot in enumerate(data):
        shared.write_slot(ring.add(start, number), slot)
    assert shared.read_slots(start, count) == b"".join(data)
    assert sum(map(bytes.__len__, data)) == sum(len(bytes(page)) - bytes(page).count(0) for page in pages)
