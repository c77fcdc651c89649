"""The whole network path, ring to ring, by the project's own frontends: `python benchmarks/net.py [--seconds N] [--json FILE]`.

Two guests' processes (benchmarks/programs/net_front.py), NetIO and hypervisor are processes of a real machine. One sends as fast as it is
answered, with 128 slots under way; what the other received is what counts (NetIO's counters). Beside each figure: the processor time that each
process used for a frame, and the raw ring (benchmarks/block_ring.py) of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.block_ring import raw_ring
from benchmarks.programs.native_guest import create, machine_of, processor_seconds, wait
from tests.support.machines import RunningMachine

RING_REQUESTS = 100_000


def received(machine: RunningMachine, domid: int) -> tuple[int, int, float]:
    """(frames, bytes, moment) of a guest's interface."""
    view = machine.client.request("top")
    vif = next(row["vifs"][0] for row in view["domains"] if row["domid"] == domid)
    return vif[5], vif[4], view["time"]


def connected(machine: RunningMachine, domid: int) -> bool:
    """Both ends are."""
    return bool(machine.client.request("network-list", {"domain": domid})[0]["state"] == 4)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ["DOMICILE_BENCHMARK_SECONDS"] = str(args.seconds)
    before = raw_ring(RING_REQUESTS)
    rows: list[dict[str, Any]] = []
    with machine_of("benchmarks.programs.net_front") as machine:
        target = create(machine, "receiver", cmdline="receive", vifs=[{"mac": "00:16:3e:00:00:02"}])
        while not connected(machine, target):
            machine.poll(0.1)
        create(machine, "sender", cmdline="send", vifs=[{"mac": "00:16:3e:00:00:01"}])
        domains = machine.client.request("check")["counters"]["domains"]
        names = {row["name"]: str(row["domid"]) for row in machine.client.request("list")}
        pids = {name: domains[names[name]]["pid"] for name in ("sender", "NetIO", "receiver")}
        pids["hypervisor"] = machine.processes("hypervisor")[0]
        at = 0
        while wait(machine, at)["stage"] != "over":
            begin = wait(machine, at + 1)
            used = {name: processor_seconds(pid) for name, pid in pids.items()}
            first = received(machine, target)
            end = wait(machine, at + 2)
            last = received(machine, target)
            at += 3
            frames, size, seconds = last[0] - first[0], last[1] - first[1], last[2] - first[2]
            row = {
                "frames": begin["stage"],
                "rate": frames / seconds,
                "megabytes": size / seconds / 1e6,
                "sent": end["sent"],
                "cpu_us": {
                    name: round((processor_seconds(pid) - used[name]) / max(frames, 1) * 1e6)
                    for name, pid in pids.items()
                },
            }
            rows.append(row)
            shares = " ".join(f"{name} {value}" for name, value in row["cpu_us"].items())
            print(
                f"{row['frames']:20} {row['rate']:8,.0f}/s received ({row['sent']:,.0f}/s sent) {row['megabytes']:7,.1f} MB/s"
                f"  CPU us: {shares}  load {os.getloadavg()[0]:.1f}"
            )
    raw = (before + raw_ring(RING_REQUESTS)) / 2
    ratio = rows[0]["rate"] / raw
    print(
        f"raw ring: {raw:,.0f}/s; frames of 60 bytes, ring to ring through the bridge, are {ratio:.1%} of it"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"raw_ring": raw, "ratio": ratio, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
