"""Ethernet frames as they pass through the driver: checksums and segmentation that a sender left to others.

A frontend may send a TCP or UDP frame whose checksum is not computed yet (NETTXF_csum_blank), or a TCP frame longer than the network takes
with the size of the segments that it is to be cut into (GSO). A receiver that can deal with such a frame gets it as it is; for any other
the work is done here.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from bus.abi.io.netif import XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6

ETH_HLEN: Final = 14
ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
VLANS: Final = (0x8100, 0x88A8)
TCP: Final = 6
UDP: Final = 17
_EXTENSIONS: Final = (0, 43, 60)
"""IPv6: hop-by-hop options, routing, destination options. A fragment (44) has no transport checksum of its own."""
_CHECKSUM_AT: Final = {TCP: 16, UDP: 6}
_FIN_PSH: Final = 0x09
_CWR: Final = 0x80
BROADCAST: Final = b"\xff" * 6


class Frame(NamedTuple):
    """One frame, from the destination address on, without the check sequence."""

    data: bytes
    blank: bool = False
    """Its TCP or UDP checksum is not computed: the field holds the sum of the pseudo header."""
    validated: bool = False
    """Its checksums need not be verified: it never was on a wire."""
    gso_size: int = 0
    """TCP: bytes of payload of each segment that it stands for. 0: it is one segment."""
    gso_type: int = 0
    """XEN_NETIF_GSO_TYPE_*."""


class Transport(NamedTuple):
    """Where things are in a frame that carries TCP or UDP over IP."""

    version: int
    network: int
    """Offset of the IP header."""
    transport: int
    """Offset of the TCP or UDP header."""
    end: int
    """Behind the last byte of the IP packet; what follows is padding."""
    protocol: int


class FrameError(ValueError):
    """A frame is not what it is said to be."""


def locate(data: bytes) -> Transport | None:
    """The TCP or UDP header of a whole (not fragmented) IP packet; None if there is none."""
    at = 12
    if len(data) < ETH_HLEN:
        return None
    kind = data[12] << 8 | data[13]
    for _ in range(2):
        if kind in VLANS and len(data) >= at + 6:
            at += 4
            kind = data[at] << 8 | data[at + 1]
    network = at + 2
    if kind == ETH_P_IP:
        return _locate_v4(data, network)
    if kind == ETH_P_IPV6:
        return _locate_v6(data, network)
    return None


def _locate_v4(data: bytes, network: int) -> Transport | None:
    if len(data) < network + 20:
        return None
    head = (data[network] & 15) * 4
    length, fragment = struct.unpack_from(">2xH2xH", data, network)
    if data[network] >> 4 != 4 or head < 20 or fragment & 0x3FFF:
        return None
    return _located(data, 4, network, network + head, network + length, data[network + 9])


def _locate_v6(data: bytes, network: int) -> Transport | None:
    if len(data) < network + 40 or data[network] >> 4 != 6:
        return None
    end = network + 40 + (data[network + 4] << 8 | data[network + 5])
    protocol, at = data[network + 6], network + 40
    for _ in range(8):
        if protocol not in _EXTENSIONS:
            break
        if len(data) < at + 8:
            return None
        protocol, at = data[at], at + 8 + data[at + 1] * 8
    return _located(data, 6, network, at, end, protocol)


def _located(
    data: bytes, version: int, network: int, transport: int, end: int, protocol: int
) -> Transport | None:
    if protocol not in _CHECKSUM_AT or end > len(data) or end - transport < (20 if protocol == TCP else 8):
        return None
    return Transport(version, network, transport, end, protocol)


def ones_sum(data: bytes) -> int:
    """The Internet checksum's sum (RFC 1071), not complemented: 16 bits, in one's complement (0 only for zeros)."""
    if len(data) & 1:
        data += b"\0"
    number = int.from_bytes(data, "big")
    return number % 0xFFFF or (0xFFFF if number else 0)


def _pseudo(data: bytes, where: Transport) -> int:
    """The sum of the pseudo header."""
    if where.version == 4:
        addresses = data[where.network + 12 : where.network + 20]
    else:
        addresses = data[where.network + 8 : where.network + 40]
    return ones_sum(addresses + struct.pack(">II", where.end - where.transport, where.protocol))


def _with_checksum(data: bytes, where: Transport, value: int) -> bytes:
    at = where.transport + _CHECKSUM_AT[where.protocol]
    return data[:at] + value.to_bytes(2, "big") + data[at + 2 :]


def blank(data: bytes) -> bytes:
    """With the sum of the pseudo header in the checksum field, as a receiver of a blank frame expects it, whatever was there. FrameError
    if the frame has no such field."""
    where = locate(data)
    if where is None:
        raise FrameError("a checksum is to be computed in a frame that has none")
    return _with_checksum(data, where, _pseudo(data, where))


def complete(data: bytes) -> bytes:
    """With its TCP or UDP checksum computed. FrameError if it has none."""
    where = locate(data)
    if where is None:
        raise FrameError("a checksum is to be computed in a frame that has none")
    at = where.transport + _CHECKSUM_AT[where.protocol]
    covered = data[where.transport : at] + b"\0\0" + data[at + 2 : where.end]
    total = (_pseudo(data, where) + ones_sum(covered)) % 0xFFFF
    value = 0xFFFF - total
    return _with_checksum(data, where, value or 0xFFFF)  # 0 in UDP says that there is none


def finished(frame: Frame) -> list[bytes]:
    """What goes to somebody who can do nothing for himself: segments, with all checksums. Empty if the frame makes no sense."""
    try:
        if frame.gso_size:
            return segments(frame)
        return [complete(frame.data) if frame.blank else frame.data]
    except FrameError:
        return []


def segments(frame: Frame) -> list[bytes]:
    """A frame with a gso_size as the frames that it stands for, their checksums computed. FrameError if it is no TCP frame of its
    type."""
    data, size = frame.data, frame.gso_size
    where = locate(data)
    if where is None or where.protocol != TCP or where.version != _VERSIONS.get(frame.gso_type):
        raise FrameError("segments of what is no TCP of that kind")
    head = where.transport + (data[where.transport + 12] >> 4) * 4
    if head < where.transport + 20 or head > where.end or size < 1:
        raise FrameError("a TCP header that makes no sense")
    payload = data[head : where.end]
    sequence = int.from_bytes(data[where.transport + 4 : where.transport + 8], "big")
    flags = data[where.transport + 13]
    ident = int.from_bytes(data[where.network + 4 : where.network + 6], "big")
    out = []
    for number, start in enumerate(range(0, max(len(payload), 1), size)):
        part = payload[start : start + size]
        last = start + size >= len(payload)
        header = bytearray(data[:head])
        header[where.transport + 4 : where.transport + 8] = ((sequence + start) & 0xFFFFFFFF).to_bytes(
            4, "big"
        )
        header[where.transport + 13] = flags & ~(0 if last else _FIN_PSH) & ~(_CWR if number else 0)
        if where.version == 4:
            length = head - where.network + len(part)
            header[where.network + 2 : where.network + 4] = length.to_bytes(2, "big")
            header[where.network + 4 : where.network + 6] = (ident + number & 0xFFFF).to_bytes(2, "big")
            header[where.network + 10 : where.network + 12] = b"\0\0"
            total = ones_sum(bytes(header[where.network : where.transport]))
            header[where.network + 10 : where.network + 12] = (0xFFFF - total).to_bytes(2, "big")
        else:
            length = head - where.network - 40 + len(part)
            header[where.network + 4 : where.network + 6] = length.to_bytes(2, "big")
        out.append(complete(bytes(header) + part))
    return out


_VERSIONS: Final = {XEN_NETIF_GSO_TYPE_TCPV4: 4, XEN_NETIF_GSO_TYPE_TCPV6: 6}


def flow_hash(data: bytes) -> int:
    """A number that is the same for all frames of one flow (addresses, ports), for choosing a queue."""
    where = locate(data)
    if where is None:
        return zlib.crc32(data[:12])
    ports = data[where.transport : where.transport + 4]
    if where.version == 4:
        return zlib.crc32(data[where.network + 12 : where.network + 20] + ports)
    return zlib.crc32(data[where.network + 8 : where.network + 40] + ports)


def is_multicast(mac: bytes) -> bool:
    """A group address, broadcast too."""
    return bool(mac[0] & 1)


def mac_text(mac: bytes) -> str:
    """00:16:3e:00:00:01"""
    return mac.hex(":")
