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
