"""How a machine ends when a part that all need dies: at once, and with nothing left (`no_leftovers` in conftest.py looks)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guests.build import build
from tests.support.machines import running_machine
from toolstack.client import MachineGone


@pytest.mark.parametrize("victim", ["hypervisor", "dom0", "warden"])
def test_the_death_of_a_part_that_all_need_ends_the_machine(victim: str) -> None:
    """`kill -9` of the hypervisor, of Dom0 or of the warden: every process is gone soon, and the client is told."""
    with running_machine() as machine:
        machine.create("guest", build("hello"), paused=True)
        domains = machine.check()["domains"]
        (hypervisor,) = machine.processes("hypervisor")
        found = {"hypervisor": hypervisor, **{f"d{number}": row["pid"] for number, row in domains.items()}}
        process = {
            "hypervisor": hypervisor,
            "dom0": found["d0"],
            "warden": int(machine.machine.runtime.pid.read_text(encoding="ascii")),
        }[victim]
        ends = [os.pidfd_open(number) for number in found.values()]
        os.kill(process, signal.SIGKILL)
        with pytest.raises(MachineGone):
            machine.expect("guest", "words that it never says")
        for pidfd in ends:
            assert wait_readable(pidfd, 5.0), "a process outlived the machine"
            os.close(pidfd)
        if victim == "warden":  # it cannot tidy up any more: whoever starts a machine of that name does
            machine.machine.close()
            machine.machine.runtime.remove()


def wait_readable(fd: int, timeout: float) -> bool:
    """Whether `fd` becomes readable in time."""

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


def test_the_machine_ends_with_its_owner() -> None:
    """A command that is killed takes its machine along: nothing is left."""
    code = (
        "import sys, time; from toolstack.machine import Machine; m = Machine(); print('up', flush=True);"
        "sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    owner.kill()
    owner.wait(10)
    owner.stdout.close()
    assert owner.stdin is not None
    owner.stdin.close()
