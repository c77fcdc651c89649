"""One virtual interface: its frontend's rings, its port of a bridge, and the way up and down, also after NetIO died."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from bus.abi.event_channel import EVTCHNSTAT_interdomain
from bus.addresses import DomId, GrantRef
from bus.addresses import Port as EventPort
from bus.log import Logger
from bus.trace_page import Counters
from domains.native.domain import GrantError, GrantMapping, HypercallError, NativeDomain
from domains.native.repeated import Repeated
from domains.native.xenstore import XenstoreClient
from domains.netio.bridges import Bridges
from domains.netio.copies import FrontendPages, Stage
from drivers.net.backend import Backend, Queue
from drivers.net.frames import Frame
from drivers.net.journal import Journals
from drivers.net.nodes import FrontLink
from drivers.net.rate import Credit, parse_rate
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.net.watch import counter_key, put
from drivers.net.xenbus_back import BackDevice
from drivers.xenbus.back import ConnectError
from drivers.xenbus.client import XenstoreError
from drivers.xenbus.nodes import NodeError, read_nodes
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.states import XenbusState

LOG: Final = Logger("netio")
MAX_QUEUES: Final = 4
LOOK_AGAIN_S: Final = 0.001
CHANGES_AT_ONCE: Final = 4


def identity(store: XenstoreClient, path: str) -> tuple[str, ...]:
    """What makes an interface another one, from its back end's directory."""
    names = ("mac", "bridge", "rate", "frontend")
    nodes = store.run(read_nodes(path, names))
    return tuple(nodes.text(name) for name in names)


class VifServer:
    """Implements `drivers.net.xenbus_back.BackPort`, `drivers.net.ports.Network` and `drivers.net.switch.Receiver` for one interface."""

    def __init__(
        self,
        host: NativeDomain,
        store: XenstoreClient,
        path: str,
        stage: Stage,
        bridges: Bridges,
        journals: Journals,
        gone: Callable[[VifServer], None],
        counters: Counters | None = None,
    ) -> None:
        """`path`: the back end's directory. ValueError or NodeError if the nodes make no sense."""
        self._host: Final = host
        self._store: Final = store
        self.path: Final = path
        self._stage: Final = stage
        self._gone: Final = gone
        self.frontend_id: Final = DomId(int(self._node("frontend-id")))
        self.handle: Final = int(path.rpartition("/")[2])
        self.identity: Final = identity(store, path)
        mac, self.bridge, limit, frontend = self.identity
        self._mac: Final = bytes.fromhex(mac.replace(":", ""))
        if len(self._mac) != 6:
            raise ValueError(f"mac is {mac!r}")
        rate = parse_rate(limit.encode())
        self._credit: Final = Credit(*rate, time.monotonic_ns) if rate is not None else None
        self._bridges: Final = bridges
        self._journals: Final = journals
        self._port: Final = bridges.join(self.bridge, f"vif{self.frontend_id}.{self.handle}", self)
        self._counters: Final = counters
        self._counter_key: Final = counter_key(self.frontend_id, self.handle)
        self._slot: Final = counters.slot(self._counter_key) if counters is not None else None
        self._backend: Backend | None = None
        self._mappings: list[GrantMapping] = []
        self._rings: list[PagedRing] = []
        self._channels: list[EventPort] = []
        self._watches: list[tuple[str, str]] = []
        self._follows: Final = Repeated(host.reactor, self._follow, CHANGES_AT_ONCE)
        self._waits = False
        self.closed = False
        self._device: Final = BackDevice(path, frontend, self, max_queues=MAX_QUEUES)

    def _node(self, name: str) -> str:
        value = self._store.read(f"{self.path}/{name}")
        return value.decode("utf-8", "replace") if value is not None else ""

    @property
    def channels(self) -> list[EventPort]:
        """Its event channels, at this end."""
        return self._channels

    def start(self) -> None:
        """Offer it, or go on with what a process before this one served. XenstoreError."""
        device, store = self._device, self._store
        state = store.run(device.start())
        if state is XenbusState.Connected:
            self._resume()
        store.write(f"{self.path}/hotplug-status", "connected")
        for watched in (f"{device.frontend}/state", f"{self.path}/online"):
            self._watches.append((watched, store.watch(watched, self._changed)))
        self._changed("")

    # ------------------------------------------------------------------ xenbus

    def _changed(self, _path: str) -> None:
        self._follows.ask()

    def _follow(self) -> None:
        """What the frontend or the toolstack wrote: `BackDevice.changed`."""
        if self.closed:
            return
        try:
            self._store.run(self._device.changed())
        except (XenstoreError, TimeoutError) as error:
            self._log(f"xenstore: {error}")

    def connect(self, link: FrontLink) -> None:
        """See BackPort."""
        if self.closed:  # while its frontend's nodes were read
            raise ConnectError("the interface is gone")
        self._attach(link, {}, resumed=False)

    def _resume(self) -> None:
        """A process before this one served the frontend, which need not know: its nodes say where the rings are, and the rings say
        where to go on."""
        try:
            link = self._store.run(self._device.read_link())
            found = {
                row[4]: EventPort(row[0])
                for row in self._host.known_channels
                if row[1] == EVTCHNSTAT_interdomain and row[3] == self.frontend_id
            }
            self._attach(link, found, resumed=True)
            self._log("goes on")
        except (ConnectError, NodeError) as error:
            self._log(f"cannot go on: {error}")
            self._fail(str(error))

    def _attach(self, link: FrontLink, found: dict[int, EventPort], *, resumed: bool) -> None:
        """Map the rings and bind the channels; `found`: local ports of an earlier process, by remote port; `resumed`: the rings are those
        that it served."""
        host, domid = self._host, self.frontend_id
        try:
            queues: list[Queue] = []
            for number, each in enumerate(link.queues):
                mapping = host.map_grants(domid, [GrantRef(each.tx_ref), GrantRef(each.rx_ref)])
                self._mappings.append(mapping)
                tx, rx = PagedRing(mapping.pages[:1], TX_SLOT), PagedRing(mapping.pages[1:], RX_SLOT)
                self._rings += [tx, rx]
                notify: dict[int, Callable[[], None]] = {}
                for channel in dict.fromkeys((each.tx_channel, each.rx_channel)):
                    notify[channel] = partial(host.notify, self._bind(channel, found, self._kick(number)))
                tx_journal, rx_journal = (
                    self._journals.of(domid, self.handle, 2 * number + ring, keep=resumed) for ring in (0, 1)
                )
                journals = (tx_journal, rx_journal)
                queues.append(Queue(tx, rx, notify[each.tx_channel], notify[each.rx_channel], journals))
            backend = Backend(
                link.abilities,
                FrontendPages(self._stage, domid),
                self,
                mac=self._mac,
                credit=self._credit,
            )
            self._backend = backend
            backend.connect(queues)
        except (GrantError, HypercallError, ValueError) as error:
            self._release()
            raise ConnectError(str(error)) from None
        self._after()

    def _bind(self, channel: int, found: dict[int, EventPort], callback: Callable[[], None]) -> EventPort:
        port = found.get(channel)
        if port is None:
            port = self._host.bind_interdomain(self.frontend_id, EventPort(channel), callback)
        else:
            self._host.on_event(port, callback)
        self._channels.append(port)
        return port

    def _fail(self, reason: str) -> None:
        """Tell the frontend, whose nodes may be gone by now."""
        try:
            self._store.run(self._device.fail(reason))
        except (XenstoreError, TimeoutError) as error:
            self._log(f"xenstore: {error}")

    # ------------------------------------------------------------------ frames

    def sent(self, frames: Sequence[Frame]) -> None:
        """See Network."""
        self._bridges.forward(self._port, frames)

    def deliver(self, frames: Sequence[Frame]) -> None:
        """See Receiver."""
        if self._backend is not None:
            self._backend.deliver(frames)
            self._after()

    def _kick(self, number: int) -> Callable[[], None]:
        def kicked() -> None:
            backend = self._backend
            if backend is None or number >= len(backend.queues):
                return
            took = backend.poll_tx(number)
            if not (backend.poll_rx(number) or took) and backend.queues[number].look_again:
                self._host.reactor.after(LOOK_AGAIN_S, again)
            self._after()

        def again() -> None:
            backend = self._backend
            if backend is not None and number < len(backend.queues):
                if backend.poll_tx(number) or backend.poll_rx(number):
                    kicked()
                self._after()

        return kicked

    def _after(self) -> None:
        """What every turn ends with: more to take, a rate limit that lets go again, a frontend that broke the rules."""
        backend = self._backend
        if backend is None:
            return
        for number, queue in enumerate(backend.queues):
            if queue.unfinished:
                queue.unfinished = False
                self._host.reactor.soon(self._kick(number))
        wait = backend.waits_for_credit
        if wait and not self._waits:
            self._waits = True
            self._host.reactor.after(wait / 1e9, self._credit_again)
        if self._slot is not None:
            put(self._slot, backend.counters)
        if backend.error is not None:
            reason = backend.error
            self._log(f"frontend: {reason}")
            self._backend = None
            self._host.reactor.soon(lambda: self._fail(reason))

    def _credit_again(self) -> None:
        self._waits = False
        backend = self._backend
        if backend is not None:
            for number in range(len(backend.queues)):
                self._kick(number)()

    # ------------------------------------------------------------------ the end

    def disconnect(self) -> bool:
        """See BackPort. Nothing is ever under way between two turns."""
        self._release()
        return True

    def _release(self) -> None:
        self._backend = None
        for ring in self._rings:
            ring.release()
        for port in self._channels:
            self._host.close_port(port)
        for mapping in self._mappings:
            self._host.unmap_grants(mapping)
        self._rings, self._channels, self._mappings = [], [], []
        self._journals.drop(self.frontend_id, self.handle)

    def removed(self) -> None:
        """See BackPort."""
        self.close()
        self._gone(self)

    def close(self) -> None:
        """The interface's nodes are gone: let go of everything."""
        if self.closed:
            return
        self.closed = True
        self._release()
        self._bridges.leave(self._port)
        for watched, token in self._watches:
            with contextlib.suppress(XenstoreError, TimeoutError):
                self._store.unwatch(watched, token)
        if self._counters is not None:
            self._counters.drop(self._counter_key)

    def _log(self, text: str) -> None:
        LOG.info(text, vif=self.path)
