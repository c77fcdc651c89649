"""The back end's side of a virtual interface's way up and down (nodes as in netif.h and Linux's netback)."""

from __future__ import annotations

from typing import Final, Protocol

from drivers.net.nodes import FrontLink, QueueLink
from drivers.net.receive import Abilities
from drivers.xenbus.back import BackEnd, Port
from drivers.xenbus.client import Procedure
from drivers.xenbus.nodes import NodeError, Nodes, read_nodes

MAX_REF: Final = 0xFFFFFFFF
ABILITIES: Final = (
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "request-multicast-control",
)
"""Nodes of a frontend that say what it can receive."""


class BackPort(Port, Protocol):
    """What the shell does when told."""

    def connect(self, link: FrontLink) -> None:
        """Map the rings, bind the channels, serve. ConnectError if that cannot be done (nothing is held then)."""


class BackDevice(BackEnd):
    """One virtual interface at the back end."""

    def __init__(self, path: str, frontend: str, port: BackPort, *, max_queues: int = 1) -> None:
        """`path`, `frontend`: the two ends' directories."""
        if not 1 <= max_queues <= 16:
            raise ValueError(f"{max_queues} queues")
        super().__init__(path, frontend, port)
        self._rings: Final = port
        self._max_queues: Final = max_queues

    def _features(self) -> list[tuple[str, str]]:
        return [
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", "1"),
            ("feature-gso-tcpv6", "1"),
            ("feature-ipv6-csum-offload", "1"),
            ("feature-rx-copy", "1"),
            ("feature-rx-flip", "0"),
            ("feature-multicast-control", "1"),
            ("feature-split-event-channels", "1"),
            ("multi-queue-max-queues", str(self._max_queues)),
            ("carrier", "1"),
        ]

    def _connect(self) -> Procedure[None]:
        self._rings.connect((yield from self.read_link()))

    def read_link(self) -> Procedure[FrontLink]:
        """What the frontend published. NodeError if it makes no sense."""
        base = self.frontend
        nodes = yield from read_nodes(base, ("request-rx-copy", "multi-queue-num-queues", *ABILITIES))
        if not nodes.number("request-rx-copy", 0, 0, 1):
            raise NodeError("the frontend does not say request-rx-copy: pages are not flipped here")
        queues = nodes.number("multi-queue-num-queues", 1, 1, self._max_queues)
        links: list[QueueLink] = []
        for queue in range(queues):
            place = base if queues == 1 else f"{base}/queue-{queue}"
            found = yield from read_nodes(
                place,
                ("tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx", "event-channel"),
            )
            tx = found.number("tx-ring-ref", None, 0, MAX_REF)
            rx = found.number("rx-ring-ref", None, 0, MAX_REF)
            if found["event-channel-tx"] is not None:
                tx_channel = found.number("event-channel-tx", None, 1, MAX_REF)
                rx_channel = found.number("event-channel-rx", None, 1, MAX_REF)
            else:
                tx_channel = rx_channel = found.number("event-channel", None, 1, MAX_REF)
            links.append(QueueLink(tx, rx, tx_channel, rx_channel))
        every = [ref for link in links for ref in (link.tx_ref, link.rx_ref)]
        if len(set(every)) < len(every):
            raise NodeError("two rings have the same grant")
        channels = [channel for link in links for channel in {link.tx_channel, link.rx_channel}]
        if len(set(channels)) < len(channels):
            raise NodeError("two queues have the same event channel")
        return FrontLink(tuple(links), self._abilities(nodes))

    def _abilities(self, nodes: Nodes) -> Abilities:
        found = {name: bool(nodes.number(name, 0, 0, 1)) for name in ABILITIES}
        return Abilities(
            notify=found["feature-rx-notify"],
            scatter=found["feature-sg"],
            gso_v4=found["feature-gso-tcpv4"],
            gso_v6=found["feature-gso-tcpv6"],
            blank_v4=not found["feature-no-csum-offload"],
            blank_v6=found["feature-ipv6-csum-offload"],
            multicast_control=found["request-multicast-control"],
        )
