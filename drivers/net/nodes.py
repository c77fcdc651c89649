"""What a network frontend published in xenstore."""

from __future__ import annotations

from dataclasses import dataclass

from drivers.net.receive import Abilities


@dataclass(frozen=True, slots=True)
class QueueLink:
    """Where one pair of rings is: the grants of their pages, and the frontend's event channels (one and the same, or two)."""

    tx_ref: int
    rx_ref: int
    tx_channel: int
    rx_channel: int


@dataclass(frozen=True, slots=True)
class FrontLink:
    """How to attach to a frontend, and what it can do."""

    queues: tuple[QueueLink, ...]
    abilities: Abilities
