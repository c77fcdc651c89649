"""What the core wants done: the only way in which it acts on the world outside machine memory.

The core appends effects in order; a shell carries them out in that order. None of them fails into the core:
what can fail comes back as a later call (`order_done`, `order_expired`, `process_ended`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.addresses import Bdf, DomId, Mfn, Port, VcpuId
from bus.messages.envelope import Message


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to the call that a domain made with this token."""

    domain: DomId
    token: int
    rc: int
    """Xen's return value: >= 0, or a negative errno."""
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Order:
    """Something that a domain's own process must do; it answers `order_done(domain, order_id, ...)` or the
    deadline passes (`order_expired`, or the core's own `tick`, whichever comes first).

    Orders to one domain are delivered in the order given, also before its process has connected (the shell
    queues)."""

    domain: DomId
    order_id: int
    """0: no answer is expected and none is accepted."""
    kind: str
    """One of `hypervisor.core.orders.ORDERS`, or of the grant tables' own."""
    body: dict[str, object] = field(default_factory=dict)
    windows: tuple[tuple[int, bool], ...] = ()
    """Windows whose memfds travel with the order: (window number, writable)."""
    timeout_ns: int = 1_000_000_000
    extents: tuple[Mfn, ...] = ()
    """Extents (by their first MFN) whose memfds travel with the order: a domain's own, or one that it
    builds."""


@dataclass(frozen=True, slots=True)
class Raise:
    """Event channel `port` of the domain became pending, for its vCPU: its process sets the bits and
    delivers."""

    domain: DomId
    port: Port
    vcpu: VcpuId


@dataclass(frozen=True, slots=True)
class Bind:
    """An interdomain channel now joins two ports: give both processes a doorbell pair each way."""

    left: DomId
    left_port: Port
    right: DomId
    right_port: Port


@dataclass(frozen=True, slots=True)
class BindInterrupt:
    """The port of `domain` now stands for a device's interrupt: it may be told of it by a doorbell."""

    domain: DomId
    port: Port


@dataclass(frozen=True, slots=True)
class Unbind:
    """The channel of `domain`'s `port` is no more: take its doorbells away."""

    domain: DomId
    port: Port


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start the process of a new domain, paused."""

    domain: DomId
    role: str


@dataclass(frozen=True, slots=True)
class KillProcess:
    """End a domain's process at once. The shell reports `process_ended` when it is known to be gone."""

    domain: DomId
    reason: str


@dataclass(frozen=True, slots=True)
class StopMachine:
    """Dom0 shut down: the machine ends. `reason` is the name of a SHUTDOWN_* code ("poweroff", "reboot",
    "crash"...)."""

    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the hypervisor's console ring (`domicile dmesg`) and the structured log."""

    level: str
    text: str
    domain: DomId | None = None


@dataclass(frozen=True, slots=True)
class ToDevice:
    """A message (of bus.messages.device) for a device process. Lost if there is none."""

    bdf: Bdf
    message: Message


@dataclass(frozen=True, slots=True)
class DmaAnswer:
    """The answer to a batch that came by the DMA lane of a device's process (`DmaDone` by another way)."""

    bdf: Bdf
    token: int
    fault: int


@dataclass(frozen=True, slots=True)
class JoinModel:
    """A device model made an ioreq server: give it and the guest's process the memory and the doorbells by which they talk
    (`bus.ioreq_area`), each in an order `ioreq_area`."""

    guest: DomId
    model: DomId
    server: int


Effect = (
    ToDevice
    | DmaAnswer
    | JoinModel
    | Reply
    | Order
    | Raise
    | Bind
    | BindInterrupt
    | Unbind
    | StartProcess
    | KillProcess
    | StopMachine
    | Log
)
