"""A guest's disk survives the deaths of DomIO and of the device process: no I/O error, nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.disks.disk_images import MODULES, fsck, make_ext4, md5_of, tool
from tests.integration.disks.victims import victim
from tests.support.machines import Expected, RunningMachine, running_machine
from toolstack.guestfetch import debian

WRITER = b"""i=0; while [ ! -b /dev/xvda ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
mkdir -p /mnt; mount -t ext4 /dev/xvda /mnt && echo MOUNTED
n=0
while [ ! -e /mnt/stop ]; do
 f=f$((n%200))
 dd if=/dev/urandom of=/mnt/$f bs=16k count=4 conv=fsync 2>/dev/null && s=$(md5sum < /mnt/$f) && sync && echo "ACK $f ${s%% *}"
 n=$((n+1))
 read -t 0 x && echo stop > /mnt/stop
done
rm /mnt/stop
umount /mnt
echo ERRORS $(dmesg | grep -ciE "i/o error|ext4-fs error|remounting")
echo DONE; poweroff -f
"""
ACK = re.compile(r"ACK (f\d+) ([0-9a-f]{32})")
RESTART_S = 15.0
"""How long an interruption may last on a busy host; the aim is two seconds."""


def _progress(machine: RunningMachine, timeout: float) -> float:
    """Wait for two acknowledgements from now on (the first may have been under way); how long it took."""
    begun = time.monotonic()
    seen = len(ACK.findall(machine.text["writer"]))
    while len(ACK.findall(machine.text["writer"])) < seen + 2:
        if time.monotonic() - begun > timeout or "writer" in machine.ended:
            logs = [
                path.read_text(errors="replace")[-1500:] for path in machine.machine.runtime.logs.iterdir()
            ]
            raise Expected(
                f"the writer does not go on; {machine.text['writer'][-1500:]}\n" + "\n---\n".join(logs)
            )
        machine.poll(0.2)
    return time.monotonic() - begun


def _interrupt(machine: RunningMachine, role: str, number: int, chance: random.Random) -> None:
    """At a random moment, send the signal to the process of that role."""
    until = time.monotonic() + chance.uniform(0.0, 0.4)
    while time.monotonic() < until:
        machine.poll(0.02)
    os.kill(victim(machine, role), number)


def _survive(tmp_path: Path, plan: Sequence[tuple[str, int]], domio: str = "native") -> list[float]:
    """Run the writer through the interruptions, then see that all is there; the pauses. `domio`: the kind of DomIO."""
    tool("mkfs.ext4")
    guest = debian(modules=MODULES, extra={"etc/rc.guest": WRITER})
    image = make_ext4(tmp_path / "disk.img", 48)
    seed = int(os.environ.get("DOMICILE_SEED", str(random.randrange(1 << 30))))
    print(f"DOMICILE_SEED={seed}")
    chance = random.Random(seed)
    pauses = []
    with running_machine(domio=domio) as machine:
        file = os.open(image, os.O_RDWR)
        try:
            with open(guest.kernel, "rb") as kernel, open(str(guest.ramdisk), "rb") as ramdisk:
                config = {
                    "name": "writer",
                    "memory_mb": 128,
                    "uuid": os.urandom(16),
                    "kernel": 0,
                    "kernel_path": str(guest.kernel),
                    "ramdisk": 1,
                    "ramdisk_path": str(guest.ramdisk),
                    "cmdline": f"{guest.cmdline} quiet",
                    "disks": [{"vdev": "xvda", "format": "raw", "readonly": False, "file": 2}],
                }
                fds = [kernel.fileno(), ramdisk.fileno(), file]
                machine.client.request("create", {"config": config, "attach": True}, fds)
        finally:
            os.close(file)
        machine.expect("writer", "MOUNTED", 120.0)
        _progress(machine, 60.0)
        before = machine.check()
        for role, number in plan:
            _interrupt(machine, role, number, chance)
            pauses.append(_progress(machine, RESTART_S))
        after = machine.check()
        machine.type("writer", "x\n")
        machine.expect("writer", r"ERRORS \d+", 60.0)
        assert "ERRORS 0" in machine.text["writer"]
        assert machine.wait_end("writer", 60.0) == "poweroff"
        acknowledged = dict(ACK.findall(machine.text["writer"]))
    # What the dead held is given back: references and mappings are bounded by what is in flight, descriptors are few.
    print(f"{len(acknowledged)} files, pauses {[round(pause, 2) for pause in pauses]}")
    assert after["windows"] <= before["windows"] + 2
    assert after["descriptors"] <= before["descriptors"] + 8
    for number in before["domains"]:
        assert after["domains"][number]["ports"] <= before["domains"][number]["ports"] + 1
        assert after["domains"][number]["mappings"] <= before["domains"][number]["mappings"] + 400
    fsck(image)
    assert {name: md5_of(image, name, tmp_path) for name in acknowledged} == acknowledged
    return pauses


@pytest.mark.timeout(240)
def test_kills_and_stops_in_turn(tmp_path: Path) -> None:
    """SIGKILL of each in turn, then each is stopped and never continued: the writer pauses, and nothing is wrong after."""
    plan = [(role, signal.SIGKILL) for role in ("domio", "nvme", "domio", "nvme")]
    _survive(tmp_path, [*plan, ("domio", signal.SIGSTOP), ("nvme", signal.SIGSTOP)])


@pytest.mark.timeout(240)
def test_kills_with_a_guest_program_as_domio(tmp_path: Path) -> None:
    """The same where DomIO is a guest on a vCPU: its process, then the device's."""
    _survive(tmp_path, [("domio", signal.SIGKILL), ("nvme", signal.SIGKILL)], "guest")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kills_and_stops_with_a_guest_program_as_domio(tmp_path: Path) -> None:
    """More of them, and each is stopped and never continued."""
    plan = [(role, signal.SIGKILL) for role in ("domio", "nvme") * 5]
    _survive(tmp_path, [*plan, ("domio", signal.SIGSTOP), ("nvme", signal.SIGSTOP)], "guest")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_kills(tmp_path: Path) -> None:
    """The same a hundred times; every tenth is a stop."""
    plan = [
        (("domio", "nvme")[turn % 2], signal.SIGSTOP if turn % 20 in (8, 19) else signal.SIGKILL)
        for turn in range(100)
    ]
    _survive(tmp_path, plan)
