"""The guest: the product's block frontend, which does random I/O and holds every answer against the model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from bus.abi.grant_table import (
    GRANT_ENTRY_V1,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_writing,
    grant_entry_v1,
)
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId, Mfn, Port
from domains.native.xenstore import XenstoreClient
from drivers.block.frontend import DiskError, Features, Frontend
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64
from drivers.block.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import Page
from drivers.xenbus.states import XenbusState
from simulation.process import SimDomain

if TYPE_CHECKING:
    from simulation.world import World

IN_FLIGHT: Final = 6
FIRST_REF: Final = 8


class Pages:
    """The guest's memory for I/O and its grant table. `drivers.block.frontend.PageSource`."""

    def __init__(self, host: SimDomain, table: Mfn, gfns: range, backend: DomId) -> None:
        assert host.memory is not None
        self._host = host
        self._backend = backend
        self._free = list(gfns)
        self._entries = host.memory.page(table)
        self._refs = list(range(FIRST_REF, 512))

    def allocate(self, count: int) -> list[Page]:
        if len(self._free) < count:
            raise MemoryError
        return [Page(gfn, self._host.page(gfn)) for gfn in (self._free.pop() for _ in range(count))]

    def free(self, pages: Sequence[Page]) -> None:
        self._free += [page.gfn for page in pages]

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        flags = GTF_permit_access | (GTF_readonly if readonly else 0)
        refs = []
        for page in pages:
            ref = self._refs.pop(0)
            size = GRANT_ENTRY_V1.size
            self._entries[ref * size : (ref + 1) * size] = GRANT_ENTRY_V1.pack(
                grant_entry_v1(flags, self._backend, page.gfn)
            )
            refs.append(ref)
        return refs

    def end(self, refs: Sequence[int]) -> list[bool]:
        ended = []
        for ref in refs:
            at = ref * GRANT_ENTRY_V1.size
            (flags,) = struct.unpack_from("<H", self._entries, at)
            if flags & (GTF_reading | GTF_writing):
                ended.append(False)
                continue
            struct.pack_into("<H", self._entries, at, 0)
            self._refs.append(ref)
            ended.append(True)
        return ended


class Guest:
    """One life of the guest. Implements `drivers.block.xenbus_front.FrontPort`."""

    def __init__(self, world: World, host: SimDomain) -> None:
        self.world = world
        self.host = host
        self.rng = world.guest_rng
        self.store = XenstoreClient(host)
        self.pages = Pages(host, world.guest_table, range(1, 62), world.backend_id)
        self.front = Frontend(self.pages)
        base = f"/local/domain/{host.domid}/device/vbd/768"
        backend = f"/local/domain/{world.backend_id}/backend/vbd/{host.domid}/768"
        wish = Wish(queues=self.rng.choice((1, 1, 2)), order=0, persistent=self.rng.random() < 0.5)
        self.device = FrontDevice(base, backend, self, wish)
        self.rings: list[PagedRing] = []
        self._ring_refs: list[int] = []
        self._ring_pages: list[Page] = []
        self.ports: list[Port] = []
        self.issued = self.done = 0
        self._running = self._again = False
        self._closing = False
        self.store.watch(f"{backend}/state", self._changed)

    # ------------------------------------------------------------------ xenbus

    def _changed(self, _path: str) -> None:
        if self._running:
            self._again = True
            return
        self._running = True
        try:
            while True:
                self._again = False
                self.store.run(self.device.changed())
                if not self._again:
                    break
        finally:
            self._running = False
        self.world.front_state = self.device.state
        self._work()

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        links = []
        for _ in range(queues):
            mine = self.pages.allocate(pages)
            refs = self.pages.grant(mine, False)
            ring = PagedRing([page.data for page in mine], X86_64.slot)
            ring.init()
            port = self.host.alloc_unbound(DOMID_SELF, self.world.backend_id)
            self.host.on_event(port, self._kicked)
            self.rings.append(ring)
            self.ports.append(port)
            self._ring_refs += refs
            self._ring_pages += mine
            links.append(QueueLink(tuple(refs), port))
        return links

    def connected(self, features: Features) -> None:
        self.front.connect(self.rings, [self._notify(port) for port in self.ports], features)

    def _notify(self, port: Port) -> Callable[[], None]:
        return lambda: self.host.notify(port)

    def disconnect(self) -> None:
        self.front.disconnect()
        self.rings = []
        ended = self.pages.end(self._ring_refs)
        if not all(ended):
            self.world.violation("the back end kept ring pages mapped after it let go")
        self.pages.free([page for page, fine in zip(self._ring_pages, ended, strict=True) if fine])
        for port in self.ports:
            self.host.close_port(port)
        self._ring_refs, self._ring_pages, self.ports = [], [], []

    def removed(self) -> None:
        """The back end is gone for good."""

    # ------------------------------------------------------------------ I/O

    def _kicked(self) -> None:
        self.front.poll()
        if self.front.leaked:
            self.world.violation(f"{self.front.leaked} pages stay mapped by the back end after its answer")
            self.front.leaked = 0
        if self.front.error:
            self.world.violation(f"the frontend found: {self.front.error}")
        self._work()

    def _work(self) -> None:
        if self.device.state is not XenbusState.Connected or self.front.error:
            return
        while self.issued < self.world.operations and self.issued - self.done < IN_FLIGHT:
            if not self._one():
                break
        if self.issued == self.done == self.world.operations and not self._closing:
            self._closing = True
            self.host.reactor.soon(self._close)

    def _one(self) -> bool:
        model, rng = self.world.model, self.rng
        draw = rng.random()
        if self.issued == self.world.operations - 1 or draw < 0.15:
            number = model.flush()

            def flushed(status: int, _: bytes) -> None:
                self._finished("flush", status)
                if wrong := model.flushed(number, status == 0):
                    self.world.violation(wrong)

            return self._ask("flush", lambda: self.front.flush(flushed))
        count = rng.choice((1, 2, 8, 16, 40))
        start = rng.randrange(self.world.sectors - count)
        sectors = range(start, start + count)
        if model.busy.intersection(sectors):
            return False
        model.busy.update(sectors)
        if draw < 0.4:

            def was_read(status: int, data: bytes) -> None:
                model.busy.difference_update(sectors)
                self._finished("read", status)
                if status == 0 and (wrong := model.read(start, data)):
                    self.world.violation(wrong)

            return self._ask(f"read {start}+{count}", lambda: self.front.read(start, count, was_read))
        data = rng.randbytes(512 * count)
        model.write(start, data)

        def written(status: int, _: bytes) -> None:
            model.busy.difference_update(sectors)
            self._finished("write", status)
            model.written(start, data, status == 0)

        return self._ask(f"write {start}+{count}", lambda: self.front.write(start, data, written))

    def _ask(self, what: str, action: Callable[[], None]) -> bool:
        self.issued += 1
        self.world.machine.trace(f"guest {what}")
        try:
            action()
        except DiskError as error:
            self.world.violation(f"{what}: {error}")
            return False
        self.world.machine.injector.happen("ring:request")
        self.host.process.check()
        return True

    def _finished(self, what: str, status: int) -> None:
        self.done += 1
        self.world.machine.trace(f"guest {what} answered {status}")
        if status and not self.world.excused(what):
            self.world.violation(f"a {what} failed with {status} though nothing that fails was planned")
        self.host.reactor.soon(self._work)

    def _close(self) -> None:
        self.world.machine.trace("guest closes the disk")
        self.store.run(self.device.close())
        self.world.front_state = self.device.state
