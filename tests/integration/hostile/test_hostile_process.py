"""A domain's process in an attacker's hands, with the domain's real credentials and descriptors, harms nobody (docs/architecture.md, section 2).

After each attack: an honest guest beside it answers in time, so do toolstack and hypervisor; the hypervisor's invariants hold; it
grew by less than 64 MB; and once the hostile domain is gone all that it had is back. `tests/support/attacks.py` has the attacks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.attacks import POINTS
from tests.support.hostile_machine import ANSWER_S, HostileMachine, hostile_machine
from toolstack.client import MachineError

ROOT = os.getuid() == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, shared_machines: None) -> Iterator[HostileMachine]:
    """One machine, which has to stand all of it."""
    with hostile_machine(tmp_path_factory.mktemp("hostile") / "plan") as machine:
        yield machine


@pytest.fixture(autouse=True)
def nothing_left_to_the_next(machine: HostileMachine) -> Iterator[None]:
    """A test that failed leaves no hostile guest to the others."""
    yield
    for name in set(machine.domains()) - {"Domain-0", "neighbour"}:
        machine.client.request("destroy", {"domain": name})


def test_the_harness_is_a_domain_like_another(machine: HostileMachine) -> None:
    """Without an attack it is built, runs and calls: what the others show is not due to a broken start."""
    guest = machine.attack("obedient")
    assert machine.said(guest, "done")[0]["rc"] == 0
    machine.all_answer()
    machine.aftermath(guest)


@pytest.mark.parametrize("name", ["flood", "flood-reading"])
def test_a_flood_of_calls(machine: HostileMachine, name: str) -> None:
    """While it lasts the neighbour and the toolstack are answered in time; a process that reads nothing is ended."""
    guest = machine.attack(name)
    machine.said(guest, "begun")
    machine.all_answer()
    if name == "flood":
        assert machine.wait_end(guest) in ("crash", "destroyed")
    else:
        said = machine.said(guest, "done")[0]
        assert said["rc"] == 0
        assert said["sent"] > 500
    machine.aftermath(guest)


def test_messages_that_are_none(machine: HostileMachine) -> None:
    """Each is refused and counted, and the sender's next good message is served."""
    guest = machine.attack("malformed")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert said["refused"] > 300
    machine.all_answer()
    machine.aftermath(guest)


def test_messages_of_many_frames_and_without_end(machine: HostileMachine) -> None:
    """Nothing of them is kept; frames over the limit end their connection at once."""
    guest = machine.attack("multipart")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert machine.said(guest, "endless")[0]["parts"] > 100
    assert [one["closed"] for one in machine.said(guest, "oversized", 3)] == [True, True, True]
    machine.all_answer()
    machine.aftermath(guest)


def test_hundreds_of_connections_and_half_handshakes(machine: HostileMachine) -> None:
    """They are closed or expire; the domain's own link goes on."""
    guest = machine.attack("connections")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert said["held"] > 100
    machine.all_answer()
    machine.aftermath(guest)


def test_replays_and_other_keys(machine: HostileMachine) -> None:
    """A recorded message or handshake is worth nothing, nor is the endpoint without the key."""
    guest = machine.attack("replay")
    assert machine.said(guest, "done")[0]["rc"] == 0
    assert {one["what_of"]: one["closed"] for one in machine.said(guest, "replayed", 3)} == {
        "message": True,
        "handshake": True,
        "wrong key": True,
    }
    machine.all_answer()
    machine.aftermath(guest)


def test_forged_answers_hellos_and_control_messages(machine: HostileMachine) -> None:
    """Order numbers of others, roles of others, Plug and DeviceAccess: without effect, or refused."""
    guest = machine.attack("forged")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert said["plug"] == [-1, -1, -1]  # EPERM
    assert said["registers"] == ["ffffffff00000000"] * 3, "registers of a device that is not its own"
    machine.all_answer()
    machine.aftermath(guest)


def creation(machine: HostileMachine, name: str) -> tuple[str, float]:
    """Create it; what the toolstack said if it could not, and how long that took."""
    begun = time.monotonic()
    try:
        machine.attack(name)
        failure = ""
    except MachineError as error:
        failure = str(error)
    return failure, time.monotonic() - begun


def test_orders_answered_with_garbage(machine: HostileMachine) -> None:
    """It costs that domain alone, and soon."""
    failure, seconds = creation(machine, "garbage-answers")
    assert seconds < 15
    machine.all_answer()
    machine.aftermath(*(() if failure else ("garbage-answers",)))


@pytest.mark.parametrize(("name", "bound"), [("silent-map", 4.0), ("silent-context", 15.0)])
def test_silence_while_the_domain_is_built(machine: HostileMachine, name: str, bound: float) -> None:
    """A granter that does not answer makes the map fail within about a second; one that never takes its state fails to be built."""
    failure, seconds = creation(machine, name)
    assert failure, "it was built"
    if name == "silent-map":
        assert "grant status -1" in failure, failure  # GNTST_general_error
    assert seconds < bound
    machine.all_answer()
    machine.aftermath()


def test_silence_at_unmap_is_the_end_of_the_granter(machine: HostileMachine) -> None:
    """Dom0 unmaps when it destroys the domain: it does not wait longer than the granter's second."""
    guest = machine.attack("silent-unmap")
    begun = time.monotonic()
    machine.client.request("destroy", {"domain": guest})
    assert machine.wait_end(guest) == "destroyed"
    assert time.monotonic() - begun < 5.0
    machine.all_answer()
    machine.aftermath(guest)


def test_silence_at_pause_is_a_crash(machine: HostileMachine) -> None:
    """XEN_DOMCTL_pausedomain returns when the vCPUs stand: one that does not say so is crashed."""
    guest = machine.attack("silent-pause")
    begun = time.monotonic()
    with contextlib.suppress(MachineError):
        machine.client.request("pause", {"domain": guest})
    assert time.monotonic() - begun < 5.0
    assert machine.wait_end(guest) in ("crash", "destroyed")
    machine.aftermath(guest)


@pytest.mark.parametrize("point", POINTS)
def test_death_at_any_point(machine: HostileMachine, point: str) -> None:
    """Killed before, at, or after each step of its life: everything is back."""
    name = f"dies-{point}"
    failure, seconds = creation(machine, name)
    assert seconds < 10
    machine.neighbour_answers()
    if not failure and point != "grant_unmap":
        assert machine.wait_end(name) in ("crash", "destroyed")
    machine.aftermath(*(() if failure else (name,)))


def test_every_hypercall_with_bytes_of_all_kinds(machine: HostileMachine) -> None:
    """The table's entries, and numbers that are none: each is answered, and what only a control domain may do is not done."""
    guest = machine.attack("every-hypercall")
    said = machine.said(guest, "done")[0]
    assert said["breached"] == []
    assert said["sent"] > 500
    assert said["answered"] >= said["sent"] - 40, said  # those that wait for events, for ever if need be
    machine.all_answer()
    machine.aftermath(guest)


def test_frames_ports_and_grants_of_others(machine: HostileMachine) -> None:
    """Well-formed calls that name what belongs to Dom0 or the neighbour: refused one and all."""
    guest = machine.attack("others")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert said["taken"] == []
    machine.all_answer()
    machine.aftermath(guest)


def test_its_own_memory_can_not_be_resized_or_sealed(machine: HostileMachine) -> None:
    """The hypervisor maps it too: a truncated memfd would be SIGBUS there."""
    guest = machine.attack("memfd")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    results = said["results"]
    if not ROOT:  # the file is then of the same user, and the descriptor gives no more than that user has
        for name in ("chmod", "chown", "open again"):
            del results[name]
    assert len(results) == (10 if ROOT else 7)
    assert not [name for name, how in results.items() if how == "allowed"], results
    assert said["size"] == 0
    machine.all_answer()
    machine.aftermath(guest)


def test_descriptors_that_nobody_asked_for(machine: HostileMachine) -> None:
    """They never arrive in the hypervisor (its count of descriptors is as before), and cost it nothing."""
    guest = machine.attack("descriptors")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    assert said["sent"] > 0
    machine.all_answer()
    machine.aftermath(guest)


def test_what_is_kept_after_unmap_sees_and_changes_nothing(machine: HostileMachine) -> None:
    """A grantee keeps descriptors and mappings of granted frames. What the granter writes after the unmap is not there, and what
    the grantee writes does not reach the granter; a read-only grant could not be written even while it was mapped."""
    giver, taker = machine.attack("granter"), ""
    machine.said(giver, "granted")
    taker = machine.attack("grantee")
    mapped = machine.said(taker, "mapped")[0]
    assert mapped["statuses"][:2] == [0, 0], mapped
    assert mapped["statuses"][2] < 0, "a writable map of a read-only grant"
    assert mapped["seen"].count("first secret    ") >= 2, "while mapped it is shared"
    if ROOT:
        assert len(mapped["reopened"]) == 3
        assert set(mapped["reopened"].values()) <= {"EBADF", "EACCES", "EPERM"}, mapped["reopened"]
    machine.write_plan(stage=1)
    assert machine.said(taker, "unmapped")[0]["statuses"] == [0, 0]
    machine.write_plan(stage=2)
    assert machine.said(giver, "written")[0]["flags"] == ["0100", "0500"]
    machine.write_plan(stage=3)
    kept = machine.said(taker, "kept")[0]["seen"]
    assert len(kept) >= 4
    assert "second secret   " not in kept
    machine.write_plan(stage=4)
    assert machine.said(giver, "found")[0]["frames"] == ["second secret   "] * 2
    machine.all_answer()
    machine.aftermath(giver, taker)


@pytest.mark.parametrize("name", ["lease-page", "endless-console", "bind-and-close"])
def test_what_is_shared_with_hypervisor_and_dom0_is_attacked(machine: HostileMachine, name: str) -> None:
    """The lease page and its doorbells, the console ring, the console's channel: everybody is answered in time, during and after.
    Consoles of others are slow while one is filled without end (docs/limits.md)."""
    timeout = 30.0 if name == "endless-console" else ANSWER_S
    guest = machine.attack(name)
    machine.said(guest, "begun")
    machine.all_answer(timeout)
    assert machine.said(guest, "done")[0]["rc"] == 0
    machine.all_answer(timeout)
    machine.aftermath(guest)


def test_last_words_as_long_as_a_message(machine: HostileMachine) -> None:
    """Its crash is told to those who follow it, whatever it said before; Dom0 goes on."""
    guest = machine.attack("last-words")
    machine.said(guest, "begun")
    assert machine.wait_end(guest) == "crash"
    machine.all_answer()
    machine.aftermath(guest)


def test_links_that_close_while_the_hypervisor_waits_for_room(machine: HostileMachine) -> None:
    """The domain's own link opens again, or it is ended; nobody else notices."""
    guest = machine.attack("vanish")
    machine.said_or_ended(guest, "done")
    machine.all_answer()
    machine.aftermath(guest)


@pytest.mark.skipif(not ROOT, reason="processes get uids of their own where the machine is started as root")
def test_what_a_process_forked_goes_with_it(machine: HostileMachine) -> None:
    """Its children have its descriptors: nothing of a dead domain runs on, and its uid is free for another."""
    guest = machine.attack("forks")
    said = machine.said(guest, "done")[0]
    assert said["rc"] == 0
    machine.aftermath(guest)
    assert [pid for pid in said["pids"] if Path(f"/proc/{pid}/cmdline").exists() and alive(pid)] == []


def alive(pid: int) -> bool:
    """It is no zombie."""
    try:
        return b"State:\tZ" not in Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return False
