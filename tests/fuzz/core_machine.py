"""A whole hypervisor core for the fuzzers (grants, IOMMU, devices, scheduler), with two domains and processes that obey."""

from __future__ import annotations

import contextlib
import functools

from bus.abi import domctl, hypercalls_model, layout
from bus.abi.arch_x86 import xen_arch_domainconfig
from bus.abi.hypercalls import HYPERCALLS, encode
from bus.abi.xen import HYPERVISOR_domctl
from bus.addresses import Bdf, DomId, Mfn
from bus.messages.device import DeviceAccess
from bus.messages.domain import Hypercall, OrderDone
from bus.messages.envelope import Message
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.devices import DeviceService
from hypervisor.core.effects import KillProcess, Order, Reply
from hypervisor.core.grant_calls import GrantCalls
from hypervisor.core.grants import GrantTables
from hypervisor.core.invariants import InvariantChecker
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import DmaService
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.pool import XenPool
from hypervisor.core.scheduler import CreditScheduler
from hypervisor.core.scheduler_calls import SchedulerCalls
from simulation.memory import SimMemory, SimStaging
from simulation.snapshot import Snapshot

SECOND = 1_000_000_000
ZEROES = bytes(4096)


class TouchedMemory(SimMemory):
    """Knows which pages were given out, so that few of them have to be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[int] = set()
        self._kept: dict[int, tuple[memoryview, bytes]] = {}

    def page(self, mfn: int) -> memoryview:
        """See SimMemory."""
        self.touched.add(mfn)
        return super().page(mfn)

    def keep(self) -> None:
        """Note what all pages hold that were given out so far; others hold zeroes."""
        self._kept = {
            mfn: (view := super(TouchedMemory, self).page(mfn), bytes(view)) for mfn in sorted(self.touched)
        }
        self.touched.clear()

    def put_back(self) -> None:
        """As it was then. After the extents are."""
        for view, data in self._kept.values():
            view[:] = data
        for mfn in self.touched:
            if mfn not in self._kept:
                with contextlib.suppress(KeyError):  # of an extent that came and went
                    super().page(mfn)[:] = ZEROES
        self.touched.clear()


class WholeCore:
    """Domain 1 is PV, domain 2 a driver domain with a device at 00:01.0. Orders are carried out with what `answer` says."""

    def __init__(self) -> None:
        memory = self.memory = TouchedMemory()
        config = MachineConfig(total_pages=1 << 12, mfn_limit=1 << 16, mfn_holes=(), xenheap_frames=32)
        core = self.core = HypervisorCore(memory, config)
        iommu = Iommu(memory, XenPool(memory, Mfn(config.mfn_limit), 64))
        self.grants = GrantTables(core.frames, core.views, memory, core.outbox, iommu)
        calls = GrantCalls(self.grants, core.dispatcher, core.outbox)
        core.attach_hooks(calls)
        core.physmap.grant_frame = calls.physmap_frame

        def raise_interrupt(now: int, entry: InterruptEntry) -> None:
            core.events.raise_pirq(entry.domain, entry.pirq)

        dma = DmaService(
            iommu,
            self.grants,
            lambda mfn, count: None,
            raise_interrupt,
        )
        self.devices = DeviceService(
            iommu,
            dma,
            core.physdev,
            core.domains,
            core.events,
            core.outbox,
            core.dispatcher,
            core.frames,
            core.news,
        )
        core.attach_hooks(self.devices)
        core.attach_hooks(SchedulerCalls(CreditScheduler(2), core.domains, config, core.dispatcher))
        self.checker = InvariantChecker(core)
        self.checker.add_references(self.grants.references)
        self.now = SECOND
        self.replies: dict[tuple[int, int], int] = {}
        self.answer: dict[str, tuple[int, bytes]] = {}
        """What an order of a kind is answered with, in place of success."""
        core.create_dom0(self.now, max_pages=64)
        self.settle()
        for ssidref in (0, 1):
            self._create(ssidref)
        self.devices.plug(Bdf(8), SimStaging(memory, 1 << 16))
        self.settle()

    def _create(self, ssidref: int) -> None:
        spec = domctl.xen_domctl_createdomain(
            ssidref, bytes(16), 0, 0, 1, 1023, -1, -1, 2, 0, 0, xen_arch_domainconfig(0, 0)
        )
        number = 1 + ssidref
        self.domctl(domctl.XEN_DOMCTL_createdomain, 0, spec)
        self.domctl(domctl.XEN_DOMCTL_max_mem, number, domctl.xen_domctl_max_mem(64 * 4))
        self.domctl(domctl.XEN_DOMCTL_max_vcpus, number, domctl.xen_domctl_max_vcpus(1))
        self.domctl(domctl.XEN_DOMCTL_unpausedomain, number, None)

    def domctl(self, cmd: int, domain: int, payload: object) -> None:
        """By Dom0."""
        command = HYPERCALLS[HYPERVISOR_domctl].command(cmd)
        assert command is not None
        packed = command.payload.pack(payload) if payload is not None and command.payload else b""
        item = domctl.xen_domctl(
            cmd, domctl.XEN_DOMCTL_INTERFACE_VERSION, domain, (0, 0, 0), packed.ljust(128, b"\0")
        )
        self.call(0, 1, HYPERVISOR_domctl, cmd, encode(command, [item], None))

    def call(self, domid: int, token: int, nr: int, cmd: int, data: bytes, vcpu: int = 0) -> None:
        """A hypercall, and what follows from it."""
        self.core.call(self.now, DomId(domid), vcpu, token, nr, cmd, data)
        self.settle()

    def take(self, domid: int, message: Message) -> None:
        """What the server does with a message of a domain."""
        if isinstance(message, Hypercall):
            self.call(domid, message.token, message.nr, message.cmd, message.data, message.vcpu)
        elif isinstance(message, OrderDone):
            self.core.order_done(self.now, DomId(domid), message.order, message.rc, message.data)
        elif isinstance(message, DeviceAccess):
            self.devices.domain_access(self.now, DomId(domid), message)
        self.settle()

    def settle(self) -> None:
        """Processes carry out orders, killed ones end, until nothing is left."""
        core = self.core
        for _ in range(1000):
            effects = core.take_effects()
            if not effects:
                return
            for effect in effects:
                if isinstance(effect, Reply):
                    assert effect.rc > -4096, f"reply {effect.rc}"
                    self.replies[effect.domain, effect.token] = effect.rc
                elif isinstance(effect, Order) and effect.order_id:
                    rc, data = self.answer.get(effect.kind, (0, self._done(effect)))
                    core.order_done(self.now, effect.domain, effect.order_id, rc, data)
                elif isinstance(effect, KillProcess):
                    core.process_ended(self.now, effect.domain, "killed")
        raise AssertionError("a thousand rounds of effects, and no end")

    @staticmethod
    def _done(order: Order) -> bytes:
        body = order.body
        count = sum(
            len(value)
            for name in ("checks", "moves", "clears", "items")
            if isinstance(value := body.get(name), list)
        )
        return bytes(2 * count)

    def advance(self, seconds: float) -> None:
        """Time passes, deadline by deadline."""
        end = self.now + int(seconds * SECOND)
        for _ in range(200):
            due = [d for d in (self.core.next_deadline(), self.devices.next_deadline()) if d is not None]
            self.now = min([end, *due], default=end) if min([end, *due]) > self.now else self.now + 1
            self.core.tick(self.now)
            self.devices.tick(self.now)
            self.settle()
            if self.now >= end:
                return

    def check(self) -> None:
        """AssertionError with the first broken invariant."""
        problems = [*self.checker.check(), *self.grants.check()]
        assert not problems, problems[0]


CONSTANT = (
    hypercalls_model.Command, hypercalls_model.Error, hypercalls_model.Hypercall, hypercalls_model.ArrayArg, layout.Layout, layout.Prim,
    layout.Bytes, layout._Field,
)  # fmt: skip
"""The ABI's tables."""


class Ready:
    """A core that is built once, and is as new for each input."""

    def __init__(self) -> None:
        self.core = WholeCore()
        memory = self.core.memory
        memory.keep()
        octets = [view.obj for view in memory._extents.values()]
        self._snapshot = Snapshot(
            self.core, constant=CONSTANT, elsewhere=(memory._kept, memory.touched, *octets)
        )

    def new(self) -> WholeCore:
        """As if it had just been made. The one before is this one."""
        self._snapshot.restore()
        self.core.memory.put_back()
        return self.core


@functools.cache
def ready() -> Ready:
    """The process's own."""
    return Ready()
