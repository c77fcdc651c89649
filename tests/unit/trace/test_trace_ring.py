"""The trace ring and the counters page: bounded, off until somebody watches, and readers that survive any writer."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from bus.trace import MAGIC, ON_WORD, RECORD_SIZE, RING_AT, WRITTEN_WORD, Kind, Trace, TraceReader, off
from bus.trace_page import NAME, SLOTS, Counters, Page, map_read_only, of_process


def memory_of(records: int) -> memoryview:
    memory = memoryview(bytearray(RING_AT + records * RECORD_SIZE))
    memory[:8] = MAGIC.to_bytes(8, "little")
    return memory


def counting() -> Trace:
    return Trace(memory_of(4), iter(range(100, 200)).__next__)


def test_off_is_zero_and_a_record_comes_back_as_it_was() -> None:
    memory = memory_of(4)
    trace, reader = Trace(memory, lambda: 77), TraceReader(memory)
    assert trace.on[0] == 0 == off().on[0]
    trace.words[ON_WORD] = 1
    assert trace.on[0] == 1
    trace.add(Kind.DMA, 3, 0x80000008, 1, -1, 1 << 70, 4, 5, 6)
    trace.add(Kind.RUN, 1 << 20, 1 << 40, 9, time=5)
    first, second = reader.take()
    assert first == (77, Kind.DMA, 3, 0x80000008, (1, (1 << 64) - 1, 0, 4, 5, 6))
    assert (second.time, second.track, second.subject, second.values[0]) == (5, 0, 0, 9)
    assert reader.take() == []


def test_the_oldest_go_and_are_counted() -> None:
    memory = memory_of(4)
    trace, reader = Trace(memory, lambda: 1), TraceReader(memory)
    for number in range(11):
        trace.add(Kind.RUN, 0, 0, number)
    assert [record.values[0] for record in reader.take()] == [
        8,
        9,
        10,
    ]  # one place is being written, for all we know
    assert reader.dropped == 8
    late = TraceReader(memory, from_start=True)
    assert len(late.take()) == 3
    assert TraceReader(memory).take() == []


def test_what_is_written_over_while_it_is_read_is_left_out() -> None:
    memory = memory_of(8)
    trace, reader = Trace(memory, lambda: 1), TraceReader(memory)
    for number in range(6):
        trace.add(Kind.RUN, 0, 0, number)

    class Racing:
        """The writer goes on between the reader's first look and its second."""

        def __init__(self) -> None:
            self.looks = 0

        def __getitem__(self, index: int) -> int:
            self.looks += 1
            if self.looks == 2:
                for number in range(6, 11):
                    trace.add(Kind.RUN, 0, 0, number)
            return trace.words[index]

    reader._words = Racing()  # type: ignore[misc,assignment]  # the seam of this test
    assert [record.values[0] for record in reader.take()] == [4, 5]
    assert reader.dropped == 4


def test_a_successor_goes_on_where_its_predecessor_was_killed() -> None:
    memory = memory_of(8)
    reader = TraceReader(memory)
    Trace(memory, lambda: 1).add(Kind.RUN, 0, 0, 1)
    Trace(memory, lambda: 2).add(Kind.RUN, 0, 0, 2)
    assert [record.values[0] for record in reader.take()] == [1, 2]


@settings(max_examples=200)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=6), st.integers(0, 1 << 32))
def test_no_writer_makes_a_reader_fail_or_take_more_than_the_ring(counts: list[int], seed: int) -> None:
    memory = memory_of(16)
    reader = TraceReader(memory)
    memory[RING_AT:] = (seed.to_bytes(8, "little") * (16 * RECORD_SIZE // 8))[: 16 * RECORD_SIZE]
    for count in counts:
        memory[8 * WRITTEN_WORD : 8 * WRITTEN_WORD + 8] = count.to_bytes(8, "little")
        assert len(reader.take()) <= 16


def test_a_page_is_shared_switched_and_read_without_write_access() -> None:
    page = Page("test")
    given_fd, seen_fd = os.dup(page.fd), os.open(f"/proc/self/fd/{page.fd}", os.O_RDONLY)
    trace, counters = of_process({NAME: given_fd})
    seen = map_read_only(seen_fd)
    assert seen.readonly
    reader = TraceReader(seen)
    page.switch(True)
    assert trace.on[0] == 1
    trace.add(Kind.SEND, 0, 0, 5)
    assert reader.take()[0].values[0] == 5
    slot = counters.slot(99)
    assert slot is not None
    slot[2] += 7
    assert Counters(seen).read() == {99: [0, 0, 7, 0, 0, 0, 0]}
    page.switch(False)
    assert trace.on[0] == 0
    reader.close()
    page.close()
    os.close(given_fd)
    os.close(seen_fd)


def test_counter_slots_are_found_again_and_given_back() -> None:
    counters = Counters(memory_of(1))
    first = counters.slot(1)
    assert first is not None
    first[0] = 5
    again = counters.slot(1)
    assert again is not None
    assert again[0] == 5
    for key in range(2, SLOTS + 1):
        assert counters.slot(key) is not None
    assert counters.slot(1000) is None
    counters.drop(1)
    fresh = counters.slot(1000)
    assert fresh is not None
    assert fresh[0] == 0
