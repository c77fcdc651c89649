"""`domicile run` of a PV kernel that prints a line and shuts down, the whole process: `python benchmarks/run_once.py [RUNS]`.

The kernel is guests/programs/hello.c. Aim (issue 3): under 1.5 s.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from guests.build import build


def main() -> None:
    """Print the median, and the processor time of all processes."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    kernel = build("hello")
    command = [str(Path(sys.executable).with_name("domicile")), "run", str(kernel), "--memory", "32"]
    times = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(runs):
        start = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        times.append(time.perf_counter() - start)
        if done.returncode or b"hello from a Xen guest" not in done.stdout:
            raise SystemExit(f"status {done.returncode}: {done.stdout!r} {done.stderr!r}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / runs
    print(
        f"domicile run of hello: median {statistics.median(times):.2f} s, best {min(times):.2f} s of {runs} (aim: under 1.5 s); "
        f"{used:.2f} s of processor time for all processes; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
