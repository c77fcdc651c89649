"""A limit on what a frontend transmits: `rate` of xl-network-configuration, as netback has it: so many bytes in each interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.xenbus.nodes import NodeError


class Credit:
    """Bytes that may still be sent in this interval. What a packet takes beyond is owed to the next ones."""

    def __init__(self, bytes_each: int, interval_us: int, clock_ns: Callable[[], int]) -> None:
        """`clock_ns`: a monotonic clock. ValueError for what is no limit."""
        if bytes_each < 1 or interval_us < 1:
            raise ValueError(f"{bytes_each} bytes in {interval_us} microseconds")
        self.bytes_each: Final = bytes_each
        self.interval_ns: Final = interval_us * 1000
        self._clock: Final = clock_ns
        self._left = bytes_each
        self._from = clock_ns()

    def _renew(self) -> None:
        passed = (self._clock() - self._from) // self.interval_ns
        if passed > 0:
            self._from += passed * self.interval_ns
            self._left = min(self.bytes_each, self._left + passed * self.bytes_each)

    @property
    def available(self) -> bool:
        """A packet may go."""
        self._renew()
        return self._left > 0

    @property
    def wait_ns(self) -> int:
        """Until a packet may go; 0: now."""
        if self.available:
            return 0
        intervals = -self._left // self.bytes_each + 1
        return max(1, self._from + intervals * self.interval_ns - self._clock())

    def spend(self, size: int) -> None:
        """A packet of that many bytes went."""
        self._left -= size


def parse_rate(text: bytes | None) -> tuple[int, int] | None:
    """The node `rate`: "BYTES,MICROSECONDS"; None: there is no limit. NodeError."""
    if not text:
        return None
    each, comma, interval = text.partition(b",")
    if not comma or not all(part.isdigit() and len(part) < 20 for part in (each, interval)):
        raise NodeError(f"rate is {text[:40]!r}: BYTES,MICROSECONDS expected")
    if not int(each) or not int(interval):
        return None
    return int(each), int(interval)
