"""Unmodified Debian Linux, a PV and a PVH guest, with its own xen-netfront: ping, TCP, a test on the bridge, hotplug, NetIO's death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from scapy.layers.dns import DNS
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from toolstack.guestfetch import debian
from toolstack.plugin.guests import Domain, GuestMachine
from toolstack.plugin.network import Network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
US, OWN = "02:00:00:00:00:01", "10.0.0.9"
BOOT_S = 150.0
WAIT_S = 60.0
KIB = 1024
"""Of a TCP transfer."""


@dataclass
class Pair:
    """Two guests, 10.0.0.1 (PV) and 10.0.0.2 (PVH)."""

    machine: GuestMachine
    pv: Domain
    pvh: Domain

    def run(self, guest: Domain, command: str, wait: float = WAIT_S) -> str:
        """A shell command's output; it must succeed."""
        guest.console.sendline(f"{command}; echo status=$?.")
        found = guest.console.expect(r"(?s)(.*)status=(\d+)\.", wait)
        assert found[2] == "0", found[1]
        return str(found[1])

    def transfer(
        self, source: Domain, target: Domain, address: str, port: int, meanwhile: Any = None
    ) -> None:
        """A file of chance over TCP; its MD5 sum is the same at both ends."""
        target.console.sendline(f"nc -l -p {port} | md5sum; echo received.")
        out = self.run(
            source, f"dd if=/dev/urandom of=/tmp/f bs=1k count={KIB} 2>/dev/null && md5sum < /tmp/f"
        )
        wanted = next(word for word in out.split() if len(word) == 32)
        source.console.sendline(f"nc {address} {port} < /tmp/f; echo sent=$?.")
        if meanwhile is not None:
            meanwhile()
        source.console.expect(r"sent=0\.", WAIT_S * 2)
        got = target.console.expect(r"([0-9a-f]{32})\s+-\s+received\.", WAIT_S)
        assert got[1] == wanted


def guest_of(machine: GuestMachine, kind: str, number: int) -> Domain:
    set_up = f"ip link set lo up; ip addr add 10.0.0.{number}/24 dev eth0; ip link set eth0 up\n"
    files = debian(modules=("xen-netfront",), extra={"etc/rc.guest": set_up.encode()})
    kernel = files.kernel if kind == "pv" else files.pvh_kernel
    assert kernel is not None
    return machine.start(
        kernel, name=kind, ramdisk=files.ramdisk, cmdline="console=hvc0 loglevel=4", memory_mb=192, type=kind,
        vifs=[f"mac=00:16:3e:00:00:0{number}"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(shared_machines: None) -> Iterator[Pair]:
    """Booted once."""
    machine = GuestMachine(memory_mb=1024)
    try:
        guests = [guest_of(machine, kind, number) for number, kind in ((1, "pv"), (2, "pvh"))]
        for guest in guests:
            guest.console.expect("domicile: init", BOOT_S)
            guest.console.expect("# ", WAIT_S)
        yield Pair(machine, *guests)
    finally:
        machine.close()


@pytest.fixture
def port(pair: Pair) -> Iterator[Network]:
    yield pair.machine.network()
    pair.machine.close_networks()


def test_two_guests_ping_each_other(pair: Pair) -> None:
    pair.run(pair.pv, "ping -c 3 10.0.0.2")
    pair.run(pair.pvh, "ping -c 3 -s 1400 10.0.0.1")


def test_a_file_arrives_whole_over_tcp_in_both_directions(pair: Pair) -> None:
    """Linux leaves checksums and segments to the back end and to the other guest."""
    pair.transfer(pair.pv, pair.pvh, "10.0.0.2", 5001)
    pair.transfer(pair.pvh, pair.pv, "10.0.0.1", 5002)


def test_a_test_on_the_bridge_speaks_with_a_guest(pair: Pair, port: Network) -> None:
    """ARP, ICMP, UDP; what the guest sends has its checksum when it comes here."""
    for number in (1, 2):
        mac, address = f"00:16:3e:00:00:0{number}", f"10.0.0.{number}"
        asked = Ether(dst="ff:ff:ff:ff:ff:ff", src=US) / ARP(hwsrc=US, psrc=OWN, pdst=address)
        answer = port.ask(asked, lambda one: one.haslayer(ARP) and one[ARP].op == 2)
        assert (answer[ARP].hwsrc, answer[ARP].psrc) == (mac, address)
        ping = Ether(dst=mac, src=US) / IP(src=OWN, dst=address) / ICMP(id=3, seq=number) / Raw(b"z" * 1200)
        assert port.ask(ping, ICMP)[ICMP].type == 0
    closed = (
        Ether(dst="00:16:3e:00:00:01", src=US)
        / IP(src=OWN, dst="10.0.0.1")
        / UDP(sport=77, dport=9)
        / Raw(b"?")
    )
    assert port.ask(closed, ICMP)[ICMP].type == 3  # port unreachable: Linux found our checksum right
    pair.pv.console.sendline(f"nslookup some.name {OWN} >/dev/null 2>&1; echo asked.")
    query = port.expect(lambda one: one.haslayer(UDP) and one[UDP].dport == 53, WAIT_S)
    given = query[UDP].chksum
    again = Ether(bytes(query))
    del again[UDP].chksum
    assert Ether(bytes(again))[UDP].chksum == given
    assert b"some.name" in query[DNS].qd[0].qname
    pair.pv.console.expect(r"asked\.\s", WAIT_S)


def test_netio_is_killed_in_the_middle_of_a_transfer(pair: Pair) -> None:
    """SIGKILL while the file goes over: TCP sends again what was lost, and the file arrives whole."""
    number = next(str(row["domid"]) for row in pair.machine.request("list") if row["name"] == "NetIO")
    killed = []

    def kill() -> None:
        for _ in range(2):
            before = moved(pair)
            while moved(pair) < before + 200_000:
                pair.machine.poll(0.02)
            pid = pair.machine.request("check")["counters"]["domains"][number]["pid"]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    pair.transfer(pair.pv, pair.pvh, "10.0.0.2", 5003, kill)
    assert len(set(killed)) == 2
    for guest in (pair.pv, pair.pvh):
        assert pair.machine.request("network-list", {"domain": guest.domid})[0]["state"] == 4
    assert pair.machine.request("check")["problems"] == []


def moved(pair: Pair) -> int:
    """Bytes that the PV guest sent."""
    rows = pair.machine.request("top")["domains"]
    return int(next(row["vifs"][0][1] for row in rows if row["domid"] == pair.pv.domid))


@pytest.mark.long
def test_a_lossy_network_is_tcps_matter(pair: Pair, port: Network) -> None:
    port.link(loss=0.02, duplicate=0.02, reorder=0.02, seed=5)
    try:
        pair.transfer(pair.pvh, pair.pv, "10.0.0.1", 5004)
    finally:
        port.link()


def test_an_interface_comes_and_goes_while_the_guest_runs(pair: Pair) -> None:
    mac = "00:16:3e:00:00:07"
    port = pair.machine.network("other")
    try:
        pair.machine.request("network-attach", {"domain": "pv", "vif": {"bridge": "other", "mac": mac}})
        pair.run(
            pair.pv,
            "until ip link show eth1 2>/dev/null; do sleep 0.2; done; ip addr add 10.1.0.1/24 dev eth1; ip link set eth1 up",
        )
        ping = Ether(dst=mac, src=US) / IP(src="10.1.0.9", dst="10.1.0.1") / ICMP(id=1, seq=1)
        asked = Ether(dst="ff:ff:ff:ff:ff:ff", src=US) / ARP(hwsrc=US, psrc="10.1.0.9", pdst="10.1.0.1")
        port.ask(asked, lambda one: one.haslayer(ARP) and one[ARP].op == 2, timeout=20, tries=10)
        assert port.ask(ping, ICMP, timeout=20, tries=10)[ICMP].type == 0
        rows = pair.machine.request("network-list", {"domain": "pv"})
        assert [(row["devid"], row["state"], row["bridge"]) for row in rows] == [
            (0, 4, "xenbr0"),
            (1, 4, "other"),
        ]
        pair.machine.request("network-detach", {"domain": "pv", "vif": mac})
        pair.run(pair.pv, "while ip link show eth1 2>/dev/null; do sleep 0.2; done")
        assert len(pair.machine.request("network-list", {"domain": "pv"})) == 1
        pair.run(pair.pv, "ping -c 1 10.0.0.2")
    finally:
        pair.machine.close_networks()
