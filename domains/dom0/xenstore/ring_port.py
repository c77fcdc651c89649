"""Joins a domain's ring page to the core. Call `pump` when the domain's event channel fires and for the core's effect `Input`,
and `push` for its effect `Output`; send the event channel when they say so.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.abi.io.xs_wire import XENSTORE_ERROR_NONE, XENSTORE_RING_SIZE
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId, Effect
from drivers.xenbus.ring import ServerRing


class Pumped(NamedTuple):
    """Outcome of a `pump`."""

    effects: list[Effect]
    notify: bool
    """Something moved: send the domain's event channel, and pump once more before waiting for it. What the domain saw of our
    indexes when it decided not to notify is older than that."""


class RingPort:
    """One attached ring."""

    def __init__(self, core: Core, conn: ConnId, page: memoryview) -> None:
        """`page`: the domain's 4096 bytes. Call `Core.introduce` with the same connection, then `connect`."""
        self._core: Final = core
        self._ring: Final = ServerRing(page)
        self.conn: Final = conn

    def connect(self) -> None:
        """The ring is served from now on (or again, after a restart of xenstored). Notify the domain."""
        self._ring.connect()

    def close(self, error: int) -> None:
        """The core dropped the connection (`Close`): tell the domain. Notify it."""
        self._ring.set_error(error)

    def detach(self) -> None:
        """Let go of the page."""
        self._ring.release()

    def push(self) -> Pumped:
        """Move output that the core has queued, as much as there is room for."""
        data = self._core.peek_output(self.conn, XENSTORE_RING_SIZE)
        if not data:
            return Pumped([], False)
        sent = self._ring.write(data)
        if sent.error != XENSTORE_ERROR_NONE:
            reason = "the response ring's indexes make no sense"
            return Pumped(self._core.fail(self.conn, sent.error, reason), False)
        self._core.output_taken(self.conn, sent.moved)
        return Pumped([], sent.notify)

    def pump(self) -> Pumped:
        """Move what can be moved, once each way: at most a ring's worth, so that no domain holds up the
        others.
        """
        if self._ring.reconnect_wanted:
            effects = self._core.reset(self.conn)
            self._ring.reconnect()
            return Pumped(effects, True)
        out = self.push()
        got = self._ring.read(min(self._core.input_room(self.conn), XENSTORE_RING_SIZE))
        if got.error != XENSTORE_ERROR_NONE:
            effects = self._core.fail(self.conn, got.error, "the request ring's indexes make no sense")
            return Pumped(out.effects + effects, out.notify)
        if not got.data:
            return out
        return Pumped(out.effects + self._core.receive(self.conn, got.data), True)
