"""The state that all grant operations share, and the step that they all end with: bringing entries and frames home.

Where a frame's content is
    A frame lives in its owner's extent until another domain maps it for its CPU; from then on it is in a *window*, a
    memfd that holds only frames mapped by one batch from one granter by one grantee with the same rights. It stays
    there until no domain but its owner has a CPU mapping of it. Mappings for devices alone, and a domain's mappings of
    its own grants, move nothing.

Who may come to a window later
    * The grantee that has a descriptor of it, with no more rights than that descriptor has.
    * Anybody, if the window was made for that one frame: a descriptor of it shows nothing else.
    Any other mapping is refused (GNTST_general_error): it would show frames that were never granted.

What a granter may rely on
    GTF_reading and GTF_writing of an entry are cleared only when nobody can reach the frame through it any more. As a
    process may keep a descriptor, an entry that was mapped through a window counts as in use until the frame has left
    the window, which is at the last unmap of the frame by any grantee.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from bus.abi.grant_table import GTF_reading, GTF_writing
from bus.abi.xen import DOMID_INVALID
from bus.addresses import PAGE_SIZE, DomId, Mfn
from hypervisor.core.grant_entries import place_of
from hypervisor.core.grant_jobs import Jobs, OrderSpec, Steps
from hypervisor.core.grant_ports import DmaMap, GrantDomains, GrantFrames, GrantOutbox
from hypervisor.core.grant_state import ActiveEntry, EntryKey, Mapping, Table, Window
from hypervisor.core.ports import MachineMemory

CLEARS_PER_ORDER: Final = 1024
"""Entries of one order (bus.messages.envelope.MAX_MESSAGE: 64 KiB, some 20 bytes each)."""
WINDOWS_OF_A_GRANTER: Final = 2048
WINDOWS: Final = 8192
"""Windows there may be: each is a memfd that the hypervisor holds open, and it may have 16,384 descriptors."""


@dataclass(slots=True)
class _Return:
    """What one granter has to undo."""

    moves: list[tuple[Mfn, int, int]] = field(default_factory=list)
    """(frame, window, index)"""
    clears: list[tuple[ActiveEntry, int]] = field(default_factory=list)
    """(entry, bits)"""

    def parts(self) -> list[_Return]:
        """The same in as many orders as it takes, moves first: a frame that was granted by thousands of entries has them all cleared
        when it comes home, which is more than one message carries."""
        step = CLEARS_PER_ORDER
        rest = [_Return([], self.clears[at : at + step]) for at in range(step, len(self.clears), step)]
        return [_Return(self.moves, self.clears[:step]), *rest]


class GrantCore:
    """Tables, windows and the index from frames to entries, with the operations on them that need no order."""

    def __init__(
        self,
        frames: GrantFrames,
        domains: GrantDomains,
        memory: MachineMemory,
        outbox: GrantOutbox,
        dma: DmaMap,
    ) -> None:
        self.frames = frames
        self.domains = domains
        self.memory = memory
        self.outbox = outbox
        self.dma = dma
        self.jobs = Jobs(outbox, domains.has_process, self._took)
        self.tables: dict[DomId, Table] = {}
        self.windows: dict[int, Window] = {}
        self.window_counts: dict[DomId, int] = {}
        """How many windows each granter has."""
        self.homes: dict[Mfn, tuple[int, int]] = {}
        """Frames that are in a window: (window, index)."""
        self.entries_of: dict[Mfn, set[EntryKey]] = {}
        """Active entries by frame."""
        self.hosts: dict[Mfn, int] = {}
        """CPU mappings of a frame by domains that do not own it."""
        self.dma_maps: dict[tuple[DomId, int], list[Mapping]] = {}
        """Mappings by the I/O virtual page at which they are."""
        self.references: dict[Mfn, int] = {}
        """References that the grant tables hold on frames: one a mapping."""
        self.orphans: dict[int, Mapping] = {}
        """Mappings of domains that are no more, on their way to be undone."""
        self.limbo: set[Hashable] = set()
        """Locks of maps that missed their deadline."""
        self._window_numbers = count(1)

    # -- names of things in locks ---------------------------------------------------------------------------------

    @staticmethod
    def entry_key(granter: DomId, ref: int) -> Hashable:
        return ("entry", granter, ref)

    @staticmethod
    def frame_key(mfn: int) -> Hashable:
        return ("frame", mfn)

    # -- patience with granters -----------------------------------------------------------------------------------

    def _took(self, granter: DomId, now: int, ns: int) -> None:
        table = self.tables.get(granter)
        if table is not None:
            table.took(now, ns)

    def puts_off(self, table: Table) -> bool:
        """What needs this granter's process now is not to be asked of it: whoever maps its frames serves others too, and its process
        takes its time, again and again. Others are served meanwhile, and the mapper tries again (GNTST_eagain)."""
        wears_out = table.wears_out(self.jobs.now)
        if wears_out and not table.put_off:
            self.outbox.log(
                "warning", "slow to let others map its frames: they are put off for a while", table.domain
            )
        table.put_off = wears_out
        return wears_out

    # -- records --------------------------------------------------------------------------------------------------

    def activate(self, entry: ActiveEntry) -> None:
        """Put a new active entry in the index."""
        self.tables[entry.granter].active[entry.ref] = entry
        self.entries_of.setdefault(entry.mfn, set()).add((entry.granter, entry.ref))

    def forget_if_idle(self, entry: ActiveEntry) -> None:
        """Take an entry out of the index if nothing is mapped by it and no bit is set for it."""
        if entry.pins or entry.bits or entry.window_bits:
            return
        table = self.tables.get(entry.granter)
        if table is not None and table.active.get(entry.ref) is entry:
            del table.active[entry.ref]
        users = self.entries_of.get(entry.mfn)
        if users is not None:
            users.discard((entry.granter, entry.ref))
            if not users:
                del self.entries_of[entry.mfn]

    def hold(self, mfn: Mfn) -> None:
        """Take a reference on a frame. XenError if the count is full."""
        self.frames.get_ref(mfn)
        self.references[mfn] = self.references.get(mfn, 0) + 1

    def let_go(self, mfn: Mfn) -> None:
        """Put one back; a frame that its owner has given up is then free."""
        self.references[mfn] -= 1
        if not self.references[mfn]:
            del self.references[mfn]
        self.frames.put_ref(mfn)

    def entry(self, granter: DomId, ref: int) -> ActiveEntry | None:
        """The active entry, if there is one."""
        table = self.tables.get(granter)
        return table.active.get(ref) if table is not None else None  # type: ignore[call-overload]  # GrantRef is int

    def count_in(self, entry: ActiveEntry, mapping: Mapping) -> None:
        """Count a new mapping."""
        entry.count(mapping.readonly, mapping.host, mapping.device, 1)
        if mapping.host and mapping.mapper != mapping.granter:
            self.hosts[mapping.mfn] = self.hosts.get(mapping.mfn, 0) + 1

    def count_out(self, mapping: Mapping, *, host: bool, device: bool) -> None:
        """Take the given halves of a mapping away, with its place in the I/O page tables if no half needs it."""
        entry = self.entry(mapping.granter, mapping.ref)
        assert entry is not None, "a mapping without its entry"
        entry.count(mapping.readonly, host, device, -1)
        if host and mapping.mapper != mapping.granter:
            left = self.hosts[mapping.mfn] - 1
            if left:
                self.hosts[mapping.mfn] = left
            else:
                del self.hosts[mapping.mfn]
        mapping.host = mapping.host and not host
        mapping.device = mapping.device and not device
        if not self.needs_dma(mapping):
            self.leave_dma(mapping)

    def needs_dma(self, mapping: Mapping) -> bool:
        """Its frame belongs into the mapper's I/O page tables, if the mapper has any."""
        others = mapping.granter != mapping.mapper
        if not self.domains.is_translated(mapping.mapper):
            return others and (mapping.host or mapping.device)
        return mapping.device or (mapping.host and others and self.domains.dma_by_p2m(mapping.mapper))

    def forget_domain(self, domain: DomId) -> None:
        """Drop the table of a domain that is no more. What it had mapped may still be on its way home: a later
        domain of the same id has no part in it."""
        table = self.tables[domain]
        if table.active:
            raise AssertionError(f"frames of domain {domain} are mapped by others")
        del self.tables[domain]
        self.orphans.update((id(mapping), mapping) for mapping in table.maptrack.values())
        nobody = DomId(DOMID_INVALID)
        for other in self.tables.values():
            for entry in other.active.values():
                if entry.grantee == domain:
                    entry.grantee = nobody
        for window in self.windows.values():
            if domain in window.rights:
                window.rights[nobody] = window.rights.pop(domain) or window.rights.get(nobody, False)

    # -- I/O page tables ------------------------------------------------------------------------------------------

    def enter_dma(self, mapping: Mapping, page: int) -> bool:
        """Put the frame into the mapper's I/O page tables. False if another frame is there, or no table is to be had.

        Several mappings of one frame share a page of a PV domain's tables (one to one): it is writable if one is."""
        users = self.dma_maps.get((mapping.mapper, page), [])
        there = self.dma.lookup(mapping.mapper, page)
        if there is not None and (not users or self.domains.is_translated(mapping.mapper)):
            return False
        writable = not mapping.readonly or any(not user.readonly for user in users)
        if there != (mapping.mfn, writable) and not self.dma.map_page(
            mapping.mapper, page, mapping.mfn, writable
        ):
            return False
        self.dma_maps[(mapping.mapper, page)] = [*users, mapping]
        mapping.dma_page = page  # type: ignore[assignment]  # a page number of the mapper's I/O address space
        return True

    def leave_dma(self, mapping: Mapping) -> None:
        """Take it out again; nothing happens if it is not in."""
        page = mapping.dma_page
        if page is None:
            return
        mapping.dma_page = None
        key = (mapping.mapper, int(page))
        users = [user for user in self.dma_maps[key] if user is not mapping]
        if not users:
            del self.dma_maps[key]
            there = self.dma.lookup(mapping.mapper, page)
            if there is not None and there[0] == mapping.mfn:
                self.dma.unmap_page(mapping.mapper, page)
            return
        self.dma_maps[key] = users
        writable = any(not user.readonly for user in users)
        there = self.dma.lookup(mapping.mapper, page)
        if there is not None and there != (mapping.mfn, writable):
            self.dma.unmap_page(mapping.mapper, page)
            self.dma.map_page(mapping.mapper, page, mapping.mfn, writable)

    # -- windows --------------------------------------------------------------------------------------------------

    def new_window(self, granter: DomId, size: int) -> Window:
        """A window of `size` frames, empty."""
        window = Window(next(self._window_numbers), granter, size)
        self.memory.create_window(window.number, size)
        self.windows[window.number] = window
        self.window_counts[granter] = self.window_counts.get(granter, 0) + 1
        return window

    def has_room(self, granter: DomId) -> bool:
        """The granter, and the machine, may have two more windows (what a batch needs of one granter)."""
        mine = self.window_counts.get(granter, 0)
        return mine + 2 <= WINDOWS_OF_A_GRANTER and len(self.windows) + 2 <= WINDOWS

    def may_join(self, window: Window, mapper: DomId, writable: bool) -> bool:
        """May `mapper` get this window's descriptor for a frame that is in it? (See the module's text.)"""
        if window.size == 1:
            return True
        has = window.rights.get(mapper)
        return has is not None and (has or not writable)

    def move_in(self, mfn: Mfn, window: Window, index: int, *, by_us: bool) -> None:
        """The frame's content is in the window from now on; `by_us`: the owner has no process, so we carry it over."""
        content = self.memory.read(mfn, 0, PAGE_SIZE) if by_us else b""
        self.memory.place(mfn, window.number, index)
        if by_us:
            self.memory.write(mfn, 0, content)
        self.homes[mfn] = (window.number, index)
        window.live.add(mfn)

    def move_back(self, mfn: Mfn, *, by_us: bool) -> None:
        """The frame's content is in its owner's extent again."""
        content = self.memory.read(mfn, 0, PAGE_SIZE) if by_us else b""
        number, _ = self.homes.pop(mfn)
        if len(self.windows[number].live) > 1:
            # The window lives on, and others may have or get it: nothing of this frame stays behind.
            self.memory.write(mfn, 0, bytes(PAGE_SIZE))
        self.memory.restore(mfn)
        if by_us:
            self.memory.write(mfn, 0, content)
        self.windows[number].live.discard(mfn)
        self.drop_if_empty(self.windows[number])

    def drop_if_empty(self, window: Window) -> None:
        """Give a window back that no frame is in."""
        if not window.live and window.number in self.windows:
            del self.windows[window.number]
            left = self.window_counts[window.granter] - 1
            if left:
                self.window_counts[window.granter] = left
            else:
                del self.window_counts[window.granter]
            self.memory.drop_window(window.number)

    # -- what the core does for a domain that has no process ------------------------------------------------------

    def set_bits(self, entry: ActiveEntry, bits: int) -> None:
        """Set bits in the granter's entry by ourselves: only while no process of the granter runs."""
        self._change_word(entry, bits, 0)

    def clear_bits(self, entry: ActiveEntry, bits: int) -> None:
        """Clear bits in the granter's entry by ourselves: as `set_bits`."""
        self._change_word(entry, 0, bits)

    def _change_word(self, entry: ActiveEntry, add: int, drop: int) -> None:
        place = place_of(self.tables[entry.granter], entry.ref)
        word = int.from_bytes(self.memory.read(place.word_mfn, place.word_offset, 2), "little")
        self.memory.write(place.word_mfn, place.word_offset, ((word | add) & ~drop).to_bytes(2, "little"))

    # -- the end of every operation -------------------------------------------------------------------------------

    def settle(self, mfns: Iterable[Mfn]) -> Steps:
        """Bring home what nobody else has mapped any more, and clear the bits that nothing needs: moves first.

        The job holds the locks of these frames. A granter that does not answer, or answers nonsense, is crashed."""
        work = self._find_returns(mfns)
        orders, waiting = list[OrderSpec](), list[tuple[DomId, _Return]]()
        for granter, back in work.items():
            if self.domains.has_process(granter) and not self.domains.is_dying(granter):
                for part in back.parts():
                    orders.append(self._unmap_order(granter, part))
                    waiting.append((granter, part))
            else:
                self._return_by_us(granter, back)
        if not orders:
            return
        outcomes = yield orders
        for (granter, back), outcome in zip(waiting, outcomes, strict=True):
            if outcome.results is not None and not any(outcome.results):
                for mfn, _, _ in back.moves:
                    self.move_back(mfn, by_us=False)
                self._cleared(back)
                continue
            if outcome.why != "dead":
                self.crash(granter, f"grant_unmap was not carried out ({outcome.why or 'refused an item'})")
            self._return_by_us(granter, back)

    def _find_returns(self, mfns: Iterable[Mfn]) -> dict[DomId, _Return]:
        work: dict[DomId, _Return] = {}
        for mfn in dict.fromkeys(mfns):
            leaves = mfn in self.homes and not self.hosts.get(mfn)
            entries = [self.tables[g].active[r] for g, r in sorted(self.entries_of.get(mfn, ()))]
            if leaves:
                granter = self.windows[self.homes[mfn][0]].granter
                work.setdefault(granter, _Return()).moves.append((mfn, *self.homes[mfn]))
                for entry in entries:
                    entry.window_bits = 0
            for entry in entries:
                excess = entry.bits & ~entry.needed_bits
                if excess:
                    work.setdefault(entry.granter, _Return()).clears.append((entry, excess))
                else:
                    self.forget_if_idle(entry)
        return work

    def _unmap_order(self, granter: DomId, back: _Return) -> OrderSpec:
        return self.unmap_order(granter, back.moves, back.clears)

    def unmap_order(
        self, granter: DomId, moves: list[tuple[Mfn, int, int]], clears: list[tuple[ActiveEntry, int]]
    ) -> OrderSpec:
        """The order that undoes a map: see `docs` of the order kinds in grants.py."""
        table, words = self.tables[granter], list[tuple[int, int, int, int]]()
        for entry, bits in clears:
            place = place_of(table, entry.ref)
            words.append((int(place.word_mfn), place.word_offset, bits, int(entry.mfn)))
        body: dict[str, object] = {"moves": [(int(m), w, i) for m, w, i in moves], "clears": words}
        return OrderSpec(granter, "grant_unmap", body, len(moves) + len(words), charged=True)

    def _return_by_us(self, granter: DomId, back: _Return) -> None:
        for mfn, _, _ in back.moves:
            self.move_back(mfn, by_us=True)
        if not self.domains.is_dying(granter):
            for entry, bits in back.clears:
                self.clear_bits(entry, bits)
        self._cleared(back)

    def _cleared(self, back: _Return) -> None:
        for entry, bits in back.clears:
            entry.bits &= ~bits
            self.forget_if_idle(entry)

    def crash(self, domain: DomId, reason: str) -> None:
        """Crash a domain whose process broke the rules, once."""
        if not self.domains.is_dying(domain):
            self.outbox.log("error", f"domain {domain} is crashed: {reason}", domain)
            self.domains.crash(domain, reason)

    # -- invariants -----------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What is inconsistent in the records; an empty list is what must be. Valid between entries into the core."""
        found: list[str] = []
        pins: dict[EntryKey, list[int]] = {}
        hosts: dict[Mfn, int] = {}
        tracks = [list(table.maptrack.values()) for table in self.tables.values()]
        for track in [*tracks, list(self.orphans.values())]:
            for mapping in track:
                counts = pins.setdefault((mapping.granter, mapping.ref), [0, 0, 0, 0])
                counts[0 if mapping.readonly else 1] += mapping.host
                counts[2 if mapping.readonly else 3] += mapping.device
                if mapping.host and mapping.mapper != mapping.granter:
                    hosts[mapping.mfn] = hosts.get(mapping.mfn, 0) + 1
                if self.frames.references(mapping.mfn) < 1:
                    found.append(f"d{mapping.mapper} handle {mapping.handle}: {mapping.mfn:#x} is not held")
                ended = not mapping.host and not mapping.device  # its frame is on its way home
                if not ended and self.entry(mapping.granter, mapping.ref) is None:
                    found.append(f"d{mapping.mapper} handle {mapping.handle}: no active entry")
        for table in self.tables.values():
            for ref, entry in table.active.items():
                counts = [entry.host_read, entry.host_write, entry.device_read, entry.device_write]
                if counts != pins.get((table.domain, ref), [0, 0, 0, 0]):
                    found.append(f"d{table.domain} ref {ref}: pins {counts}, mappings differ")
                if (table.domain, ref) not in self.entries_of.get(entry.mfn, ()):
                    found.append(f"d{table.domain} ref {ref}: not in the index of frames")
                if not self.jobs.is_locked(self.frame_key(entry.mfn)) and entry.bits != entry.needed_bits:
                    found.append(
                        f"d{table.domain} ref {ref}: bits {entry.bits:#x}, need {entry.needed_bits:#x}"
                    )
        if hosts != self.hosts:
            found.append(f"CPU mappings by frame: {self.hosts}, counted {hosts}")
        for mfn, (number, _) in self.homes.items():
            if number not in self.windows or mfn not in self.windows[number].live:
                found.append(f"frame {mfn:#x} is in window {number}, which does not know it")
            if not self.hosts.get(mfn) and not self.jobs.is_locked(self.frame_key(mfn)):
                found.append(f"frame {mfn:#x} is in window {number} and nobody maps it")
        return found

    def in_use_by(self, window: Window, entry: ActiveEntry, grantee: DomId) -> int:
        """Bits an entry keeps while the frame is in the window: the grantee's descriptor outlives its unmap."""
        return entry.bits & (GTF_reading | (GTF_writing if window.rights.get(grantee) else 0))
