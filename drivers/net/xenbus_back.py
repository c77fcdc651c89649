"""The back end's side of a virtual interface's way up and down (nodes as in netif.h and Linux's netback)."""

from __future__ import annotations

from typing import Final, Protocol

from drivers.net.nodes import FrontLink, QueueLink
from drivers.net.receive import Abilities
from drivers.xenbus.back import BackEnd, Port
from drivers.xenbus.client import Procedure
from drivers.xenbus.nodes import NodeError, optional, read_number

MAX_REF: Final = 0xFFFFFFFF


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
        if not (yield from read_number(f"{base}/request-rx-copy", 0, 0, 1)):
            raise NodeError("the frontend does not say request-rx-copy: pages are not flipped here")
        queues = yield from read_number(f"{base}/multi-queue-num-queues", 1, 1, self._max_queues)
        links: list[QueueLink] = []
        for queue in range(queues):
            place = base if queues == 1 else f"{base}/queue-{queue}"
            tx = yield from read_number(f"{place}/tx-ring-ref", None, 0, MAX_REF)
            rx = yield from read_number(f"{place}/rx-ring-ref", None, 0, MAX_REF)
            split = yield from optional(f"{place}/event-channel-tx")
            if split is not None:
                tx_channel = yield from read_number(f"{place}/event-channel-tx", None, 1, MAX_REF)
                rx_channel = yield from read_number(f"{place}/event-channel-rx", None, 1, MAX_REF)
            else:
                tx_channel = rx_channel = yield from read_number(f"{place}/event-channel", None, 1, MAX_REF)
            links.append(QueueLink(tx, rx, tx_channel, rx_channel))
        every = [ref for link in links for ref in (link.tx_ref, link.rx_ref)]
        if len(set(every)) < len(every):
            raise NodeError("two rings have the same grant")
        channels = [channel for link in links for channel in {link.tx_channel, link.rx_channel}]
        if len(set(channels)) < len(channels):
            raise NodeError("two queues have the same event channel")
        return FrontLink(tuple(links), (yield from self._abilities()))

    def _abilities(self) -> Procedure[Abilities]:
        found = {}
        for name in (
            "feature-rx-notify",
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-no-csum-offload",
            "feature-ipv6-csum-offload",
            "request-multicast-control",
        ):
            found[name] = bool((yield from read_number(f"{self.frontend}/{name}", 0, 0, 1)))
        return Abilities(
            notify=found["feature-rx-notify"],
            scatter=found["feature-sg"],
            gso_v4=found["feature-gso-tcpv4"],
            gso_v6=found["feature-gso-tcpv6"],
            blank_v4=not found["feature-no-csum-offload"],
            blank_v6=found["feature-ipv6-csum-offload"],
            multicast_control=found["request-multicast-control"],
        )
