"""The tables of `domains.hvm.shadow`: which there are, what each is made from, and how they come and go; the guest's tables stay as they
are but for accessed and dirty bits. The walk that fills them is there."""

from __future__ import annotations

from collections import Counter
from typing import Final, Protocol

from bus.addresses import PAGE_SHIFT, MachineAddr
from domains.hvm.physmap import PhysicalMap
from domains.hvm.shadow_tables import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    ENTRIES,
    LARGE,
    LONG,
    NO_PAGING,
    PAE,
    PAGE,
    PRESENT,
    RESERVED,
    USER,
    WRITABLE,
    GuestPage,
    Mode,
    Pool,
    Table,
)
from domains.vcpu.walk import NotMapped

WINDOW: Final = 1 << 39
"""Where the vCPU has what is not the domain's own memory: guest-physical addresses have 39 bits with shadow paging."""
ADDRESS_BITS: Final = 39
ADDRESS_LIMIT: Final = 1 << ADDRESS_BITS
POOL: Final = WINDOW - (1 << 34)
"""Physical address of our tables."""
CR0_PG, CR0_WP = 1 << 31, 1 << 16
CR4_PSE, CR4_PAE, CR4_SMEP = 1 << 4, 1 << 5, 1 << 20
EFER_NXE, EFER_LMA = 1 << 11, 1 << 10
BIT_20: Final = 1 << 20
BEYOND: Final = ADDRESS & ~(WINDOW - 1)
RSVD_2M: Final = 0x1FE000
RSVD_1G: Final = 0x3FFFE000
RSVD_PAE: Final = 0x7FF << 52
"""Bits that software may use in the entries of long mode, and that PAE reserves (SDM volume 3, table 4-11)."""
RSVD_PDPTE: Final = BEYOND | 0x1E6 | 0xFFF << 52
SPARE: Final = 8
"""Tables that one miss can need at most."""
OURS: Final = PRESENT | ACCESSED


class Registers(Protocol):
    """What is read of the guest's registers; CR2 is written, too."""

    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int


class Machine(Protocol):
    """What is asked of the vCPU (`domains.vcpu.shadow_vcpu`); addresses are its own physical ones."""

    def map(self, address: MachineAddr, host_address: int, size: int, *, writable: bool = True) -> None:
        """Host memory."""

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """Accesses go to hooks."""

    def unmap(self, address: MachineAddr, size: int) -> None:
        """Nothing."""

    def drop_code(self, address: MachineAddr, size: int) -> None:
        """Translations are stale."""

    def flush_tlb(self) -> None:
        """Cached walks of our tables are stale."""

    def load_tables(self, root: int) -> None:
        """For what is in the guest's control registers now."""

    def forget_tables(self) -> None:
        """Ask for others before the next walk."""

    def watch_flushes(self, wanted: bool) -> None:
        """Tell of writes of CR3."""


class ShadowTables:
    """All tables of one domain. `octets` are the domain's own frames."""

    def __init__(self, physmap: PhysicalMap, octets: memoryview, pool: memoryview) -> None:
        if physmap.base + physmap.frames << PAGE_SHIFT > POOL:
            raise ValueError("the domain's memory lies too high for shadow paging")
        self._physmap: Final = physmap
        self._host: Final = physmap.host
        self._q: Final = octets.cast("B").cast("Q")
        self._d: Final = octets.cast("B").cast("I")
        self._base: Final = physmap.base
        self._pool: Final = Pool(pool, POOL)
        self._machine: Machine | None = None
        self._regs: Registers | None = None
        self._windows: set[int] = set()  # gfns that are host memory at WINDOW
        self._window_hosts: dict[int, tuple[int, bool]] = {}
        self._tables: dict[object, Table] = {}
        self._by_address: dict[int, Table] = {}
        self._runs: dict[int, Table] = {}  # first gfn -> its table of level 1
        self._pages: dict[int, GuestPage] = {}
        self._unsynced: list[GuestPage] = []
        self._leaves: dict[int, set[tuple[Table, int]]] = {}  # gfn -> entries of level 1 outside `_runs`
        self._mode: Mode = NO_PAGING
        self._root: Table | None = None
        self._wp = self._nxe = self._smep = self._pse = False
        self._a20 = -1
        self._busy = False
        self._flush = False
        self.counts: Final[Counter[str]] = Counter()

    # --- tables

    def _entry(self, table: Table, index: int) -> int:
        """The guest's entry of now that ours is made from; 0 where there is no memory."""
        page = table.page
        if page is None:
            return 0
        mfn = self._physmap.mfn(page.gfn)
        if mfn is None:
            return 0
        at = mfn - self._base
        if table.width == 4:
            return self._d[(at << 10) + table.first + (index if table.level == 1 else index >> 1)]
        return self._q[(at << 9) + table.first + index]

    def _store(self, table: Table, index: int, entry: int) -> None:
        """Accessed or dirty, as the processor sets them."""
        assert table.page is not None
        mfn = self._physmap.mfn(table.page.gfn)
        assert mfn is not None
        at = mfn - self._base
        if table.width == 4:
            self._d[(at << 10) + table.first + (index if table.level == 1 else index >> 1)] = entry
        else:
            self._q[(at << 9) + table.first + index] = entry

    def _set(self, table: Table, index: int, entry: int, value: int) -> None:
        if table.words[index]:
            self._zap(table, index)
        table.words[index] = value
        table.live[index] = entry

    def _child(self, table: Table, index: int, entry: int, linear: int, role: int) -> Table:
        """The table of ours for the one that a guest's entry names."""
        gfn = (entry & ADDRESS & self._a20) >> PAGE_SHIFT
        width = self._mode.width
        first = 0
        if width == 4 and table.level == 2:
            first = 512 * (linear >> 21 & 1)
        return self._guest_table(gfn, width, table.level - 1, first, role)

    def _guest_table(self, gfn: int, width: int, level: int, first: int, role: int) -> Table:
        key = (gfn, width, level, first, role)
        found = self._tables.get(key)
        if found is not None:
            return found
        table = self._new(level, key)
        table.first, table.width = first, width
        page = self._pages.get(gfn)
        if page is None:
            page = self._pages[gfn] = GuestPage(gfn)
            self._protect(gfn)
        page.tables.append(table)
        table.page = page
        return table

    def _new(self, level: int, key: object) -> Table:
        table = self._pool.take(level, key)
        self._tables[key] = table
        self._by_address[table.address] = table
        return table

    def _root_table(self, cr3: int) -> Table:
        mode = self._mode
        if mode is NO_PAGING:
            key: object = ("flat root",)
            root = self._tables.get(key)
            if root is None:
                root = self._new(3, key)
                root.root = True
                for quarter in range(4):
                    upper = self._flat(quarter << 18)
                    root.words[quarter] = upper.address | PRESENT
                    upper.parents.add((root, quarter))
            return root
        role = 0 if self._wp else 1 | WRITABLE | USER
        if mode is LONG:
            root = self._guest_table((cr3 & ADDRESS & self._a20) >> PAGE_SHIFT, 8, 4, 0, role)
        elif mode is PAE:
            place = cr3 & 0xFFFFFFE0 & self._a20
            root = self._guest_table(place >> PAGE_SHIFT, 8, 3, (place & PAGE - 1) >> 3, role)
        else:
            gfn = (cr3 & 0xFFFFF000 & self._a20) >> PAGE_SHIFT
            key = (gfn, "32-bit root", role)
            found = self._tables.get(key)
            if found is None:
                found = self._new(3, key)
                for quarter in range(4):
                    part = self._guest_table(gfn, 4, 2, quarter * 256, role)
                    found.words[quarter] = part.address | PRESENT
                    part.parents.add((found, quarter))
                    part.root = True
            root = found
        root.root = True
        return root

    def _flat(self, first: int) -> Table:
        """A table of level 2 that maps a GiB of guest frames in order."""
        key = ("flat", first)
        table = self._tables.get(key)
        if table is None:
            table = self._new(2, key)
            table.region = first
            table.root = True
        return table

    def _run(self, first: int) -> Table:
        """A table of level 1 that maps 512 guest frames in order."""
        table = self._runs.get(first)
        if table is None:
            table = self._new(1, ("run", first))
            table.region = first
            table.root = True
            self._runs[first] = table
            for frame in range(first, first + ENTRIES):
                self._fill_run(table, frame)
        return table

    def _fill_run(self, table: Table, frame: int) -> None:
        gfn = frame & (self._a20 >> PAGE_SHIFT)
        page = self._pages.get(gfn)
        rights = OURS | USER if page is not None and page.synced else OURS | USER | WRITABLE | DIRTY
        table.words[frame & 511] = self._target(gfn) | rights

    def _target(self, gfn: int) -> int:
        """Physical address of the vCPU for a guest frame."""
        mfn = self._physmap.mfn(gfn)
        return mfn << PAGE_SHIFT if mfn is not None else WINDOW | gfn << PAGE_SHIFT & WINDOW - 1

    # --- in step with the guest's

    def _protect(self, gfn: int) -> None:
        """No entry of ours lets the guest write that frame."""
        for table, index in self._leaves.get(gfn, ()):
            table.words[index] &= ~WRITABLE
        for frame in (gfn,) if self._a20 == -1 else (gfn, gfn | BIT_20 >> PAGE_SHIFT):
            run = self._runs.get(frame & ~(ENTRIES - 1))
            if run is not None:
                run.words[frame & 511] &= ~WRITABLE
        self._flush = True

    def _unsync(self, page: GuestPage) -> None:
        if not page.synced:
            return
        page.synced = False
        self.counts["unsyncs"] += 1
        if not self._unsynced:
            assert self._machine is not None
            self._machine.watch_flushes(True)
        self._unsynced.append(page)

    def _sync(self, page: GuestPage) -> None:
        used = False
        for table in list(page.tables):
            live = table.live
            for index, entry in list(live.items()):
                if self._entry(table, index) != entry:
                    self._zap(table, index)
            used = (
                used
                or bool(live)
                or (table is self._root or (table.root and table.level == 2 and self._is_current(table)))
            )
        if not used:
            self._destroy_page(page)
            return
        page.synced = True
        self._protect(page.gfn)

    def _is_current(self, table: Table) -> bool:
        return any(parent is self._root for parent, _ in table.parents)

    def _zap(self, table: Table, index: int) -> None:
        """An entry of ours goes."""
        old = table.words[index]
        table.words[index] = 0
        entry = table.live.pop(index, 0)
        if old == RESERVED:
            return
        if table.level == 1:
            gfn = (entry & ADDRESS & self._a20) >> PAGE_SHIFT
            leaves = self._leaves.get(gfn)
            if leaves is not None:
                leaves.discard((table, index))
                if not leaves:
                    del self._leaves[gfn]
            return
        child = self._by_address.get(old & ADDRESS)
        if child is not None:
            child.parents.discard((table, index))
            if not child.parents and not child.root:
                self._destroy(child)

    def _destroy(self, table: Table) -> None:
        """A table of ours goes, with what only it names."""
        for parent, index in list(table.parents):
            if parent.words[index]:
                parent.words[index] = 0
                parent.live.pop(index, None)
        table.parents.clear()
        for index in list(table.live):
            self._zap(table, index)
        del self._tables[table.key], self._by_address[table.address]
        page = table.page
        if page is not None:
            page.tables.remove(table)
            if not page.tables and self._pages.get(page.gfn) is page:
                del self._pages[page.gfn]
        self._pool.give(table)
        self._flush = True
        if table is self._root:
            self._root = None
            assert self._machine is not None
            self._machine.forget_tables()

    def _destroy_page(self, page: GuestPage) -> None:
        for table in list(page.tables):
            if self._tables.get(table.key) is not table:
                continue
            for parent, _ in list(table.parents):
                if parent.page is None and parent.region < 0 and self._tables.get(parent.key) is parent:
                    self._forget_root(parent)
            if self._tables.get(table.key) is table:
                self._destroy(table)

    def _forget_root(self, root: Table) -> None:
        """The root of a two-level guest: it has no page of its own."""
        for quarter in range(4):
            child = self._by_address.get(root.words[quarter] & ADDRESS)
            if child is not None:
                child.parents.discard((root, quarter))
        root.words[0] = root.words[1] = root.words[2] = root.words[3] = 0
        del self._tables[root.key], self._by_address[root.address]
        self._pool.give(root)
        if root is self._root:
            self._root = None
            assert self._machine is not None
            self._machine.forget_tables()

    def _drop(self) -> None:
        """All tables go."""
        self.counts["drops"] += 1
        for table in self._by_address.values():
            self._pool.give(table)
        for store in (self._tables, self._by_address, self._runs, self._pages, self._leaves):
            store.clear()
        self._unsynced.clear()
        self._root = None

    def drop_all(self) -> None:
        """All tables go; the vCPU asks for new ones."""
        self._drop()
        assert self._machine is not None
        self._machine.watch_flushes(False)
        self._machine.forget_tables()
        self._machine.flush_tlb()

    # --- questions

    def protected(self, gfn: int) -> bool:
        """It is write-protected, as a table of the guest's."""
        page = self._pages.get(gfn)
        return page is not None and page.synced

    @property
    def tables(self) -> int:
        """How many pages of tables are in use."""
        return len(self._by_address)

    @property
    def a20(self) -> int:
        """The mask of guest-physical addresses."""
        return self._a20

    def physical(self, linear: int) -> int:
        """Guest-physical address of a linear one, by the guest's tables of now, without rights. NotMapped."""
        regs = self._regs
        assert regs is not None
        if not regs.cr0 & CR0_PG:
            return linear & 0xFFFFFFFF & self._a20
        q, mfn_of, base = self._q, self._physmap.mfn, self._base
        if regs.efer & EFER_LMA:
            if linear >> 47 not in (0, 0x1FFFF):
                raise NotMapped(linear)
            table, shift = regs.cr3 & ADDRESS, 39
        elif regs.cr4 & CR4_PAE:
            linear &= 0xFFFFFFFF
            table, shift = regs.cr3 & 0xFFFFFFE0, 30
        else:
            return self._physical32(linear & 0xFFFFFFFF)
        while True:
            table &= self._a20
            mfn = mfn_of(table >> PAGE_SHIFT)
            if mfn is None:
                raise NotMapped(linear)
            place = table & PAGE - 1
            entry = q[(mfn - base << 9) + (place >> 3) + (linear >> shift & 511)]
            if not entry & PRESENT:
                raise NotMapped(linear)
            table = entry & ADDRESS
            if shift == 12 or (entry & LARGE and shift in (21, 30) and (regs.efer & EFER_LMA or shift == 21)):
                mask = (1 << shift) - 1
                return (table & ~mask | linear & mask) & self._a20
            shift -= 9

    def _physical32(self, linear: int) -> int:
        regs, d = self._regs, self._d
        assert regs is not None
        table = regs.cr3 & 0xFFFFF000
        for shift in (22, 12):
            mfn = self._physmap.mfn((table & self._a20) >> PAGE_SHIFT)
            if mfn is None:
                raise NotMapped(linear)
            entry = d[(mfn - self._base << 10) + (linear >> shift & 1023)]
            if not entry & PRESENT:
                raise NotMapped(linear)
            if shift == 22 and entry & LARGE and regs.cr4 & CR4_PSE:
                return ((entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32) | linear & 0x3FFFFF) & self._a20
            table = entry & 0xFFFFF000
        return (table | linear & 0xFFF) & self._a20
