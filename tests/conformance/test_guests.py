"""The conformance guests of `guests/` on a real machine: every line that each prints must be `ok`.

They state what Xen 4.17 does (guests/README.md says how that was found out); here it is shown that Domicile does the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from guests.build import build, programs
from tests.support.machines import RunningMachine, running_machine

VCPUS = {"events": 2, "sched": 2, "time": 2}
"""Programs that need more than one vCPU for some of their lines."""


@pytest.fixture(scope="module")
def machine(shared_machines: None) -> Iterator[RunningMachine]:
    """One machine for all programs: they run one after another, as domains of it."""
    with running_machine() as machine:
        yield machine


TELLING = {"hello": "hello from a Xen guest", "wallclock": "the time of day is "}
"""Programs that check nothing, and what each says."""
ENDLESS = {"spin"}
"""Programs for other tests: they check nothing, and never end."""


@pytest.mark.parametrize("program", [name for name in programs() if name not in ENDLESS])
def test_every_line_of_a_conformance_guest_is_ok(machine: RunningMachine, program: str) -> None:
    """The program says how many checks it has, all pass, and it powers off."""
    handle = bytes(range(0x11, 0x21))
    machine.create(program, build(program), memory_mb=64, vcpus=VCPUS.get(program, 1), uuid=handle)
    reason = machine.wait_end(program)
    lines = machine.text[program].replace("\r", "").splitlines()
    failed = [line for line in lines if line.startswith(("not ok", "Bail out"))]
    assert not failed, "\n".join(failed)
    assert reason == "poweroff", machine.ended[program][1]
    passed = sum(bool(re.match(r"ok \d+ ", line)) for line in lines)
    plan = [int(line[3:]) for line in lines if re.fullmatch(r"1\.\.\d+", line)]
    if program in TELLING:
        assert any(TELLING[program] in line for line in lines)
    else:
        assert plan == [passed], f"{passed} checks passed, the plan was {plan}"
    if program == "info":
        halves = (int.from_bytes(handle[at : at + 8], "little") for at in (0, 8))
        assert "# handle {:x} {:x}".format(*halves) in lines
    assert program not in machine.domains()
