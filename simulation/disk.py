"""The disk scenario: DomIO serves a guest's disk, which reads, writes and flushes at random and holds every answer against a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domains.domio.__main__ import BOUNCES, DomIo
from domains.domio.vbd import LEDGER_PAGES
from drivers.block.frontend import DiskError, Features, Frontend
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64
from drivers.block.xenbus_front import FrontDevice, Wish
from drivers.xenbus.paged_ring import PagedRing
from simulation.guest import IN_FLIGHT, Guest
from simulation.model import DiskModel
from simulation.plan import Plan, random_faults
from simulation.process import SimDomain
from simulation.world import SECTORS, World

BDF: Final = 8
VDEV: Final = 768
GUEST_PAGES: Final = 64
DEVICE_PAGES: Final = 192
"""DomIO's memory for the driver's queues."""
RESTART_S: Final = 0.05


class DiskGuest(Guest):
    """One life of the guest. Implements `drivers.block.xenbus_front.FrontPort`."""

    DEVICE = "the disk"
    world: DiskWorld

    def __init__(self, world: DiskWorld, host: SimDomain) -> None:
        super().__init__(world, host, range(1, 62))
        self.front: Frontend = Frontend(self.pages)
        wish = Wish(queues=self.rng.choice((1, 1, 2)), order=0, persistent=self.rng.random() < 0.5)
        self.device = FrontDevice(world.front, world.back, self, wish)
        self.rings: list[PagedRing] = []
        self._doubts: list[str] = []
        """What is wrong with flushes' answers, unless a flush that failed is told with them."""
        self._told = False
        self.begin()

    # ------------------------------------------------------------------ xenbus

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        """See FrontPort."""
        links = []
        for _ in range(queues):
            mine, refs = self._ring_pages(pages)
            ring = PagedRing([page.data for page in mine], X86_64.slot)
            ring.init()
            self.rings.append(ring)
            links.append(QueueLink(tuple(refs), self._channel()))
        return links

    def connected(self, features: Features) -> None:
        """See FrontPort."""
        self.front.connect(self.rings, [self._notify(port) for port in self._ports], features)

    def disconnect(self) -> None:
        """See FrontPort."""
        super().disconnect()
        self.rings = []

    # ------------------------------------------------------------------ I/O

    def _kicked(self) -> None:
        # Of two queues' flushes that are answered before it looks, the frontend sees that of the first queue first.
        self._doubts, self._told = [], False
        super()._kicked()
        for doubt in self._doubts if not self._told else ():
            self.world.violation(doubt)

    @property
    def waits(self) -> str:
        return f"{self.front.pending} requests wait for an answer"

    def _work(self) -> None:
        if not self._ready:
            return
        while self.issued < self.world.operations and self.issued - self.done < IN_FLIGHT:
            if not self._one():
                break
        if self.issued == self.done == self.world.operations:
            self._close_soon()

    def _one(self) -> bool:
        model, rng = self.world.model, self.rng
        draw = rng.random()
        if self.issued == self.world.operations - 1 or draw < 0.15:
            number = model.flush()

            def flushed(status: int, _: bytes) -> None:
                self._finished("flush", status)
                self._told = self._told or status != 0
                if wrong := model.flushed(number, status == 0):
                    self._doubts.append(wrong)

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


class DiskWorld(World):
    """A seed and a plan with `scenario = "disk"`, run once by `run`."""

    BACKEND = "DomIO"
    KIND = "vbd"
    NUMBER = VDEV

    def __init__(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        super().__init__(seed, plan, keep_trace=keep_trace)
        self.sectors: Final = SECTORS
        self.machine.on_power_cut.append(lambda lost: self.model.power_cut(lost))

    def take(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        """See World."""
        super().take(seed, plan, keep_trace=keep_trace)
        self.model = DiskModel(SECTORS)
        self._told = {"flush": 0, "write": 0}
        """Requests of a kind that failed to tell of a power cut."""

    draw = staticmethod(random_faults)

    def excused(self, what: str) -> bool:
        """A request failed: whether it may. The plan makes requests fail; or a flush and a write, one each, have to say that a power cut
        undid what was written before."""
        if self._errors:
            return True
        if self._told.get(what, self.model.cuts) >= self.model.cuts:
            return False
        self._told[what] += 1
        return True

    # ------------------------------------------------------------------ Dom0

    def _memory(self) -> tuple[list[int], list[int]]:
        mine = [*range(LEDGER_PAGES), BOUNCES[BDF >> 3], *range(BOUNCES.stop, BOUNCES.stop + DEVICE_PAGES)]
        return mine, list(range(GUEST_PAGES))

    def _hardware(self, host: SimDomain) -> None:
        xc = self.xc
        xc.plug(BDF, "nvme", "disk1")
        xc.assign_device(self.backend_id, BDF)
        self.machine.on_device_ended = lambda bdf: host.reactor.after(
            RESTART_S, lambda: xc.plug(bdf, "nvme", "disk1")
        )

    def _nodes(self) -> list[tuple[str, str]]:
        return [
            ("removable", "0"), ("state", "1"), ("mode", "w"), ("device-type", "disk"), ("params", f"nvme:{BDF:x}"),
            ("discard-enable", "1"),
        ]  # fmt: skip

    # ------------------------------------------------------------------ the others

    def _domio(self, host: SimDomain) -> None:
        DomIo(host).start()

    def _start_guest(self, host: SimDomain) -> Guest:
        return DiskGuest(self, host)

    # ------------------------------------------------------------------ the end

    def _settled(self) -> list[str]:
        machine, guest = self.machine, self.guest
        problems = []
        # What a planned refusal kept a successor from taking up is lost with its connection, and the disk is Closed: cleanly failed.
        if not self.guest_killed and not self._errors and guest is not None and guest.front.pending:
            problems.append(f"{guest.front.pending} requests were never answered")
        machine.media.power_cut()
        return problems + self.model.check_medium(machine.media.stable)
