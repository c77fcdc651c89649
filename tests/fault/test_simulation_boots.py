"""Boots that seeds share, and moments at which a simulated process loses its CPU: traces are those of whole runs, and more is found."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from simulation import template
from simulation.disk import DiskWorld
from simulation.machine import Machine
from simulation.network import NetWorld
from simulation.plan import Fault, Plan, What
from simulation.runner import default_plan, run_seed
from simulation.snapshot import Snapshot
from simulation.world import FAMILIES, WHOLE, World, family_of

PLANS = {DiskWorld: Plan(random_faults=3), NetWorld: Plan(random_faults=3, scenario="network")}


@pytest.fixture
def begun_from(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From which state runs begin: with the domains built, or with a boot that is over."""
    counts: Counter[str] = Counter()
    begin = template.Template._begin

    def counted(self: template.Template, snapshot: Snapshot, *rest: object, **more: object) -> World:
        counts["built" if snapshot is self._built else "booted"] += 1
        return begin(self, snapshot, *rest, **more)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(template.Template, "_begin", counted)
    monkeypatch.setattr(template, "_templates", {})
    return counts


@pytest.mark.parametrize("scenario", [DiskWorld, NetWorld])
def test_a_boot_that_is_put_back_gives_the_trace_of_one_that_is_run(
    scenario: type[World], begun_from: Counter[str]
) -> None:
    """Of each seed, whoever had the boot before and whatever he did with it."""
    plan = PLANS[scenario]
    seeds = [seed for seed in range(3, 3 + 5 * FAMILIES, FAMILIES) if seed % WHOLE]
    assert len(seeds) >= 4
    assert {family_of(seed) for seed in seeds} == {3}
    for seed in seeds:
        assert run_seed(seed, plan) == scenario(seed, plan).run()
    assert begun_from["booted"] >= 2


def test_a_fault_that_strikes_in_the_boot_has_the_boot_run(begun_from: Counter[str]) -> None:
    """By the event or by the clock; its trace is that of a whole run, too."""
    late = Fault(what=What.KILL, event="step:published", n=2)
    for seed in (3, 20):
        run_seed(seed, Plan(fault=(late,)))
    begun_from.clear()
    run_seed(37, Plan(fault=(late,)))
    assert begun_from == {"booted": 1}
    for early in (
        Fault(what=What.KILL, event="dma", n=1, target="device"),
        Fault(what=What.KILL, at_ms=0.0),
    ):
        begun_from.clear()
        plan = Plan(fault=(early, late))
        found = run_seed(37, plan)
        assert begun_from == {"built": 1}
        assert found.fired == 2
        assert found == DiskWorld(37, plan).run()


def test_a_whole_seed_has_a_boot_of_its_own(begun_from: Counter[str]) -> None:
    """Its chance is its own, and I/O does not wait for the end of the boot."""
    for seed in (WHOLE, 2 * WHOLE, WHOLE):
        run_seed(seed, Plan())
    assert begun_from == {"built": 3}
    boots = {run_seed(seed, Plan(operations=1), keep_trace=True).trace[60] for seed in (WHOLE, 2 * WHOLE)}
    assert len(boots) == 2


def test_a_mutant_is_in_the_boot_and_does_not_stay_there() -> None:
    """A boot is run with the mutant that it is for; the next run without one has a boot without one."""
    seeds = [seed for seed in range(3, 3 + 3 * FAMILIES, FAMILIES) if seed % WHOLE]
    plan = PLANS[NetWorld]
    before = [run_seed(seed, plan) for seed in seeds]
    for seed in seeds[:2]:  # its defect is in what the boot makes
        assert run_seed(seed, plan, mutant="net-never-sent").failed
    assert [run_seed(seed, plan) for seed in seeds] == before


@pytest.mark.parametrize(
    ("mutant", "seeds"), [("net-answered-before-copied", range(12)), ("notify-before-publish", range(72, 73))]
)
def test_what_happens_between_a_notification_and_the_next_step_is_seen(
    mutant: str, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no fault at all: only because a process may lose its CPU there."""
    plan = default_plan(mutant).model_copy(update={"random_faults": 0})
    assert any(run_seed(seed, plan, mutant=mutant).failed for seed in seeds)
    monkeypatch.setattr(Machine, "pause", lambda self: 0)
    assert not any(run_seed(seed, plan, mutant=mutant).failed for seed in seeds)


class _Held:
    """Whatever a snapshot may meet."""

    def __init__(self) -> None:
        self.octets = memoryview(bytearray(b"abc"))
        self.views = [self.octets[1:]]
        self.by_name = {"first": self.octets[:1]}
        self.numbers = itertools.count(5)
        self.waiting: list[Iterator[int]] = []


def test_views_that_were_released_are_put_back() -> None:
    """As attributes, in lists and in dictionaries; and on the same memory."""
    held = _Held()
    memory = held.octets.obj
    kept = Snapshot(held)
    for _ in range(2):
        held.octets[0] = ord("x")
        for view in (held.octets, *held.views, *held.by_name.values()):
            view.release()
        assert next(held.numbers) == 5
        kept.restore()
        assert (bytes(held.octets), bytes(held.views[0]), bytes(held.by_name["first"])) == (
            b"abc",
            b"bc",
            b"a",
        )
        assert held.octets.obj is memory


def test_what_cannot_be_kept_is_refused() -> None:
    """A generator that has begun."""
    held = _Held()
    held.waiting.append(number for number in range(3))
    with pytest.raises(TypeError, match="generator"):
        Snapshot(held)
