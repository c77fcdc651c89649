"""User processes of Debian's Linux: exceptions, floating point, threads, copy on write, timers, and a debugger's means."""

from __future__ import annotations

import re

import pytest

from guests.build import build_user
from tests.support.machines import running_machine
from toolstack.guestfetch import INIT_LINE, debian

BOUND_S = 240.0


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "vcpus"), [("pv", 1), ("pv", 2), ("pvh", 1)])
def test_every_line_of_the_user_program_is_ok(kind: str, vcpus: int) -> None:
    guest = debian(extra={"bin/processes": build_user("processes").read_bytes()})
    with running_machine() as machine:
        machine.create(
            "debian",
            guest.kernel,
            ramdisk=guest.ramdisk,
            memory_mb=160,
            cmdline=f"{guest.cmdline} quiet",
            type=kind,
            vcpus=vcpus,
        )
        machine.expect("debian", INIT_LINE, BOUND_S)
        machine.expect("debian", "# ", BOUND_S)
        machine.type("debian", "/bin/processes\n")
        machine.expect("debian", r"processes: \d+ failed", BOUND_S)
        lines = machine.text["debian"].replace("\r", "").splitlines()
        assert [line for line in lines if line.startswith("not ok")] == []
        plan = next(line for line in lines if re.fullmatch(r"1\.\.\d+", line))
        assert sum(line.startswith("ok ") for line in lines) == int(plan[3:]) > 20
