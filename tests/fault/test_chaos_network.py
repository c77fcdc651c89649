"""Chaos on real processes, for the network: each signal, at each XenbusState and at each step of the back end, to NetIO.

The guest is the conformance guest `net`, which goes up, down, and up again; a cell passes if the fault struck, all its checks pass, and it
answers what a test on the bridge asks (again and again, as on a network that loses frames)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from guests.build import build
from simulation.plan import NET_STEPS
from toolstack.faults import What
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.network import Network

MAC, US = "00:16:3e:00:00:02", "02:00:00:00:00:01"
PLACES = [("front", state) for state in (1, 4, 5, 6)] + [("back", state) for state in (1, 2, 4, 5, 6)]
QUICK = {
    ("kill", "xenbus:front:4"),
    ("kill", "xenbus:back:2"),
    ("kill", "step:net-begun"),
    ("segfault", "step:net-filled"),
    ("freeze", "xenbus:back:2"),
}
PATIENCE_S = 45.0
"""A process that is stopped for ever is ended after 2 to 15 seconds without a sign of life (docs/limits.md)."""


@pytest.fixture(scope="module")
def machine(shared_machines: None) -> Iterator[GuestMachine]:
    """One machine for all cells."""
    running = GuestMachine(faulty=True, memory_mb=1024)
    try:
        yield running
    finally:
        running.close()


def packet(payload: Any) -> Any:
    return Ether(dst=MAC, src=US) / IP(src="10.0.0.1", dst="10.0.0.2") / payload


def told_to_go_on(network: Network, guest: Any, pattern: str) -> None:
    """The order to go on is a frame, and may be lost like any other."""
    from toolstack.plugin.guests import ConsoleFailure

    for _ in range(int(PATIENCE_S)):
        network.send(packet(UDP(sport=1, dport=9) / Raw(b"go on")))
        try:
            guest.console.expect(pattern, timeout=1.0)
            return
        except ConsoleFailure:
            if guest.ended is not None:
                raise
    raise AssertionError(f"not told to go on within {PATIENCE_S} s\n{guest.console.tail}")


def cells() -> Iterator[Any]:
    for what in ("kill", "segfault", "freeze"):
        places = [f"xenbus:{end}:{state}" for end, state in PLACES] + [
            f"step:net-{name}" for name in NET_STEPS
        ]
        for event in places:
            marks = [] if (what, event) in QUICK else [pytest.mark.long]
            yield pytest.param(what, event, id=f"{what}-{event}", marks=marks)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("what", "event"), cells())
def test_an_interface_survives(machine: GuestMachine, what: str, event: str) -> None:
    network = machine.network()
    try:
        fault = machine.faults.add(What(what), target="netio", event=event, n=1, for_ms=0)  # type: ignore[union-attr]
        guest = machine.start(build("net"), vifs=[f"mac={MAC}"])
        guest.console.expect("net: up", timeout=PATIENCE_S)
        answer = network.ask(
            packet(ICMP(id=1, seq=5) / Raw(b"x" * 3000)), lambda one: one.haslayer(ICMP) and one[ICMP].seq == 5,
            timeout=PATIENCE_S, tries=45,
        )  # fmt: skip
        assert answer[ICMP].type == 0
        told_to_go_on(network, guest, "net: up again")
        told_to_go_on(network, guest, r"a ring with impossible indexes")
        assert guest.wait_end(PATIENCE_S) == "poweroff"
        assert machine.faults.hit(fault)  # type: ignore[union-attr]
        assert "not ok" not in guest.console.text, guest.console.text
        assert machine.request("check")["problems"] == []
    finally:
        machine.close_networks()
