"""The simulated network scenario: the product survives fixed seeds, broken copies are found, a seed is one trace."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from drivers.net.backend import Backend
from drivers.net.frames import Frame
from drivers.net.journal import Journal
from drivers.xenbus.paged_ring import PagedRing
from simulation.plan import Fault, Plan, What, parse_plan
from simulation.runner import run_seed, shrink

PLAN = Plan(scenario="network", random_faults=3)


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


def _no_journal(self: Journal, old: int, answers: Any) -> None:
    """What is about to be answered is not noted."""


def _kept(self: Any, ring: PagedRing) -> int:
    return 0


def _before_the_network(plain: Callable[..., None]) -> Callable[..., None]:
    def send(self: Backend, queue: Any, packets: Any) -> None:
        real, self._network = self._network, Nowhere()  # type: ignore[misc]
        try:
            plain(self, queue, packets)
            self._step("late")
        finally:
            self._network = real  # type: ignore[misc]

    return send


class Nowhere:
    """A network that takes frames and loses every one that it gets."""

    def sent(self, frames: Any) -> None:
        """They are gone."""


def _short(plain: Callable[..., Any]) -> Callable[..., Any]:
    def fill(self: Backend, queue: Any, batch: Any, slots: int) -> None:
        plain(
            self,
            queue,
            [frame._replace(data=frame.data[:2000].ljust(len(frame.data), b"?")) for frame in batch],
            slots,
        )

    return fill


MUTANTS: dict[str, tuple[type, str, Any]] = {
    "answers are not noted": (Journal, "note", _no_journal),
    "a successor does not finish what was begun": (Journal, "recover", _kept),
    "frames are answered and never sent": (Backend, "_send", _before_the_network(Backend._send)),
    "the second page of a frame is another": (Backend, "_fill", _short(Backend._fill)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_copy_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 60 seeds; and that seed holds without the defect."""
    owner, attribute, broken = MUTANTS[name]
    for seed in range(60):
        monkeypatch.setattr(owner, attribute, broken)
        failed = run_seed(seed, PLAN).failed
        monkeypatch.undo()
        if failed:
            assert not run_seed(seed, PLAN).failed
            return
    pytest.fail(f"{name}: not found within 60 seeds")


def test_a_failing_plan_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "note", _no_journal)
    noise = Fault(what=What.SLOW, target="domio", at_ms=1.0)
    plan = Plan(
        scenario="network", operations=12, fault=(noise, Fault(what=What.KILL, event="step:net-begun", n=2))
    )
    outcome = run_seed(1, plan)
    assert outcome.failed
    small = shrink(outcome).plan
    assert [fault.event for fault in small.fault] == ["step:net-begun"]
    assert small.operations < 12


def test_frames_of_the_scenario_are_what_they_say() -> None:
    """The guest's check is real: a frame that was changed is told."""
    from simulation.network import GUEST, STATION, NetGuest

    violations: list[str] = []
    machine = SimpleNamespace(trace=lambda text: None)
    guest = object.__new__(NetGuest)
    guest.world = SimpleNamespace(violation=violations.append, machine=machine)  # type: ignore[assignment]
    guest.done, guest.waits = 0, {1: b"\0\0\0\1abc"}
    guest._received(Frame(GUEST + STATION + b"\x88\xb5" + b"\0\0\0\1abd"))
    assert violations
    assert guest.done == 1
