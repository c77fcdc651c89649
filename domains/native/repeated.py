"""To look again at what changes meanwhile: one at a time, and with a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domains.native.reactor import Reactor


class Repeated:
    """Something that a native domain does whenever it is told of a change.

    To do it, it waits for others (the store, the hypervisor), and is told of further changes meanwhile. So it never runs inside itself:
    whoever asks for it below, has it run once more afterwards. One who changes things all the time waits with the others after `most`
    times.
    """

    def __init__(self, reactor: Reactor, act: Callable[[], None], most: int) -> None:
        self._reactor: Final = reactor
        self._act: Final = act
        self._most: Final = most
        self._running = self._wanted = self._queued = False

    def ask(self) -> None:
        """Have it done: now, or after what is being done. What it raises is the first asker's; what others asked for then comes soon."""
        self._wanted = True
        if self._running:
            return
        self._running = True
        try:
            for _ in range(self._most):
                self._wanted = False
                self._act()
                if not self._wanted:
                    return
        finally:
            self._running = False
            if self._wanted and not self._queued:
                self._queued = True
                self._reactor.soon(self._later)

    def _later(self) -> None:
        self._queued = False
        if self._wanted:
            self.ask()
