"""Shadow page tables (`hap=0`): the hypervisor's own tables from guest-virtual to machine addresses, built from the guest's tables and
the p2m when the vCPU misses something.

They behave as a big TLB does, so that what the architecture says of TLBs is all that a guest may count on:

* A table of the guest's that ours are made from is write-protected. The first write to it takes the protection off ("unsynced"), and the
  next flush (CR3, CR4, CR0; INVLPG for the path of its one address) compares what was taken over with what is there, drops what
  changed, and protects the page again; a page of which nothing is in use any more is left alone from then on.
* A miss walks the guest's tables as they are now, and takes each entry on its way anew if it changed. So more rights, and pages that
  appear, need no flush; as on a processor.
* Accessed bits are set by that walk, the last level's only if the access is allowed (a denied one to a page without the bit is the one
  fault that is raised here, for want of an entry to make); a page whose dirty bit is not set is mapped read-only until it is written.
* vCPUs take turns on one thread and share all tables; each has a root of its own by its CR3.
* Large pages of the guest's, and guests without paging, go by tables that map a run of guest frames in order, made once for each run.

Own memory is at its machine addresses for the vCPU, as a PV guest's; devices and granted pages are at WINDOW + guest-physical address.
Page faults of the guest's are raised by the vCPU's own walk of our tables: entries that the guest would fault on are taken over as
they are, or left out.
"""

from __future__ import annotations

from typing import Final

from bus.addresses import PAGE_SHIFT, MachineAddr, Mfn
from domains.hvm.shadow_store import (
    ADDRESS_BITS,
    ADDRESS_LIMIT,
    BEYOND,
    BIT_20,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    OURS,
    POOL,
    RSVD_1G,
    RSVD_2M,
    RSVD_PAE,
    RSVD_PDPTE,
    SPARE,
    WINDOW,
    Machine,
    Registers,
    ShadowTables,
)
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
    Table,
)
from domains.vcpu.api import GuestFault
from domains.vcpu.shadow_mmu import FETCH, WRITE

PAGE_FAULT: Final = 14
PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16


class Shadow(ShadowTables):
    """See the module. Implements `domains.vcpu.shadow_mmu.MissHandler`, `domains.hvm.physmap.Mapper` and
    `domains.vcpu.walk.Space`."""

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
        denied: int | None = None
        try:
            if self._root is None or self._pool.free < SPARE:
                self.switched()  # if tables are short, all are dropped
            self._flush = False
            if self._mode is NO_PAGING:
                self._miss_flat(linear & 0xFFFFFFFF)
            elif self._mode is not LONG:
                linear &= 0xFFFFFFFF
                denied = self._walk(linear, access, user)
            elif linear >> 47 in (0, 0x1FFFF):
                denied = self._walk(linear, access, user)
            if self._root is None:
                self.switched()
        finally:
            self._busy = False
        if self._flush:
            assert self._machine is not None
            self._machine.flush_tlb()
        if denied is not None:
            assert self._regs is not None
            self._regs.cr2 = linear
            raise GuestFault(PAGE_FAULT, denied)

    def _miss_flat(self, linear: int) -> None:
        """No paging: guest-physical is linear."""
        assert self._root is not None
        upper = self._by_address[self._root.words[linear >> 30] & ADDRESS]
        self._flat_entry(upper, linear >> 21 & 511)
        self._run_write(linear >> PAGE_SHIFT)

    def _flat_entry(self, upper: Table, index: int) -> None:
        if not upper.words[index]:
            run = self._run(upper.region + (index << 9))
            upper.words[index] = run.address | OURS | WRITABLE | USER
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

    def _walk(self, linear: int, access: int, user: bool) -> int | None:
        """The guest's walk for one access, and ours with it. The error code of an access that is denied to a page whose accessed bit is
        not set: no entry of ours can be made of it, or the next access would not set that bit."""
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
                return None
            pdpte = level == 3 and mode is PAE
            leaf = level == 1 or (
                bool(entry & LARGE)
                and ((level == 2 and (long_entry or self._pse)) or (level == 3 and not pdpte))
            )
            if long_entry:
                bad = entry & BEYOND or (entry & NX and not nxe) or (mode is PAE and entry & RSVD_PAE)
                if pdpte:
                    bad = entry & RSVD_PDPTE
                elif entry & LARGE and level > 1:
                    bad = (
                        bad
                        or (level == 2 and entry & RSVD_2M)
                        or (level == 3 and entry & RSVD_1G)
                        or level == 4
                    )
            else:
                bad = leaf and level == 2 and entry >> 13 & 0xFF & ~((ADDRESS_LIMIT >> 32) - 1)
            if bad:
                self._set(table, index, entry, RESERVED)
                return None
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
                    flags = OURS | entry & (WRITABLE | USER | NX) | (WRITABLE | USER if role else 0)
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
        if not allowed and not entry & ACCESSED:
            if table.words[index]:
                self._zap(table, index)
            told = fetch and (self._smep or (nxe and long_entry))
            return PF_PRESENT | PF_WRITE * write | PF_USER * user | PF_FETCH * told
        wanted = ACCESSED | (DIRTY if write else 0) if allowed else 0
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
            self._set(table, index, entry, self._target(gfn) | own | OURS | (own & WRITABLE) << 5)
            leaves = self._leaves.get(gfn)
            if leaves is None:
                leaves = self._leaves[gfn] = set()
            leaves.add((table, index))
            return None
        self._large(table, index, entry, linear, own, write=write and bool(allowed))
        return None

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
        self._set(table, index, entry, child.address | own | OURS)
        child.parents.add((table, index))
        if write:
            self._run_write(frame)


__all__ = ["ADDRESS_BITS", "POOL", "WINDOW", "Mfn", "Shadow"]
