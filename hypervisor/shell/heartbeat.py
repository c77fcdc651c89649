"""Processes that stand but do not work: devices, native domains that own one, and NetIO are asked for a sign of life.

Counted in beats, not in time: where the whole host stood still, nobody is late. Any message is a sign of life; one that has
given none since the last beat is asked something small. A process that is stopped (SIGSTOP) is ended after a second; one that
runs or waits for a disk may take longer, as fdatasync on a slow disk does. A process that has not said hello yet cannot be asked: it
is ended if it is stopped, or after a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from bus.addresses import DomId

INTERVAL_NS: Final = 250_000_000
STOPPED_BEATS: Final = 4
"""After so many without a sign a stopped process is ended ..."""
SILENT_BEATS: Final = 60
"""... and any other after so many: 15 seconds."""
START_BEATS: Final = 240
"""... and one that has not said hello since it was started after so many: a minute, for a start on a busy host takes 10 seconds."""
PING_ORDER: Final = (1 << 62) + 1
"""Number of the order that asks a domain; the core's own numbers count from 1."""


def is_stopped(pid: int) -> bool:
    """The process is stopped (state T, proc(5)). False if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


class Heartbeats:
    """Who is asked and who is late. No I/O: times are nanoseconds of a monotonic clock, `stopped` looks at a process."""

    def __init__(self, stopped: Callable[[DomId], bool]) -> None:
        self._stopped = stopped
        self._missed: dict[DomId, int] = {}
        """Beats since the question that is not answered (-1: answered), of those that are watched."""
        self._starting: dict[DomId, tuple[int, int]] = {}
        """Of those that have not said hello: beats since their start, and beats in a row in which they were stopped (-1: they were not)."""
        self._next = 0

    def next_deadline(self) -> int | None:
        """When `beat` is due; None while nobody is watched."""
        return self._next if self._missed or self._starting else None

    def alive(self, peer: DomId) -> None:
        """It said something."""
        if peer in self._missed:
            self._missed[peer] = -1

    def beat(
        self, now: int, watched: Iterable[DomId], starting: Iterable[DomId] = ()
    ) -> tuple[list[DomId], list[DomId]]:
        """(whom to ask, whom to end). `watched`: whoever is to be watched at present; `starting`: those that have not said hello."""
        self._next = now + INTERVAL_NS
        self._missed = {peer: self._missed.get(peer, -1) + 1 for peer in watched}
        late = [
            peer
            for peer, missed in self._missed.items()
            if missed >= SILENT_BEATS or (missed >= STOPPED_BEATS and self._stopped(peer))
        ]
        for peer in late:
            del self._missed[peer]
        before, self._starting = self._starting, {}
        for peer in starting:
            beats, stopped = before.get(peer, (-1, -1))
            beats, stopped = beats + 1, stopped + 1 if self._stopped(peer) else -1
            if stopped >= STOPPED_BEATS or beats >= START_BEATS:
                late.append(peer)
            else:
                self._starting[peer] = beats, stopped
        return [peer for peer, missed in self._missed.items() if missed == 0], late
