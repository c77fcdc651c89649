"""A helper host on a bridge, for guests that want one there: answers ARP and ping, and gives out addresses by DHCP. It forwards nothing.

Sources: RFC 826 (ARP), RFC 792 (ICMP), RFC 2131 and 2132 (DHCP). What comes in is anybody's: lengths are checked before use, and what makes no
sense gets no answer. Leases live in memory only; a client that asks for the address that it had gets it again if nobody else has it, so
that a host which was started anew goes on where the old one was.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from drivers.net.frames import BROADCAST, ETH_HLEN, ETH_P_IP, complete, locate, ones_sum

ETH_P_ARP: Final = 0x0806
LEASE_S: Final = 86400
FIRST_HOST: Final = 10
"""Clients get addresses from the network's tenth on."""
MAX_LEASES: Final = 200
_ARP: Final = struct.Struct(">HHBBH6s4s6s4s")
_BOOTP: Final = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE: Final = b"\x63\x82\x53\x63"
_DISCOVER, _OFFER, _REQUEST, _DECLINE, _ACK, _NAK, _RELEASE, _INFORM = range(1, 9)
_MASK, _ROUTER, _WANTED, _TIME, _KIND, _SERVER = 1, 3, 50, 51, 53, 54
_MAX_OPTIONS: Final = 64


class HelperHost:
    """One host; no I/O."""

    def __init__(self, address: str, *, dhcp: bool = True) -> None:
        """`address`: its own, and the length of the network's prefix ("10.0.0.1/24"). ValueError for one that cannot be a host's."""
        try:
            self.interface: Final = IPv4Interface(address)
        except ValueError:
            raise ValueError(f"{address!r}: the address of a host, such as 10.0.0.1/24") from None
        network = self.interface.network
        if not 8 <= network.prefixlen <= 30 or self.interface.ip in (
            network.network_address,
            network.broadcast_address,
        ):
            raise ValueError(f"{address}: an address of a host in a network of /8 to /30")
        if (
            self.interface.ip.is_multicast
            or self.interface.ip.is_loopback
            or self.interface.ip.is_unspecified
        ):
            raise ValueError(f"{address}: not an address that a host can have")
        self.ip: Final = self.interface.ip.packed
        self.mac: Final = b"\x02\x44" + self.ip
        self.dhcp: Final = dhcp
        first = min(FIRST_HOST, network.num_addresses // 2)
        last = min(first + MAX_LEASES, network.num_addresses - 1)
        self._range: Final = [
            packed for n in range(first, last) if (packed := (network.network_address + n).packed) != self.ip
        ]
        self._leases: Final[dict[bytes, bytes]] = {}
        """Hardware address -> address."""

    def receive(self, data: bytes) -> list[bytes]:
        """What it sends when that frame comes."""
        if len(data) < ETH_HLEN or data[:6] not in (self.mac, BROADCAST) or data[6] & 1:
            return []
        kind = data[12] << 8 | data[13]
        if kind == ETH_P_ARP:
            return self._arp(data)
        if kind != ETH_P_IP or len(data) < 34 or data[14] >> 4 != 4:
            return []
        return self._ip(data)

    def _arp(self, data: bytes) -> list[bytes]:
        if len(data) < ETH_HLEN + _ARP.size:
            return []
        hardware, protocol, hlen, plen, operation, sender, source, _, target = _ARP.unpack_from(
            data, ETH_HLEN
        )
        if (hardware, protocol, hlen, plen, operation) != (1, ETH_P_IP, 6, 4, 1) or target != self.ip:
            return []
        answer = _ARP.pack(1, ETH_P_IP, 6, 4, 2, self.mac, self.ip, sender, source)
        return [(sender + self.mac + b"\x08\x06" + answer).ljust(60, b"\0")]

    def _ip(self, data: bytes) -> list[bytes]:
        head = (data[14] & 15) * 4
        length, fragment = struct.unpack_from(">2xH2xH", data, ETH_HLEN)
        end = ETH_HLEN + length
        if (
            head < 20
            or fragment & 0x3FFF
            or length < head
            or end > len(data)
            or ones_sum(data[14 : 14 + head]) != 0xFFFF
        ):
            return []
        payload = data[ETH_HLEN + head : end]
        if data[23] == 1 and data[30:34] == self.ip:
            return self._echo(data, payload)
        where = locate(data)
        if data[23] == 17 and where is not None and len(payload) >= 8 and self.dhcp:
            source, target, size = struct.unpack_from(">HHH", payload)
            if (source, target) == (68, 67) and 8 <= size <= len(payload):
                return self._dhcp(payload[8:size])
        return []

    def _echo(self, data: bytes, payload: bytes) -> list[bytes]:
        if len(payload) < 8 or payload[:2] != b"\x08\0" or ones_sum(payload) != 0xFFFF:
            return []
        answer = b"\0\0\0\0" + payload[4:]
        total = (0xFFFF - ones_sum(answer)).to_bytes(2, "big")
        return [self._packet(data[6:12], data[26:30], 1, answer[:2] + total + answer[4:])]

    def _packet(self, mac: bytes, address: bytes, protocol: int, payload: bytes) -> bytes:
        head = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0, self.ip, address
        )
        total = (0xFFFF - ones_sum(head)).to_bytes(2, "big")
        return (mac + self.mac + b"\x08\0" + head[:10] + total + head[12:] + payload).ljust(60, b"\0")

    # ------------------------------------------------------------------ DHCP

    def _dhcp(self, data: bytes) -> list[bytes]:
        if len(data) < _BOOTP.size:
            return []
        op, htype, hlen, _, xid, _, flags, ciaddr, _, _, _, chaddr, _, _, cookie = _BOOTP.unpack_from(data)
        if (op, htype, hlen, cookie) != (1, 1, 6, _COOKIE) or chaddr[0] & 1:
            return []
        options = _options(data[_BOOTP.size :])
        kind = options.get(_KIND, b"")
        client = chaddr[:6]
        if len(kind) != 1 or options.get(_SERVER, self.ip) != self.ip:
            return []  # it took another server's offer
        if kind[0] in (_RELEASE, _DECLINE):
            self._leases.pop(client, None)
            return []
        wanted = options.get(_WANTED, ciaddr)
        if kind[0] == _DISCOVER:
            address = self._address_for(client, wanted)
            answer = _OFFER if address else 0
        elif kind[0] == _REQUEST:
            address = wanted if self._may_have(client, wanted) else b""
            answer = _ACK if address else _NAK
            if address:
                self._leases[client] = address
        elif kind[0] == _INFORM:
            address, answer = bytes(4), _ACK
        else:
            return []
        if not answer:
            return []
        return [self._reply(answer, xid, flags, client, ciaddr, address or bytes(4))]

    def _may_have(self, client: bytes, address: bytes) -> bool:
        others = {value for mac, value in self._leases.items() if mac != client}
        known = client in self._leases or len(self._leases) < len(self._range)
        return address in self._range and address not in others and known

    def _address_for(self, client: bytes, wanted: bytes) -> bytes:
        for choice in (self._leases.get(client, b""), wanted, *self._range):
            if self._may_have(client, choice):
                return choice
        return b""

    def _reply(self, kind: int, xid: int, flags: int, client: bytes, ciaddr: bytes, address: bytes) -> bytes:
        options = bytes((_KIND, 1, kind, _SERVER, 4)) + self.ip
        if kind != _NAK:
            options += bytes((_MASK, 4)) + self.interface.netmask.packed + bytes((_ROUTER, 4)) + self.ip
        if kind != _NAK and any(address):
            options += bytes((_TIME, 4)) + LEASE_S.to_bytes(4, "big")
        body = _BOOTP.pack(
            2, 1, 6, 0, xid, 0, flags, bytes(4) if kind == _NAK else ciaddr, address, self.ip, bytes(4),
            client.ljust(16, b"\0"), b"", b"", _COOKIE,
        ) + options + b"\xff"  # fmt: skip
        body = body.ljust(300, b"\0")
        direct = any(ciaddr) and kind != _NAK
        everybody = not direct and (flags & 0x8000 or kind == _NAK)
        mac = BROADCAST if everybody else client
        target = ciaddr if direct else IPv4Address("255.255.255.255").packed if everybody else address
        datagram = struct.pack(">HHHH", 67, 68, 8 + len(body), 0) + body
        return complete(self._packet(mac, target, 17, datagram))


def _options(data: bytes) -> dict[int, bytes]:
    """Options by number, as far as they make sense."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 1 < len(data) and data[at] != 255 and len(found) < _MAX_OPTIONS:
        if data[at] == 0:
            at += 1
            continue
        size = data[at + 1]
        if at + 2 + size > len(data):
            break
        found.setdefault(data[at], data[at + 2 : at + 2 + size])
        at += 2 + size
    return found
