"""Disks through the whole path: `python benchmarks/disk.py [--dd] [--megabytes N] [--profile DIR]`: a Debian PV guest with /dev/xvda behind
DomIO, NVMe process and IOMMU.

* dd in the guest, direct, 128 KiB a request: MB/s read and written, by the guest's clock; and the processor time in microseconds that each process
  used for a request. `--dd` stops there. `--profile DIR` has `perf` look at each process.
* From SIGKILL of DomIO, and of the device process, to the guest's next acknowledged 4 KiB write: seconds on the host's clock; the guest
  writes and syncs in a loop, so that this contains one such round (its usual length is printed too).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.programs.native_guest import processor_seconds
from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import debian

KILLS = 5
ROUNDS = 2
ROLES = ("domu", "domio", "nvme", "hypervisor")
BOUND_S = 240.0


def dd_script(device: str, megabytes: int) -> str:
    """Lines for the guest's shell: write the whole device and read it, twice, between lines of the guest's /proc/uptime."""
    return f"""i=0; while [ ! -b {device} ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
for n in {" ".join(str(number) for number in range(ROUNDS))}; do
echo BEGIN $(cut -d' ' -f1 /proc/uptime); dd if=/dev/zero of={device} bs=128k count={megabytes * 8} oflag=direct 2>/dev/null
echo WRITE $(cut -d' ' -f1 /proc/uptime)
echo BEGIN $(cut -d' ' -f1 /proc/uptime); dd if={device} of=/dev/null bs=128k count={megabytes * 8} iflag=direct 2>/dev/null
echo READ $(cut -d' ' -f1 /proc/uptime)
done
echo LOOP
"""


def rate(megabytes: int, begin: str, end: str) -> float:
    """MB/s between two times of the guest's /proc/uptime (of a hundredth of a second)."""
    return (megabytes << 20) / max(0.01, float(end) - float(begin)) / 1e6


def tick(machine: RunningMachine) -> float:
    """Seconds to the next but one acknowledgement: the next may be of before."""
    start = time.monotonic()
    machine.expect("guest", "TICK[^T]*TICK", 60.0)
    return time.monotonic() - start


def dd(machine: RunningMachine, megabytes: int, directory: Path | None) -> None:
    """The table of dd."""
    found = defaultdict(list)
    for number in range(2 * ROUNDS):
        begin = machine.expect("guest", r"BEGIN ([0-9.]+)", BOUND_S)[1]
        pids = {role: machine.processes(role)[0] for role in ROLES}
        used = {role: processor_seconds(pid) for role, pid in pids.items()}
        lookers = profile(directory, f"{('write', 'read')[number % 2]}{number // 2}", pids)
        end = machine.expect("guest", r"(WRITE|READ) ([0-9.]+)", BOUND_S)
        for looker in lookers:
            looker.send_signal(signal.SIGINT)
            looker.wait(30)
        shares = {role: processor_seconds(pid) - used[role] for role, pid in pids.items()}
        found[end[1]].append((rate(megabytes, begin, end[2]), shares))
    for word, rounds in found.items():
        text = " ".join(
            f"{role} {min(shares[role] for _, shares in rounds) / (megabytes * 8) * 1e6:.0f}"
            for role in ROLES
        )
        median = statistics.median(speed for speed, _ in rounds)
        print(
            f"dd {word.lower():<5} 128 KiB direct: {median:7.1f} MB/s (of {len(rounds)})  CPU us: {text}  load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def profile(directory: Path | None, stage: str, pids: dict[str, int]) -> list[subprocess.Popen[bytes]]:
    """`perf record` of every process, until it is interrupted."""
    if directory is None:
        return []
    directory.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            ["perf", "record", "-q", "-F", "499", "-g", "-p", str(pid), "-o", str(directory / f"{stage}.{role}")],
            stderr=subprocess.DEVNULL,
        )
        for role, pid in pids.items()
    ]  # fmt: skip


def survival(machine: RunningMachine) -> None:
    """The table of kills."""
    usual = statistics.median(tick(machine) for _ in range(10))
    print(f"usual round: {usual:.3f} s")
    for role in ("domio", "nvme"):
        pauses = []
        for _ in range(KILLS):
            os.kill(machine.processes(role)[0], signal.SIGKILL)
            pauses.append(tick(machine))
            for _ in range(5):
                tick(machine)
        print(
            f"SIGKILL of {role:<5} to answered: median {statistics.median(pauses):.2f} s, worst {max(pauses):.2f} s"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dd", action="store_true", help="no kills")
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--profile", metavar="DIR", type=Path)
    args = parser.parse_args()
    loop = "while true; do dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct 2>/dev/null && echo TICK; done\n"
    script = dd_script("/dev/xvda", args.megabytes) + ("sleep 1000\n" if args.dd else loop)
    guest = debian(modules=("xen-blkfront",), extra={"etc/rc.guest": script.encode()})
    with tempfile.TemporaryFile() as disk, running_machine() as machine:
        disk.truncate(args.megabytes << 20)
        with open(guest.kernel, "rb") as kernel, open(str(guest.ramdisk), "rb") as ramdisk:
            config = {
                "name": "guest",
                "memory_mb": 128,
                "uuid": os.urandom(16),
                "kernel": 0,
                "kernel_path": str(guest.kernel),
                "ramdisk": 1,
                "ramdisk_path": str(guest.ramdisk),
                "cmdline": f"{guest.cmdline} quiet",
                "disks": [{"vdev": "xvda", "format": "raw", "readonly": False, "file": 2}],
            }
            fds = [kernel.fileno(), ramdisk.fileno(), disk.fileno()]
            machine.client.request("create", {"config": config, "attach": True}, fds)
        dd(machine, args.megabytes, args.profile)
        if not args.dd:
            survival(machine)


if __name__ == "__main__":
    main()
