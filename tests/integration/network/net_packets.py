"""Packets for the conformance guest `net`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

MAC = "00:16:3e:00:00:02"
US = "02:00:00:00:00:01"
ADDRESS = "10.0.0.2"
OWN = "10.0.0.1"
PATTERN = bytes(range(256)) * 64


def packet(payload: Any) -> Any:
    """To the guest, from the test."""
    return Ether(dst=MAC, src=US) / IP(src=OWN, dst=ADDRESS) / payload


def udp(port: int, payload: bytes) -> Any:
    return packet(UDP(sport=4000, dport=port) / Raw(payload))


def echo(seq: int, size: int) -> Any:
    """ICMP echo."""
    return packet(ICMP(id=7, seq=seq) / Raw(PATTERN[:size]))


def go_on() -> Any:
    """What the guest waits for between its steps."""
    return udp(9, b"go on")


def ours(port: int) -> Callable[[Any], bool]:
    """An answer from that port."""
    return lambda one: bool(one.haslayer(UDP) and one[UDP].sport == port)
