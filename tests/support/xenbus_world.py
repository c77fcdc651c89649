"""Both ends of a split device over a real xenstore core, in one process: what tests of any kind of device have in common."""

from __future__ import annotations

from typing import Any, Protocol

from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId
from drivers.xenbus import client as xb
from drivers.xenbus.client import Client, Procedure, XenstoreError
from drivers.xenbus.states import XenbusState


class Port(Protocol):
    """The shell of an end, in the test's hands."""

    gone: bool
    """Its device was removed."""


class XenbusWorld:
    """A store with the nodes as the toolstack leaves them. The test makes `back` and `front`, and starts the back end."""

    back: Any
    front: Any
    front_port: Port

    def __init__(self, back: str, front: str) -> None:
        """The directories of both ends."""
        self.core, self.client = Core(), Client()
        self.core.connect(ConnId(1), 0)
        for path in (back, front):
            self.write(f"{path}/state", "1")
        self.write(f"{back}/online", "1")

    def run(self, procedure: Procedure[object]) -> object:
        """To its end. XenstoreError."""
        results: list[object] = []
        self.client.start(procedure, results.append, results.append)
        while out := self.client.peek_output(1 << 16):
            self.client.output_taken(len(out))
            self.core.receive(ConnId(1), out)
            while self.core.run():
                pass
            back = self.core.peek_output(ConnId(1), 1 << 16)
            self.core.output_taken(ConnId(1), len(back))
            self.client.feed(back)
        [result] = results
        if isinstance(result, XenstoreError):
            raise result
        return result

    def one(self, request: xb.Request) -> Any:
        """A procedure of one request."""

        def procedure() -> Procedure[bytes]:
            answer: bytes = yield request
            return answer

        return self.run(procedure())

    def write(self, path: str, value: str) -> None:
        """A node's value."""
        self.one(xb.write(path, value.encode()))

    def read(self, path: str) -> str | None:
        """A node's value; None: there is none."""
        try:
            value = self.one(xb.read(path))
        except XenstoreError:
            return None
        assert isinstance(value, bytes)
        return value.decode()

    def settle(self) -> tuple[XenbusState, XenbusState]:
        """Let both ends look until they have come to rest: the states of front and back."""
        for _ in range(8):
            self.run(self.back.changed())
            if not self.front_port.gone:
                self.run(self.front.changed())
        return self.front.state, self.back.state
