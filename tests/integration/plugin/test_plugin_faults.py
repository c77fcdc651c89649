"""The plugin's fixture `faults`: a plan on the processes of a test's own machine."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from toolstack.faults import Faults, What
from toolstack.guestfetch import fetch
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.plugin import DomainFactory

pytestmark = pytest.mark.timeout(120)


def test_a_guest_is_killed_at_a_line_of_its_console(
    machine: GuestMachine, domain: DomainFactory, faults: Faults
) -> None:
    """The plan's words from the guide; the guest's end is told as a crash, and the fault says whom it hit."""
    fault = faults.add("kill", target="domu", event=r"console:GNU GRUB|grub>")
    guest = domain(fetch("grub").kernel)
    assert guest.wait_end(60.0) == "crash"
    struck = faults.wait(fault, machine.poll)
    assert len(struck.pids) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(struck.pids[0], 0)


def test_hypercalls_are_refused_and_links_are_slow_silent_and_cut(
    machine: GuestMachine, domain: DomainFactory, faults: Faults
) -> None:
    """Out of ports: Dom0's toolstack says so, and the next guest is built. Then, while a guest runs: its link is late, silent, cut; it
    goes on each time. Last, a frozen Dom0 answers late."""
    from toolstack.errors import MachineError

    ports = faults.add(What.NO_PORTS, event="hypercall:evtchnop_alloc_unbound")
    with pytest.raises(MachineError):
        domain(fetch("grub").kernel)
    assert faults.hit(ports)
    memory = faults.add(What.NO_MEMORY, event="hypercall:xenmem_populate_physmap")
    with pytest.raises(MachineError):
        domain(fetch("grub").kernel)
    assert faults.hit(memory)
    late = faults.add(
        What.DELAY, target="domu", event="from:domu", n=3, for_ms=500, latency_ms=5, jitter_ms=5
    )
    guest = domain(fetch("grub").kernel)
    guest.console.expect("grub> ", 60.0)
    assert faults.hit(late)
    for what in (What.SILENCE, What.CUT):
        fault = faults.add(what, target="domu", at_ms=0, for_ms=300)
        faults.wait(fault, machine.poll)
        guest.console.send(f"echo still{what}\n")
        guest.console.expect(f"\nstill{what}", 30.0)
    begun = time.monotonic()
    frozen = faults.add(What.FREEZE, target="dom0", at_ms=0, for_ms=700)
    faults.wait(frozen)
    machine.request("uptime")
    assert time.monotonic() - begun > 0.5
    slow = faults.add(What.SLOW, target="domu", at_ms=0, for_ms=300, factor=4)
    faults.wait(slow)
    guest.console.send("echo at last\n")
    guest.console.expect("\nat last", 30.0)
    guest.destroy()


@pytest.mark.parametrize("way", ["from", "to"])
@pytest.mark.parametrize("what", [What.CORRUPT, What.TRUNCATE])
def test_a_damaged_message_costs_its_domain_at_most(
    machine: GuestMachine, domain: DomainFactory, faults: Faults, what: What, way: str
) -> None:
    """The fifth message of a guest's process, or to it, is damaged: whatever comes of that guest, the machine goes on."""
    from toolstack.errors import MachineError

    fault = faults.add(what, event=f"{way}:domu", n=5, seed=3)
    with contextlib.suppress(MachineError):
        domain(fetch("grub").kernel, name="victim")
    faults.wait(fault, machine.poll)
    other = domain(fetch("grub").kernel, name="other")
    other.console.expect("grub> ", 60.0)
    for one in list(machine.domains.values()):
        one.destroy()
    assert machine.request("check")["problems"] == []
