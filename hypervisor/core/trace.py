"""A bounded ring of trace records. Off by default; whoever would add a record asks `enabled` first."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Record(NamedTuple):
    """One event."""

    time_ns: int
    domain: int
    vcpu: int
    kind: str
    args: tuple[int, ...]


class Trace:
    """The ring. The oldest records are dropped and counted."""

    def __init__(self, capacity: int) -> None:
        self.enabled = False
        self.dropped = 0
        self._capacity = capacity
        self._ring: deque[Record] = deque(maxlen=capacity)

    def add(self, time_ns: int, domain: int, vcpu: int, kind: str, *args: int) -> None:
        """Add a record; nothing while tracing is off."""
        if not self.enabled:
            return
        if len(self._ring) == self._capacity:
            self.dropped += 1
        self._ring.append(Record(time_ns, domain, vcpu, kind, args))

    def take(self) -> list[Record]:
        """All records, oldest first; the ring is empty afterwards."""
        records = list(self._ring)
        self._ring.clear()
        return records
