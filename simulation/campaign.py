"""Many seeds of one plan on all cores; JUnit XML and JSON lines of what came of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from simulation.plan import Plan
from simulation.runner import run_seed, shrink

CHUNK: Final = 4


class Executor(Protocol):
    """Runs a plan's seeds somewhere, and gives a record of each as it is done, in any order."""

    def run(self, plan: Plan, seeds: Iterable[int], mutant: str) -> Iterator[dict[str, Any]]:
        """Records as `run_one` makes them."""


def run_one(seed: int, plan: Plan, mutant: str = "") -> dict[str, Any]:
    """A run's record, for JSON: a failing one has its shrunk plan and its trace's last lines."""
    outcome = run_seed(seed, plan, mutant=mutant)
    record: dict[str, Any] = {
        "seed": seed,
        "failed": outcome.failed,
        "violations": outcome.violations,
        "trace_sha256": outcome.digest,
        "events": outcome.events,
        "simulated_ms": round(outcome.simulated_ms, 3),
        "answered": outcome.answered,
        "faults_fired": outcome.fired,
    }
    if outcome.failed:
        small = shrink(outcome, mutant=mutant)
        again = run_seed(seed, small.plan, mutant=mutant, keep_trace=True)
        record |= {
            "plan": outcome.plan.toml(),
            "shrunk_plan": small.plan.toml(),
            "shrunk_violations": small.outcome.violations,
            "shrink_runs": small.runs,
            "trace": again.trace[-2000:],
        }
    return record


def _job(job: tuple[int, str, str]) -> dict[str, Any]:
    seed, plan, mutant = job
    return run_one(seed, Plan.model_validate_json(plan), mutant)


class Processes:
    """On this machine's cores."""

    def __init__(self, workers: int = 0) -> None:
        """`workers`: 0 for all cores that this process may use."""
        self.workers: Final = workers or len(os.sched_getaffinity(0))

    def run(self, plan: Plan, seeds: Iterable[int], mutant: str) -> Iterator[dict[str, Any]]:
        """See Executor."""
        text = plan.model_dump_json()
        jobs = ((seed, text, mutant) for seed in seeds)
        # Not fork: the parent may have threads.
        with multiprocessing.get_context("spawn").Pool(self.workers) as pool:
            yield from pool.imap_unordered(_job, jobs, CHUNK)


def junit(records: list[dict[str, Any]], seconds: float, name: str) -> bytes:
    """A test case for each seed."""
    failures = sum(record["failed"] for record in records)
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(records)),
        failures=str(failures),
        errors="0",
        time=f"{seconds:.3f}",
    )
    for record in records:
        case = ET.SubElement(suite, "testcase", classname=name, name=f"seed {record['seed']}")
        if record["failed"]:
            failure = ET.SubElement(case, "failure", message=record["violations"][0])
            failure.text = "\n".join([*record["violations"], "shrunk plan:", record["shrunk_plan"]])
    text: bytes = ET.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text


def campaign(
    executor: Executor,
    plan: Plan,
    seeds: range,
    mutant: str,
    progress: Callable[[int, int], None],
    lines: Path | None,
) -> list[dict[str, Any]]:
    """Run; records by seed. `progress` gets (done, failed) after each. Records go to `lines` as they come."""
    records: list[dict[str, Any]] = []
    failed = 0
    target = lines.open("w", encoding="utf-8") if lines is not None else None
    try:
        for record in executor.run(plan, seeds, mutant):
            records.append(record)
            failed += record["failed"]
            if target is not None:
                target.write(json.dumps(record) + "\n")
                target.flush()
            progress(len(records), failed)
    finally:
        if target is not None:
            target.close()
    return sorted(records, key=lambda record: int(record["seed"]))
