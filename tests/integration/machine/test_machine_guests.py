"""Guests on a real machine: their life from `create` to each kind of end, and that everything is given back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guests.build import build
from tests.support.machines import RunningMachine, running_machine
from toolstack.client import MachineError
from toolstack.guestfetch import fetch

WAYS: dict[str, dict[str, Any]] = {
    "doorbells": {"doorbells": True},
    "zeromq-alone": {"doorbells": False},
    "tcp": {"transport": "tcp", "doorbells": True},
}
"""The transports: event channels by doorbells, everything over ZeroMQ, and the bus over TCP with CURVE."""


@pytest.fixture(scope="module", params=WAYS)
def machine(request: pytest.FixtureRequest, shared_machines: None) -> Iterator[RunningMachine]:
    """One machine of each transport for the tests of this file."""
    with running_machine(**WAYS[request.param]) as machine:
        yield machine


def grub(machine: RunningMachine, name: str) -> int:
    """GRUB for Xen, at its prompt."""
    domid = machine.create(name, fetch("grub").kernel, memory_mb=64)
    machine.expect(name, "grub> ")
    return domid


def test_the_machine_uses_the_transport_that_was_asked_for(
    machine: RunningMachine, request: pytest.FixtureRequest
) -> None:
    """So that the other tests of this file show what they claim to."""
    way = request.node.callspec.params["machine"]
    assert machine.client.request("info")["doorbells"] is (way != "zeromq-alone")
    assert bool(list(machine.machine.runtime.bus.iterdir())) is (way != "tcp")


def test_grub_reaches_its_prompt_and_answers(machine: RunningMachine) -> None:
    """Keys go to the guest through the console ring, and what it prints comes back."""
    grub(machine, "grub")
    machine.type("grub", "ls\n")
    machine.expect("grub", r"\(memdisk\)[\s\S]*grub> ")
    machine.type("grub", "echo sum-of-$grub_cpu-$grub_platform\n")
    machine.expect("grub", "\n.?sum-of-x86_64-xen")
    machine.type("grub", "halt\n")
    assert machine.wait_end("grub") == "poweroff"
    machine.settled()


@pytest.mark.parametrize("program", ["hello", "events", "grants", "xenstore"])
def test_conformance_guests_pass_on_every_transport(machine: RunningMachine, program: str) -> None:
    """Event channels, grants and the store behave the same whatever carries them."""
    machine.create(program, build(program), memory_mb=64, vcpus=2 if program == "events" else 1)
    assert machine.wait_end(program) == "poweroff"
    assert "not ok" not in machine.text[program]
    assert ("hello" if program == "hello" else "\n1..") in machine.text[program]
    machine.settled()


def test_two_guests_run_side_by_side(machine: RunningMachine) -> None:
    """Each has its own console, and both answer while both live."""
    grub(machine, "left")
    grub(machine, "right")
    assert {"left", "right"} <= set(machine.domains())
    for name in ("left", "right"):
        machine.type(name, f"echo i-am-{name}-$grub_cpu\n")
    for name in ("left", "right"):
        machine.expect(name, f"i-am-{name}-x86_64")
    assert "i-am-right-x86_64" not in machine.text["left"]
    for name in ("left", "right"):
        machine.client.request("destroy", {"domain": name})
        assert machine.wait_end(name) == "destroyed"
    machine.settled()


def test_destroy_gives_everything_back(machine: RunningMachine) -> None:
    """After `destroy` there is no process, frame, port, grant or window of the domain."""
    before = machine.settled()
    domid = grub(machine, "victim")
    process = machine.process_of(domid)
    machine.client.request("destroy", {"domain": "victim"})
    assert machine.wait_end("victim") == "destroyed"
    after = machine.settled()
    for what in ("free_pages", "windows", "grant_references", "descriptors"):
        assert after[what] == before[what], what
    assert after["domains"]["0"]["ports"] == before["domains"]["0"]["ports"]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(MachineError, match="does not exist"):
        machine.client.request("domid", {"domain": "victim"})


def test_kill_9_of_a_domain_process_costs_that_domain_alone(machine: RunningMachine) -> None:
    """`list` shows it gone, all it had is back, its neighbour answers."""
    before = machine.settled()
    grub(machine, "neighbour")
    with_neighbour = machine.check()
    domid = grub(machine, "killed")
    os.kill(machine.process_of(domid), signal.SIGKILL)
    assert machine.wait_end("killed") in ("destroyed", "crash")
    assert "killed" not in machine.domains()
    machine.type("neighbour", "echo still-$grub_cpu\n")
    machine.expect("neighbour", "still-x86_64")
    deadline = time.monotonic() + 10
    while len((after := machine.check())["domains"]) > 2:
        assert time.monotonic() < deadline, after
        machine.poll(0.02)
    for what in ("free_pages", "windows", "grant_references"):
        assert after[what] == with_neighbour[what], what
    assert after["domains"]["0"]["ports"] == with_neighbour["domains"]["0"]["ports"]
    machine.client.request("destroy", {"domain": "neighbour"})
    machine.wait_end("neighbour")
    assert machine.settled()["free_pages"] == before["free_pages"]


def test_a_paused_guest_makes_no_progress(machine: RunningMachine) -> None:
    """While paused it uses no processor time and echoes nothing; unpaused it goes on where it was."""
    domid = grub(machine, "pausing")
    process = machine.process_of(domid)
    machine.client.request("pause", {"domain": "pausing"})
    assert "p" in machine.domains()["pausing"]["state"]
    machine.type("pausing", "echo woken-$grub_cpu\n")
    before = cpu_ticks(process)
    while machine.poll(0.3):  # a full 0.3 s without a word
        pass
    assert "woken-" not in machine.text["pausing"]
    assert cpu_ticks(process) - before <= 1
    machine.client.request("unpause", {"domain": "pausing"})
    machine.expect("pausing", "woken-x86_64")
    with pytest.raises(MachineError, match="not paused"):
        machine.client.request("unpause", {"domain": "pausing"})
    machine.client.request("destroy", {"domain": "pausing"})
    machine.wait_end("pausing")


def test_a_guest_created_paused_starts_when_unpaused(machine: RunningMachine) -> None:
    """Nothing of it runs before."""
    machine.create("later", build("hello"), paused=True)
    assert "p" in machine.domains()["later"]["state"]
    assert not machine.poll(0.2)
    machine.client.request("unpause", {"domain": "later"})
    assert machine.wait_end("later") == "poweroff"
    assert "hello from a Xen guest" in machine.text["later"]


def test_a_guest_that_asks_for_a_reboot_is_built_again(machine: RunningMachine) -> None:
    """It is a new domain with the same name and console."""
    first = grub(machine, "again")
    deadline = time.monotonic() + 1.1  # one that reboots within a second of its start is not started again
    while (left := deadline - time.monotonic()) > 0:
        machine.poll(left)
    machine.type("again", "reboot\n")
    machine.wait_restart("again")
    machine.expect("again", "grub> ")
    second = machine.domains()["again"]["domid"]
    assert second != first
    machine.type("again", "echo round-two-$grub_cpu\n")
    machine.expect("again", "round-two-x86_64")
    machine.client.request("destroy", {"domain": "again"})
    machine.wait_end("again")
    machine.settled()


def cpu_ticks(process: int) -> int:
    """Processor time that it used so far, in clock ticks."""
    with open(f"/proc/{process}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])
