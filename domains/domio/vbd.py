"""One virtual disk: its controller, its frontend's rings, and the way up and down, also after DomIO or the device died."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

import msgpack

from bus.abi.event_channel import EVTCHNSTAT_interdomain
from bus.addresses import PAGE_SIZE, DomId, GrantRef, Port
from bus.log import Logger
from bus.trace import Trace
from bus.trace_page import Counters
from domains.domio.hardware import DmaPages, FrontendFrames, NvmePort
from domains.native.domain import GrantError, GrantMapping, HypercallError, NativeDomain
from domains.native.repeated import Repeated
from domains.native.xenstore import XenstoreClient
from drivers.block.backend import Backend
from drivers.block.ledger import Ledger, LedgerError
from drivers.block.nodes import FrontLink, QueueLink
from drivers.block.requests import Disk
from drivers.block.watch import DiskTrace, counter_key
from drivers.block.wire import ABIS
from drivers.block.xenbus_back import BackDevice
from drivers.hw.nvme.driver import NvmeDriver, State
from drivers.xenbus.back import ConnectError
from drivers.xenbus.client import XenstoreError
from drivers.xenbus.nodes import read_nodes
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.states import XenbusState

LOG: Final = Logger("domio")
MAX_QUEUES: Final = 2
MAX_ORDER: Final = 2
RING_SLOTS: Final = 32 << MAX_ORDER
"""Most requests of one ring: 32 a page."""
LEDGER_PAGES: Final = -(-Ledger.bytes_needed(MAX_QUEUES, RING_SLOTS) // PAGE_SIZE)
VECTORS: Final = 2
START_POLL_S: Final = 0.003
POLL_S: Final = 0.1
LOOK_AGAIN_S: Final = 0.001
CHANGES_AT_ONCE: Final = 4


class VbdServer:
    """Implements `drivers.block.xenbus_back.BackPort` for one disk."""

    def __init__(
        self,
        host: NativeDomain,
        store: XenstoreClient,
        path: str,
        pages: DmaPages,
        ledger: memoryview,
        bounce_gfn: int,
        gone: Callable[[VbdServer], None],
        trace: Trace | None = None,
        counters: Counters | None = None,
    ) -> None:
        """`path`: the back end's directory. `ledger`: memory that outlives the process. ValueError if the nodes make no sense."""
        self._host = host
        self._store = store
        self.path = path
        self._gone = gone
        self._bounce = bounce_gfn
        nodes = store.run(
            read_nodes(
                path,
                ("params", "frontend-id", "mode", "device-type", "removable", "discard-enable", "frontend"),
            )
        )
        params = nodes.text("params")
        if not params.startswith("nvme:"):
            raise ValueError(f"params is {params!r}: nvme:BDF expected")
        self.bdf = int(params[5:], 16)
        self.frontend_id = DomId(int(nodes.text("frontend-id")))
        self._read_only = nodes.text("mode") != "w"
        self._cdrom = nodes.text("device-type") == "cdrom"
        self._removable = nodes.text("removable") == "1"
        self._discard = nodes.text("discard-enable") == "1"
        self._frontend_path = nodes.text("frontend")
        self._ledger = Ledger(ledger)
        number = int(path.rpartition("/")[2])
        self._counters = counters
        self._counter_key = counter_key(self.frontend_id, number)
        self._watch = DiskTrace(
            trace,
            counters.slot(self._counter_key) if counters is not None else None,
            domain=self.frontend_id,
            disk=number,
            device=self.bdf,
        )
        self._port = NvmePort(host, self.bdf)
        self.driver = NvmeDriver(
            self._port,
            pages,
            on_complete=self._completed,
            on_ready=self._ready,
            on_lost=self._lost,
            vectors=VECTORS,
            on_full=self._watch.starved,
            trace=trace,
            unit=self.bdf,
        )
        self._device: BackDevice | None = None
        self._backend: Backend | None = None
        self._mappings: list[GrantMapping] = []
        self._rings: list[PagedRing] = []
        self._ports: list[Port] = []
        self._mapper: FrontendFrames | None = None
        self._remote: list[int] = []
        self._msi: list[Port] = []
        self._adopted = False
        self._follows: Final = Repeated(host.reactor, self._follow, CHANGES_AT_ONCE)
        self.closed = False
        self._looks_soon = False
        self._tick()

    # ------------------------------------------------------------------ the device

    def device_attached(self) -> None:
        """The device is there: for the first time, or after a reset (its process died, or ours)."""
        if not self._port.unmask(VECTORS):
            return
        try:
            for vector in range(len(self._msi), VECTORS):  # those that an earlier try bound are bound
                self._msi.append(
                    self._host.bind_msi(self.bdf, vector, partial(self.driver.interrupt, vector))
                )
        except HypercallError as error:
            self._log(f"its interrupts cannot be bound: {error}")
            return
        if self.driver.state is State.OFF:
            self.driver.start(time.monotonic_ns())
        else:
            self.driver.lose("the device was reset")
        self._look_soon()

    def _look_soon(self) -> None:
        """Set-up goes in steps, some of which only time brings on."""
        if not self._looks_soon:
            self._looks_soon = True
            self._host.reactor.after(START_POLL_S, self._starting)

    def _starting(self) -> None:
        self._looks_soon = False
        self.driver.poll(time.monotonic_ns())
        if not self.closed and self.driver.state is State.STARTING:
            self._look_soon()

    def _tick(self) -> None:
        """Lost interrupts and timeouts are found by looking."""
        if self.closed:
            return
        self.driver.poll(time.monotonic_ns())
        if self.driver.state is State.FAILED and self.bdf in self._host.devices:
            self.driver.start(time.monotonic_ns())
        if self.driver.state is State.STARTING:
            self._look_soon()
        if self._backend is not None:
            self._backend.retry()
            self._after(self._backend)
        self._host.reactor.after(POLL_S, self._tick)

    def _completed(self, results: list[tuple[int, bool]]) -> None:
        if self._backend is not None:
            self._backend.complete(results)
            self._after(self._backend)

    def _lost(self, reason: str) -> None:
        self._log(f"controller: {reason}")

    def _ready(self) -> None:
        """The controller works: the disk can be offered, or served again. Its nodes may be gone meanwhile, and what it says of its disk
        may be nonsense: then it is not served, and the others are."""
        try:
            self._offer()
        except (XenstoreError, TimeoutError, ValueError) as error:
            self._log(f"cannot be offered: {error}")

    def _offer(self) -> None:
        if self._device is None:
            sectors = self.driver.sectors
            disk = Disk(
                sectors=sectors,
                physical_sector_size=max(512, self.driver.block_size),
                read_only=self._read_only,
                removable=self._removable,
                cdrom=self._cdrom,
                discard=self._discard and not self._read_only,
            )
            self._device = BackDevice(
                self.path,
                self._frontend_path,
                disk,
                self,
                max_queues=MAX_QUEUES,
                max_order=MAX_ORDER,
                block_size=self.driver.block_size,
            )
            state = self._store.run(self._device.start())
            if state is XenbusState.Connected:
                self._resume()
            else:
                self._ledger.reopen()
                self._ledger.end()
            self._store.watch(f"{self._frontend_path}/state", self._changed)
            self._store.watch(f"{self.path}/online", self._changed)
            self._changed("")
        elif self._backend is not None:
            self._backend.storage_reset()
            self._after(self._backend)

    # ------------------------------------------------------------------ xenbus

    def _changed(self, _path: str) -> None:
        self._follows.ask()

    def _follow(self) -> None:
        """What the frontend or the toolstack wrote: `BackDevice.changed`."""
        if self._device is None or self.closed:
            return
        try:
            self._store.run(self._device.changed())
        except (XenstoreError, TimeoutError) as error:
            self._log(f"xenstore: {error}")

    def connect(self, link: FrontLink, disk: Disk) -> None:
        """See BackPort."""
        if self.closed:  # while its frontend's nodes were read
            raise ConnectError("the disk is gone")
        self._attach(link, disk, None)

    def _attach(self, link: FrontLink, disk: Disk, found: dict[int, Port] | None) -> None:
        """Map the rings and bind the channels; `found`: local ports of an earlier process, by remote port."""
        try:
            for queue in link.queues:
                self._mappings.append(
                    self._host.map_grants(self.frontend_id, [GrantRef(ref) for ref in queue.ring_refs])
                )
                self._rings.append(PagedRing(self._mappings[-1].pages, link.abi.slot))
            for number, queue in enumerate(link.queues):
                callback = self._kick(number)
                port = (found or {}).get(queue.event_channel)
                if port is None:
                    port = self._host.bind_interdomain(self.frontend_id, Port(queue.event_channel), callback)
                else:
                    self._host.on_event(port, callback)
                self._ports.append(port)
            mapper = self._mapper = FrontendFrames(
                self._host, self.frontend_id, self._bounce, persistent=link.persistent
            )
            self._backend = Backend(
                disk,
                self.driver,
                mapper,
                self._ledger,
                abi=link.abi,
                persistent=link.persistent,
                trust_event_index=True,
                watch=self._watch,
            )
            self._remote = [queue.event_channel for queue in link.queues]
            notify = [partial(self._notify, number) for number in range(len(self._ports))]
            if found is None:
                self._backend.connect(self._rings, notify, _pack(link, disk))
            else:
                self._backend.resume(self._rings, notify)
        except (GrantError, HypercallError, ValueError, LedgerError) as error:
            self._release()
            raise ConnectError(str(error)) from None
        self._after(self._backend)

    def _resume(self) -> None:
        """A process before this one served the frontend: go on from its ledger, without the frontend's knowing."""
        assert self._device is not None
        try:
            blob = self._ledger.reopen()
            if blob is None:
                raise LedgerError("there is no ledger of the connection")
            link, disk = _unpack(blob)
            found = {
                row[4]: Port(row[0])
                for row in self._host.known_channels
                if row[1] == EVTCHNSTAT_interdomain and row[3] == self.frontend_id
            }
            self._attach(link, disk, found)
            self._log(f"goes on with {self._backend.counters.redone if self._backend else 0} requests")
        except (LedgerError, ConnectError, ValueError) as error:
            self._log(f"cannot go on: {error}")
            self._fail(self._device, str(error))

    def _fail(self, device: BackDevice, reason: str) -> None:
        """Tell the frontend, whose nodes may be gone by now."""
        try:
            self._store.run(device.fail(reason))
        except (XenstoreError, TimeoutError) as error:
            self._log(f"xenstore: {error}")

    def _notify(self, number: int) -> None:
        """There are responses in that ring."""
        port = self._ports[number]
        if self._watch.trace.on[0]:
            self._watch.kicked(number, self._remote[number], port, outgoing=True)
        self._host.notify(port)

    def _kick(self, number: int) -> Callable[[], None]:
        def kicked() -> None:
            backend = self._backend
            if self._watch.trace.on[0] and number < len(self._ports):
                self._watch.kicked(number, self._remote[number], self._ports[number], outgoing=False)
            if backend is not None:
                if not backend.poll(number) and backend.queues[number].look_again:
                    self._host.reactor.after(LOOK_AGAIN_S, again)
                self._after(backend)

        def again() -> None:
            backend = self._backend
            if backend is not None and number < len(backend.queues):
                if backend.poll(number):
                    kicked()
                self._after(backend)

        return kicked

    def _after(self, backend: Backend) -> None:
        """What every turn ends with: answers without an interrupt, a frontend that broke the rules, draining."""
        for queue in backend.queues:
            if queue.unfinished:
                self._host.reactor.soon(self._kick(queue.number))
        if self.driver.wants_poll:
            self._host.reactor.soon(lambda: self.driver.poll(time.monotonic_ns()))
        if backend.error is not None and not backend.closing and self._device is not None:
            self._log(f"frontend: {backend.error}")
            backend.close()
            device, reason = self._device, backend.error
            self._host.reactor.soon(lambda: self._fail(device, reason))
        if backend.closing and backend.drained and self._backend is backend:
            self._release()
            self._host.reactor.soon(lambda: self._changed(""))

    def disconnect(self) -> bool:
        """See BackPort."""
        if self._backend is None:
            return True
        self._backend.close()
        if not self._backend.drained:
            return False
        self._release()
        return True

    def _release(self) -> None:
        self._backend = None
        for ring in self._rings:
            ring.release()
        for port in self._ports:
            self._host.close_port(port)
        for mapping in self._mappings:
            self._host.unmap_grants(mapping)
        if self._mapper is not None:
            # Of requests that were still under way when the disk was taken away: DMA to them faults from now on.
            self._mapper.unmap_all()
        self._rings, self._ports, self._mappings, self._mapper = [], [], [], None

    def removed(self) -> None:
        """See BackPort."""
        self.close()
        self._gone(self)

    def close(self) -> None:
        """The disk's nodes are gone: let go of everything."""
        if self.closed:
            return
        self.closed = True
        if self._backend is not None:
            self._backend.close()
            self._release()
        for port in self._msi:
            self._host.close_port(port)
        if self._counters is not None:
            self._counters.drop(self._counter_key)

    def _log(self, text: str) -> None:
        LOG.info(text, vbd=self.path)


def _pack(link: FrontLink, disk: Disk) -> bytes:
    """What a successor must know."""
    queues = [[list(queue.ring_refs), queue.event_channel] for queue in link.queues]
    shape = [disk.sectors, disk.sector_size, disk.physical_sector_size]
    flags = [disk.read_only, disk.removable, disk.cdrom, disk.discard]
    packed: bytes = msgpack.packb(
        [queues, link.abi.protocol, link.persistent, link.large_sectors, shape, flags]
    )
    return packed


def _unpack(blob: bytes) -> tuple[FrontLink, Disk]:
    """The reverse of `_pack`. ValueError if it is not that."""
    try:
        queues, protocol, persistent, large, shape, flags = msgpack.unpackb(blob)
        link = FrontLink(
            tuple(QueueLink(tuple(refs), channel) for refs, channel in queues),
            ABIS[protocol],
            persistent,
            large,
        )
        read_only, removable, cdrom, discard = flags
        disk = Disk(
            sectors=shape[0],
            sector_size=shape[1],
            physical_sector_size=shape[2],
            read_only=read_only,
            removable=removable,
            cdrom=cdrom,
            discard=discard,
        )
    except (TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"ledger: {error!r}") from None
    return link, disk
