"""Chaos on real processes, continued: what ends with the process that is struck ends cleanly, and nothing of it is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.chaos import ChaosMachine, blank, chaos_machine, record
from tests.support.machines import RunningMachine
from toolstack.client import MachineError, MachineGone
from toolstack.faults import What
from toolstack.guestfetch import fetch


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("what", "end", "state"),
    [
        pytest.param(what, end, state, marks=[] if (what, end, state) in ((What.SEGFAULT, "front", 3), (What.KILL, "front", 1)) else [pytest.mark.long])
        for what in (What.KILL, What.SEGFAULT)
        for end, state in (("front", 1), ("front", 3), ("back", 1), ("back", 2), ("back", 4))
    ],
)  # fmt: skip
def test_a_guest_dies_and_leaves_nothing(tmp_path: Path, what: What, end: str, state: int) -> None:
    """GRUB with a disk (its front end stays in Initialised): its process is struck; all that it had comes back, and the next guest is served by the same DomIO."""
    image = blank(tmp_path / "disk.img")
    disk = {"vdev": "xvda", "format": "raw", "readonly": False, "target": str(image)}
    with chaos_machine() as machine:
        fault = machine.faults.add(what, target="domu", event=f"xenbus:{end}:{state}")
        begun = time.monotonic()
        for turn in ("first", "second"):
            file = os.open(image, os.O_RDWR)
            try:
                create_with_disk(machine, turn, {**disk, "file": 1}, file)
            except MachineError:
                assert turn == "first", "the second guest was not hit by anything"
            finally:
                os.close(file)
            if turn == "first":
                assert machine.faults.wait(fault, machine.poll, 60.0).pids, "no guest's process was struck"
                if turn in machine.domains():
                    assert machine.wait_end(turn) == "crash"
                record(
                    target="domu", what=what, place=f"{end} {state}", outcome="crash",
                    seconds=round(time.monotonic() - begun, 2),
                )  # fmt: skip
        machine.expect("second", "grub> ", 60.0)
        machine.type("second", "ls\n")
        machine.expect("second", r"\(xen/xvda\)")
        machine.client.request("destroy", {"domain": "second"})
        machine.client.request("destroy", {"domain": "DomIO"})
        machine.settled()


def create_with_disk(machine: RunningMachine, name: str, disk: dict[str, object], file: int) -> None:
    """A GRUB with that disk."""
    with open(fetch("grub").kernel, "rb") as kernel:
        config = {
            "name": name, "memory_mb": 64, "uuid": os.urandom(16), "kernel": 0, "kernel_path": "grub", "disks": [disk],
        }  # fmt: skip
        machine.client.request("create", {"config": config, "attach": True}, [kernel.fileno(), file])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", [What.KILL, pytest.param(What.SEGFAULT, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", ["hypervisor", pytest.param("dom0", marks=pytest.mark.long)])
def test_what_a_machine_cannot_lose_takes_it_down_cleanly(tmp_path: Path, target: str, what: What) -> None:
    """The hypervisor, or Dom0: as on a host, all is over; everybody is told within seconds, and no process is left (a fixture
    looks)."""
    image = blank(tmp_path / "disk.img")
    with chaos_machine() as machine:
        machine.create("g", fetch("grub").kernel, memory_mb=64)
        machine.expect("g", "grub> ", 60.0)
        fault = machine.faults.add(what, target=target, event="xenbus:back:1")
        begun = time.monotonic()
        with pytest.raises((MachineGone, MachineError)):
            until_gone(machine, image)
        seconds = time.monotonic() - begun
        assert machine.faults.wait(fault, timeout=1.0).pids, f"there was no process {target}"
        assert seconds < 15.0
        machine.machine._process.wait(15.0)
        record(target=target, what=what, place="back 1", outcome="machine ends", seconds=round(seconds, 2))


def until_gone(machine: ChaosMachine, image: Path) -> None:
    """Attach a disk, and ask until nobody answers. MachineGone, MachineError."""
    machine.attach("g", "xvdb", image)
    while True:
        machine.poll(0.1)
        machine.client.request("uptime", timeout=10.0)
