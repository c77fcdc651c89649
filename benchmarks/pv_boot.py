"""Processor time of a boot of Debian's kernel, PV, 256 MB, to `Run /init`: `python benchmarks/pv_boot.py [RUNS]`.

One process, without a machine around it: the vCPU, the memory management and the fake hypervisor of `tests/unit/pvcpu/harness.py`.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.unit.pvcpu import harness
from toolstack.guestfetch import fetch


def boot() -> tuple[float, float, float]:
    """Seconds of user and system time, and on the wall."""
    guest = fetch("debian")
    assert guest.ramdisk is not None
    machine = harness.Machine(256)
    machine.load(Path(guest.kernel).read_bytes(), b"console=hvc0", Path(guest.ramdisk).read_bytes())
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    how = machine.run(seconds=120.0, until=b"Run /init")
    after = resource.getrusage(resource.RUSAGE_SELF)
    if how != "until":
        raise SystemExit(
            f"the guest did not come to its init: {how}\n" + machine.upstream.console[-2000:].decode("latin1")
        )
    return (
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        time.monotonic() - start,
    )


def main() -> None:
    """Print a line a run."""
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 2):
        user, system, wall = boot()
        load = os.getloadavg()[0]
        print(
            f"to `Run /init`: {user:.1f} s user, {system:.1f} s system, {wall:.1f} s wall (load {load:.1f})"
        )


if __name__ == "__main__":
    main()
