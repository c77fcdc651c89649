"""Orders `drop_code`: one for all frames that a step of the core wrote to, none to a domain that runs no guest code."""

from __future__ import annotations

from bus.addresses import DomId, Mfn
from hypervisor.core.effects import Order
from hypervisor.core.outbox import MAX_STALE_FRAMES, Outbox

ONE, TWO = DomId(1), DomId(2)


def orders(outbox: Outbox) -> list[tuple[DomId, object]]:
    return [(effect.domain, effect.body["frames"]) for effect in outbox.take() if isinstance(effect, Order)]


def test_the_frames_of_a_step_go_in_one_order_for_each_domain() -> None:
    """In the place of the first of them; a frame that is written twice in a row is named once."""
    outbox = Outbox(8)
    for domain, mfn in ((ONE, 10), (ONE, 10), (TWO, 20), (ONE, 11), (TWO, 21)):
        outbox.code_is_stale(domain, Mfn(mfn))
    outbox.log("info", "behind them")
    outbox.code_is_stale(ONE, Mfn(12))
    assert orders(outbox) == [(ONE, [10, 11, 12]), (TWO, [20, 21])]
    outbox.code_is_stale(ONE, Mfn(13))
    assert orders(outbox) == [(ONE, [13])]


def test_what_is_told_at_once_is_not_told_again() -> None:
    """DMA tells of an item's frames before it writes the next item, which may be the completion."""
    outbox = Outbox(8)
    outbox.code_is_stale(ONE, Mfn(9))
    outbox.tell_stale()
    assert orders(outbox) == [(ONE, [9])], "a shell without a way for it gets the order"
    told: list[tuple[DomId, list[tuple[int, int]]]] = []
    outbox.stale_now = lambda domain, runs: told.append((domain, list(runs)))
    for mfn in (10, 11, 11, 14):
        outbox.code_is_stale(ONE, Mfn(mfn))
    outbox.code_is_stale(ONE, Mfn(15), 3)
    outbox.code_is_stale(TWO, Mfn(20), 2)
    outbox.tell_stale()
    outbox.tell_stale()
    assert told == [(ONE, [(10, 2), (14, 4)]), (TWO, [(20, 2)])]


def test_what_nobody_told_is_told_before_the_effects_of_the_step() -> None:
    """A grant copy, say: before its answer leaves the core its frames are told, and no order is needed."""
    outbox = Outbox(8)
    told: list[tuple[DomId, list[tuple[int, int]]]] = []
    outbox.stale_now = lambda domain, runs: told.append((domain, list(runs)))
    outbox.code_is_stale(ONE, Mfn(12))
    assert told == []
    assert orders(outbox) == []
    assert told == [(ONE, [(12, 1)])]
    assert orders(outbox) == []
    assert len(told) == 1


def test_an_order_names_no_more_frames_than_a_message_may() -> None:
    """What is beyond goes in another one."""
    outbox = Outbox(8)
    for mfn in range(2 * MAX_STALE_FRAMES + 1):
        outbox.code_is_stale(ONE, Mfn(mfn))
    found = orders(outbox)
    assert [len(frames) for _, frames in found if isinstance(frames, list)] == [MAX_STALE_FRAMES] * 2 + [1]
    assert [mfn for _, frames in found if isinstance(frames, list) for mfn in frames] == list(
        range(2 * MAX_STALE_FRAMES + 1)
    )
