"""The transmit ring at the back end: from slots to frames.

A packet is a chain of slots: the first (with the size of the whole packet), extra infos, further fragments. What was read from the ring is
a private copy; every number in it is somebody else's. Some wrong chains cost the frontend that packet, others its connection, as Xen's
netback in Linux has it: what cannot be told apart from the next packet ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bus.abi.io.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MAX,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_EXTRA_TYPE_MCAST_DEL,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    XEN_NETIF_NR_SLOTS_MIN,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from drivers.net.frames import ETH_HLEN, Frame, FrameError, blank, locate

SLOT: Final = 12
"""Bytes of a slot: a request."""
REQUEST: Final = struct.Struct("<IHHHH")
"""gref, offset, flags, id, size."""
RESPONSE: Final = struct.Struct("<Hh")
"""id, status."""
EXTRA_GSO: Final = struct.Struct("<BBHBxH")
"""type, flags, size, GSO type, features."""
PAGE: Final = 4096
MAX_SLOTS: Final = XEN_NETIF_NR_SLOTS_MIN
"""Slots with data of one packet."""
FATAL_SLOTS: Final = 20
"""More than that is no mistake: the connection ends."""
_GSO_VERSIONS: Final = {XEN_NETIF_GSO_TYPE_TCPV4: 4, XEN_NETIF_GSO_TYPE_TCPV6: 6}


class RingBroken(Exception):
    """What the frontend published makes no sense; the text says why. Its connection ends."""


@dataclass(slots=True)
class Packet:
    """One chain."""

    answers: list[tuple[int, int]] = field(default_factory=list)
    """(id, status) of each of its slots; the status of slots with data is set when it is known."""
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    """(ref, offset, length) of its fragments; none if it is in error."""
    flags: int = 0
    gso_size: int = 0
    gso_type: int = 0
    groups: list[tuple[bool, bytes]] = field(default_factory=list)
    """(add, address): a request about multicast groups, which carries no frame."""
    error: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(length for _, _, length in self.parts)


def parse(data: bytes, limit: int) -> tuple[list[Packet], int]:
    """The chains in consecutive slots, at most about `limit` fragments of them, and how many slots they take. RingBroken."""
    count = len(data) // SLOT
    packets: list[Packet] = []
    at = fragments = 0
    while at < count and fragments < limit:
        packet = Packet()
        at = _chain(data, at, count, packet)
        fragments += len(packet.parts)
        packets.append(packet)
    return packets, at


def _chain(data: bytes, at: int, count: int, packet: Packet) -> int:
    gref, offset, flags, ident, size = REQUEST.unpack_from(data, at * SLOT)
    packet.answers.append((ident, NETIF_RSP_OKAY))
    packet.flags = flags
    at += 1
    if flags & NETTXF_extra_info:
        at = _extras(data, at, count, packet)
    if packet.groups:
        if flags & NETTXF_more_data:
            raise RingBroken("a request about multicast groups with more data")
        return at
    chain: list[tuple[int, int, int]] = []
    left = size
    while flags & NETTXF_more_data:
        if at >= count:
            raise RingBroken("a packet's last slots are missing")
        if len(chain) + 1 >= FATAL_SLOTS:
            raise RingBroken(f"a packet of more than {FATAL_SLOTS} slots")
        more_ref, more_offset, flags, more_id, length = REQUEST.unpack_from(data, at * SLOT)
        at += 1
        packet.answers.append((more_id, NETIF_RSP_OKAY))
        _within_page(more_offset, length)
        if flags & NETTXF_extra_info:
            raise RingBroken("extra info behind a slot that is not the first")
        if length > left:
            packet.error = packet.error or f"a fragment of {length} bytes where {left} are left"
        left -= min(left, length)
        chain.append((more_ref, more_offset, length))
    _within_page(offset, left if not packet.error else 0)
    if len(chain) + 1 > MAX_SLOTS:
        packet.error = packet.error or f"{len(chain) + 1} slots, where at most {MAX_SLOTS} are allowed"
    if size < ETH_HLEN:
        packet.error = packet.error or f"a packet of {size} bytes: less than an Ethernet header"
    if packet.error:
        fail(packet)
    else:
        packet.parts = [part for part in [(gref, offset, left), *chain] if part[2]]
    return at


def _within_page(offset: int, length: int) -> None:
    if offset + length > PAGE:
        raise RingBroken(f"{length} bytes at offset {offset} are not within one page")


def _extras(data: bytes, at: int, count: int, packet: Packet) -> int:
    while True:
        if at >= count:
            raise RingBroken("extra info is missing")
        kind, flags, size, gso_type, _features = EXTRA_GSO.unpack_from(data, at * SLOT)
        if not 0 < kind < XEN_NETIF_EXTRA_TYPE_MAX:
            raise RingBroken(f"extra info of type {kind}")
        if len(packet.answers) > XEN_NETIF_EXTRA_TYPE_MAX:
            raise RingBroken("extra infos without an end")
        packet.answers.append((0, NETIF_RSP_NULL))
        if kind == XEN_NETIF_EXTRA_TYPE_GSO:
            if not size or gso_type not in _GSO_VERSIONS:
                raise RingBroken(f"segments of {size} bytes, of type {gso_type}")
            packet.gso_size, packet.gso_type = size, gso_type
        elif kind in (XEN_NETIF_EXTRA_TYPE_MCAST_ADD, XEN_NETIF_EXTRA_TYPE_MCAST_DEL):
            start = at * SLOT + 2
            packet.groups.append((kind == XEN_NETIF_EXTRA_TYPE_MCAST_ADD, data[start : start + 6]))
        at += 1
        if not flags & XEN_NETIF_EXTRA_FLAG_MORE:
            return at


def fail(packet: Packet) -> None:
    """All its slots with data are answered with NETIF_RSP_ERROR."""
    packet.parts = []
    packet.answers = [
        (ident, status if status == NETIF_RSP_NULL else NETIF_RSP_ERROR) for ident, status in packet.answers
    ]


def frame_of(packet: Packet, pieces: Sequence[bytes]) -> Frame:
    """The frame, of its fragments' bytes. FrameError if its flags promise what is not there."""
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    is_blank = bool(packet.flags & NETTXF_csum_blank)
    if packet.gso_size:
        where = locate(data)
        if where is None or where.version != _GSO_VERSIONS[packet.gso_type] or where.protocol != 6:
            raise FrameError("segments are to be made of what is no TCP of that kind")
    if is_blank or packet.gso_size:
        data = blank(data)
    return Frame(
        data,
        is_blank or bool(packet.gso_size),
        is_blank or bool(packet.flags & NETTXF_data_validated),
        packet.gso_size,
        packet.gso_type,
    )
