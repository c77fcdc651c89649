"""How many simulated scenarios a second: `python -m benchmarks.simulation [RUNS] [OPERATIONS FAULTS] [--profile]`.

A scenario boots the control plane, brings a disk up, does 24 (OPERATIONS) reads, writes and flushes, breaks up to three (FAULTS) things,
recovers, takes the disk down, and checks every promise. Most boots are shared by seeds (simulation.template): those that are made in the
first 100 seeds do not count. CPU time of this one process counts, so other work on the machine falsifies little; a core that is
shared is slower all the same. `--profile` tells where the time goes, by samples of the stack each millisecond (cProfile weighs calls too
heavily)."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from simulation.plan import Plan
from simulation.runner import run_seed

ROOT = Path(__file__).resolve().parent.parent
BATCH = 20
WARM = 100


def main() -> None:
    """One line for each batch of 20, and the median."""
    words = [word for word in sys.argv[1:] if word != "--profile"]
    runs = int(words[0]) if words else 200
    operations, faults = (int(word) for word in words[1:3]) if words[1:] else (24, 3)
    plan = Plan(operations=operations, random_faults=faults)
    for seed in range(WARM):
        run_seed(seed, plan)
    if "--profile" in sys.argv:
        profile(range(WARM, WARM + runs), plan)
        return
    rates: list[float] = []
    events = 0
    for start in range(WARM, WARM + runs, BATCH):
        began = time.process_time()
        for seed in range(start, start + BATCH):
            outcome = run_seed(seed, plan)
            events += outcome.events
            if outcome.failed:
                print(f"seed {seed}: {outcome.violations}")
        rates.append(BATCH / (time.process_time() - began))
        print(f"seeds {start}..{start + BATCH - 1}: {rates[-1]:.1f} scenarios a second of CPU")
    rates.sort()
    print(
        f"median {rates[len(rates) // 2]:.1f}, best {rates[-1]:.1f} scenarios a second; {events / runs:.0f} events each"
    )


def profile(seeds: range, plan: Plan) -> None:
    """Shares of the files, and of the functions, in which a sample found the program."""
    files: Counter[str] = Counter()
    functions: Counter[str] = Counter()

    def sample(_number: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            name = code.co_filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
            files[name] += 1
            functions[f"{name}: {code.co_name}"] += 1

    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    for seed in seeds:
        run_seed(seed, plan)
    signal.setitimer(signal.ITIMER_PROF, 0)
    total = files.total()
    print(f"{total} samples of {len(seeds)} runs")
    for shares in (files, functions):
        for name, count in shares.most_common(15):
            print(f"{100 * count / total:5.1f} % {name}")
        print()


if __name__ == "__main__":
    main()
