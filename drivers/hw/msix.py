"""MSI-X table and pending bit array of a device (PCI Local Bus 3.0, section 6.8.2).

A device raises a vector by its number, and the interrupt remapping table says what that means: addresses and data of the table are
kept for those who read them back. Entries start unmasked (the specification has them masked): on Xen it is the hypervisor that unmasks
an entry when it maps it to a PIRQ, and here one that is not mapped is refused by the remapping table. A mask that is set is obeyed.
"""

from __future__ import annotations

from typing import Final

ENTRY_SIZE: Final = 16
MASKED: Final = 1


class MsixTable:
    """Vectors; those raised while masked are pending."""

    def __init__(self, vectors: int) -> None:
        self.vectors: Final = vectors
        self._table = bytearray()
        self._pending: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Addresses 0, no mask."""
        self._table = bytearray(ENTRY_SIZE * self.vectors)
        self._pending.clear()

    def read(self, offset: int, size: int) -> int:
        """From the table; 0 outside."""
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """To the table: aligned 4 or 8 bytes, as the specification demands; others are dropped."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        self._table[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        for vector in range(offset // ENTRY_SIZE, (offset + size - 1) // ENTRY_SIZE + 1):
            self._table[vector * ENTRY_SIZE + 12] &= MASKED
            self._table[vector * ENTRY_SIZE + 13 : vector * ENTRY_SIZE + 16] = bytes(3)

    def read_pending(self, offset: int, size: int) -> int:
        """From the pending bit array."""
        bits = sum(1 << vector for vector in self._pending)
        return bits >> 8 * offset & (1 << 8 * size) - 1

    def masked(self, vector: int) -> bool:
        """That vector is masked."""
        return bool(self._table[vector * ENTRY_SIZE + 12] & MASKED)

    def raise_vector(self, vector: int, function_masked: bool) -> bool:
        """True: raise it now. False: it is masked, and pending."""
        if function_masked or self.masked(vector):
            self._pending.add(vector)
            return False
        return True

    def unmasked(self, function_masked: bool) -> list[int]:
        """Pending vectors that may go now; they are not pending any more."""
        if not self._pending or function_masked:
            return []
        ready = sorted(vector for vector in self._pending if not self.masked(vector))
        self._pending.difference_update(ready)
        return ready
