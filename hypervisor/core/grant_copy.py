"""GNTTABOP_copy: the hypervisor copies between frames, by grant reference or by the caller's own frame number.

A copy is one step of the core. It does not set GTF_reading and GTF_writing for its moment, as Xen does: the granter's
own process is the only writer of its entries, and an order for each batch would cost more than the copy. A granter
that revokes an entry at the very moment of a copy can thus see the copy end some microseconds after its revocation; one
that waits for the response of its backend, as every split driver does, cannot.

Frames that are on their way into a window or home are waited for; those of a granter that does not answer are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from bus.abi.grant_table import (
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_general_error,
    GNTST_okay,
    GNTST_permission_denied,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    GTF_writing,
    gnttab_copy,
    gnttab_copy_ptr,
)
from bus.abi.xen import DOMID_FIRST_RESERVED, DOMID_SELF
from bus.addresses import PAGE_SIZE, DomId, GrantRef, Mfn
from hypervisor.core.grant_core import GrantCore
from hypervisor.core.grant_entries import check_access, frame_of, missing_entry, read_entry
from hypervisor.core.grant_jobs import Job, Steps


class Area(NamedTuple):
    """Bytes of a frame that the caller may use."""

    owner: DomId
    mfn: Mfn
    start: int
    length: int


class CopyCall:
    """One hypercall's batch. `done` gets a status an operation."""

    def __init__(
        self, core: GrantCore, caller: DomId, batch: list[gnttab_copy], done: Callable[[list[int]], None]
    ) -> None:
        self._core = core
        self._caller = caller
        self._batch = batch
        self._done = done
        self._statuses: list[int] = []

    def submit(self) -> None:
        """Copy, at once unless one of the frames is being moved."""
        if self._go_on():
            self._done(self._statuses)
        else:
            core = self._core
            core.jobs.submit(Job(self._caller, self._keys, self._run, self._blocked))

    def _go_on(self) -> bool:
        """Do the operations that are left, in order, up to one whose frames are being moved. True if all are done."""
        core = self._core
        while len(self._statuses) < len(self._batch):
            op = self._batch[len(self._statuses)]
            status, source, dest = resolve(core, self._caller, op)
            if source is not None and dest is not None:
                keys = (core.frame_key(source.mfn), core.frame_key(dest.mfn))
                if any(key in core.limbo for key in keys):
                    status = GNTST_general_error
                elif any(core.jobs.is_locked(key) for key in keys):
                    return False
                else:
                    if op.len:
                        core.memory.copy(source.mfn, op.source.offset, dest.mfn, op.dest.offset, op.len)
                    core.domains.frame_written(dest.owner, dest.mfn)
            self._statuses.append(status)
        return True

    def _keys(self) -> set[Hashable]:
        core, keys = self._core, set[Hashable]()
        for op in self._batch[len(self._statuses) :]:
            _, source, dest = resolve(core, self._caller, op)
            if source is not None and dest is not None:
                keys |= {core.frame_key(source.mfn), core.frame_key(dest.mfn)}
        return keys

    def _run(self, job: Job) -> Steps:
        held, job.held = job.held, set()
        self._core.jobs.unlock(held)  # nothing is yielded: nobody can come in between
        if not self._go_on():
            left = len(self._batch) - len(self._statuses)
            self._statuses += [GNTST_general_error] * left  # the granter changed its entry meanwhile
        self._done(self._statuses)
        return
        yield []

    def _blocked(self) -> bool:
        """While waiting: go on if it is a granter that does not answer for whom we wait."""
        if not any(key in self._core.limbo for key in self._keys()):
            return False
        if not self._go_on():
            return False
        self._done(self._statuses)
        return True


def resolve(core: GrantCore, caller: DomId, op: gnttab_copy) -> tuple[int, Area | None, Area | None]:
    """(status, source, destination) of one operation, checked; areas only if the status is GNTST_okay."""
    by_ref = (bool(op.flags & GNTCOPY_source_gref), bool(op.flags & GNTCOPY_dest_gref))
    domains: list[DomId] = []
    for pointer, is_ref in zip((op.source, op.dest), by_ref, strict=True):
        if pointer.domid != DOMID_SELF and not is_ref:
            return GNTST_permission_denied, None, None
        domain = caller if pointer.domid == DOMID_SELF else DomId(pointer.domid)
        known = pointer.domid == DOMID_SELF or pointer.domid < DOMID_FIRST_RESERVED
        if not known or domain not in core.tables or not core.domains.exists(domain):
            return GNTST_bad_domain, None, None
        domains.append(domain)
    status, source = _claim(core, caller, domains[0], op.source, by_ref[0], write=False)
    if source is None:
        return status, None, None
    status, dest = _claim(core, caller, domains[1], op.dest, by_ref[1], write=True)
    if dest is None:
        return status, None, None
    if op.source.offset + op.len > PAGE_SIZE or op.dest.offset + op.len > PAGE_SIZE:
        return GNTST_bad_copy_arg, None, None
    for pointer, area in ((op.source, source), (op.dest, dest)):
        if pointer.offset < area.start or pointer.offset + op.len > area.start + area.length:
            return GNTST_general_error, None, None
    return GNTST_okay, source, dest


def _claim(
    core: GrantCore, caller: DomId, domain: DomId, pointer: gnttab_copy_ptr, is_ref: bool, *, write: bool
) -> tuple[int, Area | None]:
    if is_ref:
        return claim_ref(core, domain, pointer.u & 0xFFFF_FFFF, caller, write=write, transitive=True)
    status, mfn = frame_of(core.frames, core.domains, domain, pointer.u)
    return status, Area(domain, mfn, 0, PAGE_SIZE) if status == GNTST_okay else None


def claim_ref(
    core: GrantCore, granter: DomId, ref: int, grantee: DomId, *, write: bool, transitive: bool
) -> tuple[int, Area | None]:
    """What `grantee` may copy by an entry: a frame or a part of one, through one transitive entry at most."""
    table = core.tables[granter]
    if ref >= table.entries:
        return missing_entry(ref), None
    if core.domains.is_dying(granter):
        return GNTST_bad_domain, None
    active = table.active.get(GrantRef(ref))
    if active is not None and active.grantee != grantee:
        return GNTST_general_error, None
    if active is not None and not (write and not active.bits & GTF_writing):
        return _active_area(core, granter, active.mfn)
    entry = read_entry(core.memory, table, GrantRef(ref))
    if active is not None:
        if entry.flags & GTF_readonly:
            return GNTST_general_error, None
        return _active_area(core, granter, active.mfn)
    if table.version == 2 and entry.kind == GTF_transitive:
        bad = entry.domid != grantee or entry.flags & GTF_sub_page or (write and entry.flags & GTF_readonly)
        if bad or not transitive or entry.trans_domid == granter:
            return GNTST_general_error, None
        if entry.trans_domid not in core.tables or not core.domains.exists(entry.trans_domid):
            return GNTST_general_error, None
        return claim_ref(core, entry.trans_domid, entry.trans_gref, granter, write=write, transitive=False)
    status = check_access(entry, grantee, write=write, mapping=False)
    if status != GNTST_okay:
        return status, None
    status, mfn = frame_of(core.frames, core.domains, granter, entry.frame)
    return status, Area(granter, mfn, entry.start, entry.length) if status == GNTST_okay else None


def _active_area(core: GrantCore, granter: DomId, mfn: Mfn) -> tuple[int, Area | None]:
    if core.frames.owner(mfn) != granter:
        return GNTST_bad_domain, None  # given back while mapped
    return GNTST_okay, Area(granter, mfn, 0, PAGE_SIZE)
