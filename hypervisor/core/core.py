"""The hypervisor core: the subsystems, put together. Calls in, effects out; no I/O, no clock, no thread.

The shell feeds it with what arrives (`call`, `order_done`, `process_ended`), with time (`tick`), and
carries out what `take_effects` returns, in order. Time is in nanoseconds and never goes back.
"""

from __future__ import annotations

from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.console import Console
from hypervisor.core.domain_info import DomainInfo
from hypervisor.core.domains import Domain, DomainSpec, DomainTable, Kind
from hypervisor.core.domctl import DomctlOps
from hypervisor.core.effects import Effect, Log
from hypervisor.core.event_calls import EventCalls
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.frames import FrameTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hvm_params import HvmParams
from hypervisor.core.hypercalls import Dispatcher
from hypervisor.core.io_permissions import IoPermissions
from hypervisor.core.ioreq import IoreqServers
from hypervisor.core.lifecycle import Lifecycle
from hypervisor.core.memory_news import MemoryNews
from hypervisor.core.memory_ops import MemoryOps
from hypervisor.core.outbox import Outbox
from hypervisor.core.physdev import PhysdevOps
from hypervisor.core.physmap import PhysMap
from hypervisor.core.platform import PlatformOps
from hypervisor.core.ports import MachineMemory
from hypervisor.core.sched_ops import SchedOps
from hypervisor.core.sysctl import SysctlOps
from hypervisor.core.vcpu_ops import VcpuOps
from hypervisor.core.views import DomainViews


class HypervisorCore:
    """One machine. Its parts are public: the grant tables, the IOMMU and the scheduler are attached by
    `attach_hooks` and by registering with `dispatcher`."""

    def __init__(self, memory: MachineMemory, config: MachineConfig) -> None:
        self.config = config
        self.memory = memory
        self._now = 0
        self.outbox = Outbox(config.max_orders)
        self.domains = DomainTable(config)
        self.frames = FrameTable(memory, config)
        self.dispatcher = Dispatcher(HYPERCALLS, self.domains, self.outbox)
        self.events = EventChannels(self.domains, self.frames, self.outbox, config)
        self.lifecycle = Lifecycle(self.domains, self.frames, self.events, self.outbox, config)
        self.news = MemoryNews(self.domains, self.outbox)
        self.physmap = PhysMap(self.frames, self.news)
        self.views = DomainViews(
            self.domains, self.frames, self.physmap, self.lifecycle, self.outbox, lambda: self._now
        )
        self.console = Console(self.events, self.outbox, config, self.dispatcher)
        self.event_calls = EventCalls(self.events, self.dispatcher)
        self.memory_ops = MemoryOps(
            self.domains, self.frames, self.physmap, self.news, memory, config, self.dispatcher
        )
        self.sched_ops = SchedOps(self.domains, self.lifecycle, self.dispatcher)
        self.info = DomainInfo(self.frames)
        self.domctl = DomctlOps(
            self.domains,
            self.frames,
            self.lifecycle,
            self.events,
            self.info,
            self.outbox,
            config,
            self.dispatcher,
        )
        self.sysctl = SysctlOps(self.domains, self.frames, self.info, self.console, config, self.dispatcher)
        self.hvm_params = HvmParams(self.domains, self.physmap, self.outbox, self.dispatcher)
        self.platform = PlatformOps(self.domains, self.outbox, config, self.dispatcher)
        self.physdev = PhysdevOps(self.domains, self.events, config, self.dispatcher)
        self.io_permissions = IoPermissions(self.domains, config, self.dispatcher)
        self.vcpu_ops = VcpuOps(self.lifecycle, self.dispatcher)
        self.ioreq = IoreqServers(self.domains, self.lifecycle, self.outbox, config, self.dispatcher)
        self._last_hooks: tuple[DomainHooks, ...] = (self.physmap, _Forget(self.dispatcher))
        first: tuple[DomainHooks, ...] = (
            self.news,
            self.events,
            self.console,
            self.sched_ops,
            self.hvm_params,
            self.platform,
            self.physdev,
            self.io_permissions,
            self.ioreq,
        )
        for hooks in first + self._last_hooks:
            self.lifecycle.add_hooks(hooks)
        self.dispatcher.before_reply = self.news.flush

    def attach_hooks(self, hooks: DomainHooks) -> None:
        """Another subsystem is told of domains' lives, before the physical maps of dead domains are
        emptied."""
        self.lifecycle.insert_hooks(hooks, len(self._last_hooks))

    # -- what the shell calls
    # -------------------------------------------------------------------------------------

    def create_dom0(self, now: int, *, max_pages: int, max_vcpus: int = 1, role: str = "dom0") -> Domain:
        """The first domain: native, privileged, with room for `max_pages` of memory; it is started at
        once."""
        self._advance(now)
        spec = DomainSpec(Kind.NATIVE, role=role, max_vcpus=max_vcpus, privileged=True)
        domain = self.lifecycle.create(now, None, spec)
        self.lifecycle.set_max_mem(now, domain, max_pages)
        self.lifecycle.set_max_vcpus(now, domain, max_vcpus)
        for vcpu in domain.vcpus:
            vcpu.initialised = vcpu.online = True
        self.lifecycle.unpause(now, domain)
        self.news.flush()
        return domain

    def call(self, now: int, domid: DomId, vcpu: int, token: int, nr: int, cmd: int, data: bytes) -> None:
        """A hypercall from the domain whose link it came by, in the wire form of its entry in the table."""
        self._advance(now)
        self.dispatcher.call(now, domid, vcpu, token, nr, cmd, data)
        self.news.flush()

    def order_done(self, now: int, domid: DomId, order_id: int, rc: int, data: bytes) -> bool:
        """A domain's process answered an order. False if it has no such order outstanding."""
        self._advance(now)
        known = self.outbox.done(now, domid, order_id, rc, data)
        self.news.flush()
        return known

    def order_expired(self, now: int, order_id: int) -> None:
        """The shell's own timer for an order ran out (`tick` does the same without being told)."""
        self._advance(now)
        self.outbox.expired(now, order_id)
        self.news.flush()

    def process_ended(self, now: int, domid: DomId, status: str) -> None:
        """The domain's process is known to be gone, for whatever reason."""
        self._advance(now)
        self.lifecycle.process_ended(now, domid, status)
        self.news.flush()

    def crash_domain(self, now: int, domid: DomId, why: str) -> None:
        """The shell found the domain's process at fault: its domain crashes."""
        self._advance(now)
        domain = self.domains.get(domid)
        if domain is not None:
            self.lifecycle.crash(now, domain, why)
        self.news.flush()

    def tick(self, now: int) -> None:
        """Time has passed: deadlines of orders, watchdogs."""
        self._advance(now)
        self.outbox.tick(now)
        self.sched_ops.tick(now)
        self.lifecycle.tick(now)
        self.news.flush()

    def next_deadline(self) -> int | None:
        """When `tick` has to be called next."""
        first = self.outbox.next_deadline()
        for deadline in (self.sched_ops.next_deadline(), self.lifecycle.next_deadline()):
            if deadline is not None and (first is None or deadline < first):
                first = deadline
        return first

    def take_effects(self) -> list[Effect]:
        """All effects since the last call, in order. Lines for the log are in the console ring by then."""
        effects = self.outbox.take()
        if not effects:
            return effects
        for effect in effects:
            if type(effect) is Log and effect.level != "guest":
                self.console.log(effect.text)
        return effects + self.outbox.take()

    def _advance(self, now: int) -> None:
        self._now = now
        self.lifecycle.advance(now)


class _Forget(DomainHooks):
    """Drops a removed domain's counters."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def removed(self, now: int, domain: Domain) -> None:
        self._dispatcher.forget(domain.domid)
