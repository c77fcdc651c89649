"""How many simulated scenarios a second: `python -m benchmarks.simulation [RUNS]`.

A scenario boots the control plane, brings a disk up, does 24 reads, writes and flushes, breaks up to three things, recovers, takes the
disk down, and checks every promise. CPU time of this one process counts, so other work on the machine falsifies little."""

from __future__ import annotations

import sys
import time

from simulation.runner import run_seed


def main() -> None:
    """One line for each batch of 20, and the median."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    run_seed(0)
    rates: list[float] = []
    events = 0
    for start in range(0, runs, 20):
        began = time.process_time()
        for seed in range(start, start + 20):
            outcome = run_seed(seed)
            events += outcome.events
            if outcome.failed:
                print(f"seed {seed}: {outcome.violations}")
        rates.append(20 / (time.process_time() - began))
        print(f"seeds {start}..{start + 19}: {rates[-1]:.1f} scenarios a second of CPU")
    rates.sort()
    print(
        f"median {rates[len(rates) // 2]:.1f}, best {rates[-1]:.1f} scenarios a second; {events / runs:.0f} events each"
    )


if __name__ == "__main__":
    main()
