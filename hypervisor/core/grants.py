"""Grant tables: what a domain lets another use of its memory (HYPERVISOR_grant_table_op).

`GrantTables` is the only object that the rest of the core sees. Calls take lists of ABI structures and answer through a
callback, now or when the processes concerned have done their part.

Orders, their bodies (msgpack-able; all numbers unsigned unless said otherwise), and what a process does on each. A process
carries orders out in the order in which they come, with its vCPUs stopped from before the first step until after the
answer is sent. Its answer has `rc` 0 and as data one little-endian int16 an item: 0, or a negative GNTST_* code.

`grant_map` to the granter; windows: those of `moves`, writable
    checks  [(entry_mfn, entry_offset, entry, word_mfn, word_offset, bits, frame), ...]
    moves   [(frame, window, index), ...]
    For each check: the entry's bytes must equal `entry`, with GTF_reading|GTF_writing (0x18) left out of the comparison
    in its first two bytes; if so, `bits` are or-ed into the 16-bit word at (word_mfn, word_offset) (the same flags word
    in version 1, the status word in version 2), and the result is 0; else GNTST_general_error (-1). If `bits` contains
    GTF_writing and `frame` is a page table or a descriptor table, it is refused (-1); from then on, until the bit is
    cleared, the frame does not become one. Then for each move: copy the frame's 4096 bytes to page `index` of the window,
    map the window's page (MAP_SHARED|MAP_FIXED) at every host address where the frame is mapped, drop translated code
    of it; result 0. Results: checks first, then moves. The descriptor may be closed once everything is mapped.
`grant_attach` to the mapper; windows: those of its items, with the access given there
    items   [(handle, frame, window, index, writable, host_addr, flags, granter), ...]
    Make the frame reachable: page `index` of the window (window 0: it is a frame of the mapper's own, where it already
    is) at machine frame `frame` (PV), or at guest frame host_addr >> 12 (auto-translated), read-only unless `writable`.
    PV: then write the page-table entry: at machine address `host_addr` if flags has GNTMAP_contains_pte, else the one that
    maps virtual address `host_addr`. Result: 0, or the GNTST_* code (GNTST_general_error, GNTST_bad_virt_addr), with
    nothing of the item left behind. A frame may be attached several times: count.
`grant_detach` to the mapper
    items   [(handle, frame, host_addr, new_addr, flags), ...]
    replace true for GNTTABOP_unmap_and_replace
    PV: check that the entry at `host_addr` maps `frame` (else GNTST_general_error, and it stays attached); clear it, or
    with `replace` move the entry of virtual address `new_addr` there and clear that one. At the last detach of the
    frame: unmap it, drop translations and translated code. Result 0.
`grant_unmap` to the granter
    moves   [(frame, window, index), ...]
    clears  [(word_mfn, word_offset, bits, frame), ...]
    For each move, if the frame's content is at that place now: copy it back to the frame's place in the process's own
    extent, map that again everywhere, drop translated code; if the content is not there (the grant_map before it failed or
    was never seen), nothing; result 0 in both cases. Then for each clear: clear `bits` in the word; result 0. Results:
    moves first, then clears. Any other answer, or none in time, crashes the domain.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from errno import E2BIG, EINVAL
from typing import Final

from bus.abi.grant_table import (
    gnttab_copy,
    gnttab_map_grant_ref,
    gnttab_unmap_and_replace,
    gnttab_unmap_grant_ref,
)
from bus.addresses import DomId, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.grant_copy import CopyCall
from hypervisor.core.grant_core import GrantCore
from hypervisor.core.grant_jobs import Job, Steps
from hypervisor.core.grant_map import MapCall
from hypervisor.core.grant_ports import DmaMap, GrantDomains, GrantFrames, GrantOutbox
from hypervisor.core.grant_state import Mapping, Table
from hypervisor.core.grant_table_ops import TableOps
from hypervisor.core.grant_unmap import ReleaseMappings, UnmapCall, UnmapRequest
from hypervisor.core.ports import MachineMemory

MAX_OPERATIONS: Final = 512
"""Operations of one call: more is E2BIG (a domain's process divides a longer batch, as Xen continues it)."""
DEFAULT_GRANT_FRAMES: Final = 64
DEFAULT_MAPTRACK: Final = 32768
"""Maptrack entries of a domain unless its creator says otherwise."""
MAPTRACK_PER_FRAME: Final = 256
"""Entries of a maptrack frame (struct grant_mapping is 16 bytes)."""


@dataclass(frozen=True, slots=True)
class OwnWindow:
    """A frame of the domain's own that lives in a window."""

    mfn: Mfn
    window: int
    index: int


class GrantTables:
    """All domains' grant tables. Every entry that can start or end a wait takes the time, in nanoseconds."""

    def __init__(
        self,
        frames: GrantFrames,
        domains: GrantDomains,
        memory: MachineMemory,
        outbox: GrantOutbox,
        dma: DmaMap,
    ) -> None:
        self._core = GrantCore(frames, domains, memory, outbox, dma)
        self.ops = TableOps(self._core)
        """Operations that answer at once."""

    # -- domains --------------------------------------------------------------------------------------------------

    def create(
        self,
        domain: DomId,
        max_grant_frames: int = DEFAULT_GRANT_FRAMES,
        max_maptrack: int = DEFAULT_MAPTRACK,
        max_version: int = 2,
    ) -> None:
        """The domain gets an empty table (no frame until it is grown). EINVAL if it has one."""
        if domain in self._core.tables:
            raise XenError(EINVAL)
        self._core.tables[domain] = Table(domain, max_grant_frames, max_maptrack, max_version)

    def release_mappings(self, now: int, domain: DomId) -> None:
        """Undo all that the domain has mapped: it is dying, or a new process takes its place. Its I/O page tables
        forget the frames before this returns; the rest follows as the granters answer."""
        if domain in self._core.tables:
            self._enter(now)
            ReleaseMappings(self._core, domain).submit()

    def quiet(self, domain: DomId) -> bool:
        """Nothing of the domain is mapped or under way, in either direction."""
        table = self._core.tables.get(domain)
        if table is None:
            return True
        return not table.active and not table.maptrack and not self._core.jobs.jobs_of(domain)

    def remove(self, domain: DomId) -> None:
        """The domain's last frame is free and its id may be used again: forget it. What it had mapped may still
        be on its way home. AssertionError while others map its frames."""
        if domain in self._core.tables:
            self._core.forget_domain(domain)

    def reset(self, now: int, domain: DomId) -> bool:
        """Soft reset: unmap what it has mapped; version 1 again, entries gone. False while others map its frames."""
        self.release_mappings(now, domain)
        table = self._core.tables.get(domain)
        if table is None or table.active:
            return table is None
        for mfn in [*table.shared, *table.status]:
            self._core.frames.release(mfn)
        table.shared, table.status, table.version = [], [], 1
        return True

    # -- calls that may wait --------------------------------------------------------------------------------------

    def map(
        self,
        now: int,
        caller: DomId,
        batch: list[gnttab_map_grant_ref],
        done: Callable[[list[gnttab_map_grant_ref]], None],
    ) -> None:
        """GNTTABOP_map_grant_ref. E2BIG."""
        self._check(caller, len(batch))
        self._enter(now)
        MapCall(self._core, caller, batch, done).submit()

    def unmap(
        self,
        now: int,
        caller: DomId,
        batch: list[gnttab_unmap_grant_ref],
        done: Callable[[list[gnttab_unmap_grant_ref]], None],
    ) -> None:
        """GNTTABOP_unmap_grant_ref. E2BIG."""
        self._check(caller, len(batch))
        self._enter(now)

        def answer(statuses: list[int]) -> None:
            done([op._replace(status=status) for op, status in zip(batch, statuses, strict=True)])

        requests = [UnmapRequest(op.handle, op.host_addr, op.dev_bus_addr) for op in batch]
        UnmapCall(self._core, caller, requests, answer, replace=False).submit()

    def unmap_and_replace(
        self,
        now: int,
        caller: DomId,
        batch: list[gnttab_unmap_and_replace],
        done: Callable[[list[gnttab_unmap_and_replace]], None],
    ) -> None:
        """GNTTABOP_unmap_and_replace. E2BIG."""
        self._check(caller, len(batch))
        self._enter(now)

        def answer(statuses: list[int]) -> None:
            done([op._replace(status=status) for op, status in zip(batch, statuses, strict=True)])

        requests = [UnmapRequest(op.handle, op.host_addr, 0, op.new_addr) for op in batch]
        UnmapCall(self._core, caller, requests, answer, replace=True).submit()

    def copy(
        self,
        now: int,
        caller: DomId,
        batch: list[gnttab_copy],
        done: Callable[[list[gnttab_copy]], None],
    ) -> None:
        """GNTTABOP_copy. E2BIG."""
        self._check(caller, len(batch))
        self._enter(now)

        def answer(statuses: list[int]) -> None:
            done([op._replace(status=status) for op, status in zip(batch, statuses, strict=True)])

        CopyCall(self._core, caller, batch, answer).submit()

    def _check(self, caller: DomId, count: int) -> None:
        if caller not in self._core.tables:
            raise XenError(EINVAL)
        if count > MAX_OPERATIONS:
            raise XenError(E2BIG)

    def _enter(self, now: int) -> None:
        self._core.jobs.now = max(self._core.jobs.now, now)

    # -- DMA and grants -------------------------------------------------------------------------------------------

    @property
    def any_moving(self) -> bool:
        """Jobs hold frames, or whatever else."""
        return self._core.jobs.holds_any

    def moving(self, mfn: Mfn) -> bool:
        """The frame's content is on its way into a window or home: nobody may touch it just now."""
        return self._core.jobs.is_locked(self._core.frame_key(mfn))

    def when_still(self, now: int, mfns: set[Mfn], domain: DomId, run: Callable[[bool], None]) -> None:
        """Call `run(True)` as soon as none of the frames is moving; `run(False)` if their owner does not answer.
        Nothing begins to move before `run` has returned. Whoever waits resolves its addresses again."""
        self._enter(now)
        core = self._core
        keys: set[Hashable] = {core.frame_key(mfn) for mfn in mfns}

        def steps(job: Job) -> Steps:
            held, job.held = job.held, set()
            core.jobs.unlock(held)  # nothing is yielded: nobody can come in between
            run(True)
            return
            yield []  # makes this a generator

        def blocked() -> bool:
            if keys.isdisjoint(core.limbo):
                return False
            run(False)
            return True

        core.jobs.submit(Job(domain, lambda: keys, steps, blocked))

    # -- views ----------------------------------------------------------------------------------------------------

    def own_windows(self, domain: DomId) -> list[OwnWindow]:
        """Where a new process of the domain finds those of its frames that are in windows."""
        core = self._core
        return [
            OwnWindow(mfn, number, index)
            for mfn, (number, index) in sorted(core.homes.items())
            if core.windows[number].granter == domain
        ]

    def mappings(self, domain: DomId) -> list[Mapping]:
        """The domain's live mappings, by handle. Not to be changed."""
        table = self._core.tables.get(domain)
        return sorted((m for m in table.maptrack.values() if m.live), key=lambda m: m.handle) if table else []

    def table(self, domain: DomId) -> Table | None:
        """The domain's table. Not to be changed."""
        return self._core.tables.get(domain)

    def holds(self, domain: DomId, mfn: Mfn) -> bool:
        """The domain has a live grant of the frame, mapped for its CPU or its devices."""
        return any(m.mfn == mfn and m.mapper == domain for m in self.mappings(domain))

    def references(self) -> Iterator[int]:
        """The frame of each reference that the grant tables hold (for `InvariantChecker.add_references`)."""
        for mfn, count in self._core.references.items():
            for _ in range(count):
                yield mfn

    def dump(self, domain: DomId) -> list[str]:
        """The active entries of a domain, a line each."""
        table = self._core.tables.get(domain)
        if table is None:
            return []
        lines = [f"d{domain} version {table.version}, {len(table.shared)}/{table.max_grant_frames} frames"]
        lines += [
            f"ref {ref} d{e.grantee} mfn {e.mfn:#x} host {e.host_read}r{e.host_write}w"
            f" device {e.device_read}r{e.device_write}w bits {e.bits:#x} window {self._core.homes.get(e.mfn)}"
            for ref, e in sorted(table.active.items())
        ]
        return lines

    @property
    def busy(self) -> int:
        """Jobs that wait or run."""
        return self._core.jobs.active

    @property
    def window_count(self) -> int:
        """Windows there are."""
        return len(self._core.windows)

    def check(self) -> list[str]:
        """Broken invariants in words; empty if all hold."""
        return self._core.problems()
