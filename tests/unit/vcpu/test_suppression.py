"""No wake-up is lost by a frontend on a vCPU that orders with MFENCE (docs/vcpu.md); ten million races: benchmarks/suppression.json."""

from __future__ import annotations

import os

import pytest

from tests.support.suppression import races


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one processor the two cannot meet")
@pytest.mark.parametrize("native", [False, True], ids=["vcpu", "native"])
def test_races_of_event_suppression_lose_no_wake_up(native: bool) -> None:
    """Against a back end on a vCPU, and this project's own: both decide races, in both ways, and no notification is missing."""
    outcome = races(50_000, native=native)
    assert outcome.found + outcome.slept == 50_000
    assert outcome.slept > 0
    assert outcome.found > 0 or not native, "it looks a second time for microseconds: thousands are found so"
    assert outcome.lost == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one processor the two cannot meet")
def test_without_a_fence_wake_ups_are_lost() -> None:
    """So the test above can fail: some of a million are."""
    lost = 0
    for _ in range(20):
        lost += races(100_000, fence=False).lost
        if lost:
            return
    pytest.fail("no wake-up was lost in two million races without a fence")
