"""The in-flight ledger: what a block back end has taken from a ring, in memory that outlives its process.

Why it is needed: responses overwrite ring slots, also those of requests that are not answered yet. So each request
is here, whole, before the back end's consumer index passes it.

Layout (little-endian words; version 1)::

    0      two copies of the head, 2 KiB each: crc32, serial, version, queues, slots, blob length, blob
    4096   for each queue: words req_cons, rsp_prod; padding to 64 bytes; a state word and an answer word for each
           slot; a record for each slot
    record: crc32, index, slot bytes, segment bytes (words); the raw ring slot; the segments of an indirect request

* A head is written over the older copy; the valid copy with the higher serial counts. A head cut short fails its
  checksum, and the other one holds.
* A record is written while its slot's state word says FREE, and the state word carries 16 bits of its checksum: a
  record cut short is never read.
* Index and state words are single aligned stores. The store of `req_cons` is what takes requests: records of
  requests behind it do not count, they are still in the ring.
* `answer` is the ring index that a response goes to. It is stored before the response is published, so that a
  successor can tell by the ring's producer index which responses the frontend has seen.
* The flush words (in queue 0's control area) say whether writes were completed since the last flush, whether such were lost, and how
  often the device had lost power when that was decided.
* A request whose failure says that writes were lost has that in its state word (bits 4 and 5), from the very store that completes it until
  the flush words say the same: whoever dies in between has told it once, and its successor does not tell it again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

from bus.abi.io.blkif import BLKIF_RSP_OKAY
from bus.abi.io.ring import MASK32, distance
from drivers.xenbus.paged_ring import PagedRing

VERSION: Final = 1
MAX_BLOB: Final = 2000
MAX_QUEUES: Final = 16
SLOT_BYTES: Final = 112
SEGMENT_BYTES: Final = 256 * 8
_HEAD: Final = struct.Struct("<IIIIII")
_HEAD_SPACE: Final = 2048
_RECORD: Final = struct.Struct("<IIII")
STRIDE: Final = _RECORD.size + SLOT_BYTES + SEGMENT_BYTES
_CONTROL: Final = 64
_CONS, _RSP, _DIRTY, _EPOCH, _LOST, _POWER = 0, 1, 2, 3, 4, 5

FLUSH_OWES: Final = 1
WRITE_OWES: Final = 2
_TOLD: Final = 0x30
_TOLD_SHIFT: Final = 4


class State(IntEnum):
    """Life of a request."""

    FREE = 0
    TAKEN = 1
    SUBMITTED = 2
    COMPLETED = 3
    ANSWERED = 4
    """Its response has a place in the ring, and is perhaps published."""


class LedgerError(Exception):
    """The memory holds no ledger that can be used, or one that contradicts itself or the ring."""


@dataclass(frozen=True, slots=True)
class Record:
    """A request of an earlier life."""

    slot: int
    """Where it is in the ledger."""
    index: int
    """Ring index of the request."""
    raw: bytes
    segments: bytes
    status: int
    """BLKIF_RSP_* if it was completed."""


class Recovered(NamedTuple):
    """What a successor has to do."""

    req_cons: int
    rsp_prod: int
    redo: list[Record]
    """Requests to carry out again, in the order in which they were taken."""
    answers: list[Record]
    """Requests that were completed and whose answers the frontend has not seen: failures first."""


Hook = Callable[[str], None]


class QueueLedger:
    """One queue's part."""

    def __init__(self, area: memoryview, slots: int) -> None:
        self.slots: Final = slots
        self._control: Final = area[:_CONTROL].cast("I")
        end = _CONTROL + 4 * slots
        self._states: Final = area[_CONTROL:end].cast("I")
        self._answers: Final = area[end : end + 4 * slots].cast("I")
        self._records: Final = area[end + 4 * slots :]
        self._free: list[int] = []
        self.hook: Hook | None = None
        """Called with a name between two steps: tests crash there."""

    @property
    def free(self) -> int:
        """Slots to be had."""
        return len(self._free)

    def clear(self) -> None:
        """A new ring: nothing in flight, indexes at 0."""
        for slot in range(self.slots):
            self._states[slot] = State.FREE
        self._control[_CONS] = self._control[_RSP] = 0
        self._free = list(range(self.slots))

    def take(self, requests: list[tuple[int, bytes, bytes]], req_cons: int) -> list[int]:
        """Hold (index, raw slot, indirect segments) each, and then move the consumer index: the slots they got."""
        taken: list[int] = []
        records, states, hook, free = self._records, self._states, self.hook, self._free
        for index, raw, segments in requests:
            slot = free.pop()
            start = slot * STRIDE
            check = crc32(segments, crc32(raw, index))
            body = _RECORD.pack(check, index, len(raw), len(segments)) + raw + segments
            if hook is None:
                records[start : start + len(body)] = body
            else:
                half = len(body) // 2
                records[start : start + half] = body[:half]
                hook("ledger.record.torn")
                records[start + half : start + len(body)] = body[half:]
                hook("ledger.record")
            states[slot] = State.TAKEN | (check & 0xFFFF) << 16
            taken.append(slot)
        if hook is not None:
            hook("ledger.taken")
        self._control[_CONS] = req_cons
        if hook is not None:
            hook("ledger.consumer")
        return taken

    def submitted(self, slots: list[int]) -> None:
        """Their commands are about to go to storage."""
        states, hook = self._states, self.hook
        for slot in slots:
            states[slot] = states[slot] & 0xFFFF0000 | State.SUBMITTED
            if hook is not None:
                hook("ledger.submitted")

    def completed(self, slot: int, status: int, told: int = 0) -> None:
        """It is done, with BLKIF_RSP_* `status` (0 to -255). `told`: of FLUSH_OWES and WRITE_OWES, what its failure tells; `settled`
        follows when the ledger owes that no more."""
        word = self._states[slot] & 0xFFFF0000 | State.COMPLETED | (-status & 0xFF) << 8
        self._states[slot] = word | told << _TOLD_SHIFT
        if self.hook is not None:
            self.hook("ledger.completed")

    def settled(self, slot: int) -> None:
        """See `completed`."""
        self._states[slot] &= ~_TOLD & MASK32

    def told(self) -> dict[int, int]:
        """What a life before told, and perhaps did not cross out: {slot: FLUSH_OWES | WRITE_OWES}."""
        return {
            slot: (word & _TOLD) >> _TOLD_SHIFT
            for slot, word in enumerate(self._states)
            if word & _TOLD and word & 0xFF & ~_TOLD == State.COMPLETED
        }

    def answering(self, slots: list[int], index: int) -> None:
        """Their responses go to ring indexes from `index` on."""
        states, hook = self._states, self.hook
        for slot in slots:
            self._answers[slot] = index & MASK32
            if hook is not None:
                hook("ledger.answer")
            states[slot] = states[slot] & 0xFFFFFF00 | State.ANSWERED
            index += 1
            if hook is not None:
                hook("ledger.answering")

    def answered(self, slots: list[int], rsp_prod: int) -> None:
        """Their responses are published."""
        self._control[_RSP] = rsp_prod
        for slot in slots:
            if self.hook is not None:
                self.hook("ledger.answered")
            self._states[slot] = State.FREE
        self._free += slots

    def recover(self, ring: PagedRing) -> Recovered:
        """What the life before left. May itself be cut short and done again. LedgerError if the ring's indexes cannot
        be true (the frontend overwrote them), or a record does not hold together."""
        cons, base = self._control[_CONS], self._control[_RSP]
        published = distance(ring.rsp_prod, base)
        redo: list[Record] = []
        answers: list[Record] = []
        gone: list[int] = []
        waiting = 0
        for slot in range(self.slots):
            word = self._states[slot]
            state = word & 0xFF
            if state == State.FREE:
                gone.append(slot)
                continue
            if state > State.ANSWERED:
                raise LedgerError(f"slot {slot} is in no state")
            record = self._record(slot, word)
            if state == State.TAKEN and distance(record.index, cons) < self.slots:
                gone.append(slot)  # the consumer index had not passed it: it is still in the ring
            elif state == State.ANSWERED:
                place = distance(self._answers[slot], base)
                if place >= 1 << 31 or place < published:
                    gone.append(slot)
                else:
                    answers.append(record)
                waiting += place < 1 << 31
            elif state == State.COMPLETED:
                answers.append(record)
            else:
                redo.append(record)
        if published > waiting:
            raise LedgerError(f"the ring says {published} responses since {base}, of {waiting}")
        rsp_prod = (base + published) & MASK32
        held = len(redo) + len(answers)
        if distance(cons, rsp_prod) != held:
            raise LedgerError(
                f"{distance(cons, rsp_prod)} requests between the indexes, {held} in the ledger"
            )
        # First all that had a place get none: a place of this life must not meet one of the last.
        for record in answers:
            self._states[record.slot] = (
                self._states[record.slot] & 0xFFFF0000 | State.COMPLETED | (-record.status & 0xFF) << 8
            )
            if self.hook is not None:
                self.hook("recover.place")
        self._control[_RSP] = rsp_prod  # before the slots are freed that it is derived from
        for slot in gone:
            if self._states[slot] != State.FREE:
                if self.hook is not None:
                    self.hook("recover.freed")
                self._states[slot] = State.FREE
        self._free = gone
        redo.sort(key=lambda record: distance(record.index, (cons - (1 << 31)) & MASK32))
        # A failure that tells of lost writes came before the flushes that succeeded after it: so it is answered before them.
        answers.sort(key=lambda record: record.status == BLKIF_RSP_OKAY)
        return Recovered(cons, rsp_prod, redo, answers)

    def _record(self, slot: int, word: int) -> Record:
        start = slot * STRIDE
        check, index, raw_size, segment_size = _RECORD.unpack_from(self._records, start)
        if raw_size > SLOT_BYTES or segment_size > SEGMENT_BYTES:
            raise LedgerError(f"slot {slot}: sizes {raw_size}, {segment_size}")
        start += _RECORD.size
        raw = bytes(self._records[start : start + raw_size])
        segments = bytes(self._records[start + raw_size : start + raw_size + segment_size])
        if crc32(segments, crc32(raw, index)) != check or check & 0xFFFF != word >> 16:
            raise LedgerError(f"slot {slot}: the checksum is wrong")
        return Record(slot, index, raw, segments, -(word >> 8 & 0xFF))


class Ledger:
    """One device's ledger."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: zeroes at the very first use, then whatever was in it. ValueError if it is too small for a head."""
        if len(memory) < 2 * _HEAD_SPACE:
            raise ValueError("too little memory for a ledger")
        self._memory: Final = memory.cast("B")
        self.queues: list[QueueLedger] = []
        self.hook: Hook | None = None

    @staticmethod
    def bytes_needed(queues: int, slots: int) -> int:
        """Memory for so many queues with rings of so many slots."""
        return 2 * _HEAD_SPACE + queues * Ledger._area(slots)

    @staticmethod
    def _area(slots: int) -> int:
        return _CONTROL + 8 * slots + STRIDE * slots

    def _head(self, copy: int) -> tuple[int, int, int, bytes] | None:
        start = copy * _HEAD_SPACE
        check, serial, version, queues, slots, size = _HEAD.unpack_from(self._memory, start)
        if version != VERSION or size > MAX_BLOB:
            return None
        body = bytes(self._memory[start + 4 : start + _HEAD.size + size])
        if crc32(body) != check:
            return None
        return serial, queues, slots, body[_HEAD.size - 4 :]

    def _newest(self) -> tuple[int, int, int, bytes] | None:
        heads = [head for head in (self._head(0), self._head(1)) if head is not None]
        return max(heads, key=lambda head: head[0], default=None)

    def _write_head(self, queues: int, slots: int, blob: bytes) -> None:
        newest = self._newest()
        serial = newest[0] + 1 if newest is not None else 1
        body = _HEAD.pack(0, serial, VERSION, queues, slots, len(blob))[4:] + blob
        data = crc32(body).to_bytes(4, "little") + body
        start = serial % 2 * _HEAD_SPACE
        half = len(data) // 2
        self._memory[start : start + half] = data[:half]
        self._step("head.torn")
        self._memory[start + half : start + len(data)] = data[half:]
        self._step("head.written")

    def _step(self, name: str) -> None:
        if self.hook is not None:
            self.hook(name)

    def _open(self, queues: int, slots: int) -> None:
        area = self._area(slots)
        self.queues = [
            QueueLedger(
                self._memory[2 * _HEAD_SPACE + area * number : 2 * _HEAD_SPACE + area * (number + 1)], slots
            )
            for number in range(queues)
        ]
        for queue in self.queues:
            queue.hook = self.hook

    def begin(self, queues: int, slots: int, blob: bytes, power_losses: int = 0) -> None:
        """A new connection: nothing in flight. `blob` (at most 2,000 bytes) is what the successor must know to
        attach to the same rings; `power_losses`: the device's count. ValueError if that does not fit the memory."""
        if not 1 <= queues <= MAX_QUEUES or slots < 1 or len(blob) > MAX_BLOB:
            raise ValueError(f"{queues} queues, {slots} slots, {len(blob)} bytes")
        if self.bytes_needed(queues, slots) > len(self._memory):
            raise ValueError(
                f"{queues} rings of {slots} slots do not fit {len(self._memory)} bytes of ledger"
            )
        self.end()  # the old records mean nothing to the new head, nor the new ones to the old head
        self._open(queues, slots)
        for queue in self.queues:
            queue.clear()
        control = self.queues[0]._control
        control[_DIRTY] = control[_EPOCH] = control[_LOST] = 0
        control[_POWER] = power_losses
        self._write_head(queues, slots, blob)

    def end(self) -> None:
        """The connection is closed: a successor finds nothing to do."""
        newest = self._newest()
        if newest is not None and newest[1]:
            self._write_head(0, 0, b"")
        self.queues = []

    def reopen(self) -> bytes | None:
        """After a restart: the blob of the connection that was up, or None. Then `recover` each of `queues`.
        LedgerError if the head makes no sense."""
        newest = self._newest()
        if newest is None or newest[1] == 0:
            return None
        _serial, queues, slots, blob = newest
        if queues > MAX_QUEUES or self.bytes_needed(queues, slots) > len(self._memory):
            raise LedgerError(f"{queues} queues of {slots} slots in {len(self._memory)} bytes")
        self._open(queues, slots)
        for queue in self.queues:  # before anybody looks whether more was lost
            for slot, told in queue.told().items():
                self.set_lost(self.lost & ~told)
                queue.settled(slot)
        return blob

    # -- flush epochs

    @property
    def epoch(self) -> int:
        """Flushes completed since `begin`."""
        return self.queues[0]._control[_EPOCH] if self.queues else 0

    @property
    def dirty(self) -> bool:
        """Writes were completed that no completed flush covers yet."""
        return bool(self.queues) and self.queues[0]._control[_DIRTY] != 0

    @property
    def lost(self) -> int:
        """Such writes were lost (a power cut of the device): FLUSH_OWES, the next flush must fail; WRITE_OWES, the next write as well."""
        return self.queues[0]._control[_LOST] if self.queues else 0

    def wrote(self) -> None:
        """A write is about to be called completed."""
        self.queues[0]._control[_DIRTY] = 1

    def flushed(self, *, clean: bool) -> None:
        """A flush was completed; `clean`: no write was completed while it ran."""
        control = self.queues[0]._control
        control[_EPOCH] = (control[_EPOCH] + 1) & MASK32
        if clean:
            control[_DIRTY] = 0

    @property
    def power_losses(self) -> int:
        """The device's count of power losses when this was last looked at."""
        return self.queues[0]._control[_POWER] if self.queues else 0

    def saw_power_losses(self, count: int) -> None:
        """The device counts so many now. More than before, with writes that no flush covers: they may be gone."""
        if self.queues:
            if count != self.power_losses and self.dirty:
                self.set_lost(FLUSH_OWES | WRITE_OWES)
            self.queues[0]._control[_POWER] = count  # after `lost`: who dies in between looks again

    def set_lost(self, lost: int) -> None:
        """See `lost`."""
        if self.queues:
            self.queues[0]._control[_LOST] = lost
