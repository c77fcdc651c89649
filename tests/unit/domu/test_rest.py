"""A guest that waits by yielding leaves the CPU to those who work for it."""

from __future__ import annotations

from domains.domu.rest import AT_ONCE, FIRST_NS, LONGEST_NS, Rest


def test_the_first_yields_come_back_at_once_then_rests_grow_to_a_bound() -> None:
    rest = Rest()
    rests = [rest.yielded(0, 0, 0) for _ in range(AT_ONCE + 20)]
    assert rests[:AT_ONCE] == [0] * AT_ONCE
    assert rests[AT_ONCE] == FIRST_NS
    assert rests == sorted(rests)
    assert rests[-1] == LONGEST_NS


def test_an_event_and_other_work_begin_anew() -> None:
    rest = Rest()
    for _ in range(10):
        rest.yielded(0, 0, 0)
    assert rest.yielded(1, 0, 0) == 0, "its answer may be there"
    assert [rest.yielded(1, 0, 0) for _ in range(AT_ONCE + 1)] == [0] * AT_ONCE + [FIRST_NS]
    rest.ran()
    assert rest.yielded(1, 0, 0) == 0


def test_no_rest_goes_beyond_the_next_timer() -> None:
    rest = Rest()
    for _ in range(20):
        rest.yielded(0, 0, 0)
    assert rest.yielded(0, 1000, 1500) == 500
    assert rest.yielded(0, 2000, 1500) == 0
