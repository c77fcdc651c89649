"""When the controller raises which MSI-X vector: masks, and coalescing (NVMe 1.4, section 7.5)."""

from __future__ import annotations

from drivers.hw.msix import MsixTable
from drivers.hw.nvme.features import Features
from drivers.hw.pci import ConfigSpace


class Interrupts:
    """The vectors of one controller."""

    def __init__(self, config: ConfigSpace, msix: MsixTable, features: Features) -> None:
        self._config = config
        self._msix = msix
        self._features = features
        self._gathered: dict[int, tuple[int, int]] = {}

    def reset(self) -> None:
        """Completions that were gathered are forgotten with their queues."""
        self._gathered.clear()

    def at_once(self, vector: int) -> bool:
        """The vector is not coalesced."""
        return not self._features.coalescing(vector)[1]

    def raise_vector(self, vector: int) -> list[int]:
        """What to raise; nothing if it is masked (then it is pending) or MSI-X is off."""
        if self._config.msix_enabled and self._msix.raise_vector(vector, self._config.msix_masked):
            return [vector]
        return []

    def posted(self, now: int, vector: int, count: int) -> list[int]:
        """Entries of a coalesced vector are in memory: what to raise now."""
        threshold, delay = self._features.coalescing(vector)
        if not delay:
            return []
        gathered, deadline = self._gathered.get(vector, (0, now + delay))
        if gathered + count >= threshold:
            self._gathered.pop(vector, None)
            return self.raise_vector(vector)
        self._gathered[vector] = gathered + count, deadline
        return []

    def due(self, now: int) -> list[int]:
        """Vectors to raise because they were gathered long enough."""
        ready: list[int] = []
        for vector in [v for v, (_, deadline) in self._gathered.items() if deadline <= now]:
            del self._gathered[vector]
            ready += self.raise_vector(vector)
        return ready

    def deadline(self) -> int | None:
        """When the next is due."""
        return min(deadline for _, deadline in self._gathered.values()) if self._gathered else None

    def unmasked(self) -> list[int]:
        """A mask may have gone: pending vectors to raise."""
        if not self._config.msix_enabled:
            return []
        return self._msix.unmasked(self._config.msix_masked)
