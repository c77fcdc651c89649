"""Faults of the IOMMU: reasons as VT-d numbers them, a ring of records with a rate limit, counters without one."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Final, NamedTuple

from bus.addresses import Bdf, DomId, Iova

RING_RECORDS: Final = 1024
BURST: Final = 64
"""Records of one device that are kept at once ..."""
PER_SECOND: Final = 32
"""... and how many a second are kept after that."""
MAX_SOURCES: Final = 1024
"""Devices counted one by one; more are counted together, as bdf 0xFFFFFFFF."""
OTHERS: Final = Bdf(0xFFFF_FFFF)


class FaultReason(IntEnum):
    """Fault reason encodings (VT-d specification 3.x, section 7.2); those from 0x100 on are this machine's own."""

    CONTEXT_NOT_PRESENT = 0x02
    """The device belongs to no domain, or the request is of an earlier assignment or of before a reset."""
    ADDRESS_BEYOND_WIDTH = 0x04
    """Above 48 bits, or the range wraps around."""
    NO_WRITE_PERMISSION = 0x05
    """No write right on the way, or not mapped (met by a write)."""
    NO_READ_PERMISSION = 0x06
    """No read right on the way, or not mapped (met by a read)."""
    PAGING_ENTRY_RESERVED = 0x0C
    INTERRUPT_INDEX_BEYOND = 0x21
    INTERRUPT_NOT_PRESENT = 0x22
    INTERRUPT_COMPATIBILITY_BLOCKED = 0x25
    """A write to 0xFEExxxxx: interrupts are raised through the remapping table or not at all."""
    INTERRUPT_SOURCE_INVALID = 0x26
    """The entry belongs to another device."""
    MALFORMED = 0x100
    """A length of zero, or too many bytes or pieces: no bus carries such a request."""


class FaultRecord(NamedTuple):
    """One fault."""

    sequence: int
    time_ns: int
    bdf: Bdf
    domain: DomId | None
    """To which the device belonged."""
    iova: Iova
    """Where it failed; the index of an interrupt request."""
    write: bool
    reason: FaultReason

    def text(self) -> str:
        """One line, for a log."""
        b = self.bdf
        name = f"{b >> 16 & 0xFFFF:04x}:{b >> 8 & 0xFF:02x}:{b >> 3 & 31:02x}.{b & 7}"
        owner = "no domain" if self.domain is None else f"d{self.domain}"
        kind = "write" if self.write else "read"
        return f"DMA fault: {name} ({owner}) {kind} of {self.iova:#x}: {self.reason.name} ({self.reason:#x})"


class _Bucket:
    __slots__ = ("time", "tokens")

    def __init__(self, time: int) -> None:
        self.tokens = float(BURST)
        self.time = time


class FaultLog:
    """Records and counts. Counting is exact; recording stops for a device that faults too fast."""

    def __init__(self, capacity: int = RING_RECORDS) -> None:
        self._ring: deque[FaultRecord] = deque(maxlen=capacity)
        self._buckets: dict[Bdf, _Bucket] = {}
        self.counts: dict[Bdf, dict[FaultReason, int]] = {}
        """All faults, by device and reason."""
        self.suppressed = 0
        """Faults counted but not recorded."""
        self._sequence = 0

    def report(
        self, now: int, bdf: Bdf, domain: DomId | None, iova: int, write: bool, reason: FaultReason
    ) -> FaultRecord | None:
        """Count a fault; the record if it was kept."""
        self._sequence += 1
        if bdf not in self.counts and len(self.counts) >= MAX_SOURCES:
            bdf = OTHERS
        by_reason = self.counts.setdefault(bdf, {})
        by_reason[reason] = by_reason.get(reason, 0) + 1
        if not self._may_record(now, bdf):
            self.suppressed += 1
            return None
        record = FaultRecord(self._sequence, now, bdf, domain, Iova(iova), write, reason)
        self._ring.append(record)
        return record

    def _may_record(self, now: int, bdf: Bdf) -> bool:
        bucket = self._buckets.get(bdf)
        if bucket is None:
            bucket = self._buckets[bdf] = _Bucket(now)
        passed = max(0, now - bucket.time)
        bucket.tokens = min(float(BURST), bucket.tokens + passed * PER_SECOND / 1e9)
        bucket.time = max(now, bucket.time)
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def records(self, bdf: Bdf | None = None, after: int = 0) -> list[FaultRecord]:
        """Kept records, oldest first: of one device or all, with a sequence number above `after`."""
        return [r for r in self._ring if r.sequence > after and (bdf is None or r.bdf == bdf)]

    def total(self, bdf: Bdf | None = None) -> int:
        """How many faults there were."""
        counts = self.counts.values() if bdf is None else [self.counts.get(bdf, {})]
        return sum(sum(c.values()) for c in counts)
