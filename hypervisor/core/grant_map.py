"""GNTTABOP_map_grant_ref: check, move frames into windows at their granters', hand the windows to the mapper.

Statuses are those of Xen 4.17 (xen/common/grant_table.c). Where Xen would write the guest's entry itself, the
granter's process does it on an order, if the entry still says what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Final

from bus.abi.grant_table import (
    GNTMAP_application_map,
    GNTMAP_contains_pte,
    GNTMAP_device_map,
    GNTMAP_host_map,
    GNTMAP_readonly,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_no_device_space,
    GNTST_okay,
    GTF_reading,
    GTF_readonly,
    GTF_writing,
    gnttab_map_grant_ref,
)
from bus.abi.xen import DOMID_FIRST_RESERVED
from bus.addresses import PAGE_SHIFT, DomId, Gfn, GrantRef, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.grant_core import GrantCore
from hypervisor.core.grant_entries import check_access, frame_of, missing_entry, place_of, read_entry
from hypervisor.core.grant_jobs import UNDO_TIMEOUT_NS, Job, OrderSpec, Outcome, Steps
from hypervisor.core.grant_state import INVALID_HANDLE, ActiveEntry, Mapping, Table, Window

MAX_WINDOWS: Final = 60
"""Windows that travel with one order (bus.messages.envelope.MAX_DESCRIPTORS, less some room)."""


@dataclass(slots=True)
class _Op:
    """One structure of the batch on its way."""

    args: gnttab_map_grant_ref
    status: int = GNTST_okay
    mapping: Mapping | None = None
    entry: ActiveEntry | None = None


@dataclass(slots=True)
class _Part:
    """What one granter is asked to do for the batch."""

    checks: list[tuple[ActiveEntry, int, bytes]] = field(default_factory=list)
    """(entry, bits to set, the entry as it was read)"""
    moves: list[tuple[Mfn, Window, int]] = field(default_factory=list)
    """(frame, window, index)"""
    new: dict[bool, list[Mfn]] = field(default_factory=dict)
    """Frames that need a window, by whether it is to be writable."""
    writable: Window | None = None
    """The window of those that are to be written."""
    failed: set[Hashable] = field(default_factory=set)
    """Entries and frames that did not get there."""


class MapCall:
    """One hypercall's batch."""

    def __init__(
        self,
        core: GrantCore,
        caller: DomId,
        batch: list[gnttab_map_grant_ref],
        done: Callable[[list[gnttab_map_grant_ref]], None],
    ) -> None:
        self._core = core
        self._caller = caller
        self._ops = [_Op(args) for args in batch]
        self._done = done
        self._parts: dict[DomId, _Part] = {}
        self._planned: dict[int, int] = {}
        """Bits that this batch sets, by the entry's identity."""
        self._mine = core.tables[caller]
        self._epoch = self._mine.epoch

    def submit(self) -> None:
        """Start, as soon as nobody else works on these entries and frames."""
        self._core.jobs.submit(Job(self._caller, self._keys, self._run))

    # -- what it is about -----------------------------------------------------------------------------------------

    def _keys(self) -> Collection[Hashable]:
        core, keys = self._core, set[Hashable]()
        for op in self._ops:
            table = core.tables.get(DomId(op.args.dom))
            if table is None or op.args.ref >= table.entries or table.unresponsive:
                continue  # refused without touching anything
            ref = GrantRef(op.args.ref)
            keys.add(core.entry_key(table.domain, ref))
            active = table.active.get(ref)
            if active is not None:
                keys.add(core.frame_key(active.mfn))
            else:
                entry = read_entry(core.memory, table, ref)
                status, mfn = frame_of(core.frames, core.domains, table.domain, entry.frame)
                if status == GNTST_okay:
                    keys.add(core.frame_key(mfn))
        return keys

    # -- the steps ------------------------------------------------------------------------------------------------

    def _run(self, job: Job) -> Steps:
        core = self._core
        for op in self._ops:
            op.status = self._admit(op, job)
        self._open_windows()
        orders, asked = list[OrderSpec](), list[DomId]()
        for granter, part in self._parts.items():
            if not part.checks and not part.moves:
                continue
            if core.domains.has_process(granter):
                orders.append(self._map_order(granter, part))
                asked.append(granter)
            else:
                self._do_by_us(part)
        late: list[DomId] = []
        if orders:
            outcomes = yield orders
            for granter, outcome in zip(asked, outcomes, strict=True):
                if not self._granter_answered(granter, self._parts[granter], outcome):
                    late.append(granter)
        self._refuse_unwritable()
        dropped = self._drop_failed()
        early = [mapping for mapping in dropped if mapping.granter not in late]
        # Before the mapper gets a window: a frame that came into it without a grant must have left it again.
        yield from core.settle(mapping.mfn for mapping in early)
        dropped += self._drop_failed()  # the caller may have died meanwhile
        attach = self._attach_orders(job)
        if attach:
            outcomes = yield [order for order, _ in attach]
            self._attached(attach, outcomes)
        dropped += self._drop_failed()
        self._finish()
        for granter in late:
            mine = [mapping for mapping in dropped if mapping.granter == granter]
            dropped = [mapping for mapping in dropped if mapping.granter != granter]
            _Undo(core, granter, self._parts[granter], mine).take_over(job)
        yield from core.settle(mapping.mfn for mapping in dropped)
        for mapping in dropped:
            core.let_go(mapping.mfn)

    def _admit(self, op: _Op, job: Job) -> int:
        """Check one operation as Xen does, in its order; count it in if it may be carried out."""
        core, args = self._core, op.args
        if not args.flags & (GNTMAP_device_map | GNTMAP_host_map):
            return GNTST_bad_gntref
        translated = core.domains.is_translated(self._caller)
        if translated and args.flags & (GNTMAP_application_map | GNTMAP_contains_pte):
            return GNTST_general_error
        if translated and args.flags & GNTMAP_device_map and not core.dma.has_context(self._caller):
            return GNTST_general_error  # Xen: no device mapping in an HVM domain
        granter = DomId(args.dom)
        table, mine = core.tables.get(granter), self._mine
        if granter >= DOMID_FIRST_RESERVED or table is None or not core.domains.exists(granter):
            return GNTST_bad_domain
        handle = mine.take_handle()
        if handle == INVALID_HANDLE:
            return GNTST_no_device_space
        status = self._admit_entry(op, table, handle, job)
        if status != GNTST_okay:
            mine.drop_handle(handle)
        return status

    def _admit_entry(self, op: _Op, table: Table, handle: int, job: Job) -> int:
        core, args = self._core, op.args
        if args.ref >= table.entries:
            return missing_entry(args.ref)
        if table.unresponsive or core.domains.is_dying(table.domain) or core.domains.is_dying(self._caller):
            return GNTST_general_error
        ref, write = GrantRef(args.ref), not args.flags & GNTMAP_readonly
        entry, raw = table.active.get(ref), b""
        if entry is not None and (entry.grantee != self._caller or entry.full):
            return GNTST_general_error
        wanted = GTF_reading | (GTF_writing if write else 0)
        missing = wanted & ~((entry.bits | self._planned.get(id(entry), 0)) if entry is not None else 0)
        if missing:
            if core.domains.has_process(table.domain) and core.puts_off(table):
                return GNTST_eagain
            copy = read_entry(core.memory, table, ref)
            raw = copy.raw
            if entry is None:
                status = check_access(copy, self._caller, write=write, mapping=True)
                if status != GNTST_okay:
                    return status
                status, mfn = frame_of(core.frames, core.domains, table.domain, copy.frame)
                if status != GNTST_okay:
                    return status
                entry = ActiveEntry(table.domain, ref, self._caller, mfn)
            elif write and copy.flags & GTF_readonly:
                return GNTST_general_error
        assert entry is not None
        if core.frame_key(entry.mfn) not in job.held or core.entry_key(table.domain, ref) not in job.held:
            return GNTST_general_error  # the granter changed the entry since the locks were taken
        if core.frames.owner(entry.mfn) != table.domain:
            return GNTST_general_error  # given back by its owner while mapped: not to be mapped anew
        return self._take(op, table, entry, handle, missing, raw)

    def _take(self, op: _Op, table: Table, entry: ActiveEntry, handle: int, missing: int, raw: bytes) -> int:
        core, flags = self._core, op.args.flags
        part = self._parts.setdefault(table.domain, _Part())
        host, write = bool(flags & GNTMAP_host_map), not flags & GNTMAP_readonly
        mapping = Mapping(
            handle, self._caller, table.domain, entry.ref, entry.mfn, flags & 0xFFFF_FFFF,
            op.args.host_addr, host, bool(flags & GNTMAP_device_map),
        )  # fmt: skip
        try:
            core.hold(entry.mfn)
        except XenError:
            return GNTST_general_error
        if (
            host
            and self._caller != table.domain
            and not self._find_home(table.domain, part, entry.mfn, write)
        ):
            core.let_go(entry.mfn)
            return GNTST_general_error
        if missing:
            part.checks.append((entry, missing, raw))
            self._planned[id(entry)] = self._planned.get(id(entry), 0) | missing
        core.activate(entry)
        core.count_in(entry, mapping)
        self._mine.maptrack[handle] = mapping
        op.mapping, op.entry = mapping, entry
        return GNTST_okay

    def _find_home(self, granter: DomId, part: _Part, mfn: Mfn, write: bool) -> bool:
        """Is there, or will there be, a window in which this mapper may have the frame?"""
        home = self._core.homes.get(mfn)
        if home is not None:
            return self._core.may_join(self._core.windows[home[0]], self._caller, write)
        if mfn in part.new.get(True, ()):
            return True
        if not self._core.has_room(granter):
            return False
        if write and mfn in part.new.get(False, ()):
            part.new[False].remove(mfn)
        group = part.new.setdefault(write, [])
        if mfn not in group:
            group.append(mfn)
        return True

    def _open_windows(self) -> None:
        for granter, part in self._parts.items():
            for writable, group in sorted(part.new.items(), reverse=True):
                if group:
                    try:
                        window = self._core.new_window(granter, len(group))
                    except OSError as error:  # no descriptor, or no memory: what needed it fails
                        self._core.outbox.log("error", f"no window of granted frames: {error}", granter)
                        part.failed |= {self._core.frame_key(mfn) for mfn in group}
                        continue
                    if writable:
                        part.writable = window
                    part.moves += [(mfn, window, index) for index, mfn in enumerate(group)]

    # -- the granter's side ---------------------------------------------------------------------------------------

    def _map_order(self, granter: DomId, part: _Part) -> OrderSpec:
        table, checks = self._core.tables[granter], list[tuple[object, ...]]()
        for entry, bits, raw in part.checks:
            place = place_of(table, entry.ref)
            checks.append(
                (
                    int(place.mfn),
                    place.offset,
                    raw,
                    int(place.word_mfn),
                    place.word_offset,
                    bits,
                    int(entry.mfn),
                )
            )
        body: dict[str, object] = {
            "checks": checks,
            "moves": [(int(mfn), window.number, index) for mfn, window, index in part.moves],
        }
        windows = tuple(dict.fromkeys((window.number, True) for _, window, _ in part.moves))
        return OrderSpec(granter, "grant_map", body, len(checks) + len(part.moves), windows, charged=True)

    def _do_by_us(self, part: _Part) -> None:
        """The granter has no process (it is being built, or starts anew): nobody else writes its memory now."""
        for entry, bits, _ in part.checks:
            self._core.set_bits(entry, bits)
            entry.bits |= bits
        for mfn, window, index in part.moves:
            self._core.move_in(mfn, window, index, by_us=True)

    def _granter_answered(self, granter: DomId, part: _Part, outcome: Outcome) -> bool:
        """Take note of what was done. False if that is unknown: the process did not answer in time, or nonsense."""
        core = self._core
        if outcome.why == "dead" and not core.domains.is_dying(granter):
            self._do_by_us(part)
            return True
        results = outcome.results or [GNTST_general_error] * (len(part.checks) + len(part.moves))
        for (entry, bits, _), result in zip(part.checks, results, strict=False):
            if result == GNTST_okay:
                entry.bits |= bits
            else:
                part.failed.add(core.entry_key(granter, entry.ref))
        for (mfn, window, index), result in zip(part.moves, results[len(part.checks) :], strict=True):
            if result == GNTST_okay:
                core.move_in(mfn, window, index, by_us=False)
            else:
                part.failed.add(core.frame_key(mfn))
        known = outcome.results is not None or outcome.why in ("dead", "refused")
        if known:
            for _, window, _ in part.moves:
                core.drop_if_empty(window)
        return known

    def _refuse_unwritable(self) -> None:
        """A frame in the batch's writable window whose granter did not allow writing after all does not stay there:
        the window's descriptor would show it for writing. What else was to be mapped of it fails as well."""
        core = self._core
        for part in self._parts.values():
            for mfn in part.writable.live if part.writable is not None else ():
                entries = (core.entry(granter, ref) for granter, ref in core.entries_of.get(mfn, ()))
                mine = (entry for entry in entries if entry is not None and entry.grantee == self._caller)
                if not any(entry.bits & GTF_writing for entry in mine):
                    part.failed.add(core.frame_key(mfn))

    def _drop_failed(self) -> list[Mapping]:
        """Count out what did not come about; their frames are still held."""
        core, dropped = self._core, list[Mapping]()
        for op in self._ops:
            mapping = op.mapping
            if mapping is None:
                continue
            failed = self._parts[mapping.granter].failed
            if op.status == GNTST_okay and (
                core.entry_key(mapping.granter, mapping.ref) in failed
                or (mapping.host and core.frame_key(mapping.mfn) in failed)
                or core.domains.is_dying(self._caller)
                or self._mine.epoch != self._epoch
            ):
                op.status = GNTST_general_error
            if op.status != GNTST_okay:
                core.count_out(mapping, host=mapping.host, device=mapping.device)
                self._mine.drop_handle(mapping.handle)
                core.orphans.pop(id(mapping), None)
                op.mapping = None
                dropped.append(mapping)
        return dropped

    # -- the mapper's side ----------------------------------------------------------------------------------------

    def _attach_orders(self, job: Job) -> list[tuple[OrderSpec, list[_Op]]]:
        """Enter what is ready into the mapper's tables; the orders that give its process the windows, each with
        the operations in it (a message carries so many descriptors and no more)."""
        orders = list[tuple[OrderSpec, list[_Op]]]()
        items, windows, inside = list[tuple[object, ...]](), dict[int, bool](), list[_Op]()
        for op in self._ops:
            mapping = op.mapping
            if mapping is None or not self._enter_tables(op, mapping) or not mapping.host:
                continue
            window = self._find_window(mapping)
            if window is not None and window.number not in windows and len(windows) >= MAX_WINDOWS:
                orders.append((self._attach_order(items, windows), inside))
                items, windows, inside = [], {}, []
            if window is not None:
                windows[window.number] = self._give_window(mapping, window)
            items.append(
                (mapping.handle, int(mapping.mfn), mapping.window, mapping.index, not mapping.readonly,
                 mapping.host_addr, mapping.flags, int(mapping.granter))
            )  # fmt: skip
            inside.append(op)
        if items:
            orders.append((self._attach_order(items, windows), inside))
        for order, _ in orders:
            for number, _ in order.windows:
                self._keep_in_use(self._core.windows[number], job)
        return orders

    def _keep_in_use(self, window: Window, job: Job) -> None:
        """All that the mapper can reach by the descriptor counts as in use, also by an entry whose own operation
        failed meanwhile: until the frame leaves the window. (Other jobs' frames in it: the mapper has reached them
        before, and their entries say so, or they are on their way out of it.)"""
        core = self._core
        for mfn in window.live:
            if core.frame_key(mfn) not in job.held:
                continue
            for granter, ref in core.entries_of.get(mfn, ()):
                entry = core.entry(granter, ref)
                if entry is not None and entry.grantee == self._caller:
                    entry.window_bits |= core.in_use_by(window, entry, self._caller)

    def _attach_order(self, items: list[tuple[object, ...]], windows: dict[int, bool]) -> OrderSpec:
        given = tuple(sorted(windows.items()))
        return OrderSpec(self._caller, "grant_attach", {"items": items}, len(items), given)

    def _enter_tables(self, op: _Op, mapping: Mapping) -> bool:
        """The mapper's I/O page tables and p2m. False, and a status, if the place is taken or there is no memory."""
        core, translated = self._core, self._core.domains.is_translated(self._caller)
        page = Gfn(mapping.host_addr >> PAGE_SHIFT) if translated else Gfn(mapping.mfn)
        dma = core.needs_dma(mapping)
        ready = not dma or not core.dma.has_context(self._caller) or core.enter_dma(mapping, page)
        if ready and translated and mapping.host:
            ready = core.domains.enter_grant(self._caller, page, mapping.mfn, not mapping.readonly)
        if not ready:
            op.status = GNTST_general_error
        return ready

    def _find_window(self, mapping: Mapping) -> Window | None:
        home = self._core.homes.get(mapping.mfn)
        if home is None or mapping.mapper == mapping.granter:
            return None  # its own frame: it has it already, wherever it is
        mapping.window, mapping.index = home
        return self._core.windows[mapping.window]

    def _give_window(self, mapping: Mapping, window: Window) -> bool:
        """The mapper gets the window's descriptor; with write access?"""
        window.rights[self._caller] = window.rights.get(self._caller, False) or not mapping.readonly
        return window.rights[self._caller]

    def _attached(self, orders: list[tuple[OrderSpec, list[_Op]]], outcomes: list[Outcome]) -> None:
        for (order, inside), outcome in zip(orders, outcomes, strict=True):
            results = outcome.results or [GNTST_general_error] * order.count
            for op, result in zip(inside, results, strict=True):
                if result == GNTST_okay:
                    continue
                op.status = result if GNTST_bad_page <= result <= GNTST_general_error else GNTST_general_error
                if self._core.domains.is_translated(self._caller) and op.mapping is not None:
                    page = Gfn(op.args.host_addr >> PAGE_SHIFT)
                    self._core.domains.remove_grant(self._caller, page, op.mapping.mfn)

    def _finish(self) -> None:
        """The handles come to life and the caller gets its answer."""
        answer: list[gnttab_map_grant_ref] = []
        for op in self._ops:
            args = op.args._replace(status=op.status)
            mapping = op.mapping
            if mapping is not None:
                mapping.live = True
                args = args._replace(handle=mapping.handle, dev_bus_addr=bus_address(self._core, mapping))
            answer.append(args)
        self._done(answer)


def bus_address(core: GrantCore, mapping: Mapping) -> int:
    """`dev_bus_addr`: the I/O virtual address of a translated mapper's device mapping; else the machine address.

    A translated domain never learns a machine address: 0 without a device mapping."""
    if not core.domains.is_translated(mapping.mapper):
        return int(mapping.mfn) << PAGE_SHIFT
    return int(mapping.dma_page) << PAGE_SHIFT if mapping.device and mapping.dma_page is not None else 0


class _Undo:
    """A granter missed the deadline of a map: the map has failed, and what its process may yet do must be undone.

    Orders to a process are carried out in turn, so the answer to `grant_unmap` says that the map is undone too."""

    def __init__(self, core: GrantCore, granter: DomId, part: _Part, dropped: list[Mapping]) -> None:
        self._core = core
        self._granter = granter
        self._part = part
        self._dropped = dropped

    def take_over(self, job: Job) -> None:
        """Take the locks of this granter's part of the job, and go on by itself."""
        core = self._core
        keys = {core.entry_key(self._granter, entry.ref) for entry, _, _ in self._part.checks}
        keys |= {core.frame_key(entry.mfn) for entry, _, _ in self._part.checks}
        keys |= {core.frame_key(mfn) for mfn, _, _ in self._part.moves}
        for mapping in self._dropped:
            keys |= {core.entry_key(mapping.granter, mapping.ref), core.frame_key(mapping.mfn)}
        keys &= job.held
        core.limbo |= keys
        core.tables[self._granter].unresponsive += 1
        core.jobs.hand_over(job, keys, Job(self._granter, lambda: keys, self._run))
        core.jobs.recheck()

    def _run(self, job: Job) -> Steps:
        core, part = self._core, self._part
        entries = [(entry, bits & ~entry.bits) for entry, bits, _ in part.checks]
        moves = [(mfn, window.number, index) for mfn, window, index in part.moves]
        if not core.domains.is_dying(self._granter):
            order = core.unmap_order(self._granter, moves, entries)
            order.timeout_ns, order.charged = UNDO_TIMEOUT_NS, False
            outcome = (yield [order])[0]
            if outcome.why == "dead" and not core.domains.is_dying(self._granter):
                for entry, bits in entries:
                    core.clear_bits(entry, bits)
            elif outcome.results is None:
                core.crash(self._granter, f"grant_map was neither done nor undone ({outcome.why})")
        core.tables[self._granter].unresponsive -= 1
        core.limbo -= job.held
        for _, window, _ in part.moves:
            core.drop_if_empty(window)
        yield from core.settle(mapping.mfn for mapping in self._dropped)
        for mapping in self._dropped:
            core.let_go(mapping.mfn)
