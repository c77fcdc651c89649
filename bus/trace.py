"""Trace records: what each process of a machine notes of what it does, while somebody watches (`domicile trace`).

Each process has a page of its own for that (`bus.trace_page`): a word that says whether anybody watches, and a ring of fixed
records. It alone writes its ring; the hypervisor alone writes the word. So tracing costs a test of one word while it is off,
memory is bounded, and what a process noted before it was killed can still be read. Readers believe nothing: a record is numbers.

Layout (little-endian): u64 magic at 0; u64 on at 64; u64 count of records ever written at 128; 64 counter slots of eight u64 from
4096 on (`bus.trace_page.Counters`); records of 64 bytes from 8192 on, record n at place n modulo their number.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

MAGIC: Final = 0x3130_4352_5443_4D44
"""'DMCTRC01'."""
ON_WORD: Final = 8
WRITTEN_WORD: Final = 16
COUNTERS_AT: Final = 4096
RING_AT: Final = 8192
RECORD_SIZE: Final = 64
MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
NOBODY: Final = 0xFFFF
"""No domain."""
_RECORD: Final = Struct("<QHHI6Q")


class Kind(IntEnum):
    """What a record is of. `FIELDS` names its numbers."""

    # the hypervisor
    HYPERCALL = 1
    EVENT = 2
    LEASE = 3
    DMA = 4
    INTERRUPT = 5
    GRANT = 6
    # a domain's process
    RUN = 16
    CALL = 17
    SEND = 18
    RECEIVE = 19
    # the block back end (of a driver domain)
    TAKEN = 32
    SEGMENT = 33
    COMMAND = 34
    ANSWERED = 35
    KICKED = 36
    # the NVMe driver
    SUBMIT = 48
    PRP = 49
    COMPLETED = 50
    # the NVMe controller
    FETCHED = 64
    REQUEST = 65
    ANSWER = 66
    MEDIUM = 67
    POSTED = 68


FIELDS: Final[dict[Kind, tuple[str, ...]]] = {
    # `track` is the vCPU, `subject` the domain
    Kind.HYPERCALL: ("number", "command", "duration"),
    Kind.EVENT: ("port",),
    # `track` is the physical CPU, `subject` the domain
    Kind.LEASE: ("granted", "end"),
    # `track` is the owner of the device, `subject` the device; `verdict`: a reason (0: none), and
    # below it, in 16 bits, the frame's owner.
    Kind.DMA: ("token", "item", "iova", "length", "machine", "verdict"),
    Kind.INTERRUPT: ("vector", "domain", "pirq"),
    # `track` is the granter, `subject` the mapper
    Kind.GRANT: ("operation", "ref", "handle", "address", "status"),
    # `track` is the vCPU
    Kind.RUN: ("duration",),
    Kind.CALL: ("number", "argument", "duration", "result"),
    Kind.SEND: ("port",),
    Kind.RECEIVE: ("port",),
    # `track` is the ring, `subject` the frontend's domain; `index`: of the request, counted from the connection on
    Kind.TAKEN: ("disk", "index", "id", "operation", "sector", "sectors"),
    Kind.SEGMENT: ("disk", "index", "number", "ref", "iova", "length"),
    Kind.COMMAND: ("disk", "index", "token", "device", "operation"),
    Kind.ANSWERED: ("disk", "index", "status"),
    Kind.KICKED: ("disk", "remote_port", "local_port", "outgoing"),
    # `track` is the queue, `subject` the device
    Kind.SUBMIT: ("command", "token", "opcode", "block", "blocks", "list"),
    Kind.PRP: ("command", "number", "address", "length"),
    Kind.COMPLETED: ("command", "status"),
    # `track` is the queue
    Kind.FETCHED: ("command", "opcode", "prp1", "prp2", "block", "blocks"),
    Kind.REQUEST: ("token", "item", "iova", "length", "command", "purpose"),
    Kind.ANSWER: ("token", "fault"),
    Kind.MEDIUM: ("operation", "offset", "length", "duration"),
    Kind.POSTED: ("command", "status"),
}


class Purpose(IntEnum):
    """For what a controller asks for DMA."""

    SUBMISSION = 0
    LIST = 1
    DATA = 2
    COMPLETION = 3


class Record(NamedTuple):
    """One record, as it was read."""

    time: int
    """CLOCK_MONOTONIC ns."""
    kind: int
    track: int
    subject: int
    values: tuple[int, ...]


class Trace:
    """The writing end, for one thread. `if trace.on[0]: trace.add(...)` is how it is used."""

    __slots__ = ("_capacity", "_clock", "_memory", "_written", "on", "words")

    def __init__(self, memory: memoryview, clock: Callable[[], int]) -> None:
        """Goes on where an earlier writer of this memory left off. ValueError if there is no room for a record."""
        self._capacity: Final = (len(memory) - RING_AT) // RECORD_SIZE
        if self._capacity < 1:
            raise ValueError(f"{len(memory)} bytes are too few for a trace")
        self._memory: Final = memory
        self._clock: Final = clock
        self.words: Final = memory[:COUNTERS_AT].cast("Q")
        self.on: Final = self.words[ON_WORD : ON_WORD + 1]
        """`on[0]` is not 0 while somebody watches."""
        self._written: int = self.words[WRITTEN_WORD]

    def add(
        self,
        kind: int,
        track: int,
        subject: int,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        e: int = 0,
        f: int = 0,
        *,
        time: int = 0,
    ) -> None:
        """Note something. Numbers are cut to their fields. `time` 0: now."""
        written = self._written
        _RECORD.pack_into(
            self._memory,
            RING_AT + written % self._capacity * RECORD_SIZE,
            time or self._clock(),
            kind,
            track & 0xFFFF,
            subject & 0xFFFF_FFFF,
            a & MASK64,
            b & MASK64,
            c & MASK64,
            d & MASK64,
            e & MASK64,
            f & MASK64,
        )
        self._written = self.words[WRITTEN_WORD] = (written + 1) & MASK64

    def now(self) -> int:
        """Of its clock, in ns."""
        return self._clock()

    def close(self) -> None:
        """Let go of the memory."""
        self.on.release()
        self.words.release()


class TraceReader:
    """The reading end: memory that another process writes, now, perhaps with malice."""

    def __init__(self, memory: memoryview, *, from_start: bool = False) -> None:
        """Reads from now on, or what is still in the ring too. ValueError if it is no trace."""
        if len(memory) < RING_AT + RECORD_SIZE or int.from_bytes(memory[:8], "little") != MAGIC:
            raise ValueError("this memory is no trace")
        self._memory: Final = memory
        self._capacity: Final = (len(memory) - RING_AT) // RECORD_SIZE
        self._words: Final = memory[:COUNTERS_AT].cast("Q")
        self.dropped = 0
        """Records that were written over before they were read."""
        self._next = 0 if from_start else self._words[WRITTEN_WORD]

    def take(self) -> list[Record]:
        """What came since the last call, oldest first; at most as many records as the ring has."""
        end = self._words[WRITTEN_WORD]
        start, capacity = self._next, self._capacity
        if end < start:  # only a writer that lies goes back
            start = end
        if end - start > capacity:
            self.dropped += end - start - capacity
            start = end - capacity
        if end == start:
            self._next = end
            return []
        first, count = start % capacity, end - start
        straight = min(count, capacity - first)
        data = bytes(self._memory[RING_AT + first * RECORD_SIZE : RING_AT + (first + straight) * RECORD_SIZE])
        data += bytes(self._memory[RING_AT : RING_AT + (count - straight) * RECORD_SIZE])
        # What was written over meanwhile, or is being written over, is not to be had any more.
        lost = min(count, max(0, self._words[WRITTEN_WORD] + 1 - capacity - start))
        self.dropped += lost
        self._next = end
        return [
            Record(time, kind, track, subject, tuple(values))
            for time, kind, track, subject, *values in _RECORD.iter_unpack(data[lost * RECORD_SIZE :])
        ]

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()


def off() -> Trace:
    """A trace that nobody watches: of a process under test, or without a page."""
    return Trace(memoryview(bytes(RING_AT + RECORD_SIZE)), lambda: 0)
