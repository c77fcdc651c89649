"""The helper host on a bridge of a real machine: it answers a test, and a guest's packets; also after NetIO was killed."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether

from guests.build import build
from tests.integration.network.net_packets import MAC, go_on
from toolstack.errors import MachineError
from toolstack.plugin.guests import GuestMachine
from toolstack.plugin.network import Network

US = "02:00:00:00:00:05"


def discover() -> Any:
    return (
        Ether(src=US, dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
        / BOOTP(chaddr=bytes.fromhex(US.replace(":", "")), xid=9) / DHCP(options=[("message-type", "discover"), "end"])
    )  # fmt: skip


def who_has(address: str) -> Any:
    return Ether(src=US, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=US, psrc="10.0.0.5", pdst=address)


@pytest.mark.pv
def test_a_helper_host_answers_until_it_goes(domain: Any, network: Network, machine: GuestMachine) -> None:
    with pytest.raises(MachineError, match="a host"):
        network.host("10.0.0.0/24")
    network.host("10.0.0.1/24")
    mac = network.ask(who_has("10.0.0.1"), lambda one: one.haslayer(ARP) and one[ARP].op == 2)[ARP].hwsrc
    ping = Ether(src=US, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1") / ICMP(id=1, seq=1)
    assert network.ask(ping, ICMP)[ICMP].type == 0
    assert network.ask(discover(), DHCP)[BOOTP].yiaddr == "10.0.0.10"
    netio = next(str(row["domid"]) for row in machine.request("list") if row["name"] == "NetIO")
    os.kill(machine.request("check")["counters"]["domains"][netio]["pid"], signal.SIGKILL)
    assert network.ask(ping, ICMP, timeout=20, tries=40)[ICMP].type == 0
    guest = domain(build("net"), vifs=[f"mac={MAC}"])
    guest.console.expect("net: up")  # a guest beside it is not disturbed
    network.send(go_on())
    guest.console.expect("net: up again")
    network.host("")
    network.drain()
    network.send(ping)
    assert not any(one.haslayer(ICMP) for one in iter(lambda: network.receive(0.5), None))
