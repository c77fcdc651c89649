"""The life of a domain: create, memory, vCPUs, start, pause, shutdown, crash, destroy.

What ends a domain gives everything back, in an order in which nothing freed is still reachable: what joins it
to others is closed (`DomainHooks.dying`), its process is killed, and only when that is known to be gone are
references dropped (`gone`) and frames freed. Frames that others still refer to keep it as a zombie, as on
Xen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from errno import EBUSY, EINVAL, ENOMEM, EPERM, ERESTART, EUSERS
from typing import cast

from bus.abi.domctl import XEN_DOMCTL_CDF_hap
from bus.abi.xen import VIRQ_DOM_EXC
from bus.addresses import DomId, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import (
    Domain,
    DomainSpec,
    DomainTable,
    Dying,
    Kind,
    Shutdown,
    VcpuState,
    shutdown_name,
)
from hypervisor.core.effects import KillProcess, StartProcess, StopMachine
from hypervisor.core.errors import XenError
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.frames import FrameTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.memory_news import RUNS_PER_ORDER
from hypervisor.core.outbox import Outbox
from hypervisor.core.p2m import FREE_CHUNKS, PAGES_PER_CHUNK, P2m

MAX_PAUSE = 255
EXCHANGE_FRAMES = 1024
"""MFNs of a PV domain beyond its maximum of memory, which XENMEM_exchange draws on (it never owns more than its maximum)."""
"""Pauses of one domain by the control domain that may be outstanding."""

Answer = Callable[[int, int], None]
"""(now_ns, rc): the outcome of something that waited for a process."""


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """One line of a domain's life, for the toolstack."""

    sequence: int
    time_ns: int
    domain: DomId
    what: str
    """created, unpaused, paused, shutdown, crashed, resumed, destroyed, removed."""
    detail: str = ""


def numbered(runs: list[list[int]]) -> list[list[int]]:
    """[[pfn, first MFN, count], ...]: a PV domain's frames as its builder numbers them, in their order."""
    out: list[list[int]] = []
    pfn = 0
    for first, count in runs:
        out.append([pfn, first, count])
        pfn += count
    return out


class Lifecycle:
    """All operations raise XenError for what Xen refuses."""

    def __init__(
        self,
        domains: DomainTable,
        frames: FrameTable,
        events: EventChannels,
        outbox: Outbox,
        config: MachineConfig,
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._events = events
        self._outbox = outbox
        self._config = config
        self._hooks: list[DomainHooks] = []
        self._history: deque[DomainEvent] = deque(maxlen=config.max_domain_events)
        self._sequence = 0
        self._killing: dict[DomId, int] = {}
        self._destroyers: dict[DomId, list[Answer]] = {}
        self._readers: dict[DomId, set[DomId]] = {}
        """Who holds a domain's memory beside its own process: its builder, its device model."""
        self._now = 0
        frames.on_extent_dropped = self._extent_dropped

    def add_hooks(self, hooks: DomainHooks) -> None:
        """Tell `hooks` of every domain's life from now on."""
        self._hooks.append(hooks)

    def insert_hooks(self, hooks: DomainHooks, before_last: int) -> None:
        """As `add_hooks`, but in front of the last so many."""
        self._hooks.insert(len(self._hooks) - before_last, hooks)

    def history(self, after: int = 0) -> list[DomainEvent]:
        """Events with a sequence number above `after` that are still kept."""
        return [e for e in self._history if e.sequence > after]

    def _note(self, now: int, domain: Domain, what: str, detail: str = "") -> None:
        self._sequence += 1
        self._history.append(DomainEvent(self._sequence, now, domain.domid, what, detail))

    # -- birth -----------------------------------------------------------------------------------------------

    def create(self, now: int, builder: Domain | None, spec: DomainSpec) -> Domain:
        """A new domain, paused, without memory and vCPUs. EINVAL, EEXIST, ENOMEM."""
        hap_without_hvm = spec.flags & XEN_DOMCTL_CDF_hap and spec.kind is not Kind.HVM
        if not 1 <= spec.max_vcpus <= self._config.max_vcpus or hap_without_hvm:
            raise XenError(EINVAL)
        domid = DomId(0) if builder is None else self._domains.choose_domid(spec.domid)
        domain = Domain(domid, spec, builder.domid if builder else None, spec.handle)
        if spec.kind is not Kind.PV:
            domain.p2m = P2m(domid)
        self._domains.add(domain)
        self._introduce(domain)
        for hooks in self._hooks:
            hooks.created(now, domain)
        self._note(now, domain, "created", spec.kind.value)
        return domain

    def _introduce(self, domain: Domain) -> None:
        """Start a process for the domain and tell it what it is."""
        domain.process_alive = True
        domain.life += 1
        self._outbox.emit(StartProcess(domain.domid, domain.spec.role))
        self._outbox.tell(
            domain.domid,
            "configure",
            {
                "domid": int(domain.domid),
                "kind": domain.spec.kind.value,
                "handle": domain.handle,
                "max_vcpus": domain.spec.max_vcpus,
                "flags": domain.spec.flags,
                "emulation_flags": domain.spec.emulation_flags,
                "privileged": domain.spec.privileged,
                "driver": domain.restartable,
            },
        )

    def set_max_mem(self, now: int, domain: Domain, pages: int) -> None:
        """XEN_DOMCTL_max_mem. The first time, it fixes the size of the domain's MFN range; a larger maximum
        later does not enlarge that (populate then ends with ENOMEM, as on a full machine). ENOMEM: no room
        for the range."""
        if domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        if self._frames.extent_of(domain.domid) is None:
            if pages > self._config.mfn_limit:
                raise XenError(ENOMEM)
            # A PV domain that has all its memory may still exchange frames: new ones come before the old ones go.
            slack = EXCHANGE_FRAMES if domain.p2m is None else 0
            extent = self._frames.create_extent(domain.domid, pages + slack)
            try:
                domain.shared_info = self._frames.allocate_xenheap(domain.domid)
            except XenError:
                self._frames.discard_extent(domain.domid)
                raise
            body = self._extent_body(domain)
            self._outbox.tell(domain.domid, "extent", body, extents=(extent.base,))
            if domain.builder is not None:
                self.share_extent(domain.builder, domain)
            for hooks in self._hooks:
                hooks.extent_created(now, domain)
        domain.max_pages = pages
        if domain.p2m is not None:
            domain.p2m.max_chunks = max(domain.p2m.max_chunks, FREE_CHUNKS + pages // PAGES_PER_CHUNK)

    def _extent_body(self, domain: Domain) -> dict[str, object]:
        extent = self._frames.extent_of(domain.domid)
        if extent is None or domain.shared_info is None:
            raise XenError(EINVAL)
        return {
            "domid": int(domain.domid),
            "base": int(extent.base),
            "ram_frames": extent.ram_capacity,
            "frames": extent.count,
            "shared_info": int(domain.shared_info),
        }

    def share_extent(self, reader: DomId, domain: Domain) -> None:
        """Give the domain's memory to its builder, or to its device model (order `build_extent`); the order
        `drop_extent` takes it away when the domain is destroyed. EINVAL if the domain has no memory yet."""
        body = self._extent_body(domain)
        self._readers.setdefault(domain.domid, set()).add(reader)
        self._outbox.tell(reader, "build_extent", body, extents=(Mfn(cast(int, body["base"])),))

    def set_max_vcpus(self, now: int, domain: Domain, count: int) -> None:
        """XEN_DOMCTL_max_vcpus: allocate the vCPUs. EINVAL unless it is the number given at creation."""
        if count != domain.spec.max_vcpus:
            raise XenError(EINVAL)
        if not domain.vcpus:
            domain.vcpus = [VcpuState(i) for i in range(count)]
            self._runnable_changed(now, domain)

    def vcpus_changed(self, now: int, domain: Domain) -> None:
        """vCPUs of the domain came up or went down."""
        self._runnable_changed(now, domain)

    # -- running ---------------------------------------------------------------------------------------------

    def _runnable_changed(self, now: int, domain: Domain) -> None:
        for hooks in self._hooks:
            hooks.runnable_changed(now, domain)

    def _start(self, now: int, domain: Domain) -> None:
        """The first unpause: tell the process what it needs beside its memory (of which it was told as it
        grew).
        """
        domain.started = True
        self._outbox.tell(
            domain.domid,
            "start",
            {
                "vcpus": len(domain.vcpus),
                "online": [v.index for v in domain.vcpus if v.online],
                "memory_map": domain.memory_map,
                "time_offset": domain.time_offset,
                "address_size": domain.address_size,
            },
        )

    def unpause(self, now: int, domain: Domain) -> None:
        """XEN_DOMCTL_unpausedomain. EINVAL if the control domain has not paused it, or it has no vCPU to
        run."""
        if not domain.controller_pause or domain.dying is not Dying.ALIVE or not domain.vcpus:
            raise XenError(EINVAL)
        domain.controller_pause -= 1
        if domain.controller_pause:
            return
        if not domain.started:
            self._start(now, domain)
        self._outbox.tell(domain.domid, "pause", {"paused": domain.paused})
        self._runnable_changed(now, domain)
        self._note(now, domain, "unpaused")

    def pause(self, now: int, domain: Domain, answer: Answer) -> None:
        """XEN_DOMCTL_pausedomain: answered when its vCPUs are known not to run. A process that does not say
        so in time is killed (its domain has crashed). EUSERS: paused too often."""
        if domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        if domain.controller_pause >= MAX_PAUSE:
            raise XenError(EUSERS)
        was_paused = domain.paused
        domain.controller_pause += 1
        if was_paused or not domain.started or not domain.process_alive:
            answer(now, 0)
            return
        self._runnable_changed(now, domain)
        self._note(now, domain, "paused")

        def done(later: int, rc: int, data: bytes) -> None:
            answer(later, 0)

        def failed(later: int, why: str) -> None:
            if why != "dead":
                self.crash(later, domain, f"its process did not pause ({why})")
            answer(later, 0)

        self._outbox.ask(
            now,
            domain.domid,
            "pause",
            {"paused": True},
            done,
            failed,
            timeout_ns=self._config.order_timeout_ns,
        )

    # -- shutdown --------------------------------------------------------------------------------------------

    def shutdown(self, now: int, domain: Domain, reason: int, *, by_itself: bool) -> None:
        """SCHEDOP_shutdown and SCHEDOP_remote_shutdown. The first reason given (or latched) stays.

        `by_itself`: its process made the call and runs no vCPU from then on; else it is told to stop."""
        if domain.shutdown_code is None:
            domain.shutdown_code = reason & 0xFF
        if domain.domid == 0:
            name = shutdown_name(domain.shutdown_code)
            self._outbox.log("info", f"Dom0 has shut down: {name}", domain.domid)
            self._outbox.emit(StopMachine(name))
        if domain.shutting_down:
            return
        domain.shutting_down = True
        self._runnable_changed(now, domain)
        if by_itself or not domain.process_alive or not domain.started:
            self._shutdown_complete(now, domain)
            return

        def failed(later: int, why: str) -> None:
            if why != "dead" and domain.process_alive and domain.dying is Dying.ALIVE:
                self._kill(later, domain, f"did not stop ({why})")
            if not domain.shut_down:
                self._shutdown_complete(later, domain)

        def done(later: int, rc: int, data: bytes) -> None:
            if not domain.shut_down:
                self._shutdown_complete(later, domain)

        body: dict[str, object] = {"reason": domain.shutdown_code}
        timeout = self._config.order_timeout_ns
        self._outbox.ask(now, domain.domid, "stop", body, done, failed, timeout_ns=timeout)

    def _shutdown_complete(self, now: int, domain: Domain) -> None:
        domain.shut_down = True
        for vcpu in domain.vcpus:
            vcpu.running = vcpu.blocked = False
        code = domain.shutdown_code if domain.shutdown_code is not None else int(Shutdown.CRASH)
        self._note(now, domain, "shutdown", shutdown_name(code))
        if self._ends_with_shutdown(domain) and domain.process_alive:
            self._kill(now, domain, "a driver domain that shut down starts anew")
        for hooks in self._hooks:
            hooks.shut_down(now, domain)
        if domain.dying is Dying.ALIVE:
            self._events.send_global_virq(VIRQ_DOM_EXC)

    @staticmethod
    def _ends_with_shutdown(domain: Domain) -> bool:
        """Its process does not outlive a shutdown: a driver domain's that is a guest, which is built anew."""
        return domain.restartable and domain.kind is Kind.PV

    def crash(self, now: int, domain: Domain, why: str, *, kill: bool = True) -> None:
        """The domain has crashed: SHUTDOWN_crash, whatever it latched before; its process is killed unless
        `kill` is False (its memory can then still be looked at through the process)."""
        if domain.dying is not Dying.ALIVE:
            return
        if not domain.crash_reason:
            domain.crash_reason = why
        self._outbox.log("error", f"domain {domain.domid} crashed: {why}", domain.domid)
        self._note(now, domain, "crashed", why)
        if not domain.shutting_down:
            domain.shutdown_code = int(Shutdown.CRASH)
            self.shutdown(now, domain, Shutdown.CRASH, by_itself=True)
        if kill and domain.process_alive:
            self._kill(now, domain, why)

    def resume(self, now: int, domain: Domain) -> None:
        """XEN_DOMCTL_resumedomain: a domain that had shut down goes on.

        A driver domain whose process is gone gets a new one, with the domain's id, memory and event channels
        as they were: it is restarted in place this way. That of a PV guest waits until its builder has set
        vCPU 0's context again; EBUSY while the old process has not ended. EINVAL for another domain without
        a process."""
        if domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        if not domain.shutting_down:
            return
        if not domain.shut_down or not (domain.process_alive or domain.restartable):
            raise XenError(EINVAL)
        if domain.process_alive and self._ends_with_shutdown(domain):
            raise XenError(EBUSY)
        domain.shutting_down = domain.shut_down = False
        domain.shutdown_code = None
        domain.crash_reason = ""
        if domain.process_alive:
            self._outbox.tell(domain.domid, "resume")
        else:
            self._start_again(now, domain)
        self._runnable_changed(now, domain)
        self._note(now, domain, "resumed")

    def _start_again(self, now: int, domain: Domain) -> None:
        """A new process for a domain that is built: it is told all that the old one knew of the
        hypervisor."""
        self._introduce(domain)
        extent = self._frames.extent_of(domain.domid)
        if extent is not None:
            self._outbox.tell(domain.domid, "extent", self._extent_body(domain), extents=(extent.base,))
        owned = self._frames.ram_runs(domain.domid)
        runs: list[tuple[str, list[list[int]]]] = [("added", owned)]
        if domain.p2m is not None:
            runs.append(("p2m", domain.p2m.runs()))
        else:
            runs.append(("m2p", numbered(owned)))
        for what, found in runs:
            for start in range(0, len(found), RUNS_PER_ORDER):
                self._outbox.tell(domain.domid, "memory", {what: found[start : start + RUNS_PER_ORDER]})
        for hooks in self._hooks:
            hooks.restarted(now, domain)
        if domain.started:
            self._start(now, domain)
            self._outbox.tell(domain.domid, "pause", {"paused": domain.paused})

    # -- death -----------------------------------------------------------------------------------------------

    def _kill(self, now: int, domain: Domain, why: str) -> None:
        if domain.domid not in self._killing:
            self._killing[domain.domid] = now + self._config.kill_timeout_ns
            self._outbox.emit(KillProcess(domain.domid, why))

    def process_ended(self, now: int, domid: DomId, status: str) -> None:
        """The shell reports: the domain's process is gone."""
        domain = self._domains.get(domid)
        if domain is None or not domain.process_alive:
            return
        domain.process_alive = False
        self._killing.pop(domid, None)
        self._outbox.domain_gone(now, domid)
        if domain.dying is Dying.ALIVE:
            if not domain.shut_down:
                self.crash(now, domain, f"its process ended: {status}", kill=False)
            elif self._ends_with_shutdown(domain):
                self._events.send_global_virq(VIRQ_DOM_EXC)  # only now can it be resumed
            self._runnable_changed(now, domain)
        for hooks in self._hooks:
            hooks.process_ended(now, domain)
        if domain.dying is Dying.DYING:
            self._finish(now, domain)

    def destroy(self, now: int, domain: Domain, answer: Answer) -> None:
        """XEN_DOMCTL_destroydomain. Answered 0 when all is given back (but frames that others hold), EAGAIN
        if the shell does not confirm the end of its process in time; to call again is right then. EPERM for
        Dom0."""
        if domain.domid == 0:
            raise XenError(EPERM)
        self._destroyers.setdefault(domain.domid, []).append(answer)
        if domain.dying is Dying.ALIVE:
            domain.dying = Dying.DYING
            self._runnable_changed(now, domain)
            for hooks in self._hooks:
                hooks.dying(now, domain)
            if domain.process_alive:
                self._kill(now, domain, "destroyed")
            else:
                self._finish(now, domain)
        elif domain.process_alive:
            self._killing.setdefault(domain.domid, now + self._config.kill_timeout_ns)

    def _finish(self, now: int, domain: Domain) -> None:
        for hooks in self._hooks:
            hooks.gone(now, domain)
        extent = self._frames.extent_of(domain.domid)
        for domid in sorted(self._readers.pop(domain.domid, ())):
            reader = self._domains.get(domid)
            if extent is not None and reader is not None and reader.process_alive:
                body: dict[str, object] = {"domid": int(domain.domid), "base": int(extent.base)}
                self._outbox.tell(domid, "drop_extent", body)
        domain.dying = Dying.DEAD
        domain.shared_info = None
        for other in self._domains:
            if other.target == domain.domid:
                other.target = None
        self._note(now, domain, "destroyed")
        self._now = now
        if self._frames.release_domain(domain.domid):
            self._remove(now, domain)
        else:
            self._outbox.log(
                "info", f"domain {domain.domid} is a zombie: frames are still held", domain.domid
            )
            self._events.send_global_virq(VIRQ_DOM_EXC)
        for answer in self._destroyers.pop(domain.domid, []):
            answer(now, 0)

    def _extent_dropped(self, domid: DomId, base: Mfn) -> None:
        domain = self._domains.get(domid)
        if domain is not None and domain.dying is Dying.DEAD and domid not in self._destroyers:
            self._remove(self._now, domain)

    def _remove(self, now: int, domain: Domain) -> None:
        if self._domains.get(domain.domid) is not domain:
            return
        for hooks in self._hooks:
            hooks.removed(now, domain)
        self._domains.remove(domain.domid)
        self._note(now, domain, "removed")
        self._events.send_global_virq(VIRQ_DOM_EXC)

    # -- time ------------------------------------------------------------------------------------------------

    def advance(self, now: int) -> None:
        """The time of what happens next (for what is noted when the last reference to a frame goes)."""
        self._now = now

    def tick(self, now: int) -> None:
        """Answer those who wait for processes that do not end."""
        for domid, deadline in list(self._killing.items()):
            if deadline <= now:
                del self._killing[domid]
                self._outbox.log("error", f"the process of domain {domid} does not end", domid)
                for answer in self._destroyers.pop(domid, []):
                    answer(now, -ERESTART)

    def next_deadline(self) -> int | None:
        """When `tick` next has something to do."""
        return min(self._killing.values()) if self._killing else None
