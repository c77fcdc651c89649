"""What every guest of the simulation has: memory to grant, xenstore, one device of the driver domain whose way up and down it goes."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

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
from drivers.xenbus.front import FrontEnd
from drivers.xenbus.pages import Page
from drivers.xenbus.states import XenbusState
from simulation.process import SimDomain

if TYPE_CHECKING:
    from simulation.world import World

IN_FLIGHT: Final = 6
"""Requests, or frames, under way at most."""
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


class Front(Protocol):
    """A frontend's rings."""

    error: str | None
    """The rule that the back end broke."""
    leaked: int
    """Pages that it would not let go of."""

    @property
    def pending(self) -> int:
        """Requests, or slots, that are not answered yet."""

    def poll(self) -> object:
        """Take the answers."""

    def disconnect(self) -> None:
        """The rings are gone."""


class Guest(ABC):
    """One life of the guest. Of a `FrontPort` (drivers.*.xenbus_front) it has what block and network share."""

    DEVICE: ClassVar[str]
    """For the trace."""
    front: Front
    device: FrontEnd

    def __init__(self, world: World, host: SimDomain, gfns: range) -> None:
        """`gfns`: its memory for I/O."""
        self.world = world
        self.host = host
        self.rng = world.guest_rng
        self.store = XenstoreClient(host)
        self.pages = Pages(host, world.guest_table, gfns, world.backend_id)
        self.issued = self.done = 0
        self._ports: list[Port] = []
        self._held: list[tuple[Page, int]] = []
        """Ring pages and their grants."""
        self._running = self._again = self._closing = False

    def go(self) -> None:
        """I/O may begin, where it had to wait for that."""
        self._work()

    def begin(self) -> None:
        """Look at the back end's state, now and whenever it changes."""
        self.store.watch(f"{self.world.back}/state", self._changed)

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

    def _ring_pages(self, count: int) -> tuple[list[Page], list[int]]:
        """Pages for rings, and their grants."""
        pages = self.pages.allocate(count)
        refs = self.pages.grant(pages, False)
        self._held += zip(pages, refs, strict=True)
        return pages, refs

    def _channel(self) -> Port:
        """An event channel that the back end may bind."""
        port = self.host.alloc_unbound(DOMID_SELF, self.world.backend_id)
        self.host.on_event(port, self._kicked)
        self._ports.append(port)
        return port

    def _notify(self, port: Port) -> Callable[[], None]:
        return lambda: self.host.notify(port)

    def disconnect(self) -> None:
        """See FrontPort."""
        self.front.disconnect()
        ended = self.pages.end([ref for _, ref in self._held])
        if not all(ended):
            self.world.violation("the back end kept ring pages mapped after it let go")
        self.pages.free([page for (page, _), fine in zip(self._held, ended, strict=True) if fine])
        for port in self._ports:
            self.host.close_port(port)
        self._held, self._ports = [], []

    def removed(self) -> None:  # noqa: B027  # nothing is to be done, in any scenario
        """The back end is gone for good."""

    # ------------------------------------------------------------------ what it does

    @property
    @abstractmethod
    def waits(self) -> str:
        """What it waits for: "3 requests wait for an answer"."""

    def _kicked(self) -> None:
        """A channel was notified: look at the answers, and at what the back end did wrong."""
        self.front.poll()
        if self.front.leaked:
            self.world.violation(f"{self.front.leaked} pages stay in use by the back end after its answer")
            self.front.leaked = 0
        if self.front.error:
            self.world.violation(f"the frontend found: {self.front.error}")
        self._work()

    @abstractmethod
    def _work(self) -> None:
        """Ask for more, or close when all is done."""

    @property
    def _ready(self) -> bool:
        return self.world.going and self.device.state is XenbusState.Connected and not self.front.error

    def _close_soon(self) -> None:
        if not self._closing:
            self._closing = True
            self.host.reactor.soon(self._close)

    def _close(self) -> None:
        self.world.machine.trace(f"guest closes {self.DEVICE}")
        self.store.run(self.device.close())
        self.world.front_state = self.device.state
