"""What the frontend of a virtual disk published in xenstore."""

from __future__ import annotations

from dataclasses import dataclass

from drivers.block.wire import Abi


@dataclass(frozen=True, slots=True)
class QueueLink:
    """Where one ring is: grants of its pages, in order, and the frontend's event channel."""

    ring_refs: tuple[int, ...]
    event_channel: int


@dataclass(frozen=True, slots=True)
class FrontLink:
    """What a frontend published: how to attach to it."""

    queues: tuple[QueueLink, ...]
    abi: Abi
    persistent: bool
    large_sectors: bool
    """It counts in the back end's sector-size, whatever that is."""
