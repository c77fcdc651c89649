"""An agent that tells the machine's warden what is not so (DOMICILE_LIE says what), once its process runs."""

from __future__ import annotations

import os
import sys

from bus.messages.envelope import Message
from bus.messages.warden import Ended, Enrol, Running
from toolstack.warden.agent import Agent, main

LIE = os.environ["DOMICILE_LIE"]


class Liar(Agent):
    """Says the truth up to `Running`, and then the lie."""

    def _send(self, message: Message, fds: list[int] | None = None) -> None:
        if not isinstance(message, Running):
            super()._send(message, fds)
            return
        assert fds is not None
        if LIE == "descriptors":
            super()._send(message, [0, 1, 2])
            return
        super()._send(message, fds)
        link = self._link
        assert link is not None
        if LIE == "garbage":
            link.send_raw(b"\xff" * 1000)
        elif LIE == "death of others":
            for number in range(1, 8):
                if number != message.id and self._link is not None:
                    super()._send(Ended(id=number, status=0))
        elif LIE == "own death":
            super()._send(Ended(id=message.id, status=0))
        elif LIE == "twice":
            super()._send(Enrol(pid=1))


if __name__ == "__main__":
    from toolstack.warden import agent

    agent.Agent = Liar  # type: ignore[misc]
    sys.exit(main())
