"""`domicile-domio`: the native driver domain."""

from __future__ import annotations

import sys
from typing import Final

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.abi.event_channel import EVTCHNSTAT_pirq
from bus.addresses import Port
from bus.link import HypervisorGone
from bus.log import Logger
from bus.messages.domain import Order
from bus.process import begin
from bus.trace import Trace
from bus.trace_page import Counters
from domains.domio.hardware import DmaPages
from domains.domio.vbd import LEDGER_PAGES, VbdServer
from domains.native.domain import NativeDomain
from domains.native.reactor import Reactor
from domains.native.repeated import Repeated
from domains.native.xenstore import XenstoreClient
from drivers.xenbus.nodes import read_nodes

LOG: Final = Logger("domio")
MAX_DISKS = 31
LOOKS_AT_ONCE: Final = 16
LEDGERS = range(MAX_DISKS * LEDGER_PAGES)
"""Guest frames of the ledgers: each disk's place follows from its PCI address, so that a new process finds it."""
LAST_NODE = "discard-enable"
"""The last node that the toolstack writes into a disk's directory: from then on it is complete."""
BOUNCES = range(LEDGERS.stop, LEDGERS.stop + MAX_DISKS + 1)


class DomIo:
    """All disks of this driver domain."""

    def __init__(
        self, host: NativeDomain, trace: Trace | None = None, counters: Counters | None = None
    ) -> None:
        self.host = host
        self._trace, self._counters = trace, counters
        self.store: XenstoreClient
        self.pages: DmaPages
        self.servers: dict[str, VbdServer] = {}
        self._looks: Final = Repeated(host.reactor, self._look, LOOKS_AT_ONCE)

    def start(self) -> None:
        """The domain is built: find what there is to serve."""
        host = self.host
        restarted = bool(host.known_channels)
        for port, status, *_ in host.known_channels:
            if status == EVTCHNSTAT_pirq:  # the old process's interrupts: the devices were reset
                host.close_port(Port(port))
        self.store = XenstoreClient(host)
        if restarted:
            self.store.reconnect()
        gfns = host.own_gfns
        self.pages = DmaPages(host, range(BOUNCES.stop, gfns[-1]))
        host.on_device = self._device
        self.store.watch("backend/vbd", self._scan)

    def _scan(self, path: str) -> None:
        """Which disks are there?"""
        node = path.partition("backend/vbd/")[2].split("/")[2:]
        if node and node != [LAST_NODE]:
            return  # within a disk's directory: neither new nor gone
        self._looks.ask()

    def _look(self) -> None:
        base = f"/local/domain/{self.host.domid}/backend/vbd"
        found: dict[str, str] = {}
        for domid in self.store.list(base):
            for number in self.store.list(f"{base}/{domid}"):
                path = f"{base}/{domid}/{number}"
                nodes = self.store.run(read_nodes(path, (LAST_NODE, "params")))
                if nodes[LAST_NODE] is not None:
                    found[path] = nodes.text("params")
        for path, server in list(self.servers.items()):
            # The same directory with another device: the disk was taken away, and another one attached before this process looked.
            if found.get(path) != f"nvme:{server.bdf:x}":
                self.servers.pop(path, None)
                server.close()
        for path, params in found.items():
            if path not in self.servers:
                self._serve(path, params)

    def _serve(self, path: str, params: str) -> None:
        try:
            slot = int(params.partition(":")[2], 16) >> 3
            if not 0 < slot <= MAX_DISKS:
                raise ValueError(f"params is {params!r}")
            ledger = self.host.pages((slot - 1) * LEDGER_PAGES, LEDGER_PAGES)
            server = VbdServer(
                self.host,
                self.store,
                path,
                self.pages,
                ledger,
                BOUNCES[slot],
                self._forget,
                self._trace,
                self._counters,
            )
        except ValueError as error:
            LOG.warning(str(error), vbd=path)
            return
        self.servers[path] = server
        if server.bdf in self.host.devices:
            server.device_attached()

    def _forget(self, server: VbdServer) -> None:
        if self.servers.get(server.path) is server:  # else its place is another disk's by now
            del self.servers[server.path]

    def _device(self, bdf: int) -> None:
        for server in self.servers.values():
            if server.bdf == bdf:
                server.device_attached()


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=4096, processes=16, oom_score=-200))
    reactor = Reactor()
    host = NativeDomain(start, reactor)
    domio = DomIo(host, host.trace, host.counters)

    def started(order: Order, fds: list[int]) -> bytes:
        reactor.soon(domio.start)
        return b""

    host.on_order["start"] = started
    host.on_order["ping"] = lambda order, fds: b""  # the hypervisor asks for a sign of life
    try:
        reactor.run()
    except HypervisorGone as gone:
        sys.exit(f"domio: {gone}")


if __name__ == "__main__":
    main()
