"""Debian's xenstore-utils against the xenstored of a running machine, with a guest beside them."""

from __future__ import annotations

import os
import re
import select
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import fetch


@pytest.fixture(scope="module")
def machine(shared_machines: None) -> Iterator[RunningMachine]:
    """A machine with GRUB on it."""
    with running_machine() as machine:
        machine.create("grub", fetch("grub").kernel, memory_mb=64)
        machine.expect("grub", "grub> ")
        yield machine


def environment(machine: RunningMachine) -> dict[str, str]:
    """Where the tools find the store."""
    return {**os.environ, "XENSTORED_PATH": str(machine.machine.runtime.xenstore)}


def tool(machine: RunningMachine, name: str, *arguments: str) -> str:
    """What one of the tools prints. CalledProcessError."""
    done = subprocess.run(
        [f"xenstore-{name}", *arguments],
        env=environment(machine),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout


def test_ls_shows_what_the_toolstack_wrote(machine: RunningMachine) -> None:
    """Paths as in xenstore-paths: name, memory, console, store, vm."""
    domid = machine.domains()["grub"]["domid"]
    listing = tool(machine, "ls", f"/local/domain/{domid}")
    assert 'name = "grub"' in listing
    assert 'target = "65536"' in listing
    assert re.search(r'ring-ref = "\d+"', listing)
    vm = tool(machine, "read", f"/local/domain/{domid}/vm").strip()
    assert tool(machine, "read", f"{vm}/name") == "grub\n"
    everything = tool(machine, "ls", "-f")
    assert f'/local/domain/{domid}/name = "grub"' in everything
    assert '/local/domain/0/name = "Domain-0"' in everything


def test_write_read_list_and_rm(machine: RunningMachine) -> None:
    """What one tool writes another reads; what is removed is an error."""
    tool(machine, "write", "/tool/test/a", "1", "/tool/test/b", "two words")
    assert tool(machine, "read", "/tool/test/b") == "two words\n"
    assert sorted(tool(machine, "list", "/tool/test").split()) == ["a", "b"]
    tool(machine, "rm", "/tool/test")
    with pytest.raises(subprocess.CalledProcessError):
        tool(machine, "read", "/tool/test/a")


def test_permissions_of_a_guest_s_node(machine: RunningMachine) -> None:
    """xenstore-ls -p: the guest may read its own directory, and write what is its own."""
    domid = machine.domains()["grub"]["domid"]
    listing = tool(machine, "ls", "-p", f"/local/domain/{domid}")
    assert re.search(rf'^name = "grub"[ .]+\(n0,r{domid}\)', listing, re.MULTILINE), listing
    assert re.search(rf"^data = .*\(n{domid}\)", listing, re.MULTILINE), listing


def test_a_watch_tells_of_writes_and_of_the_end_of_a_domain(machine: RunningMachine) -> None:
    """xenstore-watch prints each change under its path; @releaseDomain fires when a domain is destroyed."""
    with subprocess.Popen(
        ["xenstore-watch", "/tool/watched", "@releaseDomain"],
        env=environment(machine),
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        try:
            assert watcher.stdout is not None
            # One line for each watch at once, as the protocol has it.
            assert sorted(line(watcher) for _ in range(2)) == ["/tool/watched", "@releaseDomain"]
            tool(machine, "write", "/tool/watched/deep/inside", "x")
            assert line(watcher).startswith("/tool/watched/deep")
            machine.create("short", fetch("grub").kernel, memory_mb=64, paused=True)
            machine.client.request("destroy", {"domain": "short"})
            while (said := line(watcher)) != "@releaseDomain":
                assert said.startswith("/tool/watched")
        finally:
            watcher.kill()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; AssertionError if none comes in time."""
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n"):
        ready, _, _ = select.select([process.stdout], [], [], 10.0)
        assert ready, f"no line within 10 s, so far {text!r}"
        character = os.read(process.stdout.fileno(), 1).decode()
        assert character, "it ended"
        text += character
    return text.rstrip("\n")


def test_state_survives_a_restart_of_xenstored(machine: RunningMachine) -> None:
    """Nodes, a client's watch and the guest's own connection go on in a daemon that was started anew."""
    with subprocess.Popen(
        ["stdbuf", "-oL", "xenstore-watch", "/tool/restart"],
        env=environment(machine),
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        try:
            assert line(watcher) == "/tool/restart"
            tool(machine, "write", "/tool/restart/before", "1")
            assert line(watcher) == "/tool/restart/before"
            machine.client.request("xenstored-restart")
            assert tool(machine, "read", "/tool/restart/before") == "1\n"
            tool(machine, "write", "/tool/restart/after", "2")
            assert line(watcher) == "/tool/restart/after"
        finally:
            watcher.kill()
    domid = machine.domains()["grub"]["domid"]
    assert 'name = "grub"' in tool(machine, "ls", f"/local/domain/{domid}")
