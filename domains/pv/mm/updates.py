"""HYPERVISOR_mmu_update and HYPERVISOR_update_va_mapping (xen.h)."""

from __future__ import annotations

import struct
from typing import Final

from bus.abi import xen
from bus.abi.errno import XEN_EBUSY, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EPERM, XEN_ESRCH
from bus.addresses import DomId
from domains.pv.api import Continuation, GuestFault, PagingHost
from domains.pv.mm.bits import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    SLOW_BITS,
    T_L1,
    T_L4,
    T_NONE,
    T_UNOWNED,
    T_WRITABLE,
    adjust_l1,
)
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.walk import GuestMemory, address_ok
from domains.pv.xenmap import XenMap

PREEMPTED: Final = 1 << 31
"""MMU_UPDATE_PREEMPTED: in `count`, says that the call is a continuation and `pdone` holds what was done."""
CHUNK: Final = 256
"""Requests that are copied in at a time: one page of them."""
BATCH: Final = 8192
"""Requests after which a call is preempted."""

_PAIR: Final = struct.Struct("<QQ")
_AD: Final = ACCESSED | DIRTY


def page_owner(domid: int, own: DomId) -> int:
    """Xen's get_pg_owner for an unprivileged guest: 0 for itself, DOMID_IO, or -ESRCH; -EPERM for another
    domain."""
    if domid == xen.DOMID_SELF:
        return 0
    if domid == own:
        return -XEN_ESRCH  # "Cannot specify itself as foreign domain"
    if domid == xen.DOMID_IO:
        return xen.DOMID_IO
    if domid == xen.DOMID_XEN or domid < xen.DOMID_FIRST_RESERVED:
        return -XEN_EPERM
    return -XEN_ESRCH


class Updates:
    """Changes of page-table entries one by one."""

    def __init__(
        self, pages: PageTypes, memory: GuestMemory, xenmap: XenMap, host: PagingHost, domain: DomId
    ) -> None:
        self._pages = pages
        self._memory = memory
        self._map = xenmap
        self._host = host
        self._domain = domain

    def store_done(self, pdone: int, done: int) -> None:
        """`*pdone = done`, if there is a place; one that cannot be written is ignored, as on Xen."""
        if pdone:
            try:
                self._memory.write(pdone, (done & 0xFFFF_FFFF).to_bytes(4, "little"))
            except GuestFault:
                return

    def load_done(self, pdone: int) -> int:
        """What an earlier part of a preempted call left in `*pdone`."""
        if not pdone:
            return 0
        try:
            return int.from_bytes(self._memory.read(pdone, 4), "little")
        except GuestFault:
            return 0

    def read_array(self, address: int, size: int, count: int) -> list[int] | None:
        """The 64-bit words of up to `count` structures of so many bytes: of all, or if not all can be read,
        of some from the first on (Xen copies them in one by one). None if not even the first can be."""
        try:
            return memoryview(self._memory.read(address, size * count)).cast("Q").tolist()
        except GuestFault:
            # Those that end before the next page may do; what lies in the way is found the next time.
            count = min(count, max((-address & 0xFFF) // size, 1))
        try:
            return memoryview(self._memory.read(address, size * count)).cast("Q").tolist()
        except GuestFault:
            return None

    def mmu_update(self, reqs: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmu_update."""
        if count == 1 and foreigndom == xen.DOMID_SELF and not pdone:
            # A single L1 entry, as most calls are.
            try:
                ptr, new = _PAIR.unpack(self._memory.read(reqs, 16))
            except GuestFault:
                return -XEN_EFAULT
            pages = self._pages
            index = (ptr >> 12) - pages.base
            if not ptr & 7 and 0 <= index < pages.count and pages.ptype[index] == T_L1:
                return pages.mod_l1((ptr >> 3) - (pages.base << 9), new, False)
            return self._run([ptr, new], 0)[1]
        count &= 0xFFFF_FFFF
        foreigndom &= 0xFFFF_FFFF
        before = 0
        if count & PREEMPTED:
            if count == PREEMPTED and not reqs:
                return foreigndom if foreigndom < 1 << 31 else foreigndom - (1 << 32)
            count &= ~PREEMPTED
            before = self.load_done(pdone)
        if not address_ok(reqs):
            return -XEN_EFAULT
        table_domain = foreigndom >> 16
        if table_domain:
            owner = page_owner(table_domain - 1, self._domain)
            if owner:
                # Tables of DOMID_IO do not exist; those of others are out of reach.
                return -XEN_EPERM if owner == xen.DOMID_IO else owner
        owner = page_owner(foreigndom & 0xFFFF, self._domain)
        if owner < 0:
            return owner
        done, rc = 0, 0
        limit = min(count, BATCH)
        while done < limit and not rc:
            words = self.read_array(reqs + done * 16, 16, min(CHUNK, limit - done))
            if words is None:
                rc = -XEN_EFAULT
                break
            finished, rc = self._run(words, owner)
            done += finished
        self.store_done(pdone, before + done)
        if not rc and done < count:
            return Continuation((reqs + done * 16, count - done | PREEMPTED, pdone, foreigndom))
        return rc

    def _run(self, words: list[int], owner: int) -> tuple[int, int]:
        """Carry out (ptr, val) pairs. (how many were, error that stopped it)."""
        pages = self._pages
        base, count, ptype = pages.base, pages.count, pages.ptype
        memory, disallow = pages.words, pages.l1_disallow
        get_l1e, put_l1e = pages.get_l1e, pages.put_l1e
        done = 0
        items = iter(words)
        for ptr, new in zip(items, items, strict=True):
            command = ptr & 7
            index = (ptr >> 12) - base
            if command == xen.MMU_MACHPHYS_UPDATE:
                rc = self._machphys(index, new)
            elif command > xen.MMU_PT_UPDATE_NO_TRANSLATE:
                rc = -XEN_ENOSYS
            elif not 0 <= index < count:
                rc = -XEN_EINVAL
            elif ptype[index] == T_L1 and not owner:
                # PageTypes.mod_l1, in line: this is the path that forks and faults of a guest live on.
                at = (ptr >> 3) - (base << 9)
                old = memory[at]
                rc = 0
                if new & 1:
                    if new & disallow:
                        rc = -XEN_EINVAL
                    elif (old ^ new) & SLOW_BITS:
                        rc = get_l1e(new)
                    else:
                        new = adjust_l1(new)
                        memory[at] = new | (old & _AD) if command == xen.MMU_PT_UPDATE_PRESERVE_AD else new
                        done += 1
                        continue
                    if rc:
                        break
                    new = adjust_l1(new)
                if command == xen.MMU_PT_UPDATE_PRESERVE_AD:
                    new |= old & _AD
                memory[at] = new
                if old & 1:
                    put_l1e(old)
            else:
                rc = self._other(index, ptr, new, owner)
            if rc:
                break
            done += 1
        else:
            rc = 0
        return done, rc

    def _other(self, index: int, ptr: int, new: int, owner: int) -> int:
        """An update of anything but an L1 table of a call for the domain's own frames."""
        pages = self._pages
        kind = pages.ptype[index]
        at = (ptr >> 3) - (pages.base << 9)
        preserve = ptr & 7 == xen.MMU_PT_UPDATE_PRESERVE_AD
        if kind == T_L1:
            rc = self.foreign_l1(at, new)
            return rc if rc else pages.mod_l1(at, new, preserve)
        if kind <= T_L4 and kind != T_NONE:
            return -XEN_EINVAL if owner else pages.mod_upper(at, new, preserve, kind)
        if kind in (T_NONE, T_WRITABLE):
            # An ordinary page: Xen takes a writable reference for the moment of the write.
            pages.words[at] = new
            return 0
        return -XEN_EINVAL

    def foreign_l1(self, at: int, new: int) -> int:
        """Why an L1 entry may not change on behalf of DOMID_IO: only I/O memory may be mapped, that of the domain's own devices.
        0 if it may."""
        pages = self._pages
        if not new & 1 or not (pages.words[at] ^ new) & SLOW_BITS:
            return 0
        if new & pages.l1_disallow:
            return -XEN_EINVAL
        mfn = (new & ADDRESS_MASK) >> 12
        if pages.index(mfn) >= 0:
            return -XEN_EBUSY
        return 0 if mfn in pages.io_frames else pages.get_l1e(new)

    def _machphys(self, index: int, pfn: int) -> int:
        """MMU_MACHPHYS_UPDATE: the frame must be the domain's."""
        pages = self._pages
        if not 0 <= index < pages.count or pages.ptype[index] == T_UNOWNED:
            return -XEN_EINVAL
        self._map.set_m2p(index + pages.base, (pfn,))
        return 0

    def update_va_mapping(self, va: int, new: int, flags: int, domid: int = xen.DOMID_SELF) -> int:
        """HYPERVISOR_update_va_mapping(_otherdomain)."""
        owner = page_owner(domid & 0xFFFF, self._domain)
        if owner < 0:
            return owner
        if owner:
            return -XEN_EPERM
        try:
            at, _ = self._memory.l1_entry(va, self._memory.root())
        except GuestFault:
            return -XEN_EINVAL
        pages = self._pages
        if pages.ptype[at >> 9] != T_L1:
            return -XEN_EINVAL
        rc = pages.mod_l1(at, new, False)
        if rc:
            return rc
        kind = flags & xen.UVMF_FLUSHTYPE_MASK
        if kind in (xen.UVMF_TLB_FLUSH, xen.UVMF_INVLPG):
            page = va if kind == xen.UVMF_INVLPG else None
            where = flags & ~xen.UVMF_FLUSHTYPE_MASK
            if where not in (xen.UVMF_LOCAL, xen.UVMF_ALL):
                return self.flush_mask(where, page)
            self._flush(page)
        return 0

    def flush_mask(self, pointer: int, page: int | None) -> int:
        """Flush a page (None: everything) on the vCPUs of a guest bitmap: only the current one has cached
        translations. -EINVAL if the bitmap cannot be read."""
        try:
            mask = self._memory.read(pointer, (self._map.vcpus + 7) // 8)
        except GuestFault:
            return -XEN_EINVAL
        current = self._host.current_vcpu()
        if mask[current >> 3] >> (current & 7) & 1:
            self._flush(page)
        return 0

    def _flush(self, page: int | None) -> None:
        if page is None:
            self._pages.flush_wanted = True
        else:
            self._pages.want_page_flush(page)
