"""Disks through the whole path: `python benchmarks/disk.py`: a Debian PV guest with /dev/xvda behind DomIO, NVMe process and IOMMU.

* dd in the guest, direct, 128 KiB a request: MB/s read and written, by the guest's clock.
* From SIGKILL of DomIO, and of the device process, to the guest's next acknowledged 4 KiB write: seconds on the host's clock; the guest
  writes and syncs in a loop, so that this contains one such round (its usual length is printed too).
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import debian

MEGABYTES = 16
KILLS = 5
SCRIPT = f"""i=0; while [ ! -b /dev/xvda ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
for n in 1 2; do
s=$(cut -d' ' -f1 /proc/uptime); dd if=/dev/zero of=/dev/xvda bs=128k count={MEGABYTES * 8} oflag=direct 2>/dev/null
echo WRITE $s $(cut -d' ' -f1 /proc/uptime)
s=$(cut -d' ' -f1 /proc/uptime); dd if=/dev/xvda of=/dev/null bs=128k count={MEGABYTES * 8} iflag=direct 2>/dev/null
echo READ $s $(cut -d' ' -f1 /proc/uptime)
done
echo LOOP
while true; do dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct 2>/dev/null && echo TICK; done
"""


def rate(line: str) -> float:
    """MB/s between two times of the guest's /proc/uptime (of a hundredth of a second)."""
    start, end = (float(word) for word in line.split())
    return (MEGABYTES << 20) / max(0.01, end - start) / 1e6


def tick(machine: RunningMachine) -> float:
    """Seconds to the next but one acknowledgement: the next may be of before."""
    start = time.monotonic()
    machine.expect("guest", "TICK[^T]*TICK", 60.0)
    return time.monotonic() - start


def main() -> None:
    """Print the table."""
    guest = debian(modules=("xen-blkfront",), extra={"etc/rc.guest": SCRIPT.encode()})
    with tempfile.TemporaryFile() as disk, running_machine() as machine:
        disk.truncate(MEGABYTES << 20)
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
        machine.expect("guest", "LOOP", 240.0)
        for word in ("WRITE", "READ"):
            rates = [
                rate(line) for line in re.findall(rf"^{word} ([0-9. ]+)", machine.text["guest"], re.MULTILINE)
            ]
            print(
                f"dd {word.lower():<5} 128 KiB direct: {statistics.median(rates):8.1f} MB/s (of {len(rates)})"
            )
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


if __name__ == "__main__":
    main()
