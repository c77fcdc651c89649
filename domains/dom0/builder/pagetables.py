"""A PV guest's first page tables, made in bulk: 4 levels, 4 KiB pages, tables in one run of frames per
mapping.

A table covers 512 entries of 8 bytes. Level 1 tables map pages; the level 4 table is the root. Within a
mapping the tables lie by level from the root down and by address within a level, as libxenguest puts them
(the root first, so that start_info's pt_base is CR3's frame).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from bus.addresses import PAGE_SHIFT, Mfn

from .errors import BuildError

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
READ_ONLY_LEAF: Final = PRESENT | USER | ACCESSED | DIRTY
LEAF: Final = READ_ONLY_LEAF | WRITABLE
TABLE: Final = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
ENTRIES: Final = 512
_VIRTUAL: Final = (1 << 48) - 1


def _shift(level: int) -> int:
    return PAGE_SHIFT + 9 * level


class PageTables:
    """Tables under construction. `p2m[pfn]` is the MFN of each of the guest's frames."""

    def __init__(self, p2m: Sequence[int]) -> None:
        self._p2m = p2m
        self._tables: dict[tuple[int, int], int] = {}  # (level, address >> shift of the level) -> pfn
        self._content: dict[int, array[int]] = {}  # pfn -> 512 entries

    def missing(self, start: int, end: int) -> int:
        """How many tables a mapping of [start, end) would add to those that are there."""
        return sum(
            (level, index) not in self._tables
            for level in (4, 3, 2, 1)
            for index in self._indices(level, start, end)
        )

    @staticmethod
    def _indices(level: int, start: int, end: int) -> range:
        """Numbers of the tables of one level that cover [start, end)."""
        shift = _shift(level)
        return range((start & _VIRTUAL) >> shift, ((end - 1 & _VIRTUAL) >> shift) + 1)

    def add(self, start: int, end: int, first_pfn: int) -> int:
        """Make the missing tables for [start, end) in the frames from `first_pfn` on; how many they are."""
        pfn = first_pfn
        for level in (4, 3, 2, 1):
            for index in self._indices(level, start, end):
                if (level, index) in self._tables:
                    continue
                self._tables[level, index] = pfn
                self._content[pfn] = array("Q", bytes(8 * ENTRIES))
                if level < 4:
                    parent = self._content[self._tables[level + 1, index >> 9]]
                    parent[index & 511] = self._p2m[pfn] << PAGE_SHIFT | TABLE
                pfn += 1
        return pfn - first_pfn

    def fill(self, start: int, first_pfn: int, count: int, read_only: range) -> None:
        """Map `count` frames from `first_pfn` at `start`; those in `read_only` (pfns, step 1) without write
        permission.

        BuildError if part of it is mapped already.
        """
        flags = LEAF
        entries = array("Q", [mfn << PAGE_SHIFT | flags for mfn in self._p2m[first_pfn : first_pfn + count]])
        for pfn in range(max(read_only.start, first_pfn), min(read_only.stop, first_pfn + count)):
            entries[pfn - first_pfn] &= ~WRITABLE
        page = (start & _VIRTUAL) >> PAGE_SHIFT
        done = 0
        while done < count:
            index, slot = divmod(page + done, ENTRIES)
            size = min(ENTRIES - slot, count - done)
            table = self._content[self._tables[1, index]]
            if any(table[slot : slot + size]):
                raise BuildError(
                    f"kernel: two parts of the initial layout at {start + (done << PAGE_SHIFT):#x}"
                )
            table[slot : slot + size] = entries[done : done + size]
            done += size

    @property
    def root(self) -> int:
        """Pfn of the level 4 table."""
        return self._tables[4, 0]

    def levels(self) -> tuple[tuple[Mfn, int], ...]:
        """(MFN, level) of every table, the root first."""
        ordered = sorted(self._tables.items(), key=lambda item: item[1])
        return tuple((Mfn(self._p2m[pfn]), level) for (level, _), pfn in ordered)

    def runs(self) -> list[tuple[int, bytes]]:
        """(first pfn, content) of each run of neighbouring tables."""
        out: list[tuple[int, bytearray]] = []
        for pfn in sorted(self._content):
            if out and out[-1][0] + (len(out[-1][1]) >> PAGE_SHIFT) == pfn:
                out[-1][1].extend(self._content[pfn].tobytes())
            else:
                out.append((pfn, bytearray(self._content[pfn].tobytes())))
        return [(pfn, bytes(content)) for pfn, content in out]
