"""A guest whose process is a program: the project's own block frontend, asking as fast as it gets answers (benchmarks/programs/native_guest.py;
run by benchmarks/disk_ring.py).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from benchmarks.programs.front import FrontProgram, Grants
from benchmarks.programs.native_guest import PvNative, say, serve
from bus.abi import xen
from bus.addresses import DomId, Port
from domains.native.xenstore import XenstoreClient
from drivers.block.frontend import Features, Frontend
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64
from drivers.block.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.states import XenbusState

DEPTH = 32
SECONDS = float(os.environ.get("DOMICILE_BENCHMARK_SECONDS", "4"))


class Disk(FrontProgram):
    """`drivers.block.xenbus_front.FrontPort`: one disk of the domain."""

    frontend: Frontend
    device: FrontDevice

    def __init__(self, host: PvNative, store: XenstoreClient, persistent: bool) -> None:
        super().__init__(host, store)
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
        self.follow(backend)

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
        self.frontend.connect(self._rings, notify, features)

    def disconnect(self) -> None:
        """See FrontPort."""
        self.frontend.disconnect()
        self._rings.clear()
        for port in self._ports:
            self.host.close_port(port)
        self._ports.clear()


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
