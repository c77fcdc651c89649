"""GNTTABOP_unmap_grant_ref and unmap_and_replace, and the end of a grantee: mappings go, frames come home.

Order of an unmap: the I/O page tables first (from then on no DMA reaches the frame by this mapping), then the mapper's
process lets go, then the granter's process copies the frame back and clears its entry, then the caller is answered.
The mapper's answer is not needed for safety: the frame leaves the window whether it lets go or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bus.abi.grant_table import (
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_general_error,
    GNTST_okay,
)
from bus.addresses import PAGE_SHIFT, DomId, Gfn
from hypervisor.core.grant_core import GrantCore
from hypervisor.core.grant_jobs import Job, OrderSpec, Steps
from hypervisor.core.grant_map import bus_address
from hypervisor.core.grant_state import Mapping

RELEASE_BATCH = 256
"""Mappings of a dead grantee undone together."""


class UnmapRequest(NamedTuple):
    """What both operations say."""

    handle: int
    host_addr: int
    dev_bus_addr: int = 0
    new_addr: int = 0


@dataclass(slots=True)
class _Op:
    request: UnmapRequest
    status: int = GNTST_okay
    mapping: Mapping | None = None
    host: bool = False
    device: bool = False


class UnmapCall:
    """One hypercall's batch."""

    def __init__(
        self,
        core: GrantCore,
        caller: DomId,
        batch: list[UnmapRequest],
        done: Callable[[list[int]], None],
        *,
        replace: bool,
    ) -> None:
        self._core = core
        self._caller = caller
        self._ops = [_Op(request) for request in batch]
        self._done = done
        self._replace = replace
        self._mine = core.tables[caller]

    def submit(self) -> None:
        """Start, as soon as nobody else works on these entries and frames."""
        self._core.jobs.submit(Job(self._caller, self._keys, self._run, self._blocked))

    def _mapping(self, request: UnmapRequest) -> Mapping | None:
        mapping = self._mine.maptrack.get(request.handle)
        return mapping if mapping is not None and mapping.live else None

    def _keys(self) -> Collection[Hashable]:
        return mapping_keys(self._core, (self._mapping(op.request) for op in self._ops))

    def _blocked(self) -> bool:
        crash_unresponsive(self._core, (self._mapping(op.request) for op in self._ops))
        return False

    def _run(self, job: Job) -> Steps:
        core = self._core
        for op in self._ops:
            op.status = self._admit(op)
        items = [op for op in self._ops if op.host]
        if items:
            outcome = (yield [self._detach_order(items)])[0]
            for op, result in zip(items, outcome.results or [GNTST_okay] * len(items), strict=True):
                if result != GNTST_okay:
                    self._kept(op, result)
        touched: list[Mapping] = []
        for op in self._ops:
            mapping = op.mapping
            if mapping is not None and (op.host or op.device):
                # A half that was asked for twice in the batch went with its first request.
                core.count_out(mapping, host=op.host and mapping.host, device=op.device and mapping.device)
                touched.append(mapping)
        yield from core.settle(mapping.mfn for mapping in touched)
        for mapping in touched:
            if not mapping.host and not mapping.device and mapping.handle in self._mine.maptrack:
                self._mine.drop_handle(mapping.handle)
                core.orphans.pop(id(mapping), None)
                core.let_go(mapping.mfn)
        self._done([op.status for op in self._ops])

    def _admit(self, op: _Op) -> int:
        """Check one operation; take it out of the tables that the hypervisor holds itself."""
        core, request = self._core, op.request
        mapping = self._mapping(request)
        if mapping is None:
            return GNTST_bad_handle
        if (
            request.dev_bus_addr and mapping.device and request.dev_bus_addr != bus_address(core, mapping)
        ):  # of a mapping for the CPU alone Xen does not look at it
            return GNTST_general_error
        earlier = [o for o in self._ops if o is not op and o.mapping is mapping]
        host = bool(request.host_addr) and mapping.host and not any(o.host for o in earlier)
        device = bool(request.dev_bus_addr) and mapping.device and not any(o.device for o in earlier)
        if earlier and not host and not device:
            return GNTST_bad_handle  # an earlier operation of the batch used the handle up
        if host and core.domains.is_translated(self._caller):
            if self._replace or request.host_addr != mapping.host_addr:
                return GNTST_general_error  # Xen: p2m mappings cannot be replaced, and must match
            if not core.domains.remove_grant(self._caller, Gfn(mapping.host_addr >> PAGE_SHIFT), mapping.mfn):
                return GNTST_general_error
        op.mapping, op.host, op.device = mapping, host, device
        by_p2m = host and core.domains.dma_by_p2m(self._caller) and (device or not mapping.device)
        if by_p2m or (device and core.domains.is_translated(self._caller)):
            core.leave_dma(mapping)
        return GNTST_okay

    def _detach_order(self, items: list[_Op]) -> OrderSpec:
        body: dict[str, object] = {
            "items": [
                (
                    o.request.handle,
                    int(o.mapping.mfn),
                    o.request.host_addr,
                    o.request.new_addr,
                    o.mapping.flags,
                )
                for o in items
                if o.mapping is not None
            ],
            "replace": self._replace,
        }
        return OrderSpec(self._caller, "grant_detach", body, len(items))

    def _kept(self, op: _Op, result: int) -> None:
        """The mapper could not let go (its page-table entry shows another frame): the mapping for the CPU stays."""
        op.host = False
        op.status = result if GNTST_bad_page <= result <= GNTST_general_error else GNTST_general_error
        mapping = op.mapping
        if mapping is not None and self._core.domains.is_translated(self._caller):
            page = Gfn(mapping.host_addr >> PAGE_SHIFT)
            self._core.domains.enter_grant(self._caller, page, mapping.mfn, not mapping.readonly)


class ReleaseMappings:
    """Everything a grantee has mapped, when its process or the whole domain has ended."""

    def __init__(self, core: GrantCore, domain: DomId) -> None:
        self._core = core
        self._domain = domain

    def submit(self) -> None:
        """Undo all mappings that are complete now; a map under way sees the new epoch and undoes itself."""
        table = self._core.tables[self._domain]
        table.epoch += 1
        live = [mapping for mapping in table.maptrack.values() if mapping.live]
        for mapping in live:
            self._core.leave_dma(mapping)  # at once, whatever else must be waited for
        for start in range(0, len(live), RELEASE_BATCH):
            self._submit(live[start : start + RELEASE_BATCH])

    def _submit(self, batch: list[Mapping]) -> None:
        core, table = self._core, self._core.tables[self._domain]

        def left() -> list[Mapping]:
            return [m for m in batch if table.maptrack.get(m.handle) is m]

        def run(job: Job) -> Steps:
            mine = left()
            for mapping in mine:
                if mapping.host and core.domains.is_translated(self._domain):
                    page = Gfn(mapping.host_addr >> PAGE_SHIFT)
                    core.domains.remove_grant(self._domain, page, mapping.mfn)
                core.count_out(mapping, host=mapping.host, device=mapping.device)
                mapping.live = False
            yield from core.settle(mapping.mfn for mapping in mine)
            for mapping in mine:
                table.drop_handle(mapping.handle)
                core.orphans.pop(id(mapping), None)
                core.let_go(mapping.mfn)

        def blocked() -> bool:
            crash_unresponsive(core, left())
            return False

        core.jobs.submit(Job(self._domain, lambda: mapping_keys(core, left()), run, blocked))


def mapping_keys(core: GrantCore, mappings: Iterable[Mapping | None]) -> set[Hashable]:
    """Locks of all entries and frames of these mappings."""
    keys: set[Hashable] = set()
    for mapping in mappings:
        if mapping is not None:
            keys |= {core.entry_key(mapping.granter, mapping.ref), core.frame_key(mapping.mfn)}
    return keys


def crash_unresponsive(core: GrantCore, mappings: Iterable[Mapping | None]) -> None:
    """An unmap waits for a granter that has not even answered an expired map: it has had its second."""
    for mapping in mappings:
        if mapping is None:
            continue
        key = core.frame_key(mapping.mfn)
        if key in core.limbo and core.tables[mapping.granter].unresponsive:
            core.crash(mapping.granter, "grant_map was not undone in time for an unmap")
