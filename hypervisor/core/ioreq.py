"""HYPERVISOR_dm_op: ioreq servers, interrupt lines and messages, for the device model of one domain.

The guest's own process decodes its accesses and passes on those that a server asked for: it is told of the ranges by an order that it
answers, so that a range is in effect when the call returns. The memory and doorbells by which it and the device model then talk
(`bus.ioreq_area`) are made by the shell when the server is created; the hypervisor sees none of the accesses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, ENOENT, ENOSPC, EPERM
from typing import Final

from bus.abi.hvm import dm_op as abi
from bus.abi.xen import HYPERVISOR_dm_op
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Dying, Kind
from hypervisor.core.effects import JoinModel
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.lifecycle import Lifecycle
from hypervisor.core.outbox import Outbox

MAX_SERVERS: Final = 8
MAX_CREATED: Final = 32
"""Servers of a guest in its life. A device model needs one; each costs the host 18 MiB, which a hostile one could keep."""
MAX_RANGES: Final = 256
RANGE_ENDS: Final = {
    abi.XEN_DMOP_IO_RANGE_PORT: 0x10000,
    abi.XEN_DMOP_IO_RANGE_MEMORY: 1 << 52,
    abi.XEN_DMOP_IO_RANGE_PCI: 1 << 32,
}
MAX_LINE: Final = 16
MAX_LINK: Final = 4


@dataclass(slots=True)
class IoreqServer:
    """One server of a guest."""

    id: int
    model: DomId
    enabled: bool = False
    ranges: set[tuple[int, int, int]] = field(default_factory=set)
    """(type, first, last)."""


class IoreqServers(DomainHooks):
    """All servers of the machine, and what else a device model may do."""

    def __init__(
        self,
        domains: DomainTable,
        lifecycle: Lifecycle,
        outbox: Outbox,
        config: MachineConfig,
        dispatcher: Dispatcher,
    ) -> None:
        self._domains = domains
        self._lifecycle = lifecycle
        self._outbox = outbox
        self._config = config
        self._servers: dict[DomId, dict[int, IoreqServer]] = {}
        self._created: dict[DomId, int] = {}
        for cmd, handler in (
            (abi.XEN_DMOP_create_ioreq_server, self._create),
            (abi.XEN_DMOP_get_ioreq_server_info, self._info),
            (abi.XEN_DMOP_map_io_range_to_ioreq_server, self._map),
            (abi.XEN_DMOP_unmap_io_range_from_ioreq_server, self._unmap),
            (abi.XEN_DMOP_set_ioreq_server_state, self._set_state),
            (abi.XEN_DMOP_destroy_ioreq_server, self._destroy),
            (abi.XEN_DMOP_set_pci_intx_level, self._set_pci_intx),
            (abi.XEN_DMOP_set_isa_irq_level, self._set_isa_irq),
            (abi.XEN_DMOP_set_pci_link_route, self._set_link),
            (abi.XEN_DMOP_inject_msi, self._inject_msi),
            (abi.XEN_DMOP_inject_event, self._inject_event),
            (abi.XEN_DMOP_remote_shutdown, self._remote_shutdown),
            (abi.XEN_DMOP_nr_vcpus, self._nr_vcpus),
        ):
            dispatcher.register(HYPERVISOR_dm_op, cmd, handler)

    def servers(self, domain: DomId) -> list[IoreqServer]:
        """Of a guest, by number."""
        return [server for _, server in sorted(self._servers.get(domain, {}).items())]

    # -- who may, and on what -------------------------------------------------------------------------------------

    def _guest(self, call: Call) -> Domain:
        """ESRCH, EPERM: not the control domain, nor this guest's device model; EINVAL: not an HVM domain."""
        domain = self._domains.remote(call.domain, call.item.domid)
        if domain.kind is not Kind.HVM or domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        return domain

    def _server(self, call: Call, domain: Domain) -> IoreqServer:
        server = self._servers.get(domain.domid, {}).get(call.payload.id)
        if server is None:
            raise XenError(ENOENT)
        if server.model != call.domain.domid:
            raise XenError(EPERM)
        return server

    # -- servers --------------------------------------------------------------------------------------------------

    def _create(self, call: Call) -> Result:
        domain = self._guest(call)
        if any(call.payload.pad) or call.payload.handle_bufioreq:
            raise XenError(EINVAL)  # writes are never buffered: there is nothing to ask for
        servers = self._servers.setdefault(domain.domid, {})
        free = next((number for number in range(MAX_SERVERS) if number not in servers), None)
        created = self._created.get(domain.domid, 0)
        if free is None or created >= MAX_CREATED:
            raise XenError(ENOSPC)
        self._created[domain.domid] = created + 1
        servers[free] = IoreqServer(free, call.domain.domid)
        self._outbox.emit(JoinModel(domain.domid, call.domain.domid, free))
        return call.reply(0, payload=call.payload._replace(id=free))

    def _info(self, call: Call) -> Result:
        """There are no guest frames and no ports to tell of: the memory came as a descriptor."""
        self._server(call, self._guest(call))
        return call.reply(0, payload=call.payload._replace(bufioreq_port=0, ioreq_gfn=0, bufioreq_gfn=0))

    def _range(self, call: Call) -> tuple[int, int, int]:
        kind, first, last = call.payload.type, call.payload.start, call.payload.end
        if kind not in RANGE_ENDS or not 0 <= first <= last < RANGE_ENDS[kind] or call.payload.pad:
            raise XenError(EINVAL)
        return kind, first, last

    def _map(self, call: Call) -> None:
        domain = self._guest(call)
        server, new = self._server(call, domain), self._range(call)
        if any(kind == new[0] and first <= new[2] and new[1] <= last for kind, first, last in server.ranges):
            raise XenError(EEXIST)
        if len(server.ranges) >= MAX_RANGES:
            raise XenError(ENOSPC)
        server.ranges.add(new)
        self._tell(call, domain, server, "add", new, undo=lambda: server.ranges.discard(new))

    def _unmap(self, call: Call) -> None:
        domain = self._guest(call)
        server, old = self._server(call, domain), self._range(call)
        if old not in server.ranges:
            raise XenError(ENOENT)
        server.ranges.remove(old)
        self._tell(call, domain, server, "remove", old)

    def _set_state(self, call: Call) -> None:
        domain = self._guest(call)
        server = self._server(call, domain)
        if call.payload.pad or call.payload.enabled > 1:
            raise XenError(EINVAL)
        server.enabled = bool(call.payload.enabled)
        self._tell(call, domain, server, "enabled", server.enabled)

    def _tell(
        self,
        call: Call,
        domain: Domain,
        server: IoreqServer,
        what: str,
        value: object,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """The guest's process is told; the call is answered when it has said that this is in effect. `undo`: it is not."""

        def done(now: int, rc: int, data: bytes) -> None:
            if rc < 0:
                undo()
            call.answer(call.reply(0 if rc >= 0 else -EINVAL))

        def failed(now: int, why: str) -> None:
            undo()
            if what == "add" and why == "expired":  # it may still come to it
                self._outbox.tell(domain.domid, "ioreq_server", {"id": server.id, "remove": value})
            call.answer(call.reply(-EINVAL))

        timeout = self._config.start_timeout_ns
        body: dict[str, object] = {"id": server.id, what: value}
        self._outbox.ask(call.now, domain.domid, "ioreq_server", body, done, failed, timeout_ns=timeout)

    def _destroy(self, call: Call) -> Result:
        domain = self._guest(call)
        self._forget(domain.domid, self._server(call, domain))
        return call.reply(0)

    def _forget(self, guest: DomId, server: IoreqServer) -> None:
        del self._servers[guest][server.id]
        domain = self._domains.get(guest)
        if domain is not None and domain.process_alive:
            self._outbox.tell(guest, "ioreq_server", {"id": server.id, "gone": True})

    # -- interrupts, life -----------------------------------------------------------------------------------------

    def _interrupt(self, call: Call, domain: Domain, **what: int) -> Result:
        self._outbox.tell(domain.domid, "model_interrupt", dict(what))
        return call.reply(0)

    def _set_pci_intx(self, call: Call) -> Result:
        domain, wanted = self._guest(call), call.payload
        if wanted.domain or wanted.bus or wanted.device > 31 or wanted.intx > 3 or wanted.level > 1:
            raise XenError(EINVAL)
        return self._interrupt(call, domain, pci=wanted.device << 2 | wanted.intx, level=wanted.level)

    def _set_isa_irq(self, call: Call) -> Result:
        domain, wanted = self._guest(call), call.payload
        if wanted.isa_irq >= MAX_LINE or wanted.level > 1:
            raise XenError(EINVAL)
        return self._interrupt(call, domain, isa=wanted.isa_irq, level=wanted.level)

    def _set_link(self, call: Call) -> Result:
        domain, wanted = self._guest(call), call.payload
        if wanted.link >= MAX_LINK or wanted.isa_irq >= MAX_LINE:
            raise XenError(EINVAL)
        return self._interrupt(call, domain, link=wanted.link, isa=wanted.isa_irq)

    def _inject_msi(self, call: Call) -> Result:
        domain = self._guest(call)
        if call.payload.pad or call.payload.addr >> 32:
            raise XenError(EINVAL)
        return self._interrupt(call, domain, address=call.payload.addr, data=call.payload.data)

    def _inject_event(self, call: Call) -> Result:
        """Only an NMI: an exception from outside would come between two steps of an instruction."""
        domain, event = self._guest(call), call.payload
        if event.vcpuid >= len(domain.vcpus) or event.type != abi.XEN_DMOP_EVENT_nmi:
            raise XenError(EINVAL)
        self._outbox.tell(domain.domid, "trigger", {"trigger": 0, "vcpu": event.vcpuid})
        return call.reply(0)

    def _remote_shutdown(self, call: Call) -> Result:
        self._lifecycle.shutdown(call.now, self._guest(call), call.payload.reason, by_itself=False)
        return call.reply(0)

    def _nr_vcpus(self, call: Call) -> Result:
        return call.reply(0, payload=call.payload._replace(vcpus=len(self._guest(call).vcpus)))

    # -- ends -----------------------------------------------------------------------------------------------------

    def process_ended(self, now: int, domain: Domain) -> None:
        """A device model without which its guest cannot go on: the guest crashes, and says why."""
        for guest_id, servers in list(self._servers.items()):
            mine = [server for server in servers.values() if server.model == domain.domid]
            for server in mine:
                self._forget(guest_id, server)
            guest = self._domains.get(guest_id)
            if mine and guest is not None and guest.dying is Dying.ALIVE and not guest.shutting_down:
                why = domain.crash_reason or "its process ended"
                self._lifecycle.crash(now, guest, f"its device model is gone: {why}")

    def gone(self, now: int, domain: Domain) -> None:
        self._servers.pop(domain.domid, None)
        self._created.pop(domain.domid, None)
