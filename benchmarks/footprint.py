"""What a machine takes at rest: `python benchmarks/footprint.py`.

A Debian PV guest of 128 MB (busybox, a shell that waits for input) and a machine around it. For each process: memory beside guest RAM (PSS and
USS from /proc/PID/smaps, without the mappings of guests' memory: memfds of extents, windows and staging), and the share of a core that it
uses while the guest idles.

Aims (issue 3): a domain process under 60 MB, the hypervisor under 80 MB; an idle guest under 2 % of a core.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.programs.native_guest import processor_seconds
from tests.support.machines import running_machine
from toolstack.guestfetch import debian

ROLES = ("hypervisor", "dom0", "domu")
SECONDS = 10.0
GUEST_MEMORY = re.compile(r"memfd:domicile-(extent|window|staging)")


def memory(pid: int) -> tuple[float, float]:
    """PSS and USS in MB, without guests' memory."""
    pss = uss = 0
    counted = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = GUEST_MEMORY.search(line) is None
        elif counted and line.startswith("Pss:"):
            pss += int(line.split()[1])
        elif counted and line.startswith(("Private_Clean:", "Private_Dirty:")):
            uss += int(line.split()[1])
    return pss / 1000, uss / 1000


def main() -> None:
    """Print the table."""
    guest = debian()
    with running_machine() as machine:
        machine.create(
            "guest", guest.kernel, ramdisk=guest.ramdisk, memory_mb=128, cmdline=f"{guest.cmdline} quiet"
        )
        machine.expect("guest", r"[#$] ", 120.0)
        machine.poll(3.0)
        pids = [(role, pid) for role in ROLES for pid in machine.processes(role)]
        used = [processor_seconds(pid) for _, pid in pids]
        start = time.monotonic()
        while time.monotonic() - start < SECONDS:
            machine.poll(1.0)
        taken = time.monotonic() - start
        for (role, pid), before in zip(pids, used, strict=True):
            pss, uss = memory(pid)
            share = (processor_seconds(pid) - before) / taken
            print(f"{role:10} PSS {pss:6.1f} MB, USS {uss:6.1f} MB beside guest RAM; {share:6.2%} of a core")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
