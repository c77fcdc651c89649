"""Counters of a virtual interface in a trace page, for `domicile top`."""

from __future__ import annotations

from typing import Final

from drivers.net.backend import Counters

TX_BYTES, TX_PACKETS, TX_ERRORS, RX_BYTES, RX_PACKETS, RX_DROPPED = range(6)
"""Places: as the guest sees it, it transmits and receives."""
_MARK: Final = 1 << 62
"""Bit 63 is a disk's (drivers.block.watch)."""


def counter_key(domain: int, handle: int) -> int:
    """The key of an interface's slot: the frontend's domain, and the interface's number."""
    return _MARK | domain << 32 | handle


def counter_vif(key: int) -> tuple[int, int] | None:
    """(domain, handle) of a key; None: it is of something else."""
    return (key >> 32 & 0x3FFF_FFFF, key & 0xFFFF_FFFF) if key >> 62 == 1 else None


def put(slot: memoryview, counters: Counters) -> None:
    """What was counted since the last time is added: a slot outlives connections, and processes."""
    for place, number in (
        (TX_BYTES, counters.tx_bytes),
        (TX_PACKETS, counters.tx_packets),
        (TX_ERRORS, counters.tx_errors),
        (RX_BYTES, counters.rx_bytes),
        (RX_PACKETS, counters.rx_packets),
        (RX_DROPPED, counters.rx_dropped),
    ):
        slot[place] += number
    counters.tx_bytes = counters.tx_packets = counters.tx_errors = 0
    counters.rx_bytes = counters.rx_packets = counters.rx_dropped = 0
