"""Busy guests on a real machine share its CPU as their weights say; an idle one costs next to nothing."""

from __future__ import annotations

import time

import pytest

from guests.build import build
from hypervisor.shell.leases import cpu_clock
from tests.support.machines import RunningMachine, running_machine


def shares(machine: RunningMachine, seconds: float) -> dict[str, float]:
    """CPU time that each guest used, in seconds."""
    before = machine.domains()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        machine.poll(0.1)
    after = machine.domains()
    return {name: row["time_s"] - before[name]["time_s"] for name, row in after.items() if row["domid"]}


def test_weights_1_2_4_on_one_cpu() -> None:
    """Within 10 % over 4 seconds (benchmarks/scheduler.py: within 5 % over 10), by CPU time; all of them get on."""
    spin = build("spin")
    with running_machine(cpus=1) as machine:
        for name, weight in (("a", 256), ("b", 512), ("c", 1024)):
            machine.create(name, spin, memory_mb=8, cpu_weight=weight)
        for name in "abc":
            machine.expect(name, r"spun \d+")
        used = shares(machine, 4)
        total = sum(used.values())
        for name, share in (("a", 1 / 7), ("b", 2 / 7), ("c", 4 / 7)):
            assert used[name] / total == pytest.approx(share, rel=0.10)
            machine.expect(name, r"spun \d+")


def test_a_cap() -> None:
    """25 % of a CPU at most 27, although the CPU is free."""
    with running_machine(cpus=2) as machine:
        machine.create("capped", build("spin"), memory_mb=8, cap=25)
        machine.expect("capped", r"spun \d+", 20)
        began = time.monotonic()
        used = shares(machine, 3)["capped"]
        assert used / (time.monotonic() - began) <= 0.27


def test_a_woken_guest_costs_no_polling() -> None:
    """A machine whose guest is busy alone: the hypervisor has nothing to do."""
    with running_machine(cpus=1) as machine:
        machine.create("one", build("spin"), memory_mb=8)
        machine.expect("one", r"spun \d+")
        (pid,) = machine.processes("hypervisor")
        before = cpu_clock(pid)
        time.sleep(2)
        assert cpu_clock(pid) - before < 60_000_000
