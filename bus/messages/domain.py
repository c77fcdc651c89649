"""The link between a domain's process and the hypervisor.

Domain to hypervisor: `Hello`, `Hypercall`, `OrderDone`, `Report`. Hypervisor to domain: `HypercallReply`, `Order`, `Raised`,
`Refused`. Who the domain is comes from the link, never from a message.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from bus.messages.envelope import MAX_DATA, MAX_DESCRIPTORS, MAX_ITEMS, Message, registry

U16 = Annotated[int, Field(ge=0, le=0xFFFF)]
U32 = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, Field(ge=0, le=0xFFFFFFFFFFFFFFFF)]
I64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Data = Annotated[bytes, Field(max_length=MAX_DATA)]
VcpuIndex = Annotated[int, Field(ge=0, le=127)]


class Hello(Message):
    """First message of a domain's process: it has loaded its code and given up its privileges."""

    KIND: ClassVar[str] = "hello"
    pid: U32
    role: Annotated[str, Field(max_length=32)]


class Hypercall(Message):
    """A hypercall that the hypervisor serves, in the wire form of its entry in `bus.abi.hypercalls`."""

    KIND: ClassVar[str] = "hypercall"
    token: U64
    vcpu: VcpuIndex
    nr: Annotated[int, Field(ge=0, le=63)]
    cmd: U32
    data: Data = b""


class OrderDone(Message):
    """A domain's answer to an `Order`."""

    KIND: ClassVar[str] = "order_done"
    order: U64
    rc: I64
    data: Data = b""


class Report(Message):
    """What a domain's process has to say without being asked: 'blocked', 'running', 'crashed' ... with details."""

    KIND: ClassVar[str] = "report"
    what: Annotated[str, Field(max_length=32)]
    body: Annotated[dict[str, Any], Field(max_length=64)] = {}


class HypercallReply(Message):
    """The answer to the `Hypercall` with that token: Xen's return value and the updated structures."""

    KIND: ClassVar[str] = "hypercall_reply"
    token: U64
    rc: I64
    data: Data = b""


class Order(Message):
    """Something the domain's process must do, and answer with `OrderDone` unless `order` is 0. Its `descriptors` file
    descriptors come on the descriptor socket, in a `Descriptors` packet of the same `bundle` number."""

    KIND: ClassVar[str] = "order"
    order: U64
    what: Annotated[str, Field(max_length=32)]
    body: Annotated[dict[str, Any], Field(max_length=MAX_ITEMS)] = {}
    descriptors: Annotated[int, Field(ge=0, le=MAX_DESCRIPTORS)] = 0
    bundle: U64 = 0


class Descriptors(Message):
    """On the descriptor socket: the file descriptors of the order with this bundle number travel with this packet."""

    KIND: ClassVar[str] = "descriptors"
    bundle: U64
    padding: Data = b""
    """Means nothing. It makes a packet as long as its descriptors are many, so that the socket's buffer bounds how many of them lie
    unread: the host kernel has one limit for all that one user has under way to others."""


class Raised(Message):
    """Event channels of the domain became pending: (port, vcpu) each."""

    KIND: ClassVar[str] = "raised"
    events: Annotated[
        # msgpack has one kind of sequence: a list stands for the pair.
        list[Annotated[tuple[U32, VcpuIndex], Field(strict=False)]], Field(max_length=MAX_ITEMS)
    ]


class Refused(Message):
    """The hypervisor did not take a message of this domain; `count` such messages so far."""

    KIND: ClassVar[str] = "refused"
    why: Annotated[str, Field(max_length=400)]
    count: U64


FROM_DOMAIN = registry(Hello, Hypercall, OrderDone, Report)
TO_DOMAIN = registry(HypercallReply, Order, Raised, Refused)
DESCRIPTORS = registry(Descriptors)
