"""Event channels: ports, what they are bound to, and who is told.

The pending and mask bits are in the guest's memory and have one writer, the domain's own process (docs/architecture.md,
invariant 7). Here is the hypervisor's own record of ports; what became pending is said by a `Raise` effect,
and the process sets the bits. The errno of each refusal is that of Xen 4.17 (xen/common/event_channel.c's
public behaviour).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from errno import EEXIST, EINVAL, ENOENT, ENOSPC, ENOSYS, EPERM, ESRCH
from heapq import heappop, heappush
from typing import Final

from bus.abi.event_channel import EVTCHN_2L_NR_CHANNELS as TWO_LEVEL_CHANNELS
from bus.abi.event_channel import EVTCHN_FIFO_LINK_BITS
from bus.abi.event_channel import EVTCHN_FIFO_NR_CHANNELS as FIFO_CHANNELS
from bus.abi.xen import NR_VIRQS, VIRQ_DEBUG, VIRQ_TIMER, VIRQ_XENOPROF, VIRQ_XENPMU
from bus.addresses import EVTCHNS_PER_BUCKET, DomId, Port, VcpuId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import DOMID_SELF, Domain, DomainTable, Dying
from hypervisor.core.effects import Bind, BindInterrupt, Raise, Unbind
from hypervisor.core.errors import XenError
from hypervisor.core.event_fifo import FifoState
from hypervisor.core.frames import FrameTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.outbox import Outbox

PER_VCPU_VIRQS = frozenset((VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF, VIRQ_XENPMU))
"""All others are global: bound on vCPU 0 only (xen.h)."""


ROWS_PER_ORDER: Final = 1024
NO_DOMAIN: Final = DomId(0)
NO_PORT: Final = Port(0)


class State(IntEnum):
    """EVTCHNSTAT_* of event_channel.h."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


@dataclass(slots=True)
class Channel:
    """One port in use."""

    state: State
    vcpu: int
    """notify_vcpu_id: the vCPU that is told."""
    remote_domain: DomId = NO_DOMAIN
    remote_port: Port = NO_PORT
    number: int = 0
    """The VIRQ's or PIRQ's number."""
    consumer: Callable[[int, int], None] | None = None
    """A port that the hypervisor itself listens on: called with (now, vcpu). The guest cannot use or close
    it."""
    priority: int = 7
    """FIFO only (EVTCHN_FIFO_PRIORITY_DEFAULT)."""


@dataclass(slots=True)
class Ports:
    """A domain's event channels."""

    channels: dict[int, Channel] = field(default_factory=dict)
    freed: list[int] = field(default_factory=list)
    """Heap of closed ports below `fresh`."""
    fresh: int = 1
    """No port from here on was ever used. Port 0 never is."""
    virqs: dict[tuple[int, int], int] = field(default_factory=dict)
    """(vcpu, virq) -> port."""
    pirqs: dict[int, int] = field(default_factory=dict)
    pirqs_permitted: set[int] = field(default_factory=set)
    """Interrupts that the domain may bind: those of its devices."""
    fifo: FifoState | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """EVTCHNOP_status."""

    state: State
    vcpu: int
    domain: DomId = NO_DOMAIN
    port: Port = NO_PORT
    number: int = 0


class EventChannels(DomainHooks):
    """All operations raise XenError. Arguments come from guests, unchecked."""

    def __init__(
        self, domains: DomainTable, frames: FrameTable, outbox: Outbox, config: MachineConfig
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._outbox = outbox
        self._config = config
        self._ports: dict[DomId, Ports] = {}
        self._virq_handlers: dict[int, DomId] = {}

    def ports_of(self, domid: DomId) -> Ports:
        """The record of a domain's ports (KeyError if there is no such domain)."""
        return self._ports[domid]

    # -- life of a domain ------------------------------------------------------------------------------------

    def created(self, now: int, domain: Domain) -> None:
        self._ports[domain.domid] = Ports()

    def restarted(self, now: int, domain: Domain) -> None:
        """Order `channels`: the ports that the domain has; then new doorbells for those that are joined."""
        channels = sorted(self._ports[domain.domid].channels.items())
        rows = [
            [port, int(c.state), c.vcpu, int(c.remote_domain), int(c.remote_port), c.number, c.priority]
            for port, c in channels
            if c.consumer is None
        ]
        for start in range(0, len(rows), ROWS_PER_ORDER):
            self._outbox.tell(domain.domid, "channels", {"channels": rows[start : start + ROWS_PER_ORDER]})
        for port, channel in channels:
            if channel.consumer is not None or channel.state is not State.INTERDOMAIN:
                continue
            far = self._ports[channel.remote_domain].channels[channel.remote_port]
            if far.consumer is None:
                self._outbox.emit(Unbind(channel.remote_domain, channel.remote_port))
                self._outbox.emit(Bind(domain.domid, Port(port), channel.remote_domain, channel.remote_port))

    def dying(self, now: int, domain: Domain) -> None:
        ports = self._ports[domain.domid]
        for port in sorted(ports.channels):
            if port in ports.channels:  # a loopback channel's other end goes with it
                self._close(domain, port)
        self._drop_fifo(domain)
        for virq, handler in list(self._virq_handlers.items()):
            if handler == domain.domid:
                del self._virq_handlers[virq]

    def removed(self, now: int, domain: Domain) -> None:
        del self._ports[domain.domid]

    # -- helpers ---------------------------------------------------------------------------------------------

    def _channel(self, domain: Domain, port: int) -> Channel:
        """The channel of a port that is in use and the guest's own; EINVAL otherwise."""
        channel = self._ports[domain.domid].channels.get(port)
        if channel is None or channel.consumer is not None:
            raise XenError(EINVAL)
        return channel

    def _new_port(self, domain: Domain) -> Port:
        """The lowest port that is free. EINVAL for a dying domain, ENOSPC beyond its limits."""
        if domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        ports = self._ports[domain.domid]
        if ports.freed:
            return Port(heappop(ports.freed))
        limit = FIFO_CHANNELS if ports.fifo is not None else TWO_LEVEL_CHANNELS
        while ports.fresh in ports.channels:  # the hypervisor's own ports survive a reset
            ports.fresh += 1
        if ports.fresh >= limit or ports.fresh > domain.spec.max_evtchn_port:
            raise XenError(ENOSPC)
        ports.fresh += 1
        return Port(ports.fresh - 1)

    def _forget(self, ports: Ports, port: int) -> None:
        del ports.channels[port]
        if port < ports.fresh:
            heappush(ports.freed, port)

    def _raise(self, domain: DomId, port: int, vcpu: int) -> None:
        self._outbox.emit(Raise(domain, Port(port), VcpuId(vcpu)))

    def _vcpu(self, domain: Domain, vcpu: int) -> None:
        if domain.vcpu(vcpu) is None:
            raise XenError(ENOENT)

    # -- EVTCHNOP_* ------------------------------------------------------------------------------------------

    def alloc_unbound(self, caller: Domain, dom: int, remote_dom: int) -> Port:
        """A port of `dom` that accepts a binding from `remote_dom`. ESRCH, EPERM, ENOSPC."""
        domain = self._domains.target(caller, dom)
        port = self._new_port(domain)
        remote = caller.domid if remote_dom == DOMID_SELF else DomId(remote_dom)
        self._ports[domain.domid].channels[port] = Channel(State.UNBOUND, 0, remote_domain=remote)
        return port

    def alloc_unbound_xen(
        self, domain: Domain, vcpu: int, remote: DomId, consumer: Callable[[int, int], None]
    ) -> Port:
        """A port of `domain` whose events the hypervisor itself consumes (ioreq servers)."""
        self._vcpu(domain, vcpu)
        port = self._new_port(domain)
        channel = Channel(State.UNBOUND, vcpu, remote_domain=remote, consumer=consumer)
        self._ports[domain.domid].channels[port] = channel
        return port

    def close_xen(self, domain: Domain, port: Port) -> None:
        """Close a port of `alloc_unbound_xen`; nothing if it is closed already."""
        channel = self._ports[domain.domid].channels.get(port)
        if channel is not None and channel.consumer is not None:
            self._close(domain, port)

    def bind_interdomain(self, caller: Domain, remote_dom: int, remote_port: int) -> Port:
        """Join a fresh local port to a waiting one; the local port is pending afterwards. ESRCH, EINVAL,
        ENOSPC."""
        remote = self._domains.by_id(caller, remote_dom)
        local_port = self._new_port(caller)
        ports = self._ports[caller.domid]
        far = self._ports[remote.domid].channels.get(remote_port)
        if far is None or far.state is not State.UNBOUND or far.remote_domain != caller.domid:
            heappush(ports.freed, local_port)
            raise XenError(EINVAL)
        ports.channels[local_port] = Channel(
            State.INTERDOMAIN, 0, remote_domain=remote.domid, remote_port=Port(remote_port)
        )
        far.state = State.INTERDOMAIN
        far.remote_domain = caller.domid
        far.remote_port = local_port
        if far.consumer is None:
            self._outbox.emit(Bind(caller.domid, local_port, remote.domid, Port(remote_port)))
        self._raise(caller.domid, local_port, 0)
        return local_port

    def bind_virq(self, caller: Domain, virq: int, vcpu: int) -> Port:
        """EINVAL (no such VIRQ, global one not on vCPU 0), ENOENT (vCPU), EEXIST (bound already), ENOSPC."""
        if virq >= NR_VIRQS or (virq not in PER_VCPU_VIRQS and vcpu != 0):
            raise XenError(EINVAL)
        self._vcpu(caller, vcpu)
        ports = self._ports[caller.domid]
        if (vcpu, virq) in ports.virqs:
            raise XenError(EEXIST)
        port = self._new_port(caller)
        ports.channels[port] = Channel(State.VIRQ, vcpu, number=virq)
        ports.virqs[vcpu, virq] = port
        return port

    def bind_ipi(self, caller: Domain, vcpu: int) -> Port:
        """ENOENT (vCPU), ENOSPC."""
        self._vcpu(caller, vcpu)
        port = self._new_port(caller)
        self._ports[caller.domid].channels[port] = Channel(State.IPI, vcpu)
        return port

    def bind_pirq(self, caller: Domain, pirq: int) -> Port:
        """EINVAL (number), EPERM (not an interrupt of a device of the caller's), EEXIST, ENOSPC."""
        if pirq >= self._config.max_pirqs:
            raise XenError(EINVAL)
        ports = self._ports[caller.domid]
        if pirq not in ports.pirqs_permitted:
            raise XenError(EPERM)
        if pirq in ports.pirqs:
            raise XenError(EEXIST)
        port = self._new_port(caller)
        ports.channels[port] = Channel(State.PIRQ, 0, number=pirq)
        ports.pirqs[pirq] = port
        self._outbox.emit(BindInterrupt(caller.domid, port))
        return port

    def close(self, caller: Domain, port: int) -> None:
        """EINVAL for a port that is not in use, or the hypervisor's own."""
        self._channel(caller, port)
        self._close(caller, port)

    def _close(self, domain: Domain, port: int) -> None:
        ports = self._ports[domain.domid]
        channel = ports.channels[port]
        self._forget(ports, port)
        if channel.state is State.VIRQ:
            # A global VIRQ may notify another vCPU by now, but is entered under vCPU 0, where it was bound.
            bound = channel.vcpu if channel.number in PER_VCPU_VIRQS else 0
            del ports.virqs[bound, channel.number]
        elif channel.state is State.PIRQ:
            del ports.pirqs[channel.number]
            self._outbox.emit(Unbind(domain.domid, Port(port)))
        elif channel.state is State.INTERDOMAIN:
            self._outbox.emit(Unbind(domain.domid, Port(port)))
            far_ports = self._ports[channel.remote_domain]
            far = far_ports.channels.get(channel.remote_port)
            if far is None:
                raise AssertionError("an interdomain channel has one end only")
            far.state = State.UNBOUND
            far.remote_domain = domain.domid
            far.remote_port = Port(0)
            self._outbox.emit(Unbind(channel.remote_domain, channel.remote_port))

    def send(self, now: int, caller: Domain, port: int) -> None:
        """EINVAL unless the port is interdomain or IPI; silently nothing while it is unbound."""
        channel = self._channel(caller, port)
        if channel.state is State.INTERDOMAIN:
            self._arrive(now, channel.remote_domain, channel.remote_port)
        elif channel.state is State.IPI:
            self._raise(caller.domid, port, channel.vcpu)
        elif channel.state is not State.UNBOUND:
            raise XenError(EINVAL)

    def _arrive(self, now: int, domid: DomId, port: Port) -> None:
        channel = self._ports[domid].channels[port]
        if channel.consumer is not None:
            channel.consumer(now, channel.vcpu)
        else:
            self._raise(domid, port, channel.vcpu)

    def notify_xen(self, domain: Domain, port: Port) -> None:
        """The hypervisor sends on its own port (`alloc_unbound_xen`): the far end gets the event."""
        channel = self._ports[domain.domid].channels.get(port)
        if channel is not None and channel.state is State.INTERDOMAIN:
            far = self._ports[channel.remote_domain].channels[channel.remote_port]
            self._raise(channel.remote_domain, channel.remote_port, far.vcpu)

    def status(self, caller: Domain, dom: int, port: int) -> Status:
        """ESRCH, EPERM; EINVAL for a port of a bucket of which none was ever allocated."""
        domain = self._domains.target(caller, dom)
        ports = self._ports[domain.domid]
        highest = max(ports.fresh - 1, *ports.channels, 0)
        if port // EVTCHNS_PER_BUCKET > highest // EVTCHNS_PER_BUCKET:
            raise XenError(EINVAL)
        channel = ports.channels.get(port)
        if channel is None or channel.consumer is not None:
            return Status(State.CLOSED, 0)
        return Status(channel.state, channel.vcpu, channel.remote_domain, channel.remote_port, channel.number)

    def bind_vcpu(self, caller: Domain, port: int, vcpu: int) -> None:
        """ENOENT (vCPU); EINVAL for a port not in use, an IPI's, or a per-vCPU VIRQ's."""
        self._vcpu(caller, vcpu)
        channel = self._channel(caller, port)
        if channel.state is State.IPI or (channel.state is State.VIRQ and channel.number in PER_VCPU_VIRQS):
            raise XenError(EINVAL)
        channel.vcpu = vcpu

    def reset(self, caller: Domain, dom: int) -> None:
        """Close all ports of the domain and go back to the 2-level ABI. ESRCH, EPERM; EINVAL if another's and
        not paused by the control domain."""
        domain = self._domains.target(caller, dom)
        if domain is not caller and not domain.controller_pause:
            raise XenError(EINVAL)
        self._reset(domain)

    def _reset(self, domain: Domain) -> None:
        ports = self._ports[domain.domid]
        for port in sorted(ports.channels):
            channel = ports.channels.get(port)
            if channel is not None and channel.consumer is None:
                self._close(domain, port)
        self._drop_fifo(domain)

    # -- the FIFO ABI ----------------------------------------------------------------------------------------

    def init_control(self, caller: Domain, control_gfn: int, offset: int, vcpu: int) -> int:
        """Returns link_bits. ENOENT (vCPU); EINVAL (offset, frame, done before)."""
        self._vcpu(caller, vcpu)
        ports = self._ports[caller.domid]
        fifo = ports.fifo or FifoState()
        fifo.add_control_block(self._frames, caller, control_gfn, offset, vcpu)
        ports.fifo = fifo
        return EVTCHN_FIFO_LINK_BITS

    def expand_array(self, caller: Domain, array_gfn: int) -> None:
        """EOPNOTSUPP (2-level), ENOSPC (array complete), EINVAL (frame)."""
        FifoState.need(self._ports[caller.domid].fifo).add_page(self._frames, caller, array_gfn)

    def set_priority(self, caller: Domain, port: int, priority: int) -> None:
        """EINVAL (port, priority), ENOSYS (2-level)."""
        if port == 0 and self._ports[caller.domid].fifo is None:
            raise XenError(ENOSYS)  # reserved, but a port of the domain
        channel = self._channel(caller, port)
        channel.priority = FifoState.check_priority(self._ports[caller.domid].fifo, priority)

    def _drop_fifo(self, domain: Domain) -> None:
        ports = self._ports[domain.domid]
        if ports.fifo is not None:
            ports.fifo.drop(self._frames)
            ports.fifo = None
            ports.freed = sorted(p for p in ports.freed if p < TWO_LEVEL_CHANNELS)
            ports.fresh = min(ports.fresh, TWO_LEVEL_CHANNELS)

    # -- interrupts ------------------------------------------------------------------------------------------

    def send_global_virq(self, virq: int) -> None:
        """To the domain that handles it: the one of XEN_DOMCTL_set_virq_handler, or Dom0."""
        self.send_virq(self._virq_handlers.get(virq, DomId(0)), virq, 0)

    def send_virq(self, domid: DomId, virq: int, vcpu: int) -> None:
        """To the vCPU, if it has bound the VIRQ."""
        ports = self._ports.get(domid)
        port = ports.virqs.get((vcpu, virq)) if ports is not None else None
        if ports is not None and port is not None:
            self._raise(domid, port, ports.channels[port].vcpu)

    def set_virq_handler(self, domain: Domain, virq: int) -> None:
        """XEN_DOMCTL_set_virq_handler: EINVAL for a VIRQ that is not global; ESRCH for a dying domain."""
        if virq >= NR_VIRQS or virq in PER_VCPU_VIRQS:
            raise XenError(EINVAL)
        if domain.dying is not Dying.ALIVE:
            raise XenError(ESRCH)
        self._virq_handlers[virq] = domain.domid

    def permit_pirq(self, domid: DomId, pirq: int, *, allowed: bool) -> None:
        """Give the domain an interrupt, or take it away (its binding, if there is one, is closed)."""
        ports = self._ports[domid]
        if allowed:
            ports.pirqs_permitted.add(pirq)
            return
        ports.pirqs_permitted.discard(pirq)
        port = ports.pirqs.get(pirq)
        domain = self._domains.get(domid)
        if port is not None and domain is not None:
            self._close(domain, port)

    def raise_pirq(self, domid: DomId, pirq: int) -> bool:
        """A device's interrupt for the domain. False if it is not bound."""
        ports = self._ports.get(domid)
        port = ports.pirqs.get(pirq) if ports is not None else None
        if ports is None or port is None:
            return False
        self._raise(domid, port, ports.channels[port].vcpu)
        return True
