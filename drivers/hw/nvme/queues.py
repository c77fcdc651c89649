"""Submission and completion queues, and the commands in them (NVMe 1.4, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable

from bus.trace import Kind, Trace
from drivers.hw.nvme import spec
from drivers.hw.nvme.spec import Command, Status


class CompletionQueue:
    """Free slots are reserved when a command is fetched, so that a completion never waits for the driver."""

    __slots__ = (
        "base",
        "enabled",
        "head",
        "phase",
        "qid",
        "reserved",
        "seen",
        "size",
        "tail",
        "users",
        "vector",
    )

    def __init__(self, qid: int, base: int, size: int, vector: int, enabled: bool) -> None:
        self.qid, self.base, self.size = qid, base, size
        self.vector, self.enabled = vector, enabled
        self.head = self.tail = self.reserved = self.seen = 0
        self.phase = 1
        self.users = 0
        """Submission queues that complete here."""

    @property
    def room(self) -> int:
        """Slots neither used nor promised."""
        return self.size - 1 - (self.tail - self.head) % self.size - self.reserved

    def consumed(self, head: int) -> bool:
        """The driver's head doorbell. False: the value cannot be."""
        if head >= self.size or (head - self.head) % self.size > (self.tail - self.head) % self.size:
            return False
        self.head = head
        return True

    def take_slot(self) -> tuple[int, int]:
        """Address of the next entry, and its phase."""
        address, phase = self.base + spec.CQE_SIZE * self.tail, self.phase
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1
        return address, phase


class SubmissionQueue:
    """`head` is what was fetched so far."""

    __slots__ = (
        "active",
        "base",
        "count",
        "cq",
        "deleter",
        "fetching",
        "head",
        "qid",
        "seen",
        "size",
        "tail",
    )

    def __init__(self, qid: int, base: int, size: int, cq: CompletionQueue) -> None:
        self.qid, self.base, self.size, self.cq = qid, base, size, cq
        self.head = self.tail = self.seen = 0
        self.fetching = False
        self.count = 0
        """Commands that were fetched and whose completion entry is not written."""
        self.active: dict[int, Task] = {}
        """Commands that were fetched and not answered, by id."""
        self.deleter: Task | None = None
        """The command that deletes this queue, and waits for its commands."""

    @property
    def waiting(self) -> int:
        """Entries that the driver put in and that were not fetched."""
        return (self.tail - self.head) % self.size


class Task:
    """A command under way."""

    __slots__ = (
        "command",
        "dw0",
        "error_location",
        "length",
        "position",
        "prp_done",
        "registered",
        "segments",
        "slot",
        "sq",
        "start",
        "status",
        "to_memory",
    )

    def __init__(self, sq: SubmissionQueue, command: Command) -> None:
        self.sq = sq
        self.command = command
        self.status: int = Status.SUCCESS
        self.dw0 = 0
        self.position = -1
        """Its buffer in the staging memory; -1: none."""
        self.length = 0
        """Bytes of data."""
        self.segments: list[tuple[int, int]] = []
        """Where the data is in memory: (address, length)."""
        self.to_memory = False
        """The data goes out before the completion."""
        self.start: Callable[[Task], None] | None = None
        """What to begin with when there is a buffer."""
        self.prp_done: Callable[[Task], None] | None = None
        self.slot = -1
        """Position of its completion entry in the staging memory, while that is under way."""
        self.registered = False
        self.error_location = 0xFFFF

    @property
    def lba(self) -> int:
        """Starting LBA of a read, write, compare or write zeroes."""
        return self.command.cdw10 | self.command.cdw11 << 32


def note_fetched(trace: Trace, queue: int, command: Command) -> None:
    """For the trace: what the controller found in its submission queue."""
    block, blocks = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
    prps = (command.prp1, command.prp2)
    trace.add(Kind.FETCHED, queue, 0, command.cid, command.opcode, *prps, block, blocks)
