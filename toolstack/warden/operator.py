"""An operator's end of the link to the machine's warden: which containers are there, and blows at what runs in them."""

from __future__ import annotations

import itertools
import select
import socket
import time
from pathlib import Path
from typing import Any

from bus.messages.envelope import BadMessage, Message
from bus.messages.warden import TO_OPERATOR, AgentStatus, AskStatus, Status, Strike, Struck
from bus.packets import LinkClosed, LinkFull, PacketLink
from toolstack.errors import MachineError

TIMEOUT_S = 10.0


class Operator:
    """One connection."""

    def __init__(self, path: Path) -> None:
        """`path`: the socket `warden` of a machine's directory. MachineError if nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise MachineError(f"{path}: the machine's warden does not answer: {error.strerror}") from None
        self._link = PacketLink(sock, TO_OPERATOR, descriptors=False)
        self._tokens = itertools.count(1)

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

    def agents(self) -> dict[str, AgentStatus]:
        """All containers by name. MachineError."""
        answer = self._ask(AskStatus(token=next(self._tokens)))
        assert isinstance(answer, Status)
        return {row.name: row for row in answer.agents}

    def strike(self, agent: str, what: str) -> None:
        """'kill', 'stop', 'cont' the process in that container, or have the container end ('leave'). MachineError if nothing was done."""
        fields: dict[str, Any] = {"token": next(self._tokens), "agent": agent, "what": what}
        answer = self._ask(Strike(**fields))
        assert isinstance(answer, Struck)
        if answer.error:
            raise MachineError(answer.error)

    def _ask(self, message: AskStatus | Strike) -> Message:
        deadline = time.monotonic() + TIMEOUT_S
        try:
            self._link.send(message)
            while (left := deadline - time.monotonic()) > 0:
                select.select([self._link], [], [], left)
                packet = self._link.receive()
                if packet is not None and getattr(packet[0], "token", None) == message.token:
                    return packet[0]
        except (LinkClosed, LinkFull, BadMessage) as error:
            raise MachineError(f"the machine's warden: {error}") from None
        raise MachineError(f"the machine's warden did not answer within {TIMEOUT_S:.0f} s")
