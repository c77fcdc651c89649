"""A network interface and a disk named `sda` of a full HVM guest: both by the PV drivers of Debian's kernel, after unplug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import SEABIOS, need
from toolstack.guestfetch import FetchError, debian

pytestmark = [pytest.mark.long, pytest.mark.timeout(320)]
SCRIPT = b"""#!/bin/busybox sh
for i in 1 2 3 4 5 6 7 8 9 10; do
    [ -e /sys/class/net/eth0 ] && [ -b /dev/xvda ] && break
    sleep 1
done
echo "driver: $(readlink /sys/class/net/eth0/device/driver)"
ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 -s 1400 10.0.0.1 && echo "the host answers"
echo "disks: $(ls /sys/block | grep -v loop | tr '\\n' ' ')"
echo "the disk says: $(head -n 1 /dev/xvda)"
echo "written by xen-blkfront" | dd of=/dev/xvda bs=512 seek=8 conv=sync,fsync 2>/dev/null
poweroff -f
"""


def test_an_interface_and_a_disk_by_pv_drivers(tmp_path: Path) -> None:
    need(SEABIOS)
    try:
        guest = debian(modules=("xen-netfront", "xen-blkfront"), extra={"etc/rc.guest": SCRIPT})
    except FetchError as error:
        pytest.skip(f"Debian's kernel: {error}")
    image = tmp_path / "disk.img"
    image.write_bytes(b"hello from a disk named sda\n".ljust(1 << 20, b"\0"))
    command = [sys.executable, "-m", "toolstack.cli", "run", "--type", "hvm", "--memory", "256"]
    command += [str(guest.kernel), "--ramdisk", str(guest.ramdisk), "--cmdline", "console=ttyS0"]
    command += ["--disk", f"{image},raw,sda,w", "--net", "--net-host", "10.0.0.1/24", "--timeout", "280"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=310, check=False)
    console = done.stdout.decode("latin1").replace("\r", "")
    assert done.returncode == 0, f"{done.stderr.decode()}\n{console[-3000:]}"
    assert "driver: ../../bus/xen/drivers/vif" in console
    assert "3 packets received" in console
    assert "the host answers" in console
    assert "disks: xvda " in console
    assert "the disk says: hello from a disk named sda" in console
    assert image.read_bytes()[4096:4119] == b"written by xen-blkfront"
