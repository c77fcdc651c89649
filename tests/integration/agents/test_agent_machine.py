"""A machine whose processes are started by wardens of containers (agents), on plain processes: boots, blows, and agents that lie."""

from __future__ import annotations

import pytest

from tests.support.agents import agent_machine
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(180)


def test_grub_boots_in_its_container() -> None:
    """A PV guest's process runs where its agent is; the hypervisor counts its CPU time without seeing its process id."""
    with agent_machine() as machine:
        grub = fetch("grub")
        machine.create("grub", grub.kernel, memory_mb=64)
        machine.expect("grub", "grub>")
        agents = machine.operator.agents()
        assert agents["domu-pv"].role == "domu"
        assert not agents["domu-pvh"].role
        assert agents["domu-pv"].domain == machine.domains()["grub"]["domid"]
        assert machine.domains()["grub"]["time_s"] > 0.1
        machine.check()
