"""`domicile-netio`: the native driver domain of the network."""

from __future__ import annotations

import socket
import sys
from typing import Final

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.abi.event_channel import EVTCHNSTAT_interdomain
from bus.addresses import Port
from bus.link import HypervisorGone
from bus.log import Logger
from bus.messages.domain import Order
from bus.messages.net import TO_NETIO
from bus.packets import PacketLink
from bus.process import begin
from bus.trace_page import Counters
from domains.native.domain import NativeDomain
from domains.native.reactor import Reactor
from domains.native.repeated import Repeated
from domains.native.xenstore import XenstoreClient
from domains.netio.bridges import Bridges
from domains.netio.copies import STAGE_PAGES, Stage
from domains.netio.ports import Outside
from domains.netio.vif import VifServer, identity
from drivers.net.journal import Journals
from drivers.xenbus.client import XenstoreError
from drivers.xenbus.nodes import NodeError

LOG: Final = Logger("netio")
LOOKS_AT_ONCE: Final = 16
LAST_NODE: Final = "trusted"
"""The last node that the toolstack writes into an interface's directory: from then on it is complete."""


class NetIo:
    """All interfaces of this driver domain."""

    def __init__(
        self, host: NativeDomain, control: PacketLink | None, counters: Counters | None = None
    ) -> None:
        """`control`: to Dom0, for ports and links; None: there are none."""
        self.host: Final = host
        self._control: Final = control
        self._counters: Final = counters
        self.bridges: Final = Bridges(host.reactor.after)
        self.servers: Final[dict[str, VifServer]] = {}
        self._looks: Final = Repeated(host.reactor, self._look, LOOKS_AT_ONCE)
        self.store: XenstoreClient
        self.stage: Stage
        self.journals: Journals

    def start(self) -> None:
        """The domain is built: find what there is to serve."""
        host = self.host
        self.store = XenstoreClient(host)
        if host.known_channels:  # a process before this one had them
            self.store.reconnect()
        first = host.own_gfns[0]
        self.stage = Stage(host, first)
        # Where a successor finds them: the rest of its memory but the xenstore ring's page, which is the last.
        self.journals = Journals(host.pages(first + STAGE_PAGES, len(host.own_gfns) - STAGE_PAGES - 1))
        if self._control is not None:
            Outside(host.reactor, self.bridges, self._control)
        self.store.watch("backend/vif", self._scan)

    def _scan(self, path: str) -> None:
        """Which interfaces are there?"""
        node = path.partition("backend/vif/")[2].split("/")[2:]
        if node and node != [LAST_NODE]:
            return  # within an interface's directory: neither new nor gone
        self._looks.ask()

    def _look(self) -> None:
        base = f"/local/domain/{self.host.domid}/backend/vif"
        found: dict[str, tuple[str, ...]] = {}
        for domid in self.store.list(base):
            for number in self.store.list(f"{base}/{domid}"):
                path = f"{base}/{domid}/{number}"
                if self.store.read(f"{path}/{LAST_NODE}") is not None:
                    found[path] = identity(self.store, path)
        for path, server in list(self.servers.items()):
            # The same directory with other nodes: it was taken away, and another one attached before this process looked.
            if found.get(path) != server.identity:
                self.servers.pop(path, None)
                server.close()
        for path in found:
            if path not in self.servers:
                self._serve(path)
        self._close_left_over()

    def _close_left_over(self) -> None:
        """Channels of a process before this one to frontends that are gone since, or have others now."""
        left, self.host.known_channels = self.host.known_channels, []
        mine = {port for server in self.servers.values() for port in server.channels}
        for port, status, _, remote, *_ in left:
            if status == EVTCHNSTAT_interdomain and remote and port not in mine:
                self.host.close_port(Port(port))

    def _serve(self, path: str) -> None:
        try:
            server = VifServer(
                self.host,
                self.store,
                path,
                self.stage,
                self.bridges,
                self.journals,
                self._forget,
                self._counters,
            )
            self.servers[path] = server
            server.start()
        except (ValueError, NodeError, XenstoreError, TimeoutError) as error:
            # Nodes that make no sense, or are gone meanwhile: this interface is not served, and the others are.
            LOG.warning(f"cannot be offered: {error}", vif=path)

    def _forget(self, server: VifServer) -> None:
        if self.servers.get(server.path) is server:  # else its place is another one's by now
            del self.servers[server.path]


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=4096, processes=16, oom_score=-200))
    reactor = Reactor()
    host = NativeDomain(start, reactor)
    control = start.fds.get("control")
    link = PacketLink(socket.socket(fileno=control), TO_NETIO) if control is not None else None
    netio = NetIo(host, link, host.counters)

    def started(order: Order, fds: list[int]) -> bytes:
        reactor.soon(netio.start)
        return b""

    host.on_order["start"] = started
    host.on_order["ping"] = lambda order, fds: b""  # the hypervisor asks for a sign of life
    try:
        reactor.run()
    except HypervisorGone as gone:
        sys.exit(f"netio: {gone}")


if __name__ == "__main__":
    main()
