"""NetIO is killed, and taken away: what a frontend, a test and the rest of the machine see of it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from scapy.layers.inet import ICMP, UDP

from guests.build import build
from tests.integration.network.net_packets import MAC, echo, go_on, ours, udp
from toolstack.errors import MachineError
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.network import Network

BACK_S = 20.0


def process_of(machine: GuestMachine, domid: str) -> int:
    """The process of a domain, 0 if it has none now."""
    domains = machine.request("check")["counters"]["domains"]
    return int(domains[domid]["pid"]) if domid in domains else 0


def netio(machine: GuestMachine) -> str:
    return next(str(row["domid"]) for row in machine.request("list") if row["name"] == "NetIO")


@pytest.mark.pv
def test_a_killed_netio_is_replaced_and_nobody_need_know(
    domain: Any, network: Network, machine: GuestMachine
) -> None:
    """SIGKILL, again and again, while packets go both ways: the frontend stays connected, the test's port stays open."""
    guest = domain(build("net"), vifs=[f"mac={MAC}"])
    guest.console.expect("net: up")
    number = netio(machine)
    for turn in range(4):
        pid = process_of(machine, number)
        assert pid
        for seq in range(5):
            network.send(echo(seq, 1000))
        os.kill(pid, signal.SIGKILL)
        # What was under way may be lost: it is asked again, as on any network.
        answer = network.ask(
            echo(100 + turn, 3000),
            lambda one, turn=turn: one.haslayer(ICMP) and one[ICMP].seq == 100 + turn,
            timeout=BACK_S,
            tries=40,
        )
        assert len(bytes(answer[ICMP].payload)) >= 3000
        assert process_of(machine, number) not in (0, pid)
    (row,) = machine.request("network-list", {"domain": guest.domid})
    assert row["state"] == 4
    assert network.ask(udp(7, b"still here"), ours(7))[UDP].load == b"still here"
    network.send(go_on())
    guest.console.expect("net: up again")
    network.send(go_on())
    assert guest.wait_end() == "poweroff"
    assert "not ok" not in guest.console.text
    assert machine.request("check")["problems"] == []


@pytest.mark.pv
def test_netio_that_is_destroyed_closes_its_devices_and_ports_and_a_new_one_comes_with_the_next_use(
    domain: Any, network: Network, machine: GuestMachine
) -> None:
    guest = domain(build("net"), vifs=[f"mac={MAC}"])
    guest.console.expect("net: up")
    machine.request("destroy", {"domain": "NetIO"})
    with pytest.raises(MachineError, match="went away"):
        network.expect(lambda one: False, timeout=BACK_S)
    assert machine.request("network-list", {"domain": guest.domid}) == []
    guest.destroy()
    again = machine.network()
    other = domain(build("net"), vifs=[f"mac={MAC}"])
    other.console.expect("net: up")
    assert again.ask(echo(1, 100), ICMP)[ICMP].seq == 1
    deadline = time.monotonic() + BACK_S
    while machine.request("check")["problems"]:
        assert time.monotonic() < deadline
