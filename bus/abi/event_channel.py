"""HYPERVISOR_event_channel_op: commands, arguments, and the 2-level and FIFO formats (event_channel.h).

A FIFO event word: bit 31 PENDING, 30 MASKED, 29 LINKED, 28 BUSY, bits 16..0 LINK, the next port of its
queue.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Bytes, Layout, Union, u8, u16, u32, u64

EVTCHNOP_bind_interdomain: Final = 0
EVTCHNOP_bind_virq: Final = 1
EVTCHNOP_bind_pirq: Final = 2
EVTCHNOP_close: Final = 3
EVTCHNOP_send: Final = 4
EVTCHNOP_status: Final = 5
EVTCHNOP_alloc_unbound: Final = 6
EVTCHNOP_bind_ipi: Final = 7
EVTCHNOP_bind_vcpu: Final = 8
EVTCHNOP_unmask: Final = 9
EVTCHNOP_reset: Final = 10
EVTCHNOP_init_control: Final = 11
EVTCHNOP_expand_array: Final = 12
EVTCHNOP_set_priority: Final = 13

BIND_PIRQ__WILL_SHARE: Final = 1

EVTCHNSTAT_closed: Final = 0
EVTCHNSTAT_unbound: Final = 1
EVTCHNSTAT_interdomain: Final = 2
EVTCHNSTAT_pirq: Final = 3
EVTCHNSTAT_virq: Final = 4
EVTCHNSTAT_ipi: Final = 5

EVTCHN_FIFO_PRIORITY_MAX: Final = 0
EVTCHN_FIFO_PRIORITY_DEFAULT: Final = 7
EVTCHN_FIFO_PRIORITY_MIN: Final = 15
EVTCHN_FIFO_MAX_QUEUES: Final = EVTCHN_FIFO_PRIORITY_MIN + 1
EVTCHN_FIFO_PENDING: Final = 31
EVTCHN_FIFO_MASKED: Final = 30
EVTCHN_FIFO_LINKED: Final = 29
EVTCHN_FIFO_BUSY: Final = 28
EVTCHN_FIFO_LINK_BITS: Final = 17
EVTCHN_FIFO_LINK_MASK: Final = (1 << EVTCHN_FIFO_LINK_BITS) - 1
EVTCHN_FIFO_NR_CHANNELS: Final = 1 << EVTCHN_FIFO_LINK_BITS


class evtchn_alloc_unbound(NamedTuple):
    """Out: port. `dom` may be DOMID_SELF."""

    dom: u16
    remote_dom: u16
    port: u32


EVTCHN_ALLOC_UNBOUND: Final = Layout(evtchn_alloc_unbound)


class evtchn_bind_interdomain(NamedTuple):
    """Out: local_port."""

    remote_dom: u16
    remote_port: u32
    local_port: u32


EVTCHN_BIND_INTERDOMAIN: Final = Layout(evtchn_bind_interdomain)


class evtchn_bind_virq(NamedTuple):
    """Out: port. virq is VIRQ_*."""

    virq: u32
    vcpu: u32
    port: u32


EVTCHN_BIND_VIRQ: Final = Layout(evtchn_bind_virq)


class evtchn_bind_pirq(NamedTuple):
    """Out: port. flags: BIND_PIRQ__*."""

    pirq: u32
    flags: u32
    port: u32


EVTCHN_BIND_PIRQ: Final = Layout(evtchn_bind_pirq)


class evtchn_bind_ipi(NamedTuple):
    """Out: port."""

    vcpu: u32
    port: u32


EVTCHN_BIND_IPI: Final = Layout(evtchn_bind_ipi)


class evtchn_close(NamedTuple):
    port: u32


EVTCHN_CLOSE: Final = Layout(evtchn_close)


class evtchn_send(NamedTuple):
    port: u32


EVTCHN_SEND: Final = Layout(evtchn_send)


class evtchn_status_unbound(NamedTuple):
    dom: u16


EVTCHN_STATUS_UNBOUND: Final = Layout(
    evtchn_status_unbound, c="__typeof__(((struct evtchn_status *)0)->u.unbound)"
)


class evtchn_status_interdomain(NamedTuple):
    dom: u16
    port: u32


EVTCHN_STATUS_INTERDOMAIN: Final = Layout(
    evtchn_status_interdomain, c="__typeof__(((struct evtchn_status *)0)->u.interdomain)"
)


class evtchn_status(NamedTuple):
    """Out: status (EVTCHNSTAT_*), vcpu, and the member of `u` that belongs to the status."""

    dom: u16
    port: u32
    status: u32
    vcpu: u32
    u: Annotated[
        bytes, Union(unbound=evtchn_status_unbound, interdomain=evtchn_status_interdomain, pirq=u32, virq=u32)
    ]


EVTCHN_STATUS: Final = Layout(evtchn_status)


class evtchn_bind_vcpu(NamedTuple):
    port: u32
    vcpu: u32


EVTCHN_BIND_VCPU: Final = Layout(evtchn_bind_vcpu)


class evtchn_unmask(NamedTuple):
    port: u32


EVTCHN_UNMASK: Final = Layout(evtchn_unmask)


class evtchn_reset(NamedTuple):
    dom: u16


EVTCHN_RESET: Final = Layout(evtchn_reset)


class evtchn_init_control(NamedTuple):
    """Switches a vCPU to the FIFO format. control_gfn, offset: where its control block is. Out: link_bits."""

    control_gfn: u64
    offset: u32
    vcpu: u32
    link_bits: u8
    pad: Annotated[bytes, Bytes(7)]


EVTCHN_INIT_CONTROL: Final = Layout(evtchn_init_control, c_fields={"pad": "_pad"})


class evtchn_expand_array(NamedTuple):
    """One more page of 1024 event words."""

    array_gfn: u64


EVTCHN_EXPAND_ARRAY: Final = Layout(evtchn_expand_array)


class evtchn_set_priority(NamedTuple):
    """0 is the highest priority, 15 the lowest."""

    port: u32
    priority: u32


EVTCHN_SET_PRIORITY: Final = Layout(evtchn_set_priority)


class evtchn_fifo_control_block(NamedTuple):
    """`ready`: one bit a priority with events queued; head: first port of each queue, 0 for none."""

    ready: u32
    rsvd: u32
    head: Annotated[tuple[int, ...], Array(u32, 16)]


EVTCHN_FIFO_CONTROL_BLOCK: Final = Layout(evtchn_fifo_control_block, c_fields={"rsvd": "_rsvd"})


EVTCHN_2L_NR_CHANNELS: Final = 8 * 8 * 64
"""Ports of a 64-bit guest with the 2-level format."""


def fifo_link(word: int) -> int:
    """The next port in the queue, 0 at its end."""
    return word & EVTCHN_FIFO_LINK_MASK
