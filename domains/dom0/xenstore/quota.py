"""xenstored's limits, with Xen's names and defaults. They bind every domain but domain 0."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final


@dataclass(slots=True)
class Quota:
    """Limits of an unprivileged domain, unless a line says otherwise."""

    nodes: int = 1000
    """Nodes that a domain owns (ENOSPC)."""
    watches: int = 128
    """Watches of a domain (E2BIG)."""
    transactions: int = 10
    """Transactions that a domain has open (ENOSPC)."""
    outstanding: int = 20
    """Requests whose reply, or whose watch events at other clients, were not taken yet: no further request
    is looked at.
    """
    transaction_nodes: int = 1024
    """Nodes that one transaction touched (ENOSPC)."""
    node_size: int = 2048
    """Bytes of a node: 24, 8 a permission, its value, and its children's names with a nul each (ENOSPC)."""
    permissions: int = 5
    """Permissions of a node (ENOSPC)."""
    path_length: int = 3072
    """Bytes of a path (EINVAL)."""
    memory: int = 2_621_440
    """Bytes that a domain costs: nodes, watches, transactions (ENOMEM)."""
    output: int = 262_144
    """Bytes that wait for one connection; beyond it, events become one a watch, at the watch's own path."""
    privileged_output: int = 1 << 20
    """The same for a connection of domain 0; beyond it no further request of that connection is served
    either.
    """
    requests_a_turn: int = 16
    """Requests of one connection that are served before others get their turn. Domain 0's too."""


QUOTA_NAMES: Final = tuple(field.name for field in fields(Quota))
QUOTA_MAX: Final = 1 << 31
"""No limit may be set higher."""

EVENT_TIMEOUT_NS: Final = 20_000_000_000
"""So long a request counts as outstanding for watch events that others do not take (xenstored: 20 s)."""

WRITE_RATE: Final = 200
"""Writes per second that may disturb other clients' transactions, all unprivileged domains together
(xenstored: 200).
"""
WRITE_BURST: Final = 10
"""Such writes that one domain may do at once (xenstored: 10)."""
