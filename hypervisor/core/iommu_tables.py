"""Second-level I/O page tables in machine memory, in the format of Intel VT-d (specification 3.x, section 9.8).

Four levels of 512 eight-byte entries translate 48-bit I/O virtual addresses. An entry: bit 0 read, bit 1 write (an entry
with neither is not present), bit 7 (PS) a leaf of 1 GiB at level 3 or 2 MiB at level 2, bits 51:12 the frame. Level 1
entries are leaves of 4 KiB. Aligned ranges get the largest leaves; a table whose 512 entries have become one aligned run
is replaced by a leaf; a change inside a leaf splits it.

Removing never fails for want of a frame: each tree keeps two frames for splits, and if even these are used up, the whole
large leaf goes (which stops some honest DMA, and lets none through).
"""

from __future__ import annotations

import struct
from errno import ENOMEM
from typing import Final, NamedTuple, Protocol

from bus.addresses import PAGE_SIZE, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.ports import MachineMemory

LEVELS: Final = 4
ADDRESS_BITS: Final = 48
PAGE_LIMIT: Final = 1 << (ADDRESS_BITS - 12)
"""I/O virtual pages are below this."""
READ: Final = 1
WRITE: Final = 2
PAGE_SIZE_BIT: Final = 1 << 7
ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
_ENTRIES: Final = 512
_RESERVE: Final = 2
_ENTRY: Final = struct.Struct("<Q")


class TablePool(Protocol):
    """Where frames for tables come from: the hypervisor's own memory, reachable by no domain."""

    def allocate(self) -> Mfn:
        """A zeroed frame. XenError(ENOMEM) if there is none."""

    def free(self, mfn: Mfn) -> None:
        """Give a frame of `allocate` back."""


class Translation(NamedTuple):
    """Where an I/O virtual page leads."""

    mfn: Mfn
    access: int
    """READ and WRITE, or'ed."""
    level: int
    """Level of the leaf: 1 (4 KiB), 2 (2 MiB), 3 (1 GiB)."""


class WalkStep(NamedTuple):
    """One level of a walk, as it stands in memory."""

    level: int
    table: Mfn
    slot: int
    """Index of the entry in the table."""
    entry: int
    kind: str
    """One of: table, leaf, not present."""


class IoPageTables:
    """One domain's tree."""

    def __init__(self, memory: MachineMemory, pool: TablePool) -> None:
        """Raises XenError(ENOMEM)."""
        self._memory = memory
        self._pool = pool
        self._present: dict[Mfn, int] = {}
        """Present entries by table."""
        self._reserve: list[Mfn] = []
        self.leaves = [0, 0, 0, 0]
        """Leaves by level (index 1 to 3)."""
        self.lost_leaves = 0
        """Large leaves removed whole because no frame was left to split them."""
        self.root = self._new_table()
        self._fill_reserve()

    # -- entries --------------------------------------------------------------------------------------------------

    def _new_table(self) -> Mfn:
        mfn = self._pool.allocate()
        self._present[mfn] = 0
        return mfn

    def _fill_reserve(self) -> None:
        try:
            while len(self._reserve) < _RESERVE:
                self._reserve.append(self._pool.allocate())
        except XenError:
            pass  # tried again at the next change

    def _get(self, table: Mfn, index: int) -> int:
        return int.from_bytes(self._memory.read(table, index * 8, 8), "little")

    def _set(self, table: Mfn, index: int, level: int, old: int, new: int) -> None:
        self._memory.write(table, index * 8, _ENTRY.pack(new))
        self._present[table] += bool(new & 3) - bool(old & 3)
        self._count_leaf(level, old, -1)
        self._count_leaf(level, new, 1)

    def _count_leaf(self, level: int, entry: int, step: int) -> None:
        if entry & 3 and (level == 1 or entry & PAGE_SIZE_BIT):
            self.leaves[level] += step

    @staticmethod
    def _index(page: int, level: int) -> int:
        return page >> 9 * (level - 1) & 511

    @staticmethod
    def _is_leaf(entry: int, level: int) -> bool:
        return level == 1 or bool(entry & PAGE_SIZE_BIT)

    # -- reading --------------------------------------------------------------------------------------------------

    def lookup(self, page: int) -> Translation | None:
        """Walk the tables for one I/O virtual page (below PAGE_LIMIT). None if it is not mapped."""
        table, level = self.root, LEVELS
        while True:
            entry = int.from_bytes(self._memory.read(table, (page >> 9 * (level - 1) & 511) * 8, 8), "little")
            if not entry & 3:
                return None
            frame = (entry & ADDRESS_MASK) >> 12
            if level == 1 or entry & PAGE_SIZE_BIT:
                return Translation(Mfn(frame + (page & (1 << 9 * (level - 1)) - 1)), entry & 3, level)
            table, level = Mfn(frame), level - 1

    def walk(self, page: int) -> list[WalkStep]:
        """The same walk, level by level, for people to see."""
        steps: list[WalkStep] = []
        table, level = self.root, LEVELS
        while True:
            index = self._index(page, level)
            entry = self._get(table, index)
            leaf = self._is_leaf(entry, level)
            kind = "not present" if not entry & 3 else "leaf" if leaf else "table"
            steps.append(WalkStep(level, table, index, entry, kind))
            if kind != "table":
                return steps
            table, level = Mfn((entry & ADDRESS_MASK) >> 12), level - 1

    @property
    def table_count(self) -> int:
        """Frames used by tables, the root included (the reserve is not)."""
        return len(self._present)

    # -- mapping --------------------------------------------------------------------------------------------------

    def map(self, page: int, mfn: Mfn, count: int, access: int) -> None:
        """Map `count` pages from `page` on to frames from `mfn` on, replacing what is there. XenError(ENOMEM), and then
        nothing of the range is mapped. ValueError for a range outside the address space, or no access."""
        if page < 0 or count < 1 or page + count > PAGE_LIMIT or not access & 3:
            raise ValueError(f"I/O pages {page:#x}+{count:#x}, access {access}")
        self._fill_reserve()
        done = 0
        try:
            while done < count:
                done += self._map_some(page + done, Mfn(mfn + done), count - done, access & 3)
        except XenError:
            self.unmap(page, count)
            raise

    def _map_some(self, page: int, mfn: Mfn, count: int, access: int) -> int:
        """Map one large leaf, or a run of 4 KiB leaves in one table; how many pages that was."""
        level = 1
        while level < 3:
            size = 1 << 9 * level
            if count < size or (page | mfn) & size - 1:
                break
            level += 1
        table = self._table_for(page, level)
        index, size = self._index(page, level), 1 << 9 * (level - 1)
        run = min(_ENTRIES - index, count) if level == 1 else 1
        flags = access | (PAGE_SIZE_BIT if level > 1 else 0)
        if level > 1:
            old = self._get(table, index)
            self._set(table, index, level, old, mfn << 12 | flags)
            self._free_below(old, level)
        else:
            before = self._memory.read(table, index * 8, run * 8)
            was = sum(1 for (entry,) in _ENTRY.iter_unpack(before) if entry & 3)
            entries = [(mfn + i) << 12 | flags for i in range(run)]
            self._memory.write(table, index * 8, struct.pack(f"<{run}Q", *entries))
            self._present[table] += run - was
            self.leaves[1] += run - was
        self._promote(page, level)
        return run * size

    def _table_for(self, page: int, level: int) -> Mfn:
        """The table of that level for the page, made where it is missing, leaves above it split."""
        table = self.root
        for above in range(LEVELS, level, -1):
            index = self._index(page, above)
            entry = self._get(table, index)
            if not entry & 3:
                below = self._new_table()
                self._set(table, index, above, entry, below << 12 | READ | WRITE)
            elif entry & PAGE_SIZE_BIT:
                below = self._split(table, index, above, entry)
            else:
                below = Mfn((entry & ADDRESS_MASK) >> 12)
            table = below
        return table

    def _split(self, table: Mfn, index: int, level: int, entry: int, *, reserve: bool = False) -> Mfn:
        """Replace a large leaf by a table that says the same. XenError(ENOMEM): nothing is changed."""
        try:
            below = self._pool.allocate()
        except XenError:
            if not reserve or not self._reserve:
                raise
            below = self._reserve.pop()
        step = 1 << 9 * (level - 2)
        first, flags = (entry & ADDRESS_MASK) >> 12, entry & 3 | (PAGE_SIZE_BIT if level > 2 else 0)
        entries = [(first + i * step) << 12 | flags for i in range(_ENTRIES)]
        self._memory.write(below, 0, struct.pack(f"<{_ENTRIES}Q", *entries))
        self._present[below] = _ENTRIES
        self.leaves[level - 1] += _ENTRIES
        self._set(table, index, level, entry, below << 12 | READ | WRITE)
        return below

    def _promote(self, page: int, level: int) -> None:
        """Replace full tables above the page that are one aligned run of leaves by a larger leaf."""
        while level < 3:
            path = self.walk_tables(page, level)
            if path is None:
                return
            parent, table = path
            if self._present[table] != _ENTRIES:
                return
            step, (first,) = 1 << 9 * (level - 1), _ENTRY.unpack(self._memory.read(table, 0, 8))
            frame = (first & ADDRESS_MASK) >> 12
            if not self._is_leaf(first, level) or frame & (step * _ENTRIES - 1):
                return
            flags = first & ~ADDRESS_MASK
            run = struct.pack(f"<{_ENTRIES}Q", *((frame + i * step) << 12 | flags for i in range(_ENTRIES)))
            if self._memory.read(table, 0, PAGE_SIZE) != run:
                return
            index = self._index(page, level + 1)
            old = self._get(parent, index)
            self._set(parent, index, level + 1, old, frame << 12 | first & 3 | PAGE_SIZE_BIT)
            self.leaves[level] -= _ENTRIES
            self._drop_table(table)
            level += 1

    def walk_tables(self, page: int, level: int) -> tuple[Mfn, Mfn] | None:
        """(table of level + 1, table of `level`) on the page's path; None if a leaf or nothing is in between."""
        parent, table = self.root, self.root
        for above in range(LEVELS, level, -1):
            entry = self._get(table, self._index(page, above))
            if not entry & 3 or entry & PAGE_SIZE_BIT:
                return None
            parent, table = table, Mfn((entry & ADDRESS_MASK) >> 12)
        return parent, table

    # -- unmapping ------------------------------------------------------------------------------------------------

    def unmap(self, page: int, count: int) -> None:
        """Remove `count` pages from `page` on; what is not mapped is passed over. Never fails for want of memory."""
        if page < 0 or count < 1 or page + count > PAGE_LIMIT:
            raise ValueError(f"I/O pages {page:#x}+{count:#x}")
        self._unmap(self.root, LEVELS, 0, page, page + count)
        self._fill_reserve()

    def _unmap(self, table: Mfn, level: int, base: int, first: int, end: int) -> None:
        """Remove [first, end) below a table that covers pages from `base` on."""
        span = 1 << 9 * (level - 1)
        low = max(0, (first - base) // span)
        high = min(_ENTRIES, -(-(end - base) // span))
        raw = self._memory.read(table, low * 8, (high - low) * 8)
        for offset, (entry,) in enumerate(_ENTRY.iter_unpack(raw)):
            if not entry & 3:
                continue
            index = low + offset
            start = base + index * span
            whole = first <= start and start + span <= end
            if not whole and self._is_leaf(entry, level):
                try:
                    self._split(table, index, level, entry, reserve=True)
                except XenError:
                    self.lost_leaves += 1
                    whole = True
                else:
                    entry = self._get(table, index)
            if whole:
                self._set(table, index, level, entry, 0)
                self._free_below(entry, level)
                continue
            below = Mfn((entry & ADDRESS_MASK) >> 12)
            self._unmap(below, level - 1, start, first, end)
            if not self._present[below]:
                self._set(table, index, level, entry, 0)
                self._drop_table(below)

    def _free_below(self, entry: int, level: int) -> None:
        """Give back the tables under an entry that is no longer in use."""
        if not entry & 3 or self._is_leaf(entry, level):
            return
        table = Mfn((entry & ADDRESS_MASK) >> 12)
        for (below,) in _ENTRY.iter_unpack(self._memory.read(table, 0, PAGE_SIZE)):
            self._count_leaf(level - 1, below, -1)
            self._free_below(below, level - 1)
        self._drop_table(table)

    def _drop_table(self, table: Mfn) -> None:
        del self._present[table]
        self._pool.free(table)

    def destroy(self) -> None:
        """Give all frames back. The tree must not be used any more."""
        for table in self._present:
            self._pool.free(table)
        for mfn in self._reserve:
            self._pool.free(mfn)
        self._present, self._reserve = {}, []


class XenPool:
    """Frames of the hypervisor's own: an extent below the first frame that a domain can have."""

    def __init__(self, memory: MachineMemory, base: int = 0x400, frames: int = 0xC00) -> None:
        self._memory = memory
        self._base = base
        self._next = 0
        self._count = frames
        self._free: list[Mfn] = []
        memory.create_extent(Mfn(base), frames)

    def allocate(self) -> Mfn:
        """A zeroed frame. XenError(ENOMEM)."""
        if self._free:
            return self._free.pop()
        if self._next >= self._count:
            raise XenError(ENOMEM, "the hypervisor's frames for I/O page tables are used up")
        self._next += 1
        return Mfn(self._base + self._next - 1)

    def free(self, mfn: Mfn) -> None:
        """Give a frame back; it is zeroed here and now."""
        self._memory.write(mfn, 0, bytes(PAGE_SIZE))
        self._free.append(mfn)

    @property
    def used(self) -> int:
        """Frames in use."""
        return self._next - len(self._free)
