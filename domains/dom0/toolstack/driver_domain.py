"""Driver domains: made with the first device that they serve, and restarted in place when their process ends."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from bus.abi.grant_table import GNTTAB_RESERVED_XENSTORE, GRANT_ENTRY_V1, GTF_permit_access, grant_entry_v1
from bus.abi.hvm.params import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId, Port
from domains.dom0.toolstack.driver_guest import DriverGuest
from domains.dom0.toolstack.images import ForeignMemory
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import GrantError, NativeDomain

READY_TIMEOUT_S: Final = 20.0
WINDOW_S: Final = 10.0
FAST_RESTARTS: Final = 20
"""At most so many starts within WINDOW_S; what ends more often waits for its turn."""
MAX_RESTARTS: Final = 200
"""A process that ended so often, and each time within WINDOW_S of its start, is left alone, and an error is logged."""


@dataclass(slots=True)
class Restarts:
    """When something that ended may be started again."""

    starts: deque[float] = field(default_factory=lambda: deque(maxlen=FAST_RESTARTS))
    row: int = 0
    """Ends since it last ran for WINDOW_S."""

    def wait(self) -> float | None:
        """It ended: in how many seconds it is started again. None: never, it ends again and again."""
        now, starts = time.monotonic(), self.starts
        if starts and now - starts[-1] >= WINDOW_S:
            self.row = 0
        self.row += 1
        if self.row > MAX_RESTARTS:
            return None
        due = max(now, starts[0] + WINDOW_S) if len(starts) == FAST_RESTARTS else now
        starts.append(due)
        return due - now


class DriverDomainBusy(Exception):
    """It is being started, by one who is waited for below: what needs it cannot be served before that."""


class DriverDomain:
    """One driver domain, if it was needed yet."""

    def __init__(
        self,
        host: NativeDomain,
        store: XenstoreService,
        xc: ControlInterface,
        log: Callable[[str], None],
        *,
        name: str,
        role: int,
        pages: int,
        model: bool = False,
    ) -> None:
        """`role`: its ssidref (hypervisor.core.domains.ROLES). `pages`: its own memory. `model`: it can serve device models."""
        self._host: Final = host
        self._store: Final = store
        self._xc: Final = xc
        self._log: Final = log
        self.name: Final = name
        self._role: Final = role
        self._pages: Final = pages
        self._model: Final = model
        self._restarts = Restarts()
        self._due = False
        """It waits for its turn to be restarted."""
        self.domid: DomId | None = None
        self._starting = False
        self.program: DriverGuest | None = None
        """What it is built from, where it is a guest program instead of a native domain."""
        self.give_up: Callable[[], None] = lambda: None
        """Its process ends again and again: take it and what it serves away."""

    @contextmanager
    def being_started(self) -> Iterator[None]:
        """Others are served while a start waits: none of them may start a second one. DriverDomainBusy."""
        if self._starting:
            raise DriverDomainBusy(f"{self.name} is being started: try again")
        self._starting = True
        try:
            yield
        finally:
            self._starting = False

    def start(self, wanted: DomId = DomId(0)) -> DomId:  # noqa: B008  # a number
        """Create and start it, with that number, or one of the hypervisor's choice. HypercallError, GrantError; BuildError for a guest
        program."""
        if self.program is None:
            self.domid = self._start_native(wanted)
        else:
            self.domid = self.program.create(wanted, self._make_known)
        return self.domid

    def _start_native(self, wanted: DomId) -> DomId:
        xc = self._xc
        domid = xc.create_domain(uuid=os.urandom(16), max_vcpus=1, ssidref=self._role, domid=wanted)
        try:
            self._build_native(domid)
        except BaseException:
            xc.destroy(domid)
            raise
        xc.unpause(domid)
        return domid

    def _build_native(self, domid: DomId) -> None:
        xc, host = self._xc, self._host
        xc.max_vcpus(domid, 1)
        xc.max_mem(domid, self._pages << 2)
        xc.populate(domid, range(self._pages))
        xenstore_gfn = self._pages - 1
        port = host.alloc_unbound(domid, DOMID_SELF)
        xc.set_hvm_param(domid, HVM_PARAM_STORE_PFN, xenstore_gfn)
        xc.set_hvm_param(domid, HVM_PARAM_STORE_EVTCHN, port)
        fd, extent = host.foreign_extents[domid]
        memory = ForeignMemory(fd, extent["base"], extent["frames"])
        try:
            entry = GRANT_ENTRY_V1.pack(grant_entry_v1(GTF_permit_access, DomId(0), xenstore_gfn))
            offset = GNTTAB_RESERVED_XENSTORE * GRANT_ENTRY_V1.size
            memory.write_mfn(xc.grant_table_mfns(domid)[0], offset, entry)
        finally:
            memory.close()
        self._make_known(domid, port, self._pages)

    def _make_known(self, domid: DomId, port: Port, pages: int) -> None:
        """Its nodes, and its connection to xenstored: both, or nothing of it stays."""
        try:
            self._write_nodes(domid, pages)
            self._introduce(domid, port)
        except BaseException:
            self._store.domain_died(domid)
            self._store.remove(f"/local/domain/{domid}")
            raise

    def _write_nodes(self, domid: DomId, pages: int) -> None:
        store, base = self._store, f"/local/domain/{domid}"
        store.mkdir(base)
        store.permit(base, "n0", f"r{domid}")
        for path, value in (
            ("name", self.name),
            ("domid", str(domid)),
            ("memory/target", str(pages << 2)),
        ):
            store.write(f"{base}/{path}", value)
        owned: Sequence[tuple[str, str]] = (("error", ""), ("device-model/ready", "0"))
        for path, value in owned if self._model else owned[:1]:
            store.write(f"{base}/{path}", value)
            store.permit(f"{base}/{path}", f"n{domid}")
        store.mkdir(f"{base}/backend")
        store.permit(f"{base}/backend", f"n{domid}")

    def _introduce(self, domid: DomId, port: Port) -> None:
        """Connect it to xenstored. Its ring is a grant, which its process must answer for: on a busy host that may still be
        loading its code when the order's second is over. GrantError if it does not come up."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                self._store.introduce(domid, port)
                return
            except GrantError:
                if time.monotonic() > deadline:
                    raise
                self._host.reactor.once(0.2)

    def _ended(self) -> DomId | None:
        """Its number, if its process has ended and no other has taken its place."""
        info = self._xc.domain_info(self.domid) if self.domid is not None else None
        return self.domid if info is not None and info.flags & 4 else None  # XEN_DOMINF_shutdown

    def check(self) -> None:
        """VIRQ_DOM_EXC: has its process ended? It is restarted in place: same domain, memory, ports and rings."""
        if self._due or self._ended() is None:
            return
        wait = self._restarts.wait()
        if wait is None:
            self._log(
                f"{self.name} ended {MAX_RESTARTS} times, and never ran for {WINDOW_S:.0f} s: it is not restarted any more, and what it "
                "served is gone; its log says why; the next device that is attached to a guest starts it anew"
            )
            self._restarts = Restarts()
            self.give_up()
        elif wait > 0:
            self._log(
                f"{self.name} ended {FAST_RESTARTS} times within {WINDOW_S:.0f} s: a new process starts in {wait:.1f} s"
            )
            self._due = True
            self._host.reactor.after(wait, self._restart_late)
        else:
            self._restart()

    def _restart_late(self) -> None:
        self._due = False
        self._restart()

    def _restart(self) -> None:
        domid = self._ended()
        if domid is None:
            return  # it was destroyed meanwhile
        if self.program is None:
            self._xc.resume(domid)
        elif not self.program.restart(domid):
            return
        self._log(f"{self.name}'s process ended: a new one takes its place")

    def destroy(self) -> None:
        """It goes for good."""
        domid, self.domid = self.domid, None
        if domid is not None:
            self._xc.destroy(domid)
            self._store.domain_died(domid)

    def called(self, name: object) -> bool:
        """Whether a user's word (name or number) means it."""
        return self.domid is not None and str(name) in (self.name, str(int(self.domid)))
