"""What emulated devices cost a full HVM guest once its PV drivers have taken over: Debian's Linux, started directly, reads its disk by xen-blkfront.

    python benchmarks/hvm_pv.py

The guest is paused before and after it reads: its process tells its counters then. Exits to devices beside the vCPU are counted, and
their time reckoned at what one of them costs (benchmarks/hvm.py: at most 1.4 us); the time of those to the device model is measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.machines import RunningMachine, running_machine
from toolstack.cli.images import Images, make_config
from toolstack.guestfetch import debian
from toolstack.xlcfg.devices import parse_disk

ROUNDS = 24
MEGABYTES = 8
BESIDE_US = 1.4
SCRIPT = f"""#!/bin/busybox sh
while ! [ -b /dev/xvda ]; do sleep 1; done
echo rea''dy to read
read line
for i in $(seq {ROUNDS}); do
    dd if=/dev/xvda of=/dev/null bs=128k count={8 * MEGABYTES} iflag=direct 2>/dev/null
done
echo read a''ll
read line
poweroff -f
""".encode()


def sample(machine: RunningMachine) -> dict[str, Any]:
    """The exits so far, by kind."""
    machine.client.request("pause", {"domain": "pc"})
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            stats = machine.client.request("stats", {"domain": "pc"})
            if stats.get("exits"):
                return dict(stats["exits"])
            machine.poll(0.05)
    finally:
        machine.client.request("unpause", {"domain": "pc"})
    raise SystemExit("no counters came")


def main() -> None:
    """Print the share."""
    guest = debian(modules=("xen-blkfront",), extra={"etc/rc.guest": SCRIPT})
    with tempfile.TemporaryDirectory() as scratch, running_machine() as machine:
        image = Path(scratch) / "disk.img"
        image.write_bytes(bytes(MEGABYTES << 20))
        fields = {
            "name": "pc",
            "type": "hvm",
            "memory_mb": 256,
            "uuid": uuid.uuid4().bytes,
            "kernel": str(guest.kernel),
            "ramdisk": str(guest.ramdisk),
            "cmdline": "console=ttyS0",
            "disks": [parse_disk(f"{image},raw,hda,r", "disk")],
        }
        with Images() as images:
            config = make_config(fields, images).model_dump()
            machine.client.request("create", {"config": config, "attach": True}, images.descriptors)
        machine.expect("pc", "ready to read", 400)
        before, began = sample(machine), time.monotonic()
        machine.type("pc", "\r")
        machine.expect("pc", "read all", 400)
        seconds, after = time.monotonic() - began, sample(machine)
        machine.type("pc", "\r")
    grown = {kind: after[kind] - before.get(kind, 0) for kind in after}
    model, model_us = grown.pop("device model", 0), grown.pop("device model us", 0)
    devices = sum(grown.get(kind, 0) for kind in ("in", "out", "mmio read", "mmio write"))
    beside = devices - model - grown.get("posted", 0)
    share = (model_us + beside * BESIDE_US) / (seconds * 1e6)
    print(f"{ROUNDS * MEGABYTES} MB by xen-blkfront in {seconds:.1f} s; exits of that time:")
    for kind, count in sorted(grown.items(), key=lambda item: -item[1]):
        if count:
            print(f"  {kind}: {count}")
    print(f"  to the device model: {model}, {model_us / 1000:.1f} ms")
    print(f"emulated devices: {devices} of {sum(grown.values())} exits, {100 * share:.2f} % of the time")


if __name__ == "__main__":
    main()
