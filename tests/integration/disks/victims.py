"""Whom a test kills next."""

from __future__ import annotations

import time

from tests.support.machines import RunningMachine


def victim(machine: RunningMachine, role: str, before: int = 0) -> int:
    """The process of a role, once there is one: the one of before was killed just now (`before`: and is not meant). AssertionError."""
    until = time.monotonic() + 45.0
    while time.monotonic() < until:
        if role == "domio":
            pids = [machine.process_of(machine.domains()["DomIO"]["domid"])]
        else:
            pids = machine.processes(role)
        if len(pids) == 1 and pids[0] not in (0, before):
            return pids[0]
        machine.poll(0.01)
    raise AssertionError(f"no process {role}")
