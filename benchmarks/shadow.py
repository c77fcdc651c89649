"""Shadow page tables beside two-level paging: processor time of the guest's process for Debian's boot by PVH to its init, and for processes.

    python benchmarks/shadow.py [ROUNDS]

Both ways in turn, each on a machine of its own. CPU is user time of the process, as the host counts it: it says something on a busy host too.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.machines import running_machine
from toolstack.guestfetch import INIT_LINE, debian

PROCESSES = 100
LOOP = f"i=0; while [ $i -lt {PROCESSES} ]; do /bin/busybox true; i=$((i+1)); done; echo do''ne"


def user_seconds(pid: int) -> float:
    """User time of a process (proc(5), stat, utime)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def boot(*, hap: bool) -> tuple[float, float]:
    """Seconds of CPU to init, and a process started in the guest, in milliseconds."""
    guest = debian()
    assert guest.pvh_kernel is not None
    with running_machine() as machine:
        domid = machine.create(
            "g", guest.pvh_kernel, ramdisk=guest.ramdisk, memory_mb=256, cmdline="console=hvc0", type="pvh", hap=hap
        )  # fmt: skip
        pid = machine.process_of(domid)
        machine.expect("g", INIT_LINE, 120)
        to_init = user_seconds(pid)
        machine.expect("g", "# ", 30)
        before = user_seconds(pid)
        machine.type("g", LOOP + "\n")
        machine.expect("g", "\ndone", 120)
        return to_init, (user_seconds(pid) - before) / PROCESSES * 1000


def main() -> None:
    """Print the figures and their ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(rounds):
        for hap in (True, False):
            found[hap].append(boot(hap=hap))
            name = "two-level" if hap else "shadow"
            print(
                f"{name}: {found[hap][-1][0]:.2f} s to init, {found[hap][-1][1]:.1f} ms a process", flush=True
            )
    for what, unit in ((0, "s to init"), (1, "ms a process")):
        two, shadow = (statistics.median(row[what] for row in found[hap]) for hap in (True, False))
        print(f"median {unit}: two-level {two:.2f}, shadow {shadow:.2f}, ratio {shadow / two:.2f}")


if __name__ == "__main__":
    main()
