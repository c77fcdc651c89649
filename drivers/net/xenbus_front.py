"""The frontend's side of a virtual interface's way up and down (nodes as in netif.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from drivers.net.nodes import QueueLink
from drivers.net.receive import Abilities
from drivers.xenbus.client import Procedure
from drivers.xenbus.front import FrontEnd, Port
from drivers.xenbus.nodes import NodeError, read_nodes

ALL: Final = Abilities(scatter=True, gso_v4=True, gso_v6=True, blank_v6=True)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a frontend would like; it gets no more than the back end offers."""

    queues: int = 1
    split: bool = True
    """Event channels of their own for the two rings of a queue."""
    abilities: Abilities = ALL


class FrontPort(Port, Protocol):
    """What the shell does when told."""

    def publish(self, queues: int, split: bool) -> list[QueueLink]:
        """Make new rings, grant them, allocate event channels, and give pages to be filled."""

    def connected(self) -> None:
        """The interface can be used."""


class FrontDevice(FrontEnd):
    """One virtual interface at the frontend."""

    STALE = (
        *("tx-ring-ref", "rx-ring-ref", "event-channel", "event-channel-tx", "event-channel-rx"),
        "multi-queue-num-queues",
    )

    def __init__(self, path: str, backend: str, port: FrontPort, wish: Wish | None = None) -> None:
        """`path`, `backend`: the two ends' directories."""
        super().__init__(path, backend, port)
        self.wish: Final = wish if wish is not None else Wish()
        self._rings: Final = port

    def _offer(self) -> Procedure[list[tuple[str, str]]]:
        wish, base = self.wish, self.backend
        offered = yield from read_nodes(
            base, ("feature-rx-copy", "feature-split-event-channels", "multi-queue-max-queues")
        )
        if not offered.number("feature-rx-copy", 0, 0, 1):
            raise NodeError("the back end does not copy")
        split = wish.split and bool(offered.number("feature-split-event-channels", 0, 0, 1))
        count = min(wish.queues, offered.number("multi-queue-max-queues", 1, 1, 0xFFFF))
        able = wish.abilities
        nodes = [
            ("request-rx-copy", "1"),
            ("feature-rx-notify", str(int(able.notify))),
            ("feature-sg", str(int(able.scatter))),
            ("feature-gso-tcpv4", str(int(able.gso_v4))),
            ("feature-gso-tcpv6", str(int(able.gso_v6))),
            ("feature-no-csum-offload", str(int(not able.blank_v4))),
            ("feature-ipv6-csum-offload", str(int(able.blank_v6))),
            ("request-multicast-control", str(int(able.multicast_control))),
        ]
        if count > 1:
            nodes.append(("multi-queue-num-queues", str(count)))
        for number, queue in enumerate(self._rings.publish(count, split)):
            place = f"queue-{number}/" if count > 1 else ""
            nodes += [(f"{place}tx-ring-ref", str(queue.tx_ref)), (f"{place}rx-ring-ref", str(queue.rx_ref))]
            if split:
                nodes.append((f"{place}event-channel-tx", str(queue.tx_channel)))
                nodes.append((f"{place}event-channel-rx", str(queue.rx_channel)))
            else:
                nodes.append((f"{place}event-channel", str(queue.tx_channel)))
        return nodes

    def _agree(self) -> Procedure[None]:
        self._rings.connected()
        return
        yield  # a procedure that asks nothing
