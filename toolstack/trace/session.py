"""Records of all processes of a machine, in order of time, while a client watches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bus.packets import close_all
from bus.trace import Record, TraceReader
from bus.trace_page import map_read_only
from toolstack.errors import MachineGone

if TYPE_CHECKING:
    from toolstack.client import ControlClient

SETTLE_NS: Final = 200_000_000
"""A record may be written so long after the time that it bears (the end of what it tells of); older ones are in order."""
LOOK_S: Final = 0.25
"""How often new processes are asked for."""
DEVICE: Final = 0x8000_0000
HYPERVISOR: Final = 0xFFFF_FFFF


class Peer(NamedTuple):
    """Whose record it is."""

    number: int
    """A domain's, or DEVICE plus a PCI address, or HYPERVISOR."""
    role: str
    name: str

    @property
    def bdf(self) -> int | None:
        """Of a device."""
        return self.number & ~DEVICE if self.number & DEVICE and self.number != HYPERVISOR else None


class Entry(NamedTuple):
    """A record and its writer."""

    peer: Peer
    record: Record


@dataclass(slots=True)
class _Source:
    peer: Peer
    reader: TraceReader
    memory: memoryview


class TraceSession:
    """Watches from its making until `close`."""

    def __init__(self, client: ControlClient) -> None:
        """MachineError if the machine does not trace."""
        self._client = client
        self._sources: dict[int, _Source] = {}
        self._waiting: list[Entry] = []
        self._looked = 0.0
        self.began: Final = time.monotonic_ns()
        self.names: dict[int, str] = {}
        """Names of domains, also of those that are gone."""
        self.gone = False
        """The machine went down: what was noted can still be read."""
        self._started = False
        self._look()
        self._started = True

    def _look(self) -> None:
        """Take the pages of processes that are new."""
        self._looked = time.monotonic()
        while not self.gone:
            try:
                answer, fds = self._client.request_files("trace", {"known": list(self._sources)})
            except MachineGone:
                self.gone = True
                return
            rows = answer["pages"]
            self.names.update((domid, name) for domid, name in answer["names"] if name != "(null)")
            try:
                for row, fd in zip(rows, fds, strict=True):
                    self._add(row, fd)
            finally:
                close_all(fds)
            if not rows:
                return

    def _add(self, row: dict[str, Any], fd: int) -> None:
        memory = map_read_only(fd)
        peer = Peer(row["peer"], row["role"], row["name"])
        # Of processes that were there before, only what comes from now on.
        self._sources[row["id"]] = _Source(peer, TraceReader(memory, from_start=self._started), memory)

    @property
    def dropped(self) -> int:
        """Records that were written over before they were read."""
        return sum(source.reader.dropped for source in self._sources.values())

    def poll(self, *, last: bool = False) -> list[Entry]:
        """What is known for sure to be complete, in order of time; with `last`, everything."""
        if last or time.monotonic() - self._looked > LOOK_S:
            self._look()
        now = time.monotonic_ns()
        for source in self._sources.values():
            self._waiting += [
                Entry(source.peer, record)
                for record in source.reader.take()
                # A process may write any number there: what cannot be is left out.
                if self.began - SETTLE_NS <= record.time <= now + SETTLE_NS
            ]
        self._waiting.sort(key=lambda entry: entry.record.time)
        if last:
            ready, self._waiting = self._waiting, []
            return ready
        limit = now - SETTLE_NS
        count = len(self._waiting)
        while count and self._waiting[count - 1].record.time > limit:
            count -= 1
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return ready

    def close(self) -> None:
        """Let go of the memory; the machine stops tracing when nobody else watches."""
        for source in self._sources.values():
            source.reader.close()
            source.memory.release()
        self._sources.clear()
        self._client.close()
