"""The simulated network scenario: the product survives fixed seeds, a seed is one trace (its broken copies: test_simulation.py)."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from drivers.net.frames import Frame
from simulation.plan import Fault, Plan, What, parse_plan
from simulation.runner import NETWORK_PLAN as PLAN
from simulation.runner import run_seed, shrink


def test_the_product_survives_a_fixed_set_of_seeds() -> None:
    """Up to three faults each; most do happen, and all frames come back."""
    fired = 0
    for seed in range(30):
        outcome = run_seed(seed, PLAN)
        assert outcome.violations == [], f"seed {seed}: {outcome.plan.toml()}"
        fired += outcome.fired
    assert fired > 25


def test_a_seed_is_one_trace_and_a_plan_survives_its_text() -> None:
    first = run_seed(5, PLAN)
    assert run_seed(5, PLAN).digest == first.digest
    assert run_seed(6, PLAN).digest != first.digest
    assert parse_plan(first.plan.toml()) == first.plan
    assert run_seed(5, first.plan).digest == first.digest


def test_a_failing_plan_is_shrunk() -> None:
    noise = Fault(what=What.SLOW, target="domio", at_ms=1.0)
    plan = Plan(
        scenario="network", operations=12, fault=(noise, Fault(what=What.KILL, event="step:net-begun", n=2))
    )
    outcome = run_seed(1, plan, mutant="net-answers-not-noted")
    assert outcome.failed
    small = shrink(outcome, mutant="net-answers-not-noted").plan
    assert [fault.event for fault in small.fault] == ["step:net-begun"]
    assert small.operations < 12


def test_frames_of_the_scenario_are_what_they_say() -> None:
    """The guest's check is real: a frame that was changed is told."""
    from simulation.network import GUEST, STATION, NetGuest

    violations: list[str] = []
    lives = 1
    machine = SimpleNamespace(trace=lambda text: None, lives=lambda role: lives)
    guest = object.__new__(NetGuest)
    guest._under_way = Counter({1: 1})
    guest.world = SimpleNamespace(violation=violations.append, machine=machine)  # type: ignore[assignment]
    guest.done, guest.sent = 0, {1: b"\0\0\0\1abc"}
    guest._received(Frame(GUEST + STATION + b"\x88\xb5" + b"\0\0\0\1abd"))
    assert len(violations) == 1
    assert guest.done == 1
    frame = Frame(GUEST + STATION + b"\x88\xb5" + b"\0\0\0\1abc")
    guest._received(frame)  # a second time
    assert len(violations) == 2
    assert "more often than it was sent" in violations[1]
    lives = 2  # who takes over sends again what was sent and not answered
    guest._received(frame)
    assert len(violations) == 2
