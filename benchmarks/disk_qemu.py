"""What plain QEMU does with the same guest: `python benchmarks/disk_qemu.py [--megabytes N]`: Debian's Linux with a virtio-blk disk under
`qemu-system-x86_64 -accel tcg`, and the `dd` of benchmarks/disk.py in it, by the guest's clock; and QEMU's own processor time a request.

Needs Debian's package qemu-system-x86 (and seabios); without it this says so and ends well. The disk is a raw file in the page cache, as
there; `cache=writeback` is QEMU's default.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.disk import ROUNDS, dd_script, rate
from benchmarks.programs.native_guest import processor_seconds
from toolstack.guestfetch import debian

QEMU = "qemu-system-x86_64"
BOUND_S = 240.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    if shutil.which(QEMU) is None:
        print(f"skipped: no {QEMU} here (Debian's package qemu-system-x86)")
        return
    script = dd_script("/dev/vda", args.megabytes) + "poweroff -f\n"
    guest = debian(modules=("virtio_pci", "virtio_blk"), extra={"etc/rc.guest": script.encode()})
    with tempfile.NamedTemporaryFile(suffix=".img") as disk:
        disk.truncate(args.megabytes << 20)
        command = [
            QEMU, "-accel", "tcg", "-machine", "pc", "-m", "128", "-smp", "1", "-nodefaults", "-no-reboot", "-display", "none",
            "-serial", "stdio", "-kernel", str(guest.kernel), "-initrd", str(guest.ramdisk), "-append", "console=ttyS0 quiet",
            "-drive", f"file={disk.name},format=raw,if=virtio",
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
            try:
                show(qemu, args.megabytes)
            finally:
                qemu.kill()


def show(qemu: subprocess.Popen[bytes], megabytes: int) -> None:
    """Read the console until all is told. SystemExit if that does not come."""
    assert qemu.stdout is not None
    text, seen, begin, used = "", 0, "0", 0.0
    found: dict[str, list[tuple[float, float]]] = {"WRITE": [], "READ": []}
    until = time.monotonic() + BOUND_S
    while any(len(rounds) < ROUNDS for rounds in found.values()):
        ready, _, _ = select.select([qemu.stdout], [], [], max(0.0, until - time.monotonic()))
        data = os.read(qemu.stdout.fileno(), 4096) if ready else b""
        if not data:
            raise SystemExit(f"QEMU's guest did not come to its end:\n{text[-2000:]}")
        text += data.decode("latin1")
        for line in re.finditer(r"(BEGIN|WRITE|READ) ([0-9.]+)\r?\n", text[seen:]):
            now = processor_seconds(qemu.pid)
            if line[1] == "BEGIN":
                begin = line[2]
            else:
                found[line[1]].append((rate(megabytes, begin, line[2]), now - used))
            used = now
        seen = text.rfind("\n") + 1
    for word, rounds in found.items():
        speed = statistics.median(each for each, _ in rounds)
        spent = min(each for _, each in rounds) / (megabytes * 8) * 1e6
        print(
            f"QEMU TCG, virtio-blk: dd {word.lower():<5} 128 KiB direct: {speed:7.1f} MB/s (of {len(rounds)})  CPU us: {spent:.0f}"
            f"  load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
