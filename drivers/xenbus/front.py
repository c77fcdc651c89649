"""The frontend's side of a split device's way up and down (XenbusState), whatever the device is.

`FrontEnd.changed` is a procedure for `drivers.xenbus.client.Client.start`; the shell runs it after every event of
its watch on the back end's `state`, one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final, Protocol

from drivers.xenbus import client
from drivers.xenbus.client import Procedure, transaction
from drivers.xenbus.nodes import NodeError, optional, read_nodes, write_all
from drivers.xenbus.states import Reaction, XenbusState, frontend_reaction, parse_state, state_text


class Port(Protocol):
    """What the shell does when told, beside connecting."""

    def disconnect(self) -> None:
        """Let go of the rings: `Frontend.disconnect`, end the grants, close the channels. Nothing is an error."""

    def removed(self) -> None:
        """The back end is gone for good."""


class FrontEnd(ABC):
    """One device at the frontend."""

    STALE: ClassVar[tuple[str, ...]] = ()
    """Nodes of an earlier connection, with other queues and pages perhaps, that must not be read again; those of queues are."""

    def __init__(self, path: str, backend: str, port: Port) -> None:
        """`path`, `backend`: the two ends' directories."""
        self.path: Final = path
        self.backend: Final = backend
        self.port: Final = port
        self.state = XenbusState.Initialising
        self.error = ""
        self._fresh = False
        self._peer = XenbusState.Unknown

    @abstractmethod
    def _offer(self) -> Procedure[list[tuple[str, str]]]:
        """Make rings; the nodes that say where they are."""

    @abstractmethod
    def _agree(self) -> Procedure[None]:
        """The back end is Connected: read what it says, and use the device."""

    def changed(self) -> Procedure[None]:
        """See what changed at the back end, and answer to it."""
        peer = parse_state((yield from optional(f"{self.backend}/state")))
        before, self._peer = self._peer, peer
        if peer == before == XenbusState.InitWait and self.state == XenbusState.Initialised:
            return  # a watch fires more often than the state changes: our rings are published, perhaps taken already
        if peer == XenbusState.Closing and self._fresh:
            return  # that is about the connection before: its answer to Initialising comes
        self._fresh = False
        reaction = frontend_reaction(self.state, peer)
        if self.state == XenbusState.Closing and peer == XenbusState.Closing:
            # It was us who began: the back end has let go of the rings and waits for Closed.
            reaction = Reaction(enter=XenbusState.Closed, disconnect=True)
        if reaction.disconnect:
            self.port.disconnect()
        try:
            if reaction.connect:
                if reaction.enter == XenbusState.Initialised:
                    yield from self._publish()
                    return
                yield from self._agree()
        except (NodeError, ValueError, MemoryError) as error:
            self.error = str(error)
            self.port.disconnect()
            yield from self._write(XenbusState.Closing)
            return
        if reaction.enter is not None:
            yield from self._write(reaction.enter)
        if reaction.remove:
            self.port.removed()

    def restart(self) -> Procedure[None]:
        """Begin anew, as after a resume of the whole domain: the old rings are worth nothing."""
        self.port.disconnect()
        self._fresh = True
        yield from self._write(XenbusState.Initialising)
        yield from self.changed()

    def close(self) -> Procedure[None]:
        """Give the disk up; the back end follows to Closed, and we then do."""
        if self.state not in (XenbusState.Closing, XenbusState.Closed):
            yield from self._write(XenbusState.Closing)

    def _write(self, state: XenbusState) -> Procedure[None]:
        yield client.write(f"{self.path}/state", state_text(state))
        self.state = state

    def _publish(self) -> Procedure[None]:
        nodes = yield from self._offer()
        nodes.append(("state", str(int(XenbusState.Initialised))))
        yield from transaction(lambda tx: self._replace(nodes, tx))
        self.state = XenbusState.Initialised

    def _replace(self, nodes: list[tuple[str, str]], tx: int) -> Procedure[None]:
        """What an earlier connection published, with other queues and pages perhaps, must not be read again."""
        stale = [name for name in (yield from self._children(tx)) if name.startswith(("queue-", "ring-ref"))]
        old = list(dict.fromkeys([*self.STALE, *stale]))
        found = yield from read_nodes(self.path, old, tx)
        for name in old:
            if found[name] is not None:
                yield client.remove(f"{self.path}/{name}", tx)
        yield from write_all(self.path, nodes, tx)

    def _children(self, tx: int) -> Procedure[list[str]]:
        return client.names((yield client.directory(self.path, tx)))
