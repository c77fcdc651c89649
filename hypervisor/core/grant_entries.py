"""Grant entries in the granter's memory: read once, into a copy, then checked.

Nothing is trusted that comes from there: the frame number is resolved by the granter's own address space and the
frame's ownership by the hypervisor's frame table.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.abi.grant_table import (
    GRANT_ENTRY_V1,
    GRANT_ENTRY_V2_FULL_PAGE,
    GRANT_ENTRY_V2_SUB_PAGE,
    GRANT_ENTRY_V2_TRANSITIVE,
    GNTST_bad_gntref,
    GNTST_bad_page,
    GNTST_general_error,
    GNTST_okay,
    GTF_permit_access,
    GTF_readonly,
    GTF_sub_page,
    GTF_transitive,
    GTF_type_mask,
)
from bus.addresses import PAGE_SIZE, DomId, GrantRef, Mfn
from hypervisor.core.grant_ports import GrantDomains, GrantFrames
from hypervisor.core.grant_state import Table
from hypervisor.core.ports import MachineMemory


class Place(NamedTuple):
    """Where an entry is, and where its flags or status word is."""

    mfn: Mfn
    offset: int
    size: int
    word_mfn: Mfn
    word_offset: int


class Entry(NamedTuple):
    """A copy of one entry."""

    raw: bytes
    flags: int
    domid: DomId
    frame: int
    start: int
    length: int
    trans_domid: DomId
    trans_gref: GrantRef

    @property
    def kind(self) -> int:
        return self.flags & GTF_type_mask


FIRST_FRAME: Final = PAGE_SIZE // GRANT_ENTRY_V1.size


def missing_entry(ref: int) -> int:
    """The status for a reference beyond a table. On Xen each domain has a first frame from its start, and an entry that nobody
    filled permits nothing; here a table may be empty."""
    return GNTST_general_error if ref < FIRST_FRAME else GNTST_bad_gntref


def place_of(table: Table, ref: GrantRef) -> Place:
    """Where entry `ref` (checked to be below `table.entries`) is in machine memory."""
    if table.version == 1:
        mfn, offset = table.shared[ref // 512], ref % 512 * 8
        return Place(mfn, offset, 8, mfn, offset)
    mfn, offset = table.shared[ref // 256], ref % 256 * 16
    return Place(mfn, offset, 16, table.status[ref // 2048], ref % 2048 * 2)


def parse_entry(version: int, raw: bytes) -> Entry:
    """An entry's fields."""
    nobody, none = DomId(0), GrantRef(0)
    if version == 1:
        v1 = GRANT_ENTRY_V1.unpack(raw)
        return Entry(raw, v1.flags, DomId(v1.domid), v1.frame, 0, PAGE_SIZE, nobody, none)
    full = GRANT_ENTRY_V2_FULL_PAGE.unpack(raw)
    flags, domid = full.hdr.flags, DomId(full.hdr.domid)
    if flags & GTF_type_mask == GTF_transitive:
        trans = GRANT_ENTRY_V2_TRANSITIVE.unpack(raw)
        return Entry(raw, flags, domid, 0, 0, 0, DomId(trans.trans_domid), GrantRef(trans.gref))
    if flags & GTF_sub_page:
        sub = GRANT_ENTRY_V2_SUB_PAGE.unpack(raw)
        return Entry(raw, flags, domid, sub.frame, sub.page_off, sub.length, nobody, none)
    return Entry(raw, flags, domid, full.frame, 0, PAGE_SIZE, nobody, none)


def read_entry(memory: MachineMemory, table: Table, ref: GrantRef) -> Entry:
    """Copy the entry out of the granter's memory."""
    place = place_of(table, ref)
    return parse_entry(table.version, memory.read(place.mfn, place.offset, place.size))


def check_access(entry: Entry, grantee: DomId, *, write: bool, mapping: bool) -> int:
    """May `grantee` use a full or sub-page entry so? GNTST_okay or GNTST_general_error."""
    sub_page = bool(entry.flags & GTF_sub_page)
    if entry.kind != GTF_permit_access or (mapping and sub_page) or entry.domid != grantee:
        return GNTST_general_error
    if write and entry.flags & GTF_readonly:
        return GNTST_general_error
    return GNTST_okay


def frame_of(frames: GrantFrames, domains: GrantDomains, domain: DomId, gfn: int) -> tuple[int, Mfn]:
    """(status, frame) of a domain's own guest RAM at `gfn`. GNTST_bad_page if there is none of its own."""
    mfn = domains.translate(domain, gfn)
    if mfn is None or not frames.is_ram_of(mfn, domain):
        return GNTST_bad_page, Mfn(0)
    return GNTST_okay, mfn
