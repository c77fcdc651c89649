"""Checksums and segments, held against scapy's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from bus.abi.io.netif import XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6
from drivers.net.frames import Frame, FrameError, blank, complete, finished, locate, ones_sum, segments

_D, _S = "00:16:3e:00:00:02", "00:16:3e:00:00:01"
"""Given always: scapy would ask the host's network for a destination's address."""
ETHER = Ether(dst=_D, src=_S)
HEADS: list[Any] = [
    ETHER / IP(src="10.0.0.1", dst="10.0.0.2"),
    ETHER / Dot1Q(vlan=7) / IP(src="10.0.0.1", dst="10.0.0.2"),
    ETHER / IPv6(src="fe80::1", dst="fe80::2"),
    ETHER / IPv6(src="fe80::1", dst="fe80::2") / IPv6ExtHdrDestOpt(),
]


@given(st.binary(max_size=3000))
def test_the_sum_is_that_of_rfc_1071(data: bytes) -> None:
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert ones_sum(data) == total


@pytest.mark.parametrize("head", HEADS, ids=["v4", "vlan", "v6", "v6-options"])
@pytest.mark.parametrize("kind", [TCP, UDP])
@given(payload=st.binary(max_size=200), padding=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_a_checksum_that_was_left_out_is_scapys(head: Any, kind: Any, payload: bytes, padding: int) -> None:
    """Whatever stands in the field; padding behind the packet is not summed."""
    right = bytes(head / kind(sport=1000, dport=2000) / Raw(payload))
    where = locate(right)
    assert where is not None
    at = where.transport + (16 if kind is TCP else 6)
    wrong = right[:at] + b"\xde\xad" + right[at + 2 :] + bytes(padding)
    assert complete(wrong) == right + bytes(padding)
    assert complete(blank(wrong)) == right + bytes(padding)
    assert finished(Frame(wrong, blank=True)) == [right + bytes(padding)]


def test_a_zero_of_udp_is_written_as_all_ones() -> None:
    before = complete(bytes(HEADS[0] / UDP(sport=0, dport=0)))
    port = int.from_bytes(before[-2:], "big")  # what is missing to a sum of all ones
    assert complete(bytes(HEADS[0] / UDP(sport=port, dport=0)))[-2:] == b"\xff\xff"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(13),
        bytes(Ether(dst=_D, src=_S, type=0x0806) / Raw(bytes(40))),
        bytes(Ether(dst=_D, src=_S) / IP(proto=1) / Raw(bytes(40))),
        bytes(Ether(dst=_D, src=_S) / IP(frag=3, proto=17) / Raw(bytes(40))),
        bytes(Ether(dst=_D, src=_S) / IP(flags="MF", proto=17) / Raw(bytes(40))),
        bytes(Ether(dst=_D, src=_S) / IP(len=2000) / UDP()),
        bytes(Ether(dst=_D, src=_S) / IP(ihl=3) / UDP()),
        bytes(Ether(dst=_D, src=_S) / IPv6(nh=44) / Raw(bytes(40))),
        bytes(Ether(dst=_D, src=_S) / IPv6(plen=3) / UDP()),
        bytes(Ether(dst=_D, src=_S) / IP() / UDP())[:30],
    ],
)
def test_what_is_no_whole_tcp_or_udp_packet_has_no_checksum_to_compute(data: bytes) -> None:
    assert locate(data) is None
    with pytest.raises(FrameError):
        complete(data)
    assert finished(Frame(data, blank=True)) == []


@given(st.binary(max_size=120))
def test_any_bytes_are_located_or_refused(data: bytes) -> None:
    """Nothing else is raised, and nothing is read behind the end."""
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00\x00\x01\x08\x00"):
        frame = bytes(12) + kind + data
        found = locate(frame)
        if found is not None:
            assert found.transport + 8 <= found.end <= len(frame)
            complete(frame)
        finished(Frame(frame, True, True, 100, 1))


@pytest.mark.parametrize(("head", "kind"), [(HEADS[0], XEN_NETIF_GSO_TYPE_TCPV4), (HEADS[1], XEN_NETIF_GSO_TYPE_TCPV4),
                                            (HEADS[2], XEN_NETIF_GSO_TYPE_TCPV6)])  # fmt: skip
@given(
    payload=st.binary(min_size=1, max_size=5000),
    size=st.integers(1, 1500),
    flags=st.sampled_from(["A", "PA", "FPA", "CA"]),
)
@settings(max_examples=25, deadline=None)
def test_segments_are_whole_packets_of_one_stream(
    head: Any, kind: int, payload: bytes, size: int, flags: str
) -> None:
    """Their payloads in a row are the frame's; sequence numbers, lengths and checksums are right; FIN and PSH are on the last, CWR on
    the first."""
    whole = (
        head / TCP(sport=1, dport=2, seq=0xFFFFFF00, flags=flags, options=[("NOP", None)] * 4) / Raw(payload)
    )
    out = segments(Frame(bytes(whole), True, True, size, kind))
    packets = [Ether(data) for data in out]
    assert b"".join(bytes(packet[TCP].payload) for packet in packets) == payload
    at = 0xFFFFFF00
    for number, packet in enumerate(packets):
        last = number == len(packets) - 1
        assert packet[TCP].seq == at & 0xFFFFFFFF
        at += len(packet[TCP].payload)
        assert len(packet[TCP].payload) == (size if not last else len(payload) - size * number)
        wanted = set(flags) - (set() if last else {"F", "P"}) - (set() if number == 0 else {"C"})
        assert set(str(packet[TCP].flags)) == wanted
        again = Ether(bytes(packet))
        del again[TCP].chksum
        if IP in again:
            del again[IP].chksum, again[IP].len
        else:
            del again[IPv6].plen
        assert bytes(again) == bytes(packet)


def test_segments_of_another_protocol_are_refused() -> None:
    for head, kind in ((HEADS[0], XEN_NETIF_GSO_TYPE_TCPV6), (HEADS[2], XEN_NETIF_GSO_TYPE_TCPV4)):
        with pytest.raises(FrameError):
            segments(Frame(bytes(head / TCP() / Raw(b"x" * 100)), True, True, 10, kind))
    with pytest.raises(FrameError):
        segments(Frame(bytes(HEADS[0] / UDP() / Raw(b"x" * 100)), True, True, 10, XEN_NETIF_GSO_TYPE_TCPV4))
    with pytest.raises(FrameError):
        segments(Frame(bytes(HEADS[0] / TCP(dataofs=15)), True, True, 10, XEN_NETIF_GSO_TYPE_TCPV4))
