"""The I/O TLB: translations by domain and I/O virtual page, bounded, invalidated by page, by domain, or all.

It holds only what the tables said; whoever changes a present entry invalidates in the same step, so that a lookup never
finds what the tables no longer say. Entries are of 4 KiB whatever the leaf's size.
"""

from __future__ import annotations

from typing import Final

from bus.addresses import DomId

DEFAULT_ENTRIES: Final = 8192


class IoTlb:
    """Values are `mfn << 2 | access`."""

    def __init__(self, capacity: int = DEFAULT_ENTRIES) -> None:
        if capacity < 1:
            raise ValueError("an I/O TLB needs an entry at least")
        self.capacity: Final = capacity
        self._domains: dict[DomId, dict[int, int]] = {}
        self.size = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.invalidations = 0

    def of(self, domain: DomId) -> dict[int, int]:
        """The domain's part, page by page: for reading in a loop. Valid until the next change."""
        part = self._domains.get(domain)
        if part is None:
            part = self._domains[domain] = {}
        return part

    def insert(self, domain: DomId, page: int, value: int) -> None:
        """Remember a translation; the oldest one goes if there is no room (of the same domain if it has any)."""
        part = self.of(domain)
        if page not in part:
            if self.size >= self.capacity:
                self._evict(part)
            self.size += 1
        part[page] = value

    def _evict(self, part: dict[int, int]) -> None:
        if not part:
            part = max(self._domains.values(), key=len)
        del part[next(iter(part))]
        self.size -= 1
        self.evictions += 1

    def invalidate(self, domain: DomId, page: int, count: int = 1) -> None:
        """Forget a range of pages of a domain."""
        self.invalidations += 1
        part = self._domains.get(domain)
        if not part:
            return
        if count == 1:
            if part.pop(page, None) is not None:
                self.size -= 1
            return
        if count < len(part):
            gone = [p for p in range(page, page + count) if p in part]
        else:
            gone = [p for p in part if page <= p < page + count]
        for p in gone:
            del part[p]
        self.size -= len(gone)

    def invalidate_domain(self, domain: DomId) -> None:
        """Forget all of a domain."""
        self.invalidations += 1
        self.size -= len(self._domains.pop(domain, {}))

    def invalidate_all(self) -> None:
        """Forget everything."""
        self.invalidations += 1
        self._domains.clear()
        self.size = 0
