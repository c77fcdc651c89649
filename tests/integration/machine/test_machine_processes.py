"""The processes of a machine: separate uids and no privileges; what one may do to another."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import fetch

ROOT = os.getuid() == 0
REASON = "without root all processes of a machine have one uid, and isolation between them is not enforced (docs/architecture.md, section 4)"

INTRUDER = Path(__file__).parents[2] / "support" / "intruder.py"


@pytest.fixture(scope="module")
def machine(shared_machines: None) -> Iterator[RunningMachine]:
    """A machine with two guests."""
    with running_machine() as machine:
        for name in ("one", "two"):
            machine.create(name, fetch("grub").kernel, memory_mb=64)
            machine.expect(name, "grub> ")
        yield machine


def status(process: int) -> dict[str, str]:
    """/proc/PID/status by field."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def begun(machine: RunningMachine) -> dict[str, int]:
    """The processes that hold something of the machine: the hypervisor and one for each domain."""
    domains = machine.check()["domains"]
    (hypervisor,) = machine.processes("hypervisor")
    return {"hypervisor": hypervisor, **{f"d{number}": row["pid"] for number, row in domains.items()}}


def test_command_lines_say_the_role(machine: RunningMachine) -> None:
    """`domicile-ROLE` is in each command line, and no key or secret is."""
    roles = {"hypervisor": "hypervisor", "d0": "dom0", "d1": "domu", "d2": "domu"}
    found = begun(machine)
    assert set(found) == set(roles)
    for name, process in found.items():
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        assert f"domicile-{roles[name]}".encode() in words
        assert sum(map(len, words)) < 400


def test_no_process_has_a_capability_or_can_gain_one(machine: RunningMachine) -> None:
    """CapEff and CapPrm are 0 (and the bounding and ambient sets where the uid is its own), no_new_privs is set, no core is dumped."""
    for name, process in begun(machine).items():
        found = status(process)
        assert found["NoNewPrivs"] == "1", name
        limits = Path(f"/proc/{process}/limits").read_text(encoding="utf-8")
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"], name
        if ROOT:
            for which in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
                assert int(found[which], 16) == 0, f"{name}: {which} {found[which]}"
            assert found["Groups"] == "", name


@pytest.mark.skipif(not ROOT, reason=REASON)
def test_each_process_has_a_uid_of_its_own(machine: RunningMachine) -> None:
    """No two processes share one, and none is root's; real, effective, saved and file-system ids agree."""
    uids = []
    for process in [*begun(machine).values(), *machine.processes("domu")]:
        found = status(process)
        for which in ("Uid", "Gid"):
            assert len(set(found[which].split())) == 1
        uids.append((process, int(found["Uid"].split()[0])))
    assert len({uid for _, uid in set(uids)}) == len({process for process, _ in uids})
    assert all(uid >= 1000 for _, uid in uids)


@pytest.mark.skipif(not ROOT, reason=REASON)
@pytest.mark.parametrize("victim", ["d2", "d0", "hypervisor", "warden"])
def test_a_domain_reaches_no_other_process(machine: RunningMachine, victim: str) -> None:
    """Under one domain's uid: no signal, no ptrace, no memory, no descriptor of another's process, no endpoint of another."""
    found = begun(machine) | {"warden": int(machine.machine.runtime.pid.read_text(encoding="ascii"))}
    uid = int(status(found["d1"])["Uid"].split()[0])
    runtime = machine.machine.runtime
    endpoints = [str(path) for path in runtime.bus.iterdir() if path.stat().st_uid != uid]
    assert len(endpoints) == 2  # of Dom0 and of the other guest
    paths = [*endpoints, str(runtime.control), str(runtime.xenstore)]
    done = subprocess.run(
        [sys.executable, str(INTRUDER), str(uid), str(found[victim]), *paths],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        cwd="/",
    )
    result: dict[str, str] = json.loads(done.stdout)
    assert len(result) == 17 + 2 * len(paths)
    assert set(result.values()) <= {"Operation not permitted", "Permission denied"}, result
    allowed = [name for name, outcome in result.items() if outcome == "allowed"]
    assert not allowed, allowed
    for name in ("one", "two"):
        machine.type(name, "echo fine-$grub_cpu\n")
        machine.expect(name, "fine-x86_64")


def descriptors(process: int) -> dict[int, str]:
    """What its descriptors refer to."""
    base = Path(f"/proc/{process}/fd")
    return {int(entry.name): os.readlink(entry) for entry in base.iterdir()}


@pytest.mark.skipif(not ROOT, reason="an undumpable process's descriptors can be looked at by root alone")
def test_a_guest_holds_its_own_memory_and_nothing_else(machine: RunningMachine) -> None:
    """One extent memfd, mode 0600 and sealed, no other domain's; the windows it grants are in nobody else's hands but the grantee's."""
    found = begun(machine)
    held = {}
    for name in ("d1", "d2"):
        process = found[name]
        memory = {fd: path for fd, path in descriptors(process).items() if path.startswith("/memfd:")}
        extents = [fd for fd, path in memory.items() if "domicile-extent" in path]
        assert len(extents) == 1, memory
        assert not [path for path in memory.values() if "credentials" in path], (
            "keys are closed when they are read"
        )
        where = Path(f"/proc/{process}/fd/{extents[0]}")
        information = where.stat()
        assert stat.S_IMODE(information.st_mode) == 0o600
        held[name] = information.st_ino
    assert len(set(held.values())) == 2


def test_the_sockets_of_the_machine_are_its_owner_s_alone(machine: RunningMachine) -> None:
    """Mode 0600 for the control socket, the store's socket, and each endpoint of the bus."""
    runtime = machine.machine.runtime
    for path in (runtime.control, runtime.xenstore, *runtime.bus.iterdir()):
        information = path.stat()
        assert stat.S_ISSOCK(information.st_mode)
        assert stat.S_IMODE(information.st_mode) == 0o600


def test_info_says_whether_processes_are_isolated(machine: RunningMachine) -> None:
    """As docs/architecture.md asks: where they share one uid, `domicile info` says so."""
    assert machine.client.request("info")["isolated"] is ROOT
