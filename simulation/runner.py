"""Runs of seeds, and the shrinking of a plan that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from simulation.mutants import MUTANTS, applied
from simulation.plan import Plan
from simulation.template import begun
from simulation.world import Outcome

DEFAULT_PLAN: Final = Plan(random_faults=3)
NETWORK_PLAN: Final = Plan(random_faults=3, scenario="network")
MAX_SHRINK_RUNS: Final = 60
Try = Callable[[Plan], bool]
"""Whether a plan fails."""


def default_plan(mutant: str = "") -> Plan:
    """The plan that finds a mutant: its scenario with up to three faults; '' is the disk's. KeyError for a mutant that there is not."""
    return NETWORK_PLAN if mutant and MUTANTS[mutant].scenario == "network" else DEFAULT_PLAN


def run_seed(seed: int, plan: Plan | None = None, *, mutant: str = "", keep_trace: bool = False) -> Outcome:
    """One run, of the default plan if none is given. KeyError for a mutant that there is not."""
    plan = plan or default_plan(mutant)
    world = begun(seed, plan, mutant=mutant, keep_trace=keep_trace)
    with applied(mutant):
        return world.run()


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest plan found that fails still, and how many runs that took."""

    plan: Plan
    outcome: Outcome
    runs: int


def shrink(outcome: Outcome, *, mutant: str = "") -> Shrunk:
    """Fewer faults (halves first, then one by one), then fewer operations (by bisection), as long as the same seed fails."""
    runs = 0
    best = outcome

    def fails(plan: Plan) -> bool:
        nonlocal runs, best
        if runs >= MAX_SHRINK_RUNS:
            return False
        runs += 1
        found = run_seed(outcome.seed, plan, mutant=mutant)
        if found.failed:
            best = found
        return found.failed

    faults = list(outcome.plan.fault)
    size = max(1, len(faults) // 2)
    while faults and size:
        at = 0
        while at < len(faults):
            fewer = faults[:at] + faults[at + size :]
            if fails(best.plan.model_copy(update={"fault": tuple(fewer)})):
                faults = fewer
            else:
                at += size
        size //= 2
    low, high = 0, best.plan.operations
    while high - low > 1:
        middle = (low + high) // 2
        if fails(best.plan.model_copy(update={"operations": middle})):
            high = middle
        else:
            low = middle
    return Shrunk(best.plan, best, runs)
