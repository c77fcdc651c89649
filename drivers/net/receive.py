"""The receive ring at the back end: from frames to slots that the frontend gave.

Each request is a page for the back end to fill (by grant copy), each response says how much of it is. A frame takes as many pages as it
needs, and one more slot for the extra info of one that is to be segmented. Requests are used, and responses written, in the ring's order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from bus.abi.io.netif import (
    NETIF_RSP_ERROR,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
)
from drivers.net.frames import Frame, finished, locate
from drivers.net.transmit import EXTRA_GSO, PAGE

SLOT: Final = 8
REQUEST: Final = struct.Struct("<H2xI")
"""id, gref."""
RESPONSE: Final = struct.Struct("<HHHh")
"""id, offset, flags, status."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a frontend said that it can receive."""

    notify: bool = True
    """It tells when it has given pages: frames may wait for them."""
    scatter: bool = False
    """A frame may take more than one page."""
    gso_v4: bool = False
    gso_v6: bool = False
    blank_v4: bool = True
    blank_v6: bool = False
    multicast_control: bool = False
    """Groups that it did not ask for are kept from it."""

    def suited(self, frame: Frame) -> list[Frame]:
        """The frame as this frontend can take it; none if it cannot be made so."""
        if frame.gso_size:
            able = self.gso_v4 if frame.gso_type == XEN_NETIF_GSO_TYPE_TCPV4 else self.gso_v6
            if not (able and self.scatter):
                return [Frame(data, validated=True) for data in finished(frame) if self._fits(data)]
        elif frame.blank:
            where = locate(frame.data)
            if where is None or not (self.blank_v4 if where.version == 4 else self.blank_v6):
                return [Frame(data, validated=True) for data in finished(frame) if self._fits(data)]
        return [frame] if self._fits(frame.data) else []

    def _fits(self, data: bytes) -> bool:
        return self.scatter or len(data) <= PAGE


def slots_of(frame: Frame) -> int:
    """Slots that it takes."""
    return -(-len(frame.data) // PAGE) + bool(frame.gso_size)


def pages_of(frame: Frame) -> list[bytes]:
    """What goes into each page."""
    return [frame.data[at : at + PAGE] for at in range(0, len(frame.data), PAGE)]


def responses(frame: Frame, idents: list[int], stati: list[int]) -> list[bytes]:
    """The slots' content, in the ring's order. `idents`: ids of its requests, as many as it takes slots; `stati`: of the copies of its pages
    (0 or a negative GNTST_*)."""
    flags = 0
    if frame.blank:
        flags |= NETRXF_csum_blank | NETRXF_data_validated
    elif frame.validated:
        flags |= NETRXF_data_validated
    pages = pages_of(frame)
    out: list[bytes] = []
    number = 0
    for at, (page, status) in enumerate(zip(pages, stati, strict=True)):
        shown = flags if at == 0 else 0
        if at == 0 and frame.gso_size:
            shown |= NETRXF_extra_info
        if at < len(pages) - 1:
            shown |= NETRXF_more_data
        out.append(RESPONSE.pack(idents[number], 0, shown, len(page) if status == 0 else NETIF_RSP_ERROR))
        number += 1
        if at == 0 and frame.gso_size:
            out.append(EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, frame.gso_size, frame.gso_type, 0))
            number += 1
    return out
