"""Disks on running guests through the command: block-attach, block-list, block-detach, iommu; DomIO that goes for good."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.disks.disk_images import make_ext4
from tests.support.machines import RunningMachine, running_machine
from toolstack.domio import KINDS
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(120)


def domicile(machine: RunningMachine, *words: str, status: int = 0) -> str:
    """The command against that machine; its output, and its errors after that."""
    command = [sys.executable, "-m", "toolstack.cli", "-M", machine.machine.runtime.root.name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def image(tmp_path: Path, name: str) -> Path:
    """An ext4 file system with one file."""
    content = tmp_path / f"{name}.d"
    content.mkdir()
    (content / "hello.txt").write_text(f"this-is-{name}\n")
    return make_ext4(tmp_path / f"{name}.img", 16, content)


def states(machine: RunningMachine) -> dict[int, tuple[str, ...]]:
    """Rows of block-list by virtual device number."""
    head, *rows = domicile(machine, "block-list", "g").splitlines()
    assert head.split() == ["Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path"]
    return {int(row.split()[0]): tuple(row.split()[1:]) for row in rows}


def an_own_address(machine: RunningMachine) -> str:
    """An address that DomIO's tables hold: a native one's are its guest frames, a guest's the machine frames that it owns."""
    for address in (0x1234, *range(0x1000234, 0x40000000, 2 << 20)):
        view = machine.client.request("iommu", {"domain": "DomIO", "iova": address})
        if view["walk"]["mfn"] is not None:
            return hex(address)
    raise AssertionError("nothing is mapped")


@pytest.mark.parametrize("domio", KINDS)
def test_disks_come_and_go_and_grub_reads_them(tmp_path: Path, domio: str) -> None:
    """GRUB lists and reads a file of its disk; a second disk is attached, listed, seen behind the IOMMU and taken away."""
    first, second = image(tmp_path, "first"), image(tmp_path, "second")
    config = tmp_path / "g.cfg"
    config.write_text(f'name="g"\nkernel="{fetch("grub").kernel}"\nmemory=64\ndisk=["{first},raw,xvda,w"]\n')
    with running_machine(domio=domio) as machine:
        domicile(machine, "create", str(config))
        machine.client.request("console", {"domain": "g"})
        machine.expect("g", "grub> ", 60.0)
        machine.type("g", "ls (xen/xvda)/\n")
        machine.expect("g", r"hello\.txt")
        machine.type("g", "cat (xen/xvda)/hello.txt\n")
        machine.expect("g", "this-is-first")
        domicile(machine, "block-attach", "g", f"{second},raw,xvdb,r")
        domicile(machine, "block-attach", "g", f"{second},raw,xvdb,r", status=1)
        rows = states(machine)
        assert set(rows) == {51712, 51728}
        assert rows[51712][2] == "4"
        view = json.loads(domicile(machine, "iommu", "--json"))
        assert {row["bdf"] for row in view["devices"]} == {8, 16}
        assert view["devices"][0]["bytes_written"] > 0
        text = domicile(machine, "iommu", "DomIO", "--walk", an_own_address(machine))
        assert re.search(
            r"level 4: .*\n.*level 3: .*\n(.*\n)+?.*-> machine address 0x[0-9a-f]*234 \(read and write", text
        )
        assert "not mapped" in domicile(machine, "iommu", "00:01.0", "--walk", hex(1 << 40))
        assert "owns no device" in domicile(machine, "iommu", "g", status=1)
        domicile(machine, "block-detach", "--force", "g", "xvdb")
        assert set(states(machine)) == {51712}
        assert "no disk xvdb" in domicile(machine, "block-detach", "g", "xvdb", status=1)
        machine.type("g", "cat (xen/xvda)/hello.txt\n")
        machine.expect("g", "this-is-first")
        machine.check()


@pytest.mark.parametrize("domio", KINDS)
def test_domio_destroyed_for_good_leaves_its_backends_closed(tmp_path: Path, domio: str) -> None:
    """The backend's state is 6 and no process of it is left; the next disk brings a new DomIO."""
    config = tmp_path / "g.cfg"
    first = image(tmp_path, "first")
    config.write_text(f'name="g"\nkernel="{fetch("grub").kernel}"\nmemory=64\ndisk=["{first},raw,xvda,w"]\n')
    with running_machine(domio=domio) as machine:
        domicile(machine, "create", str(config))
        machine.client.request("console", {"domain": "g"})
        machine.expect("g", "grub> ", 60.0)
        guests = len(machine.processes("domu")) - (domio == "guest")
        (back,) = [row[-1] for row in states(machine).values()]
        domicile(machine, "destroy", "DomIO")
        assert domicile(machine, "xenstore-read", f"{back}/state").strip() == "6"
        assert "DomIO" not in machine.domains()
        for role, left in (("domio", 0), ("nvme", 0), ("domu", guests)):
            deadline = time.monotonic() + 20
            while len(machine.processes(role)) > left:
                assert time.monotonic() < deadline, f"a process of {role} is left"
                machine.poll(0.05)
        domicile(machine, "block-attach", "g", f"{first},raw,xvdc,r")
        assert machine.domains()["DomIO"]["domid"] > 2
        machine.client.request("destroy", {"domain": "g"})
        machine.check()
