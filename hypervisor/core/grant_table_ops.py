"""The grant operations that wait for nobody: size, version, frames, swaps, cache, and what else reads a table.

Each raises XenError for what Xen answers with an errno, and gives a status in the structure where Xen does.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, ERANGE, ESRCH
from typing import Final

from bus.abi.grant_table import (
    GNTTAB_CACHE_CLEAN,
    GNTTAB_CACHE_INVAL,
    GNTTAB_NR_RESERVED_ENTRIES,
    GRANT_ENTRY_V1,
    GRANT_ENTRY_V2_FULL_PAGE,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_okay,
    GNTST_permission_denied,
    GTF_invalid,
    GTF_permit_access,
    GTF_reading,
    GTF_transitive,
    GTF_type_mask,
    GTF_writing,
    gnttab_cache_flush,
    gnttab_get_status_frames,
    gnttab_get_version,
    gnttab_query_size,
    gnttab_set_version,
    gnttab_setup_table,
    gnttab_swap_grant_ref,
    gnttab_transfer,
    grant_entry_header,
    grant_entry_v1,
    grant_entry_v2_full_page,
)
from bus.abi.xen import DOMID_FIRST_RESERVED, DOMID_SELF
from bus.addresses import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, DomId, GrantRef, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.grant_core import GrantCore
from hypervisor.core.grant_entries import Place, place_of, read_entry
from hypervisor.core.grant_state import Table, status_frames

XENMAPIDX_GRANT_TABLE_STATUS: Final = 0x8000_0000
"""Bit of an XENMAPSPACE_grant_table index: a status frame is meant (XENMAPIDX_grant_table_status, memory.h)."""


class TableOps:
    """Operations on tables; the state is `GrantCore`'s."""

    def __init__(self, core: GrantCore) -> None:
        self._core = core

    # -- frames of tables -----------------------------------------------------------------------------------------

    def grow(self, table: Table, frames: int) -> bool:
        """At least so many shared frames, and the status frames that go with them. False if that cannot be."""
        if frames > table.max_grant_frames:
            return False
        need = status_frames(frames) if table.version == 2 else 0
        try:
            while len(table.status) < need:
                table.status.append(self._core.frames.allocate_xenheap(table.domain))
            while len(table.shared) < frames:
                table.shared.append(self._core.frames.allocate_xenheap(table.domain))
        except XenError:
            return False
        return True

    def resource_frames(self, domain: DomId, *, status: bool, first: int, count: int) -> list[Mfn]:
        """Frames of XENMEM_resource_grant_table, the table grown where needed. EINVAL, ENOMEM."""
        table = self._core.tables.get(domain)
        if table is None:
            raise XenError(ESRCH)
        if status and table.version != 2:
            raise XenError(EINVAL)
        wanted = first + count
        shared = wanted * 8 if status else wanted
        if shared > table.max_grant_frames + (7 if status else 0):
            raise XenError(EINVAL)
        if not self.grow(table, max(len(table.shared), min(shared, table.max_grant_frames))):
            raise XenError(ENOMEM)
        frames = table.status if status else table.shared
        if wanted > len(frames):
            raise XenError(EINVAL)
        return frames[first:wanted]

    def map_space_frame(self, domain: DomId, index: int) -> Mfn:
        """The frame of XENMAPSPACE_grant_table index `index`; the table grows up to it. EINVAL, ENOMEM."""
        status = bool(index & XENMAPIDX_GRANT_TABLE_STATUS)
        index &= ~XENMAPIDX_GRANT_TABLE_STATUS
        return self.resource_frames(domain, status=status, first=index, count=1)[0]

    def _target(self, caller: DomId, domid: int) -> tuple[int, Table | None]:
        domain = caller if domid == DOMID_SELF else DomId(domid)
        table = self._core.tables.get(domain)
        if (
            (domid != DOMID_SELF and domid >= DOMID_FIRST_RESERVED)
            or table is None
            or not self._core.domains.exists(domain)
        ):
            return GNTST_bad_domain, None
        if not self._core.domains.controls(caller, domain):
            return GNTST_permission_denied, None
        return GNTST_okay, table

    def setup_table(self, caller: DomId, op: gnttab_setup_table) -> tuple[gnttab_setup_table, list[int]]:
        """GNTTABOP_setup_table: (structure, frame numbers as the domain knows them)."""
        status, table = self._target(caller, op.dom)
        if table is None:
            return op._replace(status=status), []
        if not self.grow(table, op.nr_frames):
            return op._replace(status=GNTST_general_error), []
        numbers = [self._core.domains.gfn_of(table.domain, mfn) for mfn in table.shared[: op.nr_frames]]
        return op._replace(status=GNTST_okay), numbers

    def query_size(self, caller: DomId, op: gnttab_query_size) -> gnttab_query_size:
        """GNTTABOP_query_size."""
        status, table = self._target(caller, op.dom)
        if table is None:
            return op._replace(status=status)
        return op._replace(
            nr_frames=len(table.shared), max_nr_frames=table.max_grant_frames, status=GNTST_okay
        )

    def get_status_frames(
        self, caller: DomId, op: gnttab_get_status_frames
    ) -> tuple[gnttab_get_status_frames, list[int]]:
        """GNTTABOP_get_status_frames: (structure, frame numbers as the domain knows them)."""
        status, table = self._target(caller, op.dom)
        if table is None:
            return op._replace(status=status), []
        if op.nr_frames > len(table.status):
            return op._replace(status=GNTST_general_error), []
        numbers = [self._core.domains.gfn_of(table.domain, mfn) for mfn in table.status[: op.nr_frames]]
        return op._replace(status=GNTST_okay), numbers

    # -- versions -------------------------------------------------------------------------------------------------

    def get_version(self, caller: DomId, op: gnttab_get_version) -> gnttab_get_version:
        """GNTTABOP_get_version. ESRCH, EPERM."""
        status, table = self._target(caller, op.dom)
        if table is None:
            raise XenError(ESRCH if status == GNTST_bad_domain else EPERM)
        return op._replace(version=table.version)

    def set_version(self, caller: DomId, op: gnttab_set_version) -> gnttab_set_version:
        """GNTTABOP_set_version. EINVAL; ENOSYS if version 2 is not allowed; EBUSY while an entry but the reserved ones
        is mapped, or a status frame is; ERANGE if a reserved entry cannot be said in version 1; ENOMEM."""
        table = self._core.tables[caller]
        if op.version not in (1, 2):
            raise XenError(EINVAL)
        if op.version > table.max_version:
            raise XenError(ENOSYS)
        if op.version == table.version:
            return op
        if any(ref >= GNTTAB_NR_RESERVED_ENTRIES for ref in table.active):
            raise XenError(EBUSY)
        if any(self._core.jobs.is_locked(self._core.entry_key(caller, ref)) for ref in range(8)):
            raise XenError(EBUSY)
        reserved = self._reserved(table)
        if op.version == 2:
            self._to_version_2(table, reserved)
        else:
            self._to_version_1(table, reserved)
        return op._replace(version=table.version)

    def _reserved(self, table: Table) -> list[grant_entry_v1]:
        """The first eight entries, as version 1 entries."""
        nothing = grant_entry_v1(0, 0, 0)
        kept = [nothing] * GNTTAB_NR_RESERVED_ENTRIES
        for ref in range(GNTTAB_NR_RESERVED_ENTRIES if table.shared else 0):
            entry = read_entry(self._core.memory, table, GrantRef(ref))
            if table.version == 1:
                kept[ref] = GRANT_ENTRY_V1.unpack(entry.raw)
                continue
            full = GRANT_ENTRY_V2_FULL_PAGE.unpack(entry.raw)
            kind = entry.flags & GTF_type_mask
            if kind == GTF_transitive or (kind == GTF_permit_access and full.frame >> 32):
                raise XenError(ERANGE)
            if kind == GTF_permit_access:
                flags = entry.flags | self._status_word(table, ref)
                kept[ref] = grant_entry_v1(flags, int(entry.domid), full.frame)
        return kept

    def _status_word(self, table: Table, ref: int) -> int:
        place = place_of(table, GrantRef(ref))
        return int.from_bytes(self._core.memory.read(place.word_mfn, place.word_offset, 2), "little")

    def _to_version_2(self, table: Table, reserved: list[grant_entry_v1]) -> None:
        frames, taken = self._core.frames, list[Mfn]()
        try:
            for _ in range(status_frames(len(table.shared))):
                taken.append(frames.allocate_xenheap(table.domain))
        except XenError:
            for mfn in taken:
                frames.release(mfn)
            raise XenError(ENOMEM) from None
        table.status, table.version = taken, 2
        self._wipe(table)
        for ref, old in enumerate(reserved if table.shared else ()):
            if old.flags & GTF_type_mask == GTF_invalid and not old.domid and not old.frame:
                continue
            bits = GTF_reading | GTF_writing
            place = place_of(table, GrantRef(ref))
            header = grant_entry_header(old.flags & ~bits, old.domid)
            self._write(place, GRANT_ENTRY_V2_FULL_PAGE.pack(grant_entry_v2_full_page(header, 0, old.frame)))
            word = (old.flags & bits).to_bytes(2, "little")
            self._core.memory.write(place.word_mfn, place.word_offset, word)

    def _to_version_1(self, table: Table, reserved: list[grant_entry_v1]) -> None:
        core = self._core
        for mfn in table.status:
            mapped = (
                core.domains.is_translated(table.domain)
                and core.domains.gfn_of(table.domain, mfn) != 0xFFFF_FFFF_FFFF_FFFF
            )
            if core.frames.references(mfn) or mapped:
                raise XenError(EBUSY)
        for mfn in table.status:
            core.frames.release(mfn)
        table.status, table.version = [], 1
        self._wipe(table)
        for ref, old in enumerate(reserved if table.shared else ()):
            self._write(place_of(table, GrantRef(ref)), GRANT_ENTRY_V1.pack(old))

    def _wipe(self, table: Table) -> None:
        for mfn in table.shared:
            self._core.memory.write(mfn, 0, bytes(PAGE_SIZE))

    def _write(self, place: Place, raw: bytes) -> None:
        self._core.memory.write(place.mfn, place.offset, raw)

    # -- entries --------------------------------------------------------------------------------------------------

    def swap_grant_ref(self, caller: DomId, op: gnttab_swap_grant_ref) -> gnttab_swap_grant_ref:
        """GNTTABOP_swap_grant_ref: one operation. GNTST_bad_gntref; GNTST_eagain while one of them is mapped."""
        core, table = self._core, self._core.tables[caller]
        if op.ref_a >= table.entries or op.ref_b >= table.entries:
            return op._replace(status=GNTST_bad_gntref)
        if op.ref_a == op.ref_b:
            return op._replace(status=GNTST_okay)
        for ref in (op.ref_a, op.ref_b):
            if GrantRef(ref) in table.active or core.jobs.is_locked(core.entry_key(caller, ref)):
                return op._replace(status=GNTST_eagain)
        places = [place_of(table, GrantRef(ref)) for ref in (op.ref_a, op.ref_b)]
        raws = [core.memory.read(p.mfn, p.offset, p.size) for p in places]
        words = [core.memory.read(p.word_mfn, p.word_offset, 2) for p in places]
        for place, raw, word in zip(places, reversed(raws), reversed(words), strict=True):
            self._write(place, raw)
            if table.version == 2:
                core.memory.write(place.word_mfn, place.word_offset, word)
        return op._replace(status=GNTST_okay)

    def seed(self, domain: DomId, ref: int, grantee: DomId, frame: int) -> None:
        """A full-page grant written by the domain builder (console, xenstore) before the domain runs: entry `ref`
        permits `grantee` to use the domain's frame number `frame`. ESRCH, EINVAL, ENOMEM, EBUSY."""
        table = self._core.tables.get(domain)
        if table is None:
            raise XenError(ESRCH)
        if not 0 <= ref < GNTTAB_NR_RESERVED_ENTRIES or (table.version == 1 and frame >> 32):
            raise XenError(EINVAL)
        if not table.shared and not self.grow(table, 1):
            raise XenError(ENOMEM)
        if GrantRef(ref) in table.active:
            raise XenError(EBUSY)
        if table.version == 1:
            raw = GRANT_ENTRY_V1.pack(grant_entry_v1(GTF_permit_access, int(grantee), frame))
        else:
            header = grant_entry_header(GTF_permit_access, int(grantee))
            raw = GRANT_ENTRY_V2_FULL_PAGE.pack(grant_entry_v2_full_page(header, 0, frame))
        self._write(place_of(table, GrantRef(ref)), raw)

    def transfer(self, op: gnttab_transfer) -> gnttab_transfer:
        """GNTTABOP_transfer: refused. Page ownership never changes hands on this machine (a frame is part of its
        owner's extent for good), and GNTST_bad_page is the one refusal after which, by the interface, the page still
        belongs to the caller."""
        return op._replace(status=GNTST_bad_page)

    # -- caches ---------------------------------------------------------------------------------------------------

    def cache_flush(self, caller: DomId, op: gnttab_cache_flush) -> None:
        """GNTTABOP_cache_flush, one operation: memory is coherent here, so that only the checks remain. EINVAL,
        EPERM; EOPNOTSUPP for an invalidation without cleaning, as on x86."""
        core = self._core
        known = GNTTAB_CACHE_INVAL | GNTTAB_CACHE_CLEAN
        if op.offset >= PAGE_SIZE or op.offset + op.length > PAGE_SIZE or op.op & ~known:
            raise XenError(EINVAL)
        if not op.length or not op.op:
            return
        address = op.a & ~PAGE_MASK
        if core.domains.is_translated(caller):
            entry = core.dma.lookup(caller, address >> PAGE_SHIFT)
            mfn: Mfn | None = entry[0] if entry else core.domains.translate(caller, address >> PAGE_SHIFT)
        else:
            mfn = Mfn(address >> PAGE_SHIFT)
        if mfn is None or (not core.frames.references(mfn) and core.frames.owner(mfn) is None):
            raise XenError(EINVAL)
        owner = core.frames.owner(mfn)
        if owner is None:
            raise XenError(EPERM)
        if owner != caller and not any(m.mfn == mfn for m in core.tables[caller].maptrack.values() if m.live):
            raise XenError(EINVAL)
        if op.op == GNTTAB_CACHE_INVAL:
            raise XenError(EOPNOTSUPP)
