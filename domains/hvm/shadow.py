"""Shadow page tables (`hap=0`): the hypervisor's own tables from guest-virtual to machine addresses, built from the guest's tables and
the p2m when the vCPU misses something.

They behave as a big TLB does, so that what the architecture says of TLBs is all that a guest may count on:

* A table of the guest's that ours are made from is write-protected. The first write to it takes the protection off ("unsynced"), and the
  next flush (CR3, CR4, CR0; INVLPG for the path of its one address) compares what was taken over with what is there, drops what
  changed, and protects the page again; a page of which nothing is in use any more is left alone from then on.
* A miss walks the guest's tables as they are now, and takes each entry on its way anew if it changed. So more rights, and pages that
  appear, need no flush; as on a processor.
* Accessed bits are set by that walk; a page whose dirty bit is not set is mapped read-only until it is written.
* vCPUs take turns on one thread and share all tables; each has a root of its own by its CR3.
* Large pages of the guest's, and guests without paging, go by tables that map a run of guest frames in order, made once for each run.

Own memory is at its machine addresses for the vCPU, as a PV guest's; devices and granted pages are at WINDOW + guest-physical address.
Page faults of the guest's are raised by the vCPU's own walk of our tables: entries that the guest would fault on are taken over as
they are, or left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, Protocol

from bus.addresses import PAGE_SHIFT, MachineAddr, Mfn
from domains.hvm.physmap import PhysicalMap
from domains.hvm.shadow_tables import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    ENTRIES,
    LARGE,
    LONG,
    NO_PAGING,
    NX,
    PAE,
    PAGE,
    PRESENT,
    RESERVED,
    TWO_LEVELS,
    USER,
    WRITABLE,
    GuestPage,
    Mode,
    Pool,
    Table,
)
from domains.vcpu.shadow_mmu import FETCH, WRITE
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
_BEYOND: Final = ADDRESS & ~(WINDOW - 1)
_RSVD_2M: Final = 0x1FE000
_RSVD_1G: Final = 0x3FFFE000
_RSVD_PAE: Final = 0x7FF << 52
"""Bits that software may use in the entries of long mode, and that PAE reserves (SDM volume 3, table 4-11)."""
_RSVD_PDPTE: Final = _BEYOND | 0x1E6 | 0xFFF << 52
SPARE: Final = 8
"""Tables that one miss can need at most."""
_OURS: Final = PRESENT | ACCESSED


class Registers(Protocol):
    """What is read of the guest's registers."""

    cr0: int
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


class Shadow:
    """See the module. Implements `domains.vcpu.shadow_mmu.MissHandler`, `domains.hvm.physmap.Mapper` and
    `domains.vcpu.walk.Space`. `octets` are the domain's own frames."""

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

    def attach(self, machine: Machine, regs: Registers) -> None:
        """The vCPU."""
        self._machine, self._regs = machine, regs
        own = self._physmap
        machine.map(MachineAddr(own.base << PAGE_SHIFT), self._host, own.frames << PAGE_SHIFT)

    # --- Mapper: the p2m changes

    def map(self, address: MachineAddr, host_address: int, size: int, *, writable: bool = True) -> None:
        """Own memory is there already; other memory comes to its window."""
        gfn = address >> PAGE_SHIFT
        assert self._machine is not None
        self._change(gfn, size >> PAGE_SHIFT)
        own = self._physmap
        if self._host <= host_address < self._host + (own.frames << PAGE_SHIFT):
            self._leave(gfn, size >> PAGE_SHIFT)
            return
        self._machine.map(MachineAddr(WINDOW + address), host_address, size, writable=writable)
        for step in range(size >> PAGE_SHIFT):
            self._window_hosts[gfn + step] = host_address + (step << PAGE_SHIFT), writable

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """See Mapper."""
        assert self._machine is not None
        self._change(address >> PAGE_SHIFT, size >> PAGE_SHIFT)
        self._leave(address >> PAGE_SHIFT, size >> PAGE_SHIFT, unmap=False)
        self._machine.map_mmio(MachineAddr(WINDOW + address), size)
        self._windows.update(range(address >> PAGE_SHIFT, address + size >> PAGE_SHIFT))

    def unmap(self, address: MachineAddr, size: int) -> None:
        """See Mapper."""
        self._change(address >> PAGE_SHIFT, size >> PAGE_SHIFT)
        self._leave(address >> PAGE_SHIFT, size >> PAGE_SHIFT)

    def _leave(self, gfn: int, count: int, *, unmap: bool = True) -> None:
        """Nothing is at the window any more."""
        assert self._machine is not None
        for frame in range(gfn, gfn + count) if len(self._windows) + len(self._window_hosts) else ():
            if frame in self._windows or frame in self._window_hosts:
                self._windows.discard(frame)
                self._window_hosts.pop(frame, None)
                if unmap:
                    self._machine.unmap(MachineAddr(WINDOW + (frame << PAGE_SHIFT)), PAGE)

    def _change(self, gfn: int, count: int) -> None:
        """What our tables say of guest frames is void."""
        if not self._by_address:
            return
        if count > ENTRIES:
            self.drop_all()
            return
        self._busy = True
        try:
            for frame in range(gfn, gfn + count):
                page = self._pages.get(frame)
                if page is not None:
                    self._destroy_page(page)
                for table, index in list(self._leaves.get(frame, ())):
                    self._zap(table, index)
                run = self._runs.get(frame & ~(ENTRIES - 1))
                if run is not None:
                    self._fill_run(run, frame)
        finally:
            self._busy = False
        assert self._machine is not None
        self._machine.flush_tlb()

    # --- Space: guest-physical memory for Xen's side

    def host_address(self, address: int, size: int = 1, *, writable: bool = False) -> int | None:
        """Host address of guest-physical memory within one page; None: no memory, or not to be written."""
        gfn = address >> PAGE_SHIFT
        if (address + size - 1) >> PAGE_SHIFT != gfn and size > 1:
            return self._host_run(address, size, writable)
        mfn = self._physmap.mfn(gfn)
        if mfn is not None:
            return self._host + (mfn - self._base << PAGE_SHIFT) + (address & PAGE - 1)
        found = self._window_hosts.get(gfn)
        if found is None or (writable and not found[1]):
            return None
        return found[0] + (address & PAGE - 1)

    def _host_run(self, address: int, size: int, writable: bool) -> int | None:
        """Several pages: only where the host has them in one piece."""
        first = self.host_address(address, 1, writable=writable)
        at = (address | PAGE - 1) + 1
        while first is not None and at < address + size:
            if self.host_address(at, 1, writable=writable) != first + at - address:
                return None
            at += PAGE
        return first

    def drop_code(self, address: int, size: int) -> None:
        """Somebody wrote guest-physical memory: translations of code there, and what our tables took from there, are stale."""
        assert self._machine is not None
        for gfn in range(address >> PAGE_SHIFT, (address + size - 1 >> PAGE_SHIFT) + 1):
            if gfn in self._pages:
                self._unsync(self._pages[gfn])
            mfn = self._physmap.mfn(gfn)
            if mfn is not None:
                self._machine.drop_code(MachineAddr(mfn << PAGE_SHIFT), PAGE)
            elif gfn in self._window_hosts:
                self._machine.drop_code(MachineAddr(WINDOW + (gfn << PAGE_SHIFT)), PAGE)

    # --- the guest's registers

    def switched(self) -> None:
        """See MissHandler: CR3 or the mode is another."""
        self.counts["roots"] += 1
        regs = self._regs
        assert regs is not None
        assert self._machine is not None
        self.flushed()  # a task switch loads CR3 without telling
        self._flush = False
        cr0, cr4, efer = regs.cr0, regs.cr4, regs.efer
        if not cr0 & CR0_PG:
            self._mode = NO_PAGING
        elif efer & EFER_LMA:
            self._mode = LONG
        else:
            self._mode = PAE if cr4 & CR4_PAE else TWO_LEVELS
        self._wp = bool(cr0 & CR0_WP)
        self._nxe, self._smep = bool(efer & EFER_NXE), bool(cr4 & CR4_SMEP)
        self._pse = bool(cr4 & CR4_PSE)
        if self._pool.free < SPARE:
            self._drop()
        self._root = self._root_table(regs.cr3)
        self._machine.load_tables(self._root.address)
        if self._flush:
            self._machine.flush_tlb()

    def flushed(self) -> None:
        """The guest flushes its TLB: our tables follow what it changed."""
        if not self._unsynced:
            return
        self.counts["flushes"] += 1
        pages, self._unsynced = self._unsynced, []
        self._busy = True
        try:
            for page in pages:
                if self._pages.get(page.gfn) is page:
                    self._sync(page)
        finally:
            self._busy = False
        assert self._machine is not None
        self._machine.watch_flushes(False)
        self._machine.flush_tlb()

    def invalidate(self, linear: int) -> None:
        """INVLPG: the path of one address is compared."""
        if not self._unsynced or self._root is None or self._mode is NO_PAGING:
            return
        self.counts["invlpg"] += 1
        table: Table | None = self._root
        while table is not None and table.region < 0:
            index = linear >> 9 * table.level + 3 & ENTRIES - 1
            if table.level == 3 and self._mode.top == 3:
                index = linear >> 30 & 3
            if not table.words[index]:
                return
            stale = table.page is not None and not table.page.synced
            if stale and self._entry(table, index) != table.live.get(index):
                self._zap(table, index)
                return
            if table.level == 1:
                return
            table = self._by_address.get(table.words[index] & ADDRESS)

    def mode_changed(self) -> None:
        """CR0, CR4 or EFER was written, or another vCPU runs."""
        self.flushed()
        assert self._machine is not None
        self._machine.forget_tables()

    def nx_changed(self) -> None:
        """EFER.NXE changed: what was made before is made anew."""
        self.drop_all()

    def set_a20(self, enabled: bool) -> None:
        """Address line 20."""
        mask = -1 if enabled else ~BIT_20
        if mask != self._a20:
            self._a20 = mask
            self.drop_all()

    # --- misses

    def miss(self, linear: int, access: int, user: bool) -> None:
        """See MissHandler."""
        if self._busy:
            return
        self.counts["misses"] += 1
        self._busy = True
        try:
            if self._root is None or self._pool.free < SPARE:
                self.switched()  # if tables are short, all are dropped
            self._flush = False
            if self._mode is NO_PAGING:
                self._miss_flat(linear & 0xFFFFFFFF)
            elif self._mode is not LONG:
                self._walk(linear & 0xFFFFFFFF, access, user)
            elif linear >> 47 in (0, 0x1FFFF):
                self._walk(linear, access, user)
            if self._root is None:
                self.switched()
        finally:
            self._busy = False
        if self._flush:
            assert self._machine is not None
            self._machine.flush_tlb()

    def _miss_flat(self, linear: int) -> None:
        """No paging: guest-physical is linear."""
        assert self._root is not None
        upper = self._by_address[self._root.words[linear >> 30] & ADDRESS]
        self._flat_entry(upper, linear >> 21 & 511)
        self._run_write(linear >> PAGE_SHIFT)

    def _flat_entry(self, upper: Table, index: int) -> None:
        if not upper.words[index]:
            run = self._run(upper.region + (index << 9))
            upper.words[index] = run.address | _OURS | WRITABLE | USER
            run.parents.add((upper, index))

    def _run_write(self, frame: int) -> None:
        """A miss in a table of a run: the frame is a protected table of the guest's, which is written."""
        run = self._runs[frame & ~(ENTRIES - 1)]
        gfn = frame & (self._a20 >> PAGE_SHIFT)
        page = self._pages.get(gfn)
        if page is not None and page.synced:
            self._unsync(page)
        if not run.words[frame & 511] & WRITABLE:
            self._fill_run(run, frame)

    def _walk(self, linear: int, access: int, user: bool) -> None:
        """The guest's walk for one access, and ours with it."""
        table = self._root
        assert table is not None
        mode, nxe, pages = self._mode, self._nxe, self._pages
        long_entry = mode.width == 8
        write, fetch = access == WRITE, access == FETCH
        rights, no_fetch = WRITABLE | USER, 0
        while True:
            level = table.level
            if level == 3 and mode.top == 3:
                index = linear >> 30 & 3
                if mode is TWO_LEVELS:
                    # The root has a table of ours for each quarter of the guest's directory: never missing.
                    table = self._by_address[table.words[index] & ADDRESS]
                    continue
            else:
                index = linear >> 9 * level + 3 & 511
            entry = self._entry(table, index)
            if not entry & PRESENT:
                if table.words[index]:
                    self._zap(table, index)
                return
            pdpte = level == 3 and mode is PAE
            leaf = level == 1 or (
                bool(entry & LARGE)
                and ((level == 2 and (long_entry or self._pse)) or (level == 3 and not pdpte))
            )
            if long_entry:
                bad = entry & _BEYOND or (entry & NX and not nxe) or (mode is PAE and entry & _RSVD_PAE)
                if pdpte:
                    bad = entry & _RSVD_PDPTE
                elif entry & LARGE and level > 1:
                    bad = (
                        bad
                        or (level == 2 and entry & _RSVD_2M)
                        or (level == 3 and entry & _RSVD_1G)
                        or level == 4
                    )
            else:
                bad = leaf and level == 2 and entry >> 13 & 0xFF & ~((ADDRESS_LIMIT >> 32) - 1)
            if bad:
                self._set(table, index, entry, RESERVED)
                return
            if not pdpte:
                rights &= entry
                no_fetch |= entry & NX
            if leaf:
                break
            role = 0 if self._wp else 1 | rights & (WRITABLE | USER)
            child = self._child(table, index, entry, linear, role)
            if not pdpte and not entry & ACCESSED:
                entry |= ACCESSED
                self._store(table, index, entry)
            if table.live.get(index) != entry or table.words[index] & ADDRESS != child.address:
                if pdpte:
                    flags = PRESENT
                else:
                    flags = _OURS | entry & (WRITABLE | USER | NX) | (WRITABLE | USER if role else 0)
                if table.words[index] & ADDRESS == child.address:
                    table.words[index] = child.address | flags
                    table.live[index] = entry
                else:
                    self._set(table, index, entry, child.address | flags)
                child.parents.add((table, index))
            table = child
        # The leaf: may this access be?
        supervisor_write = write and not user and not self._wp
        allowed = (
            (not user or rights & USER)
            and (not write or rights & WRITABLE or supervisor_write)
            and not (fetch and no_fetch and nxe)
            and not (fetch and not user and self._smep and rights & USER)
        )
        # (Accessed is set by an access that is denied as well: an entry of ours without it could not be told from one with it.)
        wanted = ACCESSED | (DIRTY if write and allowed else 0)
        if entry & wanted != wanted:
            entry |= wanted
            self._store(table, index, entry)
        if not self._wp:
            own = rights & (WRITABLE | USER)
            if supervisor_write and allowed and not rights & WRITABLE:
                own = WRITABLE  # for the kernel alone: a user's next read makes it anew
        else:
            own = entry & (WRITABLE | USER)
        if not entry & DIRTY:
            own &= ~WRITABLE
        own |= entry & NX
        if level == 1:
            gfn = entry & ADDRESS & self._a20
            gfn >>= PAGE_SHIFT
            page = pages.get(gfn)
            if page is not None and page.synced and own & WRITABLE:
                if write and allowed:
                    self._unsync(page)
                else:
                    own &= ~WRITABLE
            self._set(table, index, entry, self._target(gfn) | own | _OURS | (own & WRITABLE) << 5)
            leaves = self._leaves.get(gfn)
            if leaves is None:
                leaves = self._leaves[gfn] = set()
            leaves.add((table, index))
            return
        self._large(table, index, entry, linear, own, write=write and bool(allowed))

    def _large(self, table: Table, index: int, entry: int, linear: int, own: int, *, write: bool) -> None:
        """A large page of the guest's: our entry names a table of a run."""
        if table.level == 3:
            upper = self._flat(((entry & ADDRESS) >> 30) << 18)
            child = upper
            self._flat_entry(upper, linear >> 21 & 511)
            frame = ((entry & ADDRESS) >> 30 << 18) | linear >> PAGE_SHIFT & 0x3FFFF
        elif self._mode is TWO_LEVELS:
            base = (entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32) >> PAGE_SHIFT
            base += linear >> PAGE_SHIFT & 0x200
            child = self._run(base)
            frame = base | linear >> PAGE_SHIFT & 511
        else:
            base = (entry & ADDRESS) >> 21 << 9
            child = self._run(base)
            frame = base | linear >> PAGE_SHIFT & 511
        self._set(table, index, entry, child.address | own | _OURS)
        child.parents.add((table, index))
        if write:
            self._run_write(frame)

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
        rights = _OURS | USER if page is not None and page.synced else _OURS | USER | WRITABLE | DIRTY
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


__all__ = ["ADDRESS_BITS", "POOL", "WINDOW", "Mfn", "Shadow"]
