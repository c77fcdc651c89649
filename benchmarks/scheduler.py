"""The scheduler's figures on a real machine: shares by weight over 10 s on one CPU, a cap, and what an idle guest costs.

Run it on a quiet host: `python benchmarks/scheduler.py [seconds]`.
"""

from __future__ import annotations

import sys
import time

from guests.build import build
from hypervisor.shell.leases import cpu_clock
from tests.support.machines import RunningMachine, running_machine


def used(machine: RunningMachine, seconds: float) -> tuple[dict[str, float], float]:
    """CPU seconds of each guest, and the time that passed."""
    before, began = machine.domains(), time.monotonic()
    end = began + seconds
    while time.monotonic() < end:
        machine.poll(0.1)
    after, wall = machine.domains(), time.monotonic() - began
    return {n: row["time_s"] - before[n]["time_s"] for n, row in after.items() if row["domid"]}, wall


def main() -> None:
    """Prints the table."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    spin = build("spin")
    with running_machine(cpus=1) as machine:
        weights = {"w256": 256, "w512": 512, "w1024": 1024}
        for name, weight in weights.items():
            machine.create(name, spin, memory_mb=8, cpu_weight=weight)
        for name in weights:
            machine.expect(name, r"spun \d+")
        (pid,) = machine.processes("hypervisor")
        before = cpu_clock(pid)
        times, wall = used(machine, seconds)
        total, all_weights = sum(times.values()), sum(weights.values())
        for name, weight in weights.items():
            share, fair = times[name] / total, weight / all_weights
            print(
                f"{name:8} {100 * share:6.2f} % of the guests' time, fair {100 * fair:6.2f} %, off {share / fair - 1:+.1%}"
            )
        print(
            f"CPU in use {100 * total / wall:.1f} %; hypervisor {100 * (cpu_clock(pid) - before) / 1e9 / wall:.1f} % of a core"
        )
    with running_machine(cpus=2) as machine:
        machine.create("capped", spin, memory_mb=8, cap=25)
        machine.expect("capped", r"spun \d+")
        times, wall = used(machine, seconds)
        print(f"cap 25: {100 * times['capped'] / wall:.2f} % of a CPU")


if __name__ == "__main__":
    main()
