"""The hypervisor process: one thread, one epoll loop; calls into the core, effects out of it."""

from __future__ import annotations

import errno
import json
import select
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bus.abi.xen import HYPERVISOR_domctl, HYPERVISOR_sysctl
from bus.addresses import Bdf, DomId
from bus.log import Logger
from bus.messages.device import (
    FROM_DEVICE,
    Attach,
    DeviceAccess,
    DeviceHello,
    DeviceVector,
    Dma,
    DmaRequest,
    Inspect,
    Plug,
)
from bus.messages.domain import Hello, Hypercall, HypercallReply, OrderDone, Report
from bus.messages.envelope import Message
from bus.trace import Kind as TraceKind
from hypervisor.core import effects as fx
from hypervisor.core.core import HypervisorCore
from hypervisor.core.devices import DeviceService
from hypervisor.core.domains import DRIVER_GUEST, Kind
from hypervisor.core.errors import XenError
from hypervisor.core.scheduler_calls import SchedulerCalls
from hypervisor.shell.devices import DeviceShell, address_of, is_device, peer_id
from hypervisor.shell.heartbeat import PING_ORDER, Heartbeats
from hypervisor.shell.inspection import iommu_answer
from hypervisor.shell.joins import Joins
from hypervisor.shell.leases import Leases
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.peers import Cork, Peer, PeerLost
from hypervisor.shell.processes import Processes, WardenGone
from hypervisor.shell.trace_pages import TracePages

IDLE_S: Final = 1.0
MAX_COUNTERS: Final = 8
"""Kinds of counters that a domain's last words may have (their sizes are bounded by the message's)."""
SHARE_NS: Final = 5_000_000
"""How long one peer's messages are obeyed before the others get their turn."""


class Server:
    """Sockets, processes, doorbells and time around the core."""

    def __init__(
        self,
        core: HypervisorCore,
        memory: MemfdMemory,
        processes: Processes,
        devices: DeviceService,
        scheduler: SchedulerCalls,
        traces: TracePages,
        *,
        doorbells: bool,
    ) -> None:
        """`doorbells` False: all notifications go over ZeroMQ."""
        self._logger = Logger("hypervisor")
        self.devices = devices
        self._device_shell = DeviceShell(memory)
        self.core = core
        self.memory = memory
        self.processes = processes
        self.traces = traces
        self._trace = traces.own
        self.doorbells = doorbells
        self.peers: dict[DomId, Peer] = {}
        self._cork = Cork()
        self._epoll = select.epoll()
        self._epoll.register(processes.fileno(), select.EPOLLIN)
        self._by_fd: dict[int, Peer] = {}
        self._lost: list[tuple[DomId, str]] = []
        self._stopped: str | None = None
        self._joins = Joins(
            self.peers, self._watch, lambda domain, why: self._lost.append((domain, why)), doorbells=doorbells
        )
        self._busy: dict[DomId, Peer] = {}
        """Peers whose turn ended before their messages did."""
        self._settings: dict[str, Any] = {"doorbells": doorbells}
        self._heartbeats = Heartbeats(self._is_stopped)
        self.leases = Leases(
            scheduler,
            doorbells=doorbells,
            signal=processes.signal,
            cpu_of=self._cpu_of,
            ring=self._ring_lease,
            crash=lambda domain, why: core.crash_domain(time.monotonic_ns(), domain, why),
            log=self.log,
            trace=traces.own,
        )
        core.outbox.stale_now = self.leases.stale

    def run(self) -> str:
        """Serve until the machine stops; why it did."""
        self._apply()
        while self._stopped is None:
            lease_deadline = self.leases.next_deadline()
            beat = self._heartbeats.next_deadline()
            deadlines = (self.core.next_deadline(), self.devices.next_deadline(), lease_deadline, beat)
            deadline = min((d for d in deadlines if d is not None), default=None)
            left = IDLE_S if deadline is None else (deadline - time.monotonic_ns()) / 1e9
            self._round(0.0 if self._busy else min(IDLE_S, max(0.0, left)))
            self._turns()
            now = time.monotonic_ns()
            if deadline is not None and now >= deadline:
                # What arrived while we were busy ourselves was in time: it is looked at before anything expires.
                self._round(0.0)
                now = time.monotonic_ns()
                self.core.tick(now)
                self.devices.tick(now)
                self._apply()
            lease_deadline = self.leases.next_deadline()
            if lease_deadline is not None and now >= lease_deadline:
                self.leases.turn(now)
                self._apply()
            if beat is not None and now >= beat:
                self._beat(now)
        return self._stopped

    def _round(self, timeout: float) -> None:
        """Wait for at most `timeout` seconds, then serve all that is there."""
        for fd, events in self._epoll.poll(timeout):
            if fd == self.processes.fileno():
                self._process_news()
            elif not self.leases.rang(fd):
                peer = self._by_fd.get(fd)
                if peer is not None:
                    self._serve(peer, fd, events)

    def _beat(self, now: int) -> None:
        """Ask devices, the driver domains that own them, and the network's, for a sign of life; end those that owe one."""
        devices = self.devices.iommu.devices()
        owners = {device.domain for device in devices if device.domain is not None}
        serving = (d for d in self.core.domains if d.restartable and (d.domid in owners or d.serves))
        watched = [*(peer_id(device.bdf) for device in devices), *(domain.domid for domain in serving)]
        there = [peer for peer in watched if peer in self.peers]
        up = [peer for peer in there if self.peers[peer].connected]
        starting = [p for p in there if not self.peers[p].connected and self.processes.started(p)]
        ask, late = self._heartbeats.beat(now, up, starting)
        for peer in ask:
            if is_device(peer):
                self.devices.access(now, address_of(peer), -1, 0, 2, None, lambda value: None)
            else:
                self._say(self.peers[peer], partial(self.peers[peer].order, PING_ORDER, "ping", {}))
        for peer in late:
            name = f"device {address_of(peer):#x}" if is_device(peer) else f"domain {peer}"
            self.log("warning", f"{name}: its process gives no sign of life: it is ended")
            self.processes.signal(peer, "kill")
        self._apply()

    def _cpu_of(self, domain: DomId) -> int | None:
        running = self.processes.of(domain)
        return running.cpu_ns() if running is not None else None

    def _is_stopped(self, peer: DomId) -> bool:
        running = self.processes.of(peer)
        return running is not None and running.stopped()

    def _ring_lease(self, domain: DomId) -> None:
        peer = self.peers.get(domain)
        if peer is not None:
            self._say(peer, peer.look_at_lease)

    def _say(self, peer: Peer, say: Callable[[], None]) -> None:
        """Send something; a peer that takes nothing is lost."""
        try:
            say()
            self._watch(peer)
        except PeerLost as lost:
            self._lost.append((peer.domain, str(lost)))

    def _open_lease(self, peer: Peer) -> None:
        """The lease page goes to a guest's process as its first order."""
        domain = self.core.domains.get(peer.domain)
        if domain is None or domain.kind is Kind.NATIVE:
            return
        body, fds, bell = self.leases.open(peer.domain)
        if bell is not None:
            self._epoll.register(bell, select.EPOLLIN)
        try:
            peer.order(0, "lease_page", body, fds)
        except PeerLost as lost:
            self._lost.append((peer.domain, str(lost)))

    def _measure(self, asker: DomId) -> None:
        """The toolstack is about to look at domains' CPU times."""
        self.leases.measure()
        self.leases.tell()
        for domain in self.core.domains:
            if domain.kind is Kind.NATIVE:
                self.leases.measure_native(domain.domid, running=domain.domid == asker)

    def _serve(self, peer: Peer, fd: int, events: int) -> None:
        self._guarded(peer, lambda: self._ready(peer, fd, events))

    def _ready(self, peer: Peer, fd: int, events: int) -> None:
        """One of its descriptors is."""
        if peer.listener is not None and fd == peer.listener.fileno():
            new = peer.accept()
            if new is not None:
                self._by_fd[new] = peer
                self._epoll.register(new, select.EPOLLIN)
            return
        if events & select.EPOLLOUT:
            peer.flush()
            if fd in peer.descriptors():  # sending may have found it closed
                self._epoll.modify(fd, select.EPOLLIN)
        waits = bool(peer.inbox)  # for its turn
        peer.inbox.extend(peer.receive(fd))
        if not waits:
            self._turn(peer)

    def _guarded(self, peer: Peer, act: Callable[[], None]) -> None:
        """What goes wrong with a peer costs that peer."""
        try:
            act()
        except PeerLost as lost:
            self._lose(peer.domain, str(lost))
            self._apply()
        except Exception as error:
            if peer.domain == 0:
                raise
            self.log("critical", "".join(traceback.format_exception(error))[-4000:], peer.domain)
            self._lose(peer.domain, f"hypervisor fault: {error!r}"[:200])
            self._apply()

    def _turn(self, peer: Peer) -> None:
        """Obey what a peer sent, for no longer than its share: the others wait meanwhile."""
        end = time.monotonic_ns() + SHARE_NS
        while peer.inbox:
            message = peer.inbox.popleft()
            # Batches of DMA that came together: their answers, interrupts and stale frames go out together.
            self._take(peer, message, apply=not isinstance(message, Dma | DmaRequest))
            if time.monotonic_ns() >= end:
                break
        self._apply()
        if peer.inbox:
            self._busy[peer.domain] = peer
        self._watch(peer)

    def _turns(self) -> None:
        """The next turn of each peer that did not come to its end."""
        busy, self._busy = self._busy, {}
        for peer in busy.values():
            if self.peers.get(peer.domain) is peer:
                self._guarded(peer, partial(self._turn, peer))

    def _take(self, peer: Peer, message: Message | DmaRequest, *, apply: bool = True) -> None:
        if self.peers.get(peer.domain) is not peer:
            peer.inbox.clear()  # it was lost meanwhile: what it still had to say is of no interest
            return
        try:
            self._obey(peer, message)
        except PeerLost:
            raise
        except Exception as error:  # a bug of ours: it costs the domain that found it, not the machine
            self.log("critical", "".join(traceback.format_exception(error))[-4000:], peer.domain)
            if peer.domain == 0:
                raise
            if is_device(peer.domain):
                self._lose(peer.domain, f"hypervisor fault: {error!r}"[:200])
                return
            self.core.crash_domain(time.monotonic_ns(), peer.domain, f"hypervisor fault: {error!r}"[:200])
        if apply:
            self._apply()

    def _obey(self, peer: Peer, message: Message | DmaRequest) -> None:
        now = time.monotonic_ns()
        self._heartbeats.alive(peer.domain)
        if isinstance(message, DmaRequest):
            self.devices.receive_dma(now, address_of(peer.domain), message)
            return
        if isinstance(message, Hello | DeviceHello):
            peer.connected = True
            peer.flush()
            if is_device(peer.domain) and self._heartbeats.next_deadline() is None:
                self._beat(now)
        if is_device(peer.domain):
            self.devices.receive(now, address_of(peer.domain), message)
        elif isinstance(message, Hypercall):
            if message.nr in (HYPERVISOR_domctl, HYPERVISOR_sysctl):
                self._measure(peer.domain)
            self.core.call(
                now, peer.domain, message.vcpu, message.token, message.nr, message.cmd, message.data
            )
            if message.nr == HYPERVISOR_domctl:
                self._sweep_traces()  # of a domain that is gone now: its process may have ended long before
            if self._trace.on[0]:
                spent = time.monotonic_ns() - now
                domain, nr = peer.domain, message.nr
                self._trace.add(TraceKind.HYPERCALL, message.vcpu, domain, nr, message.cmd, spent, time=now)
        elif isinstance(message, OrderDone) and message.order == PING_ORDER:
            pass
        elif isinstance(message, OrderDone):
            self.core.order_done(now, peer.domain, message.order, message.rc, message.data)
        elif isinstance(message, DeviceAccess):
            self.devices.domain_access(now, peer.domain, message)
        elif isinstance(message, DeviceVector):
            self.devices.domain_vector(now, peer.domain, message)
        elif isinstance(message, Plug):
            self._plug(peer, message)
        elif isinstance(message, Inspect):
            self._inspect(peer, message)
        elif isinstance(message, Report):
            self._report(peer, message)

    def _report(self, peer: Peer, report: Report) -> None:
        if report.what == "lease":
            self.leases.told(peer.domain)
            return
        if report.what == "counters":
            if len(report.body) <= MAX_COUNTERS and peer.may_report():
                self._tell_control("counters", {"domid": int(peer.domain), "counters": report.body}, [])
            return
        if report.what == "log":
            domain = self.core.domains.get(peer.domain)
            if domain is not None:
                text = str(report.body.get("text", ""))[:500]
                self.core.console.write(time.monotonic_ns(), domain, text.encode() + b"\n")
            return
        if peer.may_report():
            self.log("info", f"{report.what} {json.dumps(report.body, default=str)[:1000]}", peer.domain)

    def _plug(self, peer: Peer, plug: Plug) -> None:
        """The control domain plugs a device in, or pulls it out."""
        caller = self.core.domains.get(peer.domain)
        if caller is None or not caller.spec.privileged:
            peer.send(HypercallReply(token=plug.token, rc=-errno.EPERM))
            return
        try:
            rc = self._plug_or_pull(plug)
        except XenError as error:
            rc = -error.errno
        peer.send(HypercallReply(token=plug.token, rc=rc))

    def _plug_or_pull(self, plug: Plug) -> int:
        bdf = Bdf(plug.bdf)
        number = peer_id(bdf)
        if self.processes.of(number) is not None:
            if plug.present:
                return -errno.EBUSY
            self.processes.signal(number, "kill")
        self._drop_peer(number)
        if plug.present:
            self.devices.plug(bdf, self._device_shell.plug(bdf, plug.role, plug.name))
            trace = self.traces.page(number, plug.role, plug.name)
            self._add_peer(
                self.processes.start(number, plug.role, self._settings, plug.name, FROM_DEVICE, trace)
            )
        else:
            self.devices.remove(bdf)
            self._device_shell.unplug(bdf)
            self._sweep_traces()
        return 0

    def _inspect(self, peer: Peer, inspect: Inspect) -> None:
        """The control domain looks at the IOMMU, or says whether somebody watches the trace."""
        caller = self.core.domains.get(peer.domain)
        rc, data = -errno.EPERM, b""
        if caller is not None and caller.spec.privileged:
            if inspect.what == "trace":
                self.traces.switch(bool(inspect.args.get("on")))
                if self._trace.on[0]:
                    self.leases.note(time.monotonic_ns())
                rc, data = 0, b""
            else:
                rc, data = iommu_answer(
                    self.devices.iommu, inspect.args, lambda bdf: self.devices.hello_of(bdf) is not None
                )
        peer.send(HypercallReply(token=inspect.token, rc=rc, data=data))

    def _device_ended(self, bdf: Bdf, how: str) -> None:
        """Its process is gone: registers read as all ones, and nothing that it asked lands any more."""
        self.log("warning", f"device {bdf:#x}: process ended with {how}")
        self.devices.unplug(bdf)
        self._device_shell.unplug(bdf)
        self._tell_control("device_ended", {"bdf": int(bdf), "how": how}, [])

    def _add_peer(self, peer: Peer) -> None:
        peer.cork = self._cork
        self.peers[peer.domain] = peer
        if peer.listener is not None:
            self._by_fd[peer.listener.fileno()] = peer
            self._epoll.register(peer.listener.fileno(), select.EPOLLIN)

    def _process_news(self) -> None:
        while (news := self.processes.receive()) is not None:
            running, ended, listener = news
            peer = self.peers.get(running.domain)
            if ended is not None:
                how = f"signal {-ended.status}" if ended.status < 0 else f"status {ended.status}"
                if ended.status and ended.text:
                    self.log("warning", f"process ended with {how}: {ended.text[-2000:]}", running.domain)
                self._drop_peer(running.domain)
                if is_device(running.domain):
                    self._device_ended(address_of(running.domain), how)
                else:
                    self.core.process_ended(time.monotonic_ns(), running.domain, how)
                    self._apply()
                    self._sweep_traces()
            elif listener is not None:
                if peer is None or peer.listener is not None:
                    listener.close()
                else:
                    peer.listen(listener)
                    self._by_fd[listener.fileno()] = peer
                    self._epoll.register(listener.fileno(), select.EPOLLIN)
            self._apply()
            if ended is None and self._heartbeats.next_deadline() is None:
                self._beat(time.monotonic_ns())  # it may be stopped before it says hello

    def _sweep_traces(self) -> None:
        devices = {peer_id(device.bdf) for device in self.devices.iommu.devices()}
        self.traces.sweep(lambda peer: peer in devices or self.core.domains.get(peer) is not None)

    def _tell_control(self, what: str, body: dict[str, object], fds: list[int]) -> None:
        control = self.peers.get(DomId(0))
        if control is not None:
            self._say(control, partial(control.order, 0, what, body, fds))

    def _lose(self, domain: DomId, why: str) -> None:
        """A domain's link is useless: end its process; the rest follows from that."""
        self.log("error", f"link lost: {why}", domain)
        self._drop_peer(domain)
        self.processes.signal(domain, "kill")

    def _drop_peer(self, domain: DomId) -> None:
        peer = self.peers.pop(domain, None)
        self.leases.close(domain)
        self._joins.gone(domain)
        if peer is not None:
            self._by_fd = {fd: other for fd, other in self._by_fd.items() if other is not peer}
            peer.close()

    def _watch(self, peer: Peer) -> None:
        """Have epoll tell when a connection with something to send takes more."""
        fd = peer.write_fd
        if fd is not None and not self._cork.is_in:
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)

    # ------------------------------------------------------------------ effects

    def _apply(self) -> None:
        """Carry out what the core wants, in order; event notifications of one batch go together, and so do all messages to one peer."""
        raised: dict[DomId, list[tuple[int, int]]] = defaultdict(list)
        while batch := self.core.take_effects():
            self._cork.is_in = True
            for effect in batch:
                if isinstance(effect, fx.Raise):
                    if self._trace.on[0]:
                        self._trace.add(TraceKind.EVENT, effect.vcpu, effect.domain, effect.port)
                    if not self._joins.ring(effect.domain, effect.port):
                        raised[effect.domain].append((effect.port, effect.vcpu))
                    continue
                if raised and isinstance(effect, fx.Reply) and effect.domain in raised:
                    self._send_raised(effect.domain, raised.pop(effect.domain))
                try:
                    self._one(effect)
                except WardenGone:
                    raise
                except (
                    Exception
                ) as error:  # a bug, or no descriptors left: it costs the domain that it is about
                    self._failed(effect, error)
            for domain, events in raised.items():
                self._send_raised(domain, events)
            raised.clear()
            self._uncork()
            lost, self._lost = self._lost, []
            for domain, why in lost:
                self._lose(domain, why)

    def _uncork(self) -> None:
        sent, lost = self._cork.pull(self.peers)
        self._lost += lost
        for peer in sent:
            self._watch(peer)

    def _failed(self, effect: fx.Effect, error: Exception) -> None:
        domain = getattr(effect, "domain", getattr(effect, "left", getattr(effect, "guest", None)))
        self.log("critical", "".join(traceback.format_exception(error))[-4000:], domain)
        if isinstance(effect, fx.StartProcess):
            self.core.process_ended(time.monotonic_ns(), effect.domain, f"not started: {error}"[:200])
        elif isinstance(effect, fx.ToDevice | fx.DmaAnswer):
            self._lost.append((peer_id(effect.bdf), f"hypervisor fault: {error!r}"[:200]))
        elif domain is None or domain == 0:
            raise error
        else:
            self._lost.append((domain, f"hypervisor fault: {error!r}"[:200]))

    def _send_raised(self, domain: DomId, events: list[tuple[int, int]]) -> None:
        peer = self.peers.get(domain)
        if peer is not None:
            self._say(peer, partial(peer.raised, events))

    def _one(self, effect: fx.Effect) -> None:
        if isinstance(effect, fx.StartProcess):
            self.log("info", f"process {effect.role} is started", effect.domain)
            trace = self.traces.page(effect.domain, effect.role, "")
            domain = self.core.domains.get(effect.domain)
            kind = domain.kind.value if domain is not None else ""
            if domain is not None and domain.spec.ssidref == DRIVER_GUEST:
                kind = "driver"  # in containers it has one of its own: no guest's
            peer = self.processes.start(effect.domain, effect.role, self._settings, trace=trace, kind=kind)
            self._add_peer(peer)
            self._open_lease(peer)
            if effect.domain == 0:
                self.traces.connect(self._tell_control)
        elif isinstance(effect, fx.KillProcess):
            self.log("info", f"killed: {effect.reason}", effect.domain)
            if self.processes.of(effect.domain) is None:
                self._drop_peer(effect.domain)
                self.core.process_ended(time.monotonic_ns(), effect.domain, "not running")
            else:
                self.processes.signal(effect.domain, "kill")
        elif isinstance(effect, fx.StopMachine):
            self._stopped = effect.reason
            self.processes.halt(effect.reason)
        elif isinstance(effect, fx.Log):
            self.log(effect.level, effect.text, effect.domain)
        elif isinstance(effect, fx.Bind):
            self._joins.bind(effect)
        elif isinstance(effect, fx.BindInterrupt):
            self._joins.interrupt(effect.domain, effect.port)
        elif isinstance(effect, fx.ToDevice):
            self._to_device(effect)
        elif isinstance(effect, fx.JoinModel):
            self._joins.model(effect)
        elif isinstance(effect, fx.DmaAnswer):
            device = self.peers.get(peer_id(effect.bdf))
            if device is not None:
                device.answer_dma(effect.token, effect.fault)
        else:
            self._to_peer(effect)

    def _to_device(self, effect: fx.ToDevice) -> None:
        peer = self.peers.get(peer_id(effect.bdf))
        hello = self.devices.hello_of(effect.bdf)
        if peer is None or hello is None:
            return
        try:
            if isinstance(effect.message, Attach):
                owner = self.devices.owner(effect.bdf)
                target = self.peers.get(owner) if owner is not None else None
                old = peer.lane
                self.devices.receive_late(time.monotonic_ns(), effect.bdf, peer.drain_lane())
                gone = self._device_shell.attach(effect.message, hello, peer, target, self.doorbells)
                if target is not None and gone is not None:
                    self._lost.append((target.domain, str(gone)))
                elif target is not None:
                    self._watch(target)
                if peer.lane is not None and peer.lane is not old:
                    self._by_fd[peer.lane.fileno()] = peer
                    self._epoll.register(peer.lane.fileno(), select.EPOLLIN)
            else:
                peer.send(effect.message)
            self._watch(peer)
        except PeerLost as lost:
            self._lost.append((peer.domain, str(lost)))

    def _to_peer(self, effect: fx.Reply | fx.Order | fx.Unbind | fx.Raise) -> None:
        peer = self.peers.get(effect.domain)
        if peer is None:
            return
        try:
            if isinstance(effect, fx.Reply):
                peer.reply(effect.token, effect.rc, effect.data)
            elif isinstance(effect, fx.Order):
                self._order(peer, effect)
            elif isinstance(effect, fx.Unbind):
                self._joins.unbind(effect.domain, effect.port)
            self._watch(peer)
        except PeerLost as lost:
            self._lost.append((effect.domain, str(lost)))

    def _order(self, peer: Peer, order: fx.Order) -> None:
        body = order.body
        if order.windows:
            body = {**body, "windows": [window for window, _ in order.windows]}
        with self.memory.lent(order.windows, order.extents) as descriptors:
            peer.order(order.order_id, order.kind, body, descriptors)

    def log(self, level: str, text: str, domain: DomId | None = None) -> None:
        """One JSON line on standard error: the structured log of the hypervisor."""
        self._logger.write(level, text, domain=domain)
