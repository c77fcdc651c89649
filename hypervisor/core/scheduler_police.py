"""Who uses CPU time without a lease: a leaky bucket for each domain, filled by the CPU time that the kernel counted.

A process without a lease may work a little (orders, messages): RATE of a CPU, and BURST ns at once. One that runs on overflows
the bucket within BURST / (1 - RATE) ns of CPU time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus.addresses import DomId

BURST: Final = 10_000_000
RATE_PERCENT: Final = 10
INTERVAL: Final = 8_000_000
"""Time between two samples, while there is somebody whom an offender would harm."""
LEAVE_LIMIT: Final = 25_000_000
"""A holder that does not say within this time that it stopped, and uses no CPU time, is taken to have stopped."""


@dataclass(slots=True)
class _Bucket:
    level: int
    at: int
    used: int


class Police:
    """Pure: the caller samples, and stops those that are found out."""

    def __init__(self) -> None:
        self._buckets: dict[DomId, _Bucket] = {}

    def watch(self, now: int, domain: DomId, used: int) -> None:
        """Its lease is over; it has used `used` ns of CPU time so far."""
        self._buckets[domain] = _Bucket(0, now, used)

    def forget(self, domain: DomId) -> None:
        """It has a lease, or is gone."""
        self._buckets.pop(domain, None)

    def watched(self, domain: DomId) -> bool:
        """It has no lease."""
        return domain in self._buckets

    def sample(self, now: int, domain: DomId, used: int) -> bool:
        """True: it runs without a lease. False also for one that is not watched."""
        bucket = self._buckets.get(domain)
        if bucket is None:
            return False
        allowed = max(0, now - bucket.at) * RATE_PERCENT // 100
        bucket.level = max(0, bucket.level + max(0, used - bucket.used) - allowed)
        bucket.at, bucket.used = now, used
        return bucket.level > BURST
