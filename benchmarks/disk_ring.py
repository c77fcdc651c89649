"""The whole disk path, ring to ring, by the project's own frontend: `python benchmarks/disk_ring.py [--seconds N] [--one-time] [--profile DIR]`.

Frontend (benchmarks/programs/disk_front.py, in a guest's process), DomIO, NVMe process and hypervisor are processes of a real machine; 32 requests
under way; a raw file in the page cache. Beside each figure: the processor time that each process used for a request, and the raw ring
(benchmarks/block_ring.py) of the same run. Persistent grants, and indirect descriptors for 128 KiB, unless --one-time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.block_ring import raw_ring
from benchmarks.programs.native_guest import machine_of, processor_seconds, wait
from toolstack.guestfetch import fetch

DISK = 128 << 20
ROLES = ("domu", "domio", "nvme", "hypervisor")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--one-time", action="store_true")
    parser.add_argument("--profile", metavar="DIR", help="perf record of each process and stage")
    args = parser.parse_args()
    os.environ["DOMICILE_BENCHMARK_SECONDS"] = str(args.seconds)
    os.environ["DOMICILE_BENCHMARK_PERSISTENT"] = str(int(not args.one_time))
    before = raw_ring(100_000)
    with tempfile.TemporaryFile() as file, machine_of("benchmarks.programs.disk_front") as machine:
        file.write(os.urandom(1 << 20) * (DISK >> 20))
        file.flush()
        kernel = os.open(fetch("grub").kernel, os.O_RDONLY)
        config = {
            "name": "guest",
            "memory_mb": 96,
            "uuid": os.urandom(16),
            "kernel": 0,
            "kernel_path": str(fetch("grub").kernel),
            "disks": [{"vdev": "xvda", "format": "raw", "readonly": False, "file": 1}],
        }
        machine.client.request("create", {"config": config, "attach": True}, [kernel, file.fileno()])
        os.close(kernel)
        wait(machine, 0)
        pids = {role: machine.processes(role)[0] for role in ROLES}
        rates = {}
        at = 1
        while wait(machine, at)["stage"] != "over":
            begin = wait(machine, at + 1)
            used = {role: processor_seconds(pid) for role, pid in pids.items()}
            if args.profile:  # the rest of the stage
                profile(Path(args.profile), begin["stage"], pids, args.seconds)
            end = wait(machine, at + 2)
            at += 3
            done = end["rate"] * args.seconds
            shares = " ".join(
                f"{role} {(processor_seconds(pid) - used[role]) / done * 1e6:.0f}"
                for role, pid in pids.items()
            )
            rates[end["stage"]] = end["rate"]
            load = os.getloadavg()[0]
            print(
                f"{end['stage']:26} {end['rate']:8,.0f}/s {end['megabytes']:7,.0f} MB/s  CPU us: {shares}  load {load:.1f}"
            )
    raw = (before + raw_ring(100_000)) / 2
    print(
        f"raw ring: {raw:,.0f}/s; 4 KiB random reads are {rates['4 KiB random reads'] / raw:.1%} of it (aim 10 %, goal 33 %)"
    )


def profile(directory: Path, stage: str, pids: dict[str, int], seconds: float) -> None:
    """perf record of every process for most of the stage."""
    directory.mkdir(exist_ok=True)
    running = [
        subprocess.Popen(
            ["perf", "record", "-q", "-F", "499", "-g", "-p", str(pid), "-o",
             str(directory / f"{stage.replace(' ', '_')}.{role}"), "sleep", str(seconds * 0.8)],
            stderr=subprocess.DEVNULL,
        )
        for role, pid in pids.items()
    ]  # fmt: skip
    for each in running:
        each.wait()


if __name__ == "__main__":
    main()
