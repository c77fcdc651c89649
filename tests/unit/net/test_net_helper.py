"""The helper host: ARP, ping and DHCP as scapy speaks them, and what gets no answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from drivers.net.helper import MAX_LEASES, HelperHost

CLIENT = "00:16:3e:00:00:01"
ALL = "ff:ff:ff:ff:ff:ff"


def one(host: HelperHost, packet: Any) -> Any:
    """Its one answer, which has right checksums; None if there is none."""
    out = host.receive(bytes(packet))
    assert len(out) <= 1
    if not out:
        return None
    answer = Ether(out[0])
    for layer in (IP, UDP, ICMP):
        if answer.haslayer(layer):
            again = Ether(out[0])
            given = again[layer].chksum
            del again[layer].chksum
            assert Ether(bytes(again))[layer].chksum == given
    return answer


def dhcp(kind: str, mac: str = CLIENT, flags: int = 0, ciaddr: str = "0.0.0.0", **more: Any) -> Any:
    return (
        Ether(src=mac, dst=ALL) / IP(src=ciaddr, dst="255.255.255.255") / UDP(sport=68, dport=67)
        / BOOTP(chaddr=bytes.fromhex(mac.replace(":", "")), xid=7, flags=flags, ciaddr=ciaddr)
        / DHCP(options=[("message-type", kind), *more.items(), "end"])
    )  # fmt: skip


def options(answer: Any) -> dict[str, Any]:
    return {entry[0]: entry[1] for entry in answer[DHCP].options if isinstance(entry, tuple)}


def test_arp_and_ping() -> None:
    host = HelperHost("10.0.0.1/24")
    answer = one(host, Ether(src=CLIENT, dst=ALL) / ARP(hwsrc=CLIENT, psrc="10.0.0.5", pdst="10.0.0.1"))
    mac = answer[ARP].hwsrc
    assert (answer[ARP].op, answer[ARP].psrc, answer.dst) == (2, "10.0.0.1", CLIENT)
    assert mac == host.mac.hex(":")
    ping = Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1") / ICMP(id=3, seq=4) / Raw(b"odd")
    echo = one(host, ping)
    assert (echo[ICMP].type, echo[ICMP].id, echo[ICMP].seq, echo[IP].dst) == (0, 3, 4, "10.0.0.5")
    assert bytes(echo[ICMP].payload)[:3] == b"odd"


def test_an_address_by_dhcp_and_again_after_the_server_was_started_anew() -> None:
    host = HelperHost("10.0.0.1/24")
    offer = one(host, dhcp("discover"))
    assert options(offer)["message-type"] == 2
    address = offer[BOOTP].yiaddr
    assert (address, offer[IP].dst, offer.dst, offer[BOOTP].xid) == ("10.0.0.10", address, CLIENT, 7)
    said = options(offer)
    assert (said["server_id"], said["subnet_mask"], said["router"]) == (
        "10.0.0.1",
        "255.255.255.0",
        "10.0.0.1",
    )
    ack = one(host, dhcp("request", requested_addr=address, server_id="10.0.0.1"))
    assert (options(ack)["message-type"], options(ack)["lease_time"], ack[BOOTP].yiaddr) == (
        5,
        86400,
        address,
    )
    other = one(host, dhcp("discover", mac="00:16:3e:00:00:02"))
    assert other[BOOTP].yiaddr == "10.0.0.11"
    anew = HelperHost("10.0.0.1/24")
    assert options(one(anew, dhcp("request", requested_addr=address)))["message-type"] == 5
    assert one(anew, dhcp("discover", mac="00:16:3e:00:00:02"))[BOOTP].yiaddr == "10.0.0.11"
    refused = one(anew, dhcp("request", mac="00:16:3e:00:00:02", requested_addr=address))
    assert (options(refused)["message-type"], refused.dst) == (6, ALL)
    renewed = one(anew, dhcp("request", ciaddr=address))
    assert (options(renewed)["message-type"], renewed[IP].dst) == (5, address)
    assert one(anew, dhcp("release")) is None
    assert one(anew, dhcp("discover", mac="00:16:3e:00:00:02"))[BOOTP].yiaddr == "10.0.0.10"
    told = one(anew, dhcp("inform", ciaddr="10.0.0.77"))
    assert (options(told)["message-type"], "lease_time" in options(told)) == (5, False)


def test_a_client_that_asks_for_broadcasts_gets_them() -> None:
    offer = one(HelperHost("10.0.0.1/24"), dhcp("discover", flags=0x8000))
    assert (offer.dst, offer[IP].dst) == (ALL, "255.255.255.255")


def test_what_gets_no_answer() -> None:
    host = HelperHost("10.0.0.1/24")
    mac = host.mac.hex(":")
    for packet in (
        Ether(src=CLIENT, dst=ALL) / ARP(hwsrc=CLIENT, psrc="10.0.0.5", pdst="10.0.0.2"),
        Ether(src=CLIENT, dst="00:16:3e:00:00:02") / IP(src="10.0.0.5", dst="10.0.0.1") / ICMP(),
        Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.2") / ICMP(),
        Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1") / ICMP(chksum=1),
        Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1", chksum=1) / ICMP(),
        Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1", flags="MF") / ICMP(),
        Ether(src=CLIENT, dst=mac) / IP(src="10.0.0.5", dst="10.0.0.1") / ICMP(type=0),
        Ether(src="01:00:00:00:00:01", dst=ALL) / ARP(pdst="10.0.0.1"),
        dhcp("request", requested_addr="10.0.0.10", server_id="10.0.0.9"),
    ):  # fmt: skip
        assert one(host, packet) is None, packet.summary()
    assert one(HelperHost("10.0.0.1/24", dhcp=False), dhcp("discover")) is None


def test_addresses_run_out() -> None:
    for length, room in ((24, MAX_LEASES), (30, 1)):
        host = HelperHost(f"10.0.0.1/{length}")
        given = set()
        for number in range(room + 5):
            mac = f"00:16:3e:00:01:{number & 255:02x}"
            offer = one(host, dhcp("discover", mac=mac))
            if offer is not None:
                address = offer[BOOTP].yiaddr
                assert (
                    options(one(host, dhcp("request", mac=mac, requested_addr=address)))["message-type"] == 5
                )
                given.add(address)
        assert len(given) == room
        assert "10.0.0.1" not in given


@given(st.binary(max_size=400), st.booleans())
@settings(max_examples=200, deadline=None)
def test_anything(data: bytes, shaped: bool) -> None:
    """Nothing is raised, whatever comes."""
    host = HelperHost("10.0.0.1/24")
    host.receive(data)
    if shaped:
        for start in (
            bytes(dhcp("discover"))[:-20],
            bytes(Ether(src=CLIENT, dst=ALL) / ARP(pdst="10.0.0.1"))[:20],
        ):
            host.receive(start + data)
        raw = bytearray(bytes(dhcp("discover")))
        for at, value in enumerate(data):
            raw[(at * 7) % len(raw)] = value
        host.receive(bytes(raw))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.1/32",
        "10.0.0.0/24",
        "10.0.0.255/24",
        "224.0.0.1/24",
        "127.0.0.1/8",
        "x",
        "::1/64",
        "10.0.0.1/7",
    ],
)
def test_addresses_that_no_host_has(address: str) -> None:
    with pytest.raises(ValueError, match="a host"):
        HelperHost(address)
