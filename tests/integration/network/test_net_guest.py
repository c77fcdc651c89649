"""The conformance guest `net` and a test on one bridge: frames both ways, states up, down and up again, a ring broken on purpose."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from guests.build import build
from tests.integration.network.net_packets import ADDRESS, MAC, OWN, PATTERN, US, echo, go_on, ours, udp
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.network import Network

TRANSPORTS = [
    pytest.param("doorbells", marks=pytest.mark.domicile_machine(memory_mb=1024, doorbells=True)),
    pytest.param("zeromq-alone", marks=pytest.mark.domicile_machine(memory_mb=1024, doorbells=False)),
    pytest.param("tcp", marks=pytest.mark.domicile_machine(memory_mb=1024, transport="tcp", doorbells=True)),
]


@pytest.mark.pv
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_frontend_of_this_project_and_a_test_exchange_frames(
    domain: Any, network: Network, machine: GuestMachine, transport: str
) -> None:
    """ARP, ICMP, UDP; checksums completed by the back end; packets in several slots; multicast groups; the states of xenbus."""
    assert machine.request("info")["doorbells"] is (transport != "zeromq-alone")
    guest = domain(build("net"), vifs=[f"mac={MAC}"])
    guest.console.expect("net: up")
    announced = network.expect(ARP)
    assert (announced[ARP].hwsrc, announced[ARP].psrc) == (MAC, ADDRESS)

    answer = network.ask(Ether(dst="ff:ff:ff:ff:ff:ff", src=US) / ARP(hwsrc=US, psrc=OWN, pdst=ADDRESS), ARP)
    assert (answer.src, answer[ARP].op, answer[ARP].hwsrc) == (MAC, 2, MAC)

    for size in (0, 56, 1400, 8000):
        answer = network.ask(echo(size, size), ICMP)
        assert (answer[ICMP].type, answer[ICMP].seq) == (0, size)
        assert bytes(answer[ICMP].payload)[:size] == PATTERN[:size]

    for port, payload in ((7, b"odd"), (7, b"even"), (8, b"none"), (10, b"x" * 1000)):
        back = network.ask(udp(port, payload), ours(port))
        assert bytes(back[UDP].payload)[: len(payload)] == payload
        given = back[UDP].chksum
        del back[UDP].chksum
        right = Ether(bytes(back))[UDP].chksum
        assert given == (right if port == 7 else 0)

    network.send(Ether(dst="01:00:5e:01:02:04", src=US, type=0x88B5) / Raw(b"not asked for"))
    network.send(Ether(dst="01:00:5e:01:02:03", src=US, type=0x88B5) / Raw(b"asked for"))
    assert guest.console.expect(r"net: group (\d+)")[1] == "23"

    network.send(go_on())
    guest.console.expect("net: up again")
    assert network.ask(udp(7, b"again"), ours(7))[UDP].load == b"again"
    network.send(go_on())
    assert guest.wait_end() == "poweroff"
    lines = guest.console.text.splitlines()
    assert [line for line in lines if line.startswith(("not ok", "Bail"))] == []
    assert f"1..{sum(bool(re.match('ok ', line)) for line in lines)}" in lines
    assert machine.request("check")["problems"] == []
