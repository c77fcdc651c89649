"""The parts of shadow paging: shadow tables in a pool of pages, the guest's tables that they are made from, and what each paging mode
has for entries (Intel SDM volume 3, 4.3 to 4.5).
"""

from __future__ import annotations

from typing import Final, NamedTuple

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ADDRESS: Final = 0x000F_FFFF_FFFF_F000
RESERVED: Final = PRESENT | 1 << 51
"""An entry of ours that gives the guest the page fault of a reserved bit: beyond the physical addresses of the vCPU."""
ENTRIES: Final = 512
PAGE: Final = 4096


class Mode(NamedTuple):
    """A paging mode: tables of our format have 9 bits of index a level, whatever the guest's have."""

    name: str
    top: int
    """The level of the tables at which CR3 points (of ours: 3 or 4)."""
    width: int
    """Bytes of a guest's entry; 0: no paging."""


NO_PAGING: Final = Mode("none", 3, 0)
TWO_LEVELS: Final = Mode("32-bit", 3, 4)
PAE: Final = Mode("pae", 3, 8)
LONG: Final = Mode("long", 4, 8)


class GuestPage:
    """A page of the guest's that our tables are made from. Write-protected while `synced`."""

    __slots__ = ("gfn", "synced", "tables")

    def __init__(self, gfn: int) -> None:
        self.gfn: Final = gfn
        self.tables: list[Table] = []
        self.synced = True


class Table:
    """A page of ours. `live`: what the guest's entry was for each of our entries that is there."""

    __slots__ = (
        "address",
        "first",
        "key",
        "level",
        "live",
        "page",
        "parents",
        "region",
        "root",
        "slot",
        "width",
        "words",
    )

    def __init__(self, slot: int, address: int, words: memoryview, level: int, key: object) -> None:
        self.slot: Final = slot
        self.address: Final = address
        self.words: Final = words
        self.level: Final = level
        self.key: Final = key
        self.live: dict[int, int] = {}
        self.parents: set[tuple[Table, int]] = set()
        self.page: GuestPage | None = None
        self.width = 8
        """Bytes of an entry of that page's."""
        self.first = 0
        """Index of the guest's entry that our first one is made from, in words of the mode's width from the page's start."""
        self.region = -1
        """Of a table that maps guest frames in order: the first one."""
        self.root = False


class Pool:
    """Pages for tables, at physical `address` of the vCPU."""

    def __init__(self, memory: memoryview, address: int) -> None:
        self._words: Final = memory.cast("B").cast("Q")
        self._address: Final = address
        self.pages: Final = len(self._words) // ENTRIES
        self._free = list(range(self.pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many are left."""
        return len(self._free)

    def take(self, level: int, key: object) -> Table:
        """An empty table. IndexError if there is none left."""
        slot = self._free.pop()
        words = self._words[slot * ENTRIES : (slot + 1) * ENTRIES]
        words[:] = _EMPTY
        return Table(slot, self._address + slot * PAGE, words, level, key)

    def give(self, table: Table) -> None:
        """It is not used any more."""
        self._free.append(table.slot)


_EMPTY: Final = memoryview(bytes(PAGE)).cast("Q")
