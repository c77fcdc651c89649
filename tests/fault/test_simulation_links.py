"""Messages that come twice or change places, where the protocol allows it: what is allowed, how they pass, and that the product survives it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from simulation.live.plan import Fault as LiveFault
from simulation.live.plan import What as LiveWhat
from simulation.order import ANSWER, DONE, NOTIFICATION, Turns
from simulation.plan import Fault, Plan, PlanError, What, parse_plan
from simulation.runner import run_seed

EVENTS = [
    *(f"{kind}:{role}" for kind in (ANSWER, DONE) for role in ("dom0", "domio", "guest", "device")),
    "notification:domio",
]


class Wire:
    """What passed, and what waits for its time to be over."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.late: list[Callable[[], None]] = []
        self.turns = Turns(self.late.append)

    def send(self, kind: str, name: str, *, twice: bool = False, swap: bool = False) -> None:
        self.turns.through(kind, lambda: self.passed.append(name), twice=twice, swap=swap)


def test_a_message_comes_twice() -> None:
    wire = Wire()
    wire.send(ANSWER, "a", twice=True)
    wire.send(ANSWER, "b")
    assert wire.passed == ["a", "a", "b"]


def test_two_of_a_kind_change_places_and_no_more() -> None:
    wire = Wire()
    wire.send(DONE, "a", swap=True)
    assert wire.passed == []
    for name in "bc":
        wire.send(DONE, name)
    assert wire.passed == ["b", "a", "c"]
    wire.late.pop()()  # its time is over: it has passed
    assert wire.passed == ["b", "a", "c"]


def test_an_answer_is_not_overtaken_by_what_is_not_one() -> None:
    """An order that was given after the call was carried out is obeyed after its answer has come."""
    wire = Wire()
    wire.send(ANSWER, "answer", swap=True)
    wire.send("", "order")
    wire.send(ANSWER, "next")
    assert wire.passed == ["answer", "order", "next"]


def test_a_notification_is_overtaken_by_anything() -> None:
    wire = Wire()
    wire.send(NOTIFICATION, "raised", swap=True)
    wire.send("", "order")
    wire.send(NOTIFICATION, "next")
    assert wire.passed == ["order", "next", "raised"]


def test_who_is_not_overtaken_passes_when_its_time_is_over() -> None:
    wire = Wire()
    wire.send(ANSWER, "a", swap=True)
    wire.late.pop()()
    wire.send(ANSWER, "b")
    assert wire.passed == ["a", "b"]


@pytest.mark.parametrize(
    ("what", "event", "told"),
    [
        ("duplicate", "hypercall:evtchnop_send", "once and in order; only notification:ROLE, answer:ROLE, done:ROLE may"),
        ("reorder", "dma", "reorder: hypercalls, orders, register accesses and DMA requests come once and in order"),
        ("reorder", "answer:device", "answers to DMA come in order, and a device may rely on that"),
        ("duplicate", "notification:device", "nobody notifies device by its link"),
        ("duplicate", "answer:nvme", "no link has that name; dom0, domio, guest, device have one"),
    ],
)  # fmt: skip
def test_what_the_protocol_does_not_allow_is_refused_in_a_line_that_names_it(
    what: str, event: str, told: str
) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(f'[[fault]]\nwhat = "{what}"\nevent = "{event}"', "p")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "event", "told"),
    [
        (LiveWhat.DUPLICATE, "from:domio", "on the link of domio only notification:domio, answer:domio, done:domio may"),
        (LiveWhat.REORDER, "to:domu", "on the link of domu only"),
        (LiveWhat.REORDER, "answer:nvme", "answers to DMA come in order"),
        (LiveWhat.DUPLICATE, "answer:hypervisor", "no link has that name"),
    ],
)  # fmt: skip
def test_a_machine_of_processes_refuses_the_same(what: LiveWhat, event: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LiveFault(what=what, event=event)


@pytest.mark.parametrize("scenario", ["disk", "network"])
def test_what_comes_twice_or_in_another_order_breaks_nothing(scenario: str) -> None:
    """On each link, in each direction, from the first message on."""
    fired: dict[tuple[str, What], int] = {}
    for event, what in itertools.product(EVENTS, (What.DUPLICATE, What.REORDER)):
        if event == "answer:device" and what is What.REORDER:
            continue
        faults = tuple(Fault(what=what, event=event, n=n) for n in (1, 2, 5, 9, 20))
        for seed in (1, 2, 8):
            outcome = run_seed(
                seed, Plan.model_validate({"fault": faults, "operations": 8, "scenario": scenario})
            )
            assert outcome.violations == [], (event, what, seed)
            fired[event, what] = fired.get((event, what), 0) + outcome.fired
    silent = {event for (event, _), count in fired.items() if not count}
    # Dom0 grants nothing in either scenario, and the network's has no device.
    assert silent <= {"done:dom0", *(("answer:device", "done:device") if scenario == "network" else ())}


def test_a_plan_without_them_does_not_count_them() -> None:
    """Its trace, and how long it takes, are as before."""
    trace = run_seed(3, Plan(operations=2), keep_trace=True).trace
    assert not [line for line in trace if line.split()[1].startswith(("answer:", "done:", "notification:"))]
