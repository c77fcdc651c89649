"""`domicile top` on a real machine: counters of disks are the back end's own, and go on when DomIO is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(120)


def top(machine: RunningMachine, *words: str) -> dict[str, dict[str, str]]:
    """The last table: rows by name."""
    command = [sys.executable, "-m", "toolstack.cli", "-M", machine.machine.runtime.root.name, "top", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [line.replace("no limit", "no_limit").split() for line in done.stdout.splitlines()]
    start = max(place for place, line in enumerate(lines) if line[0] == "NAME")
    return {line[0]: dict(zip(lines[start], line, strict=True)) for line in lines[start + 1 :]}


@pytest.fixture
def grub(tmp_path: Path) -> Iterator[RunningMachine]:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    config = tmp_path / "g.cfg"
    config.write_text(f'name="g"\nkernel="{fetch("grub").kernel}"\nmemory=64\ndisk=["{disk},raw,xvda,w"]\n')
    with running_machine() as machine:
        words = ["-M", machine.machine.runtime.root.name, "create", str(config)]
        subprocess.run(
            [sys.executable, "-m", "toolstack.cli", *words], check=True, timeout=60, capture_output=True
        )
        machine.client.request("console", {"domain": "g"})
        machine.expect("g", "grub> ", 60.0)
        yield machine


def read(machine: RunningMachine, sector: int) -> None:
    machine.type("g", f"hexdump (xen/xvda){sector}+8 -s 0 -n 512\n")
    machine.expect("g", "000001f0 .*\n")
    machine.expect("g", "grub> ")


def test_counters_are_the_back_ends_and_outlive_it(grub: RunningMachine) -> None:
    """GRUB reads 64 sectors around what it is asked for, in requests of 8: so many more are counted; also by a DomIO that took the
    place of one that was killed. CPU time, memory and vCPUs are those of `list`."""
    before = top(grub, "-b", "-i", "1")["g"]
    assert int(before["VBD_RD"]) > 0
    assert int(before["VBD_RSECT"]) >= int(before["VBD_RD"])
    read(grub, 77776)
    after = top(grub)["g"]  # no terminal: text
    assert int(after["VBD_RD"]) - int(before["VBD_RD"]) == 8
    assert int(after["VBD_RSECT"]) - int(before["VBD_RSECT"]) == 64
    assert (after["VBD_WR"], after["VBDS"], after["VCPUS"], after["MEM(k)"]) == ("0", "1", "1", "65536")
    domio = grub.domains()["DomIO"]["domid"]
    os.kill(grub.process_of(domio), signal.SIGKILL)
    read(grub, 99984)
    later = top(grub, "-b", "-i", "2", "-d", "0.2")
    assert (
        int(later["g"]["VBD_RD"]) - int(after["VBD_RD"]) >= 8
    )  # those under way at the death are done again
    assert int(later["g"]["VBD_RD"]) - int(after["VBD_RD"]) < 20
    assert set(later) == {"Domain-0", "DomIO", "g"}
