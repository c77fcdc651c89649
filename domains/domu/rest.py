"""How long a domain whose vCPU yields in a loop leaves the host's CPU to others.

SCHEDOP_yield lets other domains run first. A guest that waits by yielding (GRUB for its disk) has the processes that work for it
on the same host CPUs: a yield that comes back at once, 200 times a request, takes the time from them.
"""

from __future__ import annotations

from typing import Final

AT_ONCE: Final = 3
"""Yields in a row, without an event between them, that cost no more than a yield."""
FIRST_NS: Final = 20_000
LONGEST_NS: Final = 1_000_000


class Rest:
    """`yielded` at each yield, `ran` at each slice that ended without one."""

    __slots__ = ("_events", "_yields")

    def __init__(self) -> None:
        self._events = 0
        self._yields = 0

    def ran(self) -> None:
        """The guest did something else."""
        self._yields = 0

    def yielded(self, events: int, now: int, deadline: int) -> int:
        """Nanoseconds to rest, 0 for none: until something arrives, or the timer at `deadline` (0: none) is due, each time a little
        longer. `events`: how many have arrived in all."""
        if events != self._events:
            self._events, self._yields = events, 0
            return 0
        self._yields += 1
        if self._yields <= AT_ONCE:
            return 0
        longest = min(FIRST_NS << min(self._yields - AT_ONCE - 1, 10), LONGEST_NS)
        return max(0, min(longest, deadline - now) if deadline else longest)
