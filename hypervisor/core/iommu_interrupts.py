"""Interrupt remapping: a device raises interrupts by an index, and each index belongs to one device and one domain."""

from __future__ import annotations

from errno import EINVAL, ENOSPC
from typing import Final, NamedTuple

from bus.addresses import Bdf, DomId
from hypervisor.core.errors import XenError
from hypervisor.core.iommu_faults import FaultReason

DEFAULT_ENTRIES: Final = 4096
MAX_PER_DEVICE: Final = 2048
"""MSI-X has no more vectors."""


class InterruptEntry(NamedTuple):
    """A present entry: what an index means. The source is always verified (SVT 01)."""

    source: Bdf
    domain: DomId
    pirq: int
    """The domain's physical interrupt, which an event channel may be bound to."""


class InterruptTable:
    """The remapping table of the machine."""

    def __init__(self, capacity: int = DEFAULT_ENTRIES) -> None:
        self._capacity = capacity
        self._entries: dict[int, InterruptEntry] = {}
        self._free: list[int] = []
        self._next = 0

    def allocate(self, source: Bdf, domain: DomId, pirq: int) -> int:
        """A new entry's index. ENOSPC if the table, or the device's share of it, is full; EINVAL for a bad PIRQ."""
        if pirq < 0:
            raise XenError(EINVAL)
        if sum(1 for entry in self._entries.values() if entry.source == source) >= MAX_PER_DEVICE:
            raise XenError(ENOSPC)
        if self._free:
            index = self._free.pop()
        elif self._next < self._capacity:
            index = self._next
            self._next += 1
        else:
            raise XenError(ENOSPC)
        self._entries[index] = InterruptEntry(source, domain, pirq)
        return index

    def release(self, index: int) -> None:
        """The entry is not present any more. EINVAL if it is not now."""
        if self._entries.pop(index, None) is None:
            raise XenError(EINVAL)
        self._free.append(index)

    def release_device(self, source: Bdf) -> None:
        """All entries of a device go."""
        for index in [i for i, entry in self._entries.items() if entry.source == source]:
            self.release(index)

    def lookup(self, source: Bdf, index: int) -> InterruptEntry | FaultReason:
        """What the index means to this device, or why it means nothing."""
        if not 0 <= index < self._capacity:
            return FaultReason.INTERRUPT_INDEX_BEYOND
        entry = self._entries.get(index)
        if entry is None:
            return FaultReason.INTERRUPT_NOT_PRESENT
        if entry.source != source:
            return FaultReason.INTERRUPT_SOURCE_INVALID
        return entry

    def of(self, source: Bdf) -> dict[int, InterruptEntry]:
        """The device's entries by index."""
        return {i: entry for i, entry in sorted(self._entries.items()) if entry.source == source}
