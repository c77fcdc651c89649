"""What the core wants done: the only way in which it acts on the world outside machine memory.

The core appends effects in order; a shell carries them out in that order. None of them fails into the core: what can
fail comes back as a later call (`order_done`, `process_ended`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.addresses import DomId, Port, VcpuId


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
    """Something that a domain's own process must do; it answers `order_done(domain, order_id, ...)` or the deadline
    passes (the core is then told `order_expired`)."""

    domain: DomId
    order_id: int
    kind: str
    """One of the kinds in bus.messages.orders."""
    body: dict[str, object] = field(default_factory=dict)
    windows: tuple[tuple[int, bool], ...] = ()
    """Windows whose memfds travel with the order: (window number, writable)."""
    timeout_ns: int = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Raise:
    """Event channel `port` of the domain became pending, for its vCPU: its process sets the bits and delivers."""

    domain: DomId
    port: Port
    vcpu: VcpuId


@dataclass(frozen=True, slots=True)
class Bind:
    """An interdomain channel now joins two ports: give both processes a doorbell pair (eventfds)."""

    left: DomId
    left_port: Port
    right: DomId
    right_port: Port


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
    """End a domain's process at once."""

    domain: DomId
    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the hypervisor's console ring (`domicile dmesg`) and the structured log."""

    level: str
    text: str
    domain: DomId | None = None


Effect = Reply | Order | Raise | Bind | Unbind | StartProcess | KillProcess | Log
