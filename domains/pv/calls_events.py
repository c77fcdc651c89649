"""HYPERVISOR_event_channel_op: bindings are made by the hypervisor; unmasking and IPIs within the domain are done here
(event_channel.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from bus.abi import event_channel as ec
from bus.abi.errno import XEN_EINVAL, XEN_ENOENT, XEN_ENOSYS, XEN_EOPNOTSUPP
from bus.abi.hypercalls_model import Command, State
from bus.abi.xen import (
    DOMID_SELF,
    VIRQ_TIMER,
    HYPERVISOR_event_channel_op,
    HYPERVISOR_event_channel_op_compat,
)
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn, Port
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.events import CONTROL_BLOCK_SIZE, EventChannels
from domains.pv.upstream import Upstream
from domains.pv.wire import Remote

CONTROL_BLOCK_ALIGNMENT: Final = 8


class EventCalls:
    """See the module."""

    def __init__(
        self,
        cpu: Cpu,
        events: EventChannels,
        remote: Remote,
        upstream: Upstream,
        commands: Callable[[int, int], Command | None],
    ) -> None:
        self._cpu = cpu
        self._events = events
        self._remote = remote
        self._upstream = upstream
        self._commands = commands
        self._held: list[Mfn] = []

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {
            HYPERVISOR_event_channel_op: self.event_channel_op,
            HYPERVISOR_event_channel_op_compat: self.event_channel_op_compat,
        }

    def event_channel_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for an unknown command; otherwise as the table of hypercalls says."""
        cmd &= LOW32
        if cmd == ec.EVTCHNOP_send:
            return self._send(int.from_bytes(self._cpu.mmu.read_virtual(arg, 4), "little"))
        if cmd == ec.EVTCHNOP_unmask:
            return self._unmask(int.from_bytes(self._cpu.mmu.read_virtual(arg, 4), "little"))
        command = self._commands(HYPERVISOR_event_channel_op, cmd)
        if command is None:
            return -XEN_ENOSYS
        if command.state is State.REFUSED:
            return -command.refusal
        if cmd in (ec.EVTCHNOP_init_control, ec.EVTCHNOP_expand_array):
            return self._fifo(cmd, command, arg)
        rc, updated = self._remote.call_structure(HYPERVISOR_event_channel_op, command, arg)
        if rc >= 0 and updated is not None:
            self._apply(cmd, updated)
        return rc

    def event_channel_op_compat(self, op: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """The call as it was before Xen 3.2: the command is the first word of the structure."""
        cmd = int.from_bytes(self._cpu.mmu.read_virtual(op, 4), "little")
        if cmd > ec.EVTCHNOP_unmask:
            return -XEN_ENOSYS
        return self.event_channel_op(cmd, op + 4, a3, a4, a5)

    def _send(self, port: int) -> int:
        target = self._events.ipi_target(port)
        if target is None:
            return self._upstream.send_event(Port(port))
        self._events.set_pending(port, target)
        return 0

    def _unmask(self, port: int) -> int:
        if port == 0:
            return 0  # reserved, but a port of the domain: Xen unmasks nothing there
        if not self._events.known(port):
            return -XEN_EINVAL
        self._events.unmask(port)
        return 0

    def _apply(self, cmd: int, item: Any) -> None:
        """The hypervisor did it: keep what delivery needs."""
        events = self._events
        if cmd == ec.EVTCHNOP_bind_virq:
            events.bind(item.port, item.vcpu, timer=item.virq == VIRQ_TIMER)
        elif cmd == ec.EVTCHNOP_bind_ipi:
            events.bind(item.port, item.vcpu, ipi=True)
        elif cmd == ec.EVTCHNOP_bind_interdomain:
            events.bind(item.local_port, 0)
        elif cmd == ec.EVTCHNOP_bind_pirq or (cmd == ec.EVTCHNOP_alloc_unbound and item.dom == DOMID_SELF):
            events.bind(item.port, 0)
        elif cmd == ec.EVTCHNOP_bind_vcpu:
            events.notify_vcpu(item.port, item.vcpu)
        elif cmd == ec.EVTCHNOP_close:
            events.close(item.port)
        elif cmd == ec.EVTCHNOP_set_priority:
            events.set_priority(item.port, item.priority)
        elif cmd == ec.EVTCHNOP_reset and item.dom == DOMID_SELF:
            events.reset()
            for mfn in self._held:
                self._cpu.mmu.release_from_grant(mfn, True)
            self._held.clear()

    def _fifo(self, cmd: int, command: Command, arg: int) -> int:
        """A page of the guest's for FIFO words: Xen writes it from now on, so it must be the domain's own and no page table."""
        assert command.argument is not None
        cpu = self._cpu
        item = command.argument.unpack(cpu.mmu.read_virtual(arg, command.argument.size))
        if cmd == ec.EVTCHNOP_expand_array and not self._events.fifo:
            return -XEN_EOPNOTSUPP
        if cmd == ec.EVTCHNOP_init_control:
            mfn, offset = Mfn(item.control_gfn), item.offset
            if not self._events.has_vcpu(item.vcpu):
                return -XEN_ENOENT
            if offset > PAGE_SIZE - CONTROL_BLOCK_SIZE or offset % CONTROL_BLOCK_ALIGNMENT:
                return -XEN_EINVAL
        else:
            mfn, offset = Mfn(item.array_gfn), 0
        if cpu.mmu.hold_for_grant(mfn, True):
            return -XEN_EINVAL
        rc, _ = self._remote.call_item(HYPERVISOR_event_channel_op, command, item, arg, cmd=cmd)
        if rc < 0:
            cpu.mmu.release_from_grant(mfn, True)
            return rc
        self._held.append(mfn)
        place = (mfn - cpu.base << PAGE_SHIFT) + offset
        if cmd == ec.EVTCHNOP_init_control:
            self._events.init_control(item.vcpu, place)
        else:
            self._events.expand_array(place)
        return rc
