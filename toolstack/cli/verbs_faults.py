"""`domicile simulate` and `domicile campaign`: the machine in one process, broken on purpose (docs/faults.md)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from toolstack.cli.output import say
from toolstack.errors import EXIT_FAILED, InputError, MachineError

if TYPE_CHECKING:
    from simulation.plan import Plan
    from simulation.world import Outcome

MAX_SEED: Final = (1 << 63) - 1
MAX_RUNS: Final = 10_000_000


def _plan(path: str, mutant: str = "") -> Plan:
    from simulation.mutants import MUTANTS
    from simulation.plan import PlanError, load_plan
    from simulation.runner import default_plan

    if mutant and mutant not in MUTANTS:
        raise InputError(f"--mutant {mutant}: there are {', '.join(MUTANTS)}")
    if not path:
        return default_plan(mutant)
    try:
        plan = load_plan(Path(path))
    except PlanError as error:
        raise InputError(str(error)) from None
    if mutant and MUTANTS[mutant].scenario != plan.scenario:
        raise InputError(f'--mutant {mutant}: the plan needs scenario = "{MUTANTS[mutant].scenario}"')
    return plan


def simulate(
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="The first seed.")] = 0,
    runs: Annotated[
        int,
        typer.Option(
            metavar="K", min=1, max=MAX_RUNS, help="So many seeds, from N on; ends at the first that fails."
        ),
    ] = 1,
    plan: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Fault plan (TOML); by default up to three faults are drawn from the seed."
        ),
    ] = "",
    trace: Annotated[bool, typer.Option("--trace", help="Print the trace of the last run.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object for each run.")] = False,
    list_mutants: Annotated[
        bool, typer.Option("--list-mutants", help="Names of the deliberately broken copies.")
    ] = False,
    mutant: Annotated[str, typer.Option(metavar="NAME", help="Run on that broken copy.")] = "",
) -> None:
    """Run scenarios in one process on a seeded clock: control plane, block I/O, faults, recovery, check.

    Exit status 1 if a promise was broken: then the seed and a shrunk plan are printed.

    Example: domicile simulate --seed 0 --runs 100
    """
    from simulation.mutants import MUTANTS
    from simulation.runner import run_seed

    if list_mutants:
        for one in MUTANTS.values():
            say(f"{one.name:<22} {one.what} ({one.scenario}; found within {one.bound} seeds)")
        return
    chosen = _plan(plan, mutant)
    started = time.monotonic()
    for number in range(seed, seed + runs):
        outcome = run_seed(number, chosen, mutant=mutant, keep_trace=trace)
        if json_:
            say(json.dumps(_record(outcome)))
        if outcome.failed:
            if trace:
                say("\n".join(outcome.trace))
            _tell(outcome, mutant, json_)
            raise typer.Exit(EXIT_FAILED)
    if trace:
        say("\n".join(outcome.trace))
    if not json_:
        seconds = time.monotonic() - started
        what = f"seed {seed}" if runs == 1 else f"seeds {seed} to {seed + runs - 1}"
        say(
            f"{what}: every promise held ({runs / seconds:.1f} runs/s); trace of the last: {outcome.digest[:16]}"
        )


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": outcome.seed,
        "violations": outcome.violations,
        "plan": outcome.plan.toml(),
        "trace_sha256": outcome.digest,
        "events": outcome.events,
        "simulated_ms": outcome.simulated_ms,
        "answered": outcome.answered,
        "faults_fired": outcome.fired,
    }


def _tell(outcome: Outcome, mutant: str, as_json: bool) -> None:
    from simulation.runner import shrink

    small = shrink(outcome, mutant=mutant)
    if as_json:
        say(json.dumps({**_record(small.outcome), "shrunk": True}))
        return
    say(
        f"seed {outcome.seed}: {len(outcome.violations)} promise{'s' * (len(outcome.violations) != 1)} broken"
    )
    for text in outcome.violations:
        say(f"  {text}")
    say(f"shrunk plan ({len(outcome.plan.fault)} faults to {len(small.plan.fault)}, {small.runs} runs):")
    for line in small.plan.toml().splitlines():
        say(f"  {line}")
    say(f"  # {small.outcome.violations[0]}")
    option = f" --mutant {mutant}" if mutant else ""
    say(f"again: domicile simulate --seed {outcome.seed} --plan FILE{option} --trace")


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    try:
        low, high = int(first), int(last if dots else first)
    except ValueError:
        raise InputError(f"--seeds {text}: a range is written 0..999") from None
    if not 0 <= low <= high <= MAX_SEED or high - low >= MAX_RUNS:
        raise InputError(f"--seeds {text}: not a range of seeds, or more than {MAX_RUNS}")
    return range(low, high + 1)


def campaign(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Fault plan (TOML).")],
    seeds: Annotated[str, typer.Option(metavar="A..B", help="Seeds, both ends included.")] = "0..99",
    junit: Annotated[str, typer.Option(metavar="FILE", help="JUnit XML.")] = "",
    lines: Annotated[
        str, typer.Option("--jsonl", metavar="FILE", help="A JSON object a line, as runs end.")
    ] = "",
    workers: Annotated[int, typer.Option(metavar="N", min=0, max=1024, help="Processes; 0: all cores.")] = 0,
    mutant: Annotated[str, typer.Option(metavar="NAME", help="Run on that broken copy.")] = "",
) -> None:
    """Run a plan with many seeds on all cores, and sum up.

    Exit status 1 if a promise was broken. Each failure keeps its seed, plan, shrunk plan and trace (--jsonl).

    Example: domicile campaign plan.toml --seeds 0..999 --junit out.xml --jsonl out.jsonl
    """
    from simulation import campaign as work

    chosen, wanted = _plan(plan, mutant), _seeds(seeds)
    started = time.monotonic()
    live = sys.stderr.isatty()

    def progress(done: int, failed: int) -> None:
        if live or done == len(wanted) or done % 500 == 0:
            rate = done / max(0.001, time.monotonic() - started)
            end = "\n" if done == len(wanted) or not live else "\r"
            print(
                f"{done}/{len(wanted)} seeds, {failed} failed, {rate:.1f}/s",
                end=end,
                file=sys.stderr,
                flush=True,
            )

    try:
        records = work.campaign(
            work.Processes(workers), chosen, wanted, mutant, progress, Path(lines) if lines else None
        )
        seconds = time.monotonic() - started
        if junit:
            Path(junit).write_bytes(work.junit(records, seconds, Path(plan).stem))
    except OSError as error:
        raise MachineError(f"{error.filename or 'campaign'}: {error.strerror}") from None
    failed = [record for record in records if record["failed"]]
    say(f"{'seed':>8}  {'faults':>6}  first broken promise")
    for record in failed[:50]:
        say(f"{record['seed']:>8}  {record['faults_fired']:>6}  {record['violations'][0][:120]}")
    fired = sum(record["faults_fired"] for record in records)
    say(
        f"{len(records)} seeds, {fired} faults, {len(failed)} failed, {seconds:.1f} s ({len(records) / seconds:.1f}/s)"
    )
    if failed:
        raise typer.Exit(EXIT_FAILED)


def add(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command(name="simulate")(simulate)
    app.command(name="campaign")(campaign)
