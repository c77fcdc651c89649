"""The guest's way to the hypervisor, over the bus: implements `domains.pv.upstream.Upstream`."""

from __future__ import annotations

from collections.abc import Callable

from bus.abi.event_channel import EVTCHN_SEND, EVTCHNOP_send, evtchn_send
from bus.abi.sched import SCHED_SHUTDOWN, SCHEDOP_shutdown
from bus.abi.xen import HYPERVISOR_event_channel_op, HYPERVISOR_sched_op
from bus.addresses import Port
from bus.doorbell import Doorbell
from bus.link import DomainLink
from bus.messages.domain import Report
from bus.trace import Kind, Trace, off

MAX_LOG_LINE = 400


class BusUpstream:
    """Hypercalls over the link; events by doorbell where there is one. HypervisorGone ends the process."""

    def __init__(self, link: DomainLink) -> None:
        self._link = link
        self.doorbells: dict[int, Doorbell] = {}
        """Where to ring for a local port."""
        self.loops: dict[int, Port] = {}
        """Ports of channels within the domain, and their other ends."""
        self.deliver: Callable[[Port], None] = lambda port: None
        """Makes a port of this domain pending at once."""
        self.calls = 0
        self.trace: Trace = off()
        self.vcpu: Callable[[], int] = lambda: 0
        """Which one runs, for the trace."""
        self.before_shutdown: Callable[[int], None] = lambda reason: None
        """Called, with the SHUTDOWN_* reason, before the hypervisor is told that the domain has shut down: last words."""

    def hypercall(self, vcpu: int, nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        """See Upstream."""
        self.calls += 1
        if nr == HYPERVISOR_sched_op and cmd == SCHEDOP_shutdown:
            self.before_shutdown(SCHED_SHUTDOWN.unpack(data).reason)
        return self._link.call(nr, cmd, data, vcpu)

    def send_event(self, port: Port) -> int:
        """See Upstream."""
        if self.trace.on[0]:
            self.trace.add(Kind.SEND, self.vcpu(), 0, port)
        bell = self.doorbells.get(port)
        if bell is not None:
            bell.ring()
            return 0
        other = self.loops.get(port)
        if other is not None:
            self.deliver(other)
            return 0
        rc, _ = self.hypercall(
            0, HYPERVISOR_event_channel_op, EVTCHNOP_send, EVTCHN_SEND.pack(evtchn_send(port))
        )
        return rc

    def vcpu_state(self, vcpu: int, running: bool) -> None:
        """See Upstream: `vcpu-list` learns it from the lease page, not from messages."""

    def console_line(self, text: str) -> None:
        """See Upstream."""
        self._link.send(Report(what="log", body={"text": text[:MAX_LOG_LINE]}))
