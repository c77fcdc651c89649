"""The back end's side of a split device's way up and down (XenbusState), whatever the device is.

`BackEnd.changed` is a procedure for `drivers.xenbus.client.Client.start`. The shell runs it after every event of its
watches on the frontend's `state` and on its own `online`, one at a time, and once more when `Port.disconnect` said
that it was not done and now is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Protocol

from drivers.xenbus import client
from drivers.xenbus.client import Procedure, XenstoreError, transaction
from drivers.xenbus.nodes import NodeError, optional, read_all, write_all
from drivers.xenbus.states import XenbusState, backend_reaction, parse_state, state_text


class ConnectError(Exception):
    """The rings cannot be mapped or the channel not bound; the text says why."""


class Port(Protocol):
    """What the shell does when told, beside connecting."""

    def disconnect(self) -> bool:
        """Let go of the rings (nothing is an error). False if requests are under way still: it goes on by itself."""

    def removed(self) -> None:
        """The device is gone for good."""


class BackEnd(ABC):
    """One device at the back end."""

    def __init__(self, path: str, frontend: str, port: Port) -> None:
        """`path`, `frontend`: the two ends' directories."""
        self.path: Final = path
        self.frontend: Final = frontend
        self.port: Final = port
        self.state = XenbusState.Unknown
        self.removed = False
        self.error = ""
        self._draining = False

    @abstractmethod
    def _features(self) -> list[tuple[str, str]]:
        """Nodes that are written before InitWait."""

    @abstractmethod
    def _connect(self) -> Procedure[None]:
        """Read what the frontend published, and serve it. NodeError, ConnectError."""

    def start(self) -> Procedure[XenbusState]:
        """Read the own state first: of a new device, or of one that a process before this one served. If the answer is
        Connected, the caller resumes from its ledger, or calls `fail`. Else `changed` follows."""
        self.state = parse_state((yield from optional(f"{self.path}/state")))
        return self.state

    def changed(self) -> Procedure[None]:
        """See what changed, and answer to it."""
        if self.removed:
            return
        peer_node, online_node = f"{self.frontend}/state", f"{self.path}/online"
        found = yield from read_all((peer_node, online_node))
        peer, online = parse_state(found[peer_node]), found[online_node] == b"1"
        if self.state == XenbusState.Initialising and peer in (
            XenbusState.Initialised,
            XenbusState.Connected,
        ):
            # The frontend did not wait for our features: it gets them all the same.
            yield from self._enter(XenbusState.InitWait, peer)
        reaction = backend_reaction(self.state, peer, online)
        if reaction.disconnect or self._draining:
            self._draining = not self.port.disconnect()
            if self._draining:
                if self.state not in (XenbusState.Closing, XenbusState.Closed) and not reaction.connect:
                    yield from self._write_state(XenbusState.Closing)
                return
        if reaction.connect:
            try:
                yield from self._connect()
            except (NodeError, ConnectError) as error:
                yield from self.fail(str(error))
                return
        if reaction.enter is not None:
            yield from self._enter(reaction.enter, peer)
        if reaction.remove:
            self.removed = True
            self.port.removed()

    def fail(self, reason: str) -> Procedure[None]:
        """This frontend cannot be served (any longer): say why in error/, let go, and go to Closing."""
        self.error = reason
        self._draining = not self.port.disconnect()
        relative = (
            self.path.split("/", 4)[-1] if self.path.startswith("/local/domain/") else self.path.strip("/")
        )
        try:
            yield client.write(f"error/{relative}/error", f"22 {reason}".encode()[:1024])
        except XenstoreError as error:
            if error.name not in ("EACCES", "ENOSPC", "E2BIG"):
                raise
        if self.state not in (XenbusState.Closing, XenbusState.Closed):
            yield from self._write_state(XenbusState.Closing)

    def _write_state(self, state: XenbusState) -> Procedure[None]:
        yield client.write(f"{self.path}/state", state_text(state))
        self.state = state

    def _enter(self, state: XenbusState, peer: XenbusState) -> Procedure[None]:
        nodes: list[tuple[str, str]] = []
        if state == XenbusState.InitWait:
            nodes = self._features()
        nodes.append(("state", str(int(state))))
        yield from transaction(lambda tx: write_all(self.path, nodes, tx))
        self.state = state
