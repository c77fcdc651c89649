"""HYPERVISOR_event_channel_op: the structures of event_channel.h around `EventChannels`."""

from __future__ import annotations

from bus.abi import event_channel as abi
from bus.abi.xen import HYPERVISOR_event_channel_op
from hypervisor.core.event_channels import EventChannels, State
from hypervisor.core.hypercalls import Call, Dispatcher, Result


class EventCalls:
    """Wire form of each command: its structure; the reply is the structure with its OUT fields filled."""

    def __init__(self, events: EventChannels, dispatcher: Dispatcher) -> None:
        self._events = events
        for cmd, handler in (
            (abi.EVTCHNOP_bind_interdomain, self._bind_interdomain),
            (abi.EVTCHNOP_bind_virq, self._bind_virq),
            (abi.EVTCHNOP_bind_pirq, self._bind_pirq),
            (abi.EVTCHNOP_close, self._close),
            (abi.EVTCHNOP_send, self._send),
            (abi.EVTCHNOP_status, self._status),
            (abi.EVTCHNOP_alloc_unbound, self._alloc_unbound),
            (abi.EVTCHNOP_bind_ipi, self._bind_ipi),
            (abi.EVTCHNOP_bind_vcpu, self._bind_vcpu),
            (abi.EVTCHNOP_reset, self._reset),
            (abi.EVTCHNOP_init_control, self._init_control),
            (abi.EVTCHNOP_expand_array, self._expand_array),
            (abi.EVTCHNOP_set_priority, self._set_priority),
        ):
            dispatcher.register(HYPERVISOR_event_channel_op, cmd, handler)

    def _alloc_unbound(self, call: Call) -> Result:
        op = call.item
        port = self._events.alloc_unbound(call.domain, op.dom, op.remote_dom)
        return call.reply(0, op._replace(port=port))

    def _bind_interdomain(self, call: Call) -> Result:
        op = call.item
        port = self._events.bind_interdomain(call.domain, op.remote_dom, op.remote_port)
        return call.reply(0, op._replace(local_port=port))

    def _bind_virq(self, call: Call) -> Result:
        op = call.item
        port = self._events.bind_virq(call.domain, op.virq, op.vcpu)
        return call.reply(0, op._replace(port=port))

    def _bind_pirq(self, call: Call) -> Result:
        op = call.item
        port = self._events.bind_pirq(call.domain, op.pirq)
        return call.reply(0, op._replace(port=port))

    def _bind_ipi(self, call: Call) -> Result:
        op = call.item
        port = self._events.bind_ipi(call.domain, op.vcpu)
        return call.reply(0, op._replace(port=port))

    def _close(self, call: Call) -> Result:
        self._events.close(call.domain, call.item.port)
        return call.reply(0)

    def _send(self, call: Call) -> Result:
        self._events.send(call.now, call.domain, call.item.port)
        return call.reply(0)

    def _status(self, call: Call) -> Result:
        op = call.item
        status = self._events.status(call.domain, op.dom, op.port)
        detail = b""
        if status.state is State.UNBOUND:
            detail = abi.EVTCHN_STATUS_UNBOUND.pack(abi.evtchn_status_unbound(status.domain))
        elif status.state is State.INTERDOMAIN:
            inner = abi.evtchn_status_interdomain(status.domain, status.port)
            detail = abi.EVTCHN_STATUS_INTERDOMAIN.pack(inner)
        elif status.state in (State.PIRQ, State.VIRQ):
            detail = status.number.to_bytes(4, "little")
        size = abi.EVTCHN_STATUS.field_size("u")
        filled = op._replace(status=int(status.state), vcpu=status.vcpu, u=detail.ljust(size, b"\0"))
        return call.reply(0, filled)

    def _bind_vcpu(self, call: Call) -> Result:
        op = call.item
        self._events.bind_vcpu(call.domain, op.port, op.vcpu)
        return call.reply(0)

    def _reset(self, call: Call) -> Result:
        self._events.reset(call.domain, call.item.dom)
        return call.reply(0)

    def _init_control(self, call: Call) -> Result:
        op = call.item
        bits = self._events.init_control(call.domain, op.control_gfn, op.offset, op.vcpu)
        return call.reply(0, op._replace(link_bits=bits))

    def _expand_array(self, call: Call) -> Result:
        self._events.expand_array(call.domain, call.item.array_gfn)
        return call.reply(0)

    def _set_priority(self, call: Call) -> Result:
        op = call.item
        self._events.set_priority(call.domain, op.port, op.priority)
        return call.reply(0)
