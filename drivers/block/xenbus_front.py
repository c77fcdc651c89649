"""The frontend's side of a virtual disk's way up and down (nodes as in blkif.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from drivers.block.frontend import Features
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64, Abi
from drivers.xenbus.client import Procedure
from drivers.xenbus.front import FrontEnd, Port
from drivers.xenbus.nodes import read_nodes
from drivers.xenbus.paged_ring import MAX_ORDER


@dataclass(frozen=True, slots=True)
class Wish:
    """What a frontend would like; it gets no more than the back end offers."""

    queues: int = 1
    order: int = 0
    persistent: bool = True
    large_sectors: bool = True
    abi: Abi = X86_64


class FrontPort(Port, Protocol):
    """What the shell does when told."""

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        """Make new rings of so many pages, grant them, and allocate event channels."""

    def connected(self, features: Features) -> None:
        """The disk can be used: `Frontend.connect`."""


class FrontDevice(FrontEnd):
    """One virtual disk at the frontend."""

    STALE = ("ring-page-order", "num-ring-pages", "multi-queue-num-queues", "ring-ref", "event-channel")

    def __init__(self, path: str, backend: str, port: FrontPort, wish: Wish | None = None) -> None:
        """`path`, `backend`: the two ends' directories."""
        super().__init__(path, backend, port)
        self.wish: Final = wish if wish is not None else Wish()
        self._rings: Final = port

    def _offer(self) -> Procedure[list[tuple[str, str]]]:
        wish, base = self.wish, self.backend
        offered = yield from read_nodes(base, ("max-ring-page-order", "multi-queue-max-queues"))
        order = min(wish.order, offered.number("max-ring-page-order", 0, 0, 31), MAX_ORDER)
        count = min(wish.queues, offered.number("multi-queue-max-queues", 1, 1, 0xFFFF))
        queues = self._rings.publish(count, 1 << order)
        nodes = [("protocol", wish.abi.protocol)]
        nodes.append(("feature-persistent", str(int(wish.persistent))))
        nodes.append(("feature-large-sector-size", str(int(wish.large_sectors))))
        if order:
            nodes += [("ring-page-order", str(order)), ("num-ring-pages", str(1 << order))]
        if count > 1:
            nodes.append(("multi-queue-num-queues", str(count)))
        for number, queue in enumerate(queues):
            place = f"queue-{number}/" if count > 1 else ""
            nodes.append((f"{place}event-channel", str(queue.event_channel)))
            if order:
                nodes += [(f"{place}ring-ref{at}", str(ref)) for at, ref in enumerate(queue.ring_refs)]
            else:
                nodes.append((f"{place}ring-ref", str(queue.ring_refs[0])))
        return nodes

    def _agree(self) -> Procedure[None]:
        self._rings.connected((yield from self._features()))

    def _features(self) -> Procedure[Features]:
        flag_nodes = [f"feature-{name}" for name in ("flush-cache", "barrier", "discard", "persistent")]
        others = ("sector-size", "sectors", "info", "discard-secure", "feature-max-indirect-segments")
        found = yield from read_nodes(self.backend, (*flag_nodes, *others))
        size = found.number("sector-size", 512, 512, 4096)
        flags = {name.removeprefix("feature-"): bool(found.number(name, 0, 0, 1)) for name in flag_nodes}
        return Features(
            sectors=found.number("sectors", None, 0, 1 << 55),
            sector_size=size,
            read_only=bool(found.number("info", 0, 0, 0xFFFFFFFF) & 4),
            flush=flags["flush-cache"],
            barrier=flags["barrier"],
            discard=flags["discard"],
            discard_secure=bool(found.number("discard-secure", 0, 0, 1)),
            max_indirect=found.number("feature-max-indirect-segments", 0, 0, 0xFFFFFFFF),
            persistent=flags["persistent"] and self.wish.persistent,
        )
