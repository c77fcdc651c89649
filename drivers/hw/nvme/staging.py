"""Buffers in the staging memory that a device shares with the hypervisor.

Blocks are powers of two of pages, up to a chunk of 2^MDTS pages. A chunk holds blocks of one size while one of them is in use: so
allocation costs the same whatever is in use, and a large block is to be had again as soon as the small ones of its chunk are free.
"""

from __future__ import annotations

from typing import Final

PAGE: Final = 4096


class StagingFull(Exception):
    """No block of that size is free now."""


class _Chunk:
    __slots__ = ("free", "order", "start", "total")

    def __init__(self, start: int) -> None:
        self.start = start
        self.order = -1
        self.free: list[int] = []
        self.total = 0


class Staging:
    """The allocator, and the memory: `view` is the staging memory itself."""

    def __init__(self, view: memoryview, largest: int) -> None:
        """`largest`: bytes of the largest block, a power of two pages. ValueError if not even four such blocks fit."""
        if len(view) < 4 * largest:
            raise ValueError(f"{len(view)} bytes of staging memory; {4 * largest} are needed")
        self.view = view
        self.largest: Final = largest
        self._orders = (largest // PAGE).bit_length()
        self._chunks = [_Chunk(start) for start in range(0, len(view) - largest + 1, largest)]
        self._idle = list(reversed(self._chunks))
        self._partial: list[set[_Chunk]] = [set() for _ in range(self._orders)]
        self.in_use = 0

    def _order(self, length: int) -> int:
        return ((length + PAGE - 1) // PAGE - 1).bit_length()

    def allocate(self, length: int) -> int:
        """Position of a block of at least `length` bytes (1 to `largest`). StagingFull."""
        order = self._order(length)
        partial = self._partial[order]
        if partial:
            chunk = next(iter(partial))
        elif self._idle:
            chunk = self._idle.pop()
            chunk.order = order
            step = PAGE << order
            chunk.free = list(range(chunk.start, chunk.start + self.largest, step))
            chunk.total = len(chunk.free)
            partial.add(chunk)
        else:
            raise StagingFull
        position = chunk.free.pop()
        if not chunk.free:
            partial.discard(chunk)
        self.in_use += 1
        return position

    def release(self, position: int) -> None:
        """Give a block back."""
        chunk = self._chunks[position // self.largest]
        chunk.free.append(position)
        self.in_use -= 1
        partial = self._partial[chunk.order]
        if len(chunk.free) == chunk.total:
            partial.discard(chunk)
            chunk.order = -1
            self._idle.append(chunk)
        else:
            partial.add(chunk)
