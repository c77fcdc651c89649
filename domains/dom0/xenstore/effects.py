"""What the core wants done by its shell, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

ConnId = NewType("ConnId", int)
"""A connection (a domain's ring, or a socket), numbered by the shell."""


@dataclass(frozen=True, slots=True)
class Output:
    """The connection has bytes to send: `Core.peek_output` and `Core.output_taken`."""

    conn: ConnId


@dataclass(frozen=True, slots=True)
class Input:
    """The connection had no `input_room` for a while and has some again: look whether bytes of its client wait (a ring's
    client does not notify a second time).
    """

    conn: ConnId


@dataclass(frozen=True, slots=True)
class Close:
    """The core has dropped the connection. A socket is closed; in a ring page `error` is put in its error
    field.
    """

    conn: ConnId
    error: int
    """XENSTORE_ERROR_* of xs_wire.h."""
    reason: str


@dataclass(frozen=True, slots=True)
class AttachRing:
    """INTRODUCE: map the domain's ring page, bind its event channel (or bind it anew), then call
    `Core.introduce`; if that fails `Core.introduce_failed`. The requester has no reply before.
    """

    domid: int
    gfn: int
    """As the requester gave it. Xen's own xenstored uses the reserved grant instead
    (GNTTAB_RESERVED_XENSTORE).
    """
    port: int
    """The unbound event channel in the domain."""


@dataclass(frozen=True, slots=True)
class DetachRing:
    """The domain was released or died: unbind its event channel and unmap its ring page. Its connection is
    gone.
    """

    domid: int
    conn: ConnId | None


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the log."""

    text: str


Effect = Output | Input | Close | AttachRing | DetachRing | Log
