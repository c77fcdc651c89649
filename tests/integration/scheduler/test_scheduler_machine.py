"""Busy guests on a real machine share its CPU as their weights say; an idle one costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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


def test_pinning(tmp_path: Path) -> None:
    """`cpus=` and `vcpu-pin`: two busy guests share one CPU although another is free, until one is moved there; what is no CPU of the
    machine is refused in one line."""

    def domicile(*words: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "toolstack.cli", "-M", machine.machine.runtime.root.name, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows() -> dict[str, list[str]]:
        lines = domicile("vcpu-list").splitlines()[1:]
        return {line.split()[0]: line.split() for line in lines}

    config = tmp_path / "spin.cfg"
    config.write_text(f'name="b"\nkernel="{build("spin")}"\nmemory=8\ncpus="0"\n')
    with running_machine(cpus=2) as machine:
        machine.create("a", build("spin"), memory_mb=8, cpus=[[0]])
        domicile("create", "-q", str(config))
        machine.client.request("console", {"domain": "b"})
        for name in "ab":
            machine.expect(name, r"spun \d+")
        began = time.monotonic()
        used = shares(machine, 2)
        assert sum(used.values()) <= 1.15 * (time.monotonic() - began)
        assert {row[3] for name, row in rows().items() if name in "ab"} == {"0"}
        assert rows()["b"][6:] == ["0", "/", "all"]
        domicile("vcpu-pin", "b", "all", "1")
        machine.expect("b", r"spun \d+")
        machine.expect("b", r"spun \d+")
        assert (rows()["b"][3], rows()["b"][6:]) == ("1", ["1", "/", "all"])
        said = domicile("vcpu-pin", "b", "0", "5", status=1)
        assert said == "domicile: vCPU 0 of b: the machine has CPUs 0 to 1, none of them is in 5 to 5\n"
        assert "vCPU 'x'" in domicile("vcpu-pin", "b", "x", "0", status=2)
        assert "b has no vCPU 4" in domicile("vcpu-pin", "b", "4", "0", status=1)
