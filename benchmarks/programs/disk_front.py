"""A guest whose process is a program: the project's own block frontend, asking as fast as it gets answers (benchmarks/programs/native_guest.py;
run by benchmarks/disk_ring.py).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence

from benchmarks.programs.native_guest import PvNative, say, serve
from bus.abi import grant_table as gt
from bus.abi import xen
from bus.addresses import DomId, Mfn, Port
from domains.native.xenstore import XenstoreClient
from drivers.block.frontend import Features, Frontend
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64
from drivers.block.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import Page
from drivers.xenbus.states import XenbusState

DEPTH = 32
SECONDS = float(os.environ.get("DOMICILE_BENCHMARK_SECONDS", "4"))
FIRST_PAGE = 8192
"""Frames (of the domain's own range) from here on are for rings and data: the builder put the unused kernel below."""
GRANT_FRAMES = 8


class Grants:
    """`drivers.block.frontend.PageSource` on a version 1 table."""

    def __init__(self, host: PvNative, backend: DomId) -> None:
        self._host, self._backend = host, backend
        request = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(xen.DOMID_SELF, GRANT_FRAMES, 0, 0))
        reply = host.call(
            xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, request, "GNTTABOP_setup_table"
        )
        assert host.memory is not None
        self._memory = host.memory
        size = gt.GNTTAB_SETUP_TABLE.size
        self._tables = [
            self._memory.page(Mfn(int.from_bytes(reply[size + 8 * n : size + 8 * n + 8], "little")))
            for n in range(GRANT_FRAMES)
        ]
        self._refs = list(range(GRANT_FRAMES * 512 - 1, 63, -1))
        self._pages = list(range(host.ram_frames - 1, FIRST_PAGE, -1))

    def allocate(self, count: int) -> list[Page]:
        """See PageSource."""
        if len(self._pages) < count:
            raise MemoryError
        return [Page(gfn, self._host.page(gfn)) for gfn in (self._pages.pop() for _ in range(count))]

    def free(self, pages: Sequence[Page]) -> None:
        """See PageSource."""
        self._pages += [page.gfn for page in pages]

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        """See PageSource."""
        out = []
        for page in pages:
            ref = self._refs.pop()
            flags = gt.GTF_permit_access | (gt.GTF_readonly if readonly else 0)
            entry = gt.GRANT_ENTRY_V1.pack(
                gt.grant_entry_v1(flags, self._backend, self._memory.base + page.gfn)
            )
            self._tables[ref >> 9][8 * (ref & 511) : 8 * (ref & 511) + 8] = entry
            out.append(ref)
        return out

    def end(self, refs: Sequence[int]) -> list[bool]:
        """See PageSource."""
        out = []
        for ref in refs:
            entry = self._tables[ref >> 9][8 * (ref & 511) : 8 * (ref & 511) + 8]
            free = not entry[0] & (gt.GTF_reading | gt.GTF_writing)
            if free:
                entry[:2] = b"\0\0"
                self._refs.append(ref)
            out.append(free)
        return out


class Disk:
    """`drivers.block.xenbus_front.FrontPort`: one disk of the domain."""

    def __init__(self, host: PvNative, store: XenstoreClient, persistent: bool) -> None:
        self.host, self.store = host, store
        base = "device/vbd"
        number = store.list(base)[0]
        backend = (store.read(f"{base}/{number}/backend") or b"").decode()
        self.backend = DomId(int(store.read(f"{base}/{number}/backend-id") or b"0"))
        self.grants = Grants(host, self.backend)
        self.frontend = Frontend(self.grants)
        self._rings: list[PagedRing] = []
        self._ports: list[Port] = []
        self.device = FrontDevice(
            f"{base}/{number}", backend, self, Wish(queues=1, order=2, persistent=persistent)
        )
        self._busy = self._again = False
        store.watch(f"{backend}/state", lambda path: self.changed())
        self.changed()

    def changed(self) -> None:
        """One at a time."""
        self._again = True
        if self._busy:
            return
        self._busy = True
        while self._again:
            self._again = False
            self.store.run(self.device.changed())
        self._busy = False

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        """See FrontPort."""
        self.disconnect()
        links = []
        for _ in range(queues):
            own = self.grants.allocate(pages)
            for page in own:
                page.data[:] = bytes(4096)
            self._rings.append(PagedRing([page.data for page in own], X86_64.slot))
            self._rings[-1].init()
            port = self.host.alloc_unbound(xen.DOMID_SELF, self.backend)
            self.host.on_event(port, self.poll)
            self._ports.append(port)
            links.append(QueueLink(tuple(self.grants.grant(own, False)), port))
        return links

    def connected(self, features: Features) -> None:
        """See FrontPort."""
        notify = [lambda port=port: self.host.notify(port) for port in self._ports]
        self.frontend.connect(self._rings, notify, features)  # type: ignore[arg-type]  # the default binds now

    def disconnect(self) -> None:
        """See FrontPort."""
        self.frontend.disconnect()
        self._rings.clear()
        for port in self._ports:
            self.host.close_port(port)
        self._ports.clear()

    def removed(self) -> None:
        """See FrontPort."""

    def poll(self) -> None:
        """The back end answered."""
        self.frontend.poll()
        if self.frontend.error is not None:
            raise SystemExit(f"back end: {self.frontend.error}")


def measure(disk: Disk, name: str, size: int, write: bool, pick: Callable[[], int]) -> None:
    """DEPTH requests of `size` bytes under way for SECONDS, at sectors that `pick` gives."""
    reactor, front = disk.host.reactor, disk.frontend
    count = size >> 9
    data = os.urandom(size)
    done = under_way = 0
    going = True
    start = end = time.perf_counter()

    def ask() -> None:
        nonlocal under_way
        under_way += 1
        sector = pick()
        if write:
            front.write(sector, data, finished)
        else:
            front.read(sector, count, finished)

    def finished(status: int, _data: bytes) -> None:
        nonlocal done, under_way
        if status:
            raise SystemExit(f"{name}: status {status}")
        done += 1
        under_way -= 1
        if going:
            ask()

    for warm in (True, False):
        say(stage=name, what="warm" if warm else "begin")
        done = 0
        going = True
        if warm:
            seconds = 0.5
        else:
            seconds = SECONDS
        cpu, start = time.process_time(), time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            if not under_way:
                with front.batch():
                    for _ in range(DEPTH):
                        ask()
            reactor.once(0.1)
        end = now
        used = time.process_time() - cpu
    going = False
    rate = done / (end - start)
    say(
        stage=name,
        what="end",
        rate=rate,
        megabytes=rate * size / 1e6,
        microseconds=1e6 / rate if rate else 0,
        frontend_cpu=used / (end - start),
    )
    deadline = time.monotonic() + 10
    while under_way and time.monotonic() < deadline:
        reactor.once(0.1)


def run(host: PvNative) -> None:
    """All measurements."""
    store = XenstoreClient(host)
    deadline = time.monotonic() + 30
    while not store.list("device/vbd"):
        if time.monotonic() > deadline:
            raise SystemExit("no disk")
        host.reactor.once(0.05)
    disk = Disk(host, store, os.environ.get("DOMICILE_BENCHMARK_PERSISTENT", "1") == "1")
    while disk.device.state is not XenbusState.Connected:
        host.reactor.once(0.1)
    features = disk.frontend.features
    say(stage="connected", what=f"{features}")
    sectors = features.sectors
    at = 0

    def in_a_row() -> int:
        nonlocal at
        at = (at + 256) % (sectors - 256)
        return at

    def anywhere() -> int:
        return random.randrange(sectors >> 3) << 3

    measure(disk, "4 KiB random reads", 4096, False, anywhere)
    measure(disk, "4 KiB random writes", 4096, True, anywhere)
    measure(disk, "128 KiB sequential reads", 131072, False, in_a_row)
    measure(disk, "128 KiB sequential writes", 131072, True, in_a_row)
    say(stage="over", what="over")
    host.reactor.run()


if __name__ == "__main__":
    serve(run)
