"""HYPERVISOR_mmuext_op (xen.h): pins, roots, TLB flushes, LDT, page copies."""

from __future__ import annotations

from typing import Final

from bus.abi import xen
from bus.abi.errno import XEN_EACCES, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EOPNOTSUPP
from bus.addresses import DomId, Mfn
from domains.pv.api import Continuation, PagingHost
from domains.pv.mm.bits import T_L4, T_WRITABLE
from domains.pv.mm.descriptors import DescriptorTables
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.updates import PREEMPTED, Updates, page_owner
from domains.pv.mm.walk import GuestMemory, address_ok

_SIZE: Final = xen.MMUEXT_OP.size
CHUNK: Final = 128
"""Operations that are copied in at a time."""
BATCH: Final = 1024
"""Operations after which a call is preempted."""
_FLUSHES: Final = (xen.MMUEXT_TLB_FLUSH_LOCAL, xen.MMUEXT_TLB_FLUSH_ALL)
_PAGE_FLUSHES: Final = (xen.MMUEXT_INVLPG_LOCAL, xen.MMUEXT_INVLPG_ALL)


class ExtendedOps:
    """The commands of mmuext_op."""

    def __init__(
        self,
        pages: PageTypes,
        memory: GuestMemory,
        updates: Updates,
        tables: DescriptorTables,
        host: PagingHost,
        domain: DomId,
        *,
        cache_flush: bool,
    ) -> None:
        self._pages = pages
        self._memory = memory
        self._updates = updates
        self._tables = tables
        self._host = host
        self._domain = domain
        self._cache_flush = cache_flush
        self.roots: dict[int, int] = {}
        """L4 tables that vCPUs use as a root: MFN -> how many references."""

    def mmuext_op(self, uops: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmuext_op."""
        count &= 0xFFFF_FFFF
        foreigndom &= 0xFFFF_FFFF
        before = 0
        if count & PREEMPTED:
            if count == PREEMPTED and not uops:
                return foreigndom if foreigndom < 1 << 31 else foreigndom - (1 << 32)
            count &= ~PREEMPTED
            before = self._updates.load_done(pdone)
        if not address_ok(uops):
            return -XEN_EFAULT
        owner = page_owner(foreigndom & 0xFFFF, self._domain)
        if owner:
            # Nothing here applies to DOMID_IO: no PV domain.
            return -XEN_EINVAL if owner == xen.DOMID_IO else owner
        done, rc = 0, 0
        limit = min(count, BATCH)
        while done < limit and not rc:
            words = self._updates.read_array(uops + done * _SIZE, _SIZE, min(CHUNK, limit - done))
            if words is None:
                rc = -XEN_EFAULT
                break
            items = iter(words)
            for command, arg1, arg2 in zip(items, items, items, strict=True):
                rc = self.operate(command & 0xFFFF_FFFF, arg1, arg2)
                if rc:
                    break
                done += 1
        self._updates.store_done(pdone, before + done)
        if not rc and done < count:
            return Continuation((uops + done * _SIZE, count - done | PREEMPTED, pdone, foreigndom))
        return rc

    def operate(self, command: int, arg1: int, arg2: int) -> int:
        """One command for the domain's own frames. 0 or a negative errno."""
        pages = self._pages
        if command <= xen.MMUEXT_PIN_L4_TABLE:
            return pages.pin(arg1, command + 1)
        if command == xen.MMUEXT_UNPIN_TABLE:
            return pages.unpin(arg1)
        if command in _FLUSHES:
            pages.flush_wanted = True
            return 0
        if command in _PAGE_FLUSHES:
            pages.want_page_flush(arg1)
            return 0
        if command == xen.MMUEXT_TLB_FLUSH_MULTI:
            return self._updates.flush_mask(arg2, None)
        if command == xen.MMUEXT_INVLPG_MULTI:
            return self._updates.flush_mask(arg2, arg1)
        if command == xen.MMUEXT_NEW_BASEPTR:
            return self.new_kernel_root(arg1)
        if command == xen.MMUEXT_NEW_USER_BASEPTR:
            return self.new_user_root(arg1)
        if command in (xen.MMUEXT_FLUSH_CACHE, xen.MMUEXT_FLUSH_CACHE_GLOBAL):
            # Host caches are coherent: with the right to it, it is nothing.
            return (
                0 if self._cache_flush else -XEN_EACCES if command == xen.MMUEXT_FLUSH_CACHE else -XEN_EINVAL
            )
        if command == xen.MMUEXT_SET_LDT:
            return self._tables.set_ldt(self._host.current_vcpu(), arg1, arg2 & 0xFFFF_FFFF)
        if command == xen.MMUEXT_CLEAR_PAGE:
            return self._store(arg1, None)
        if command == xen.MMUEXT_COPY_PAGE:
            source = pages.index(arg2)
            return -XEN_EINVAL if source < 0 else self._store(arg1, source)
        if command in (xen.MMUEXT_MARK_SUPER, xen.MMUEXT_UNMARK_SUPER):
            return -XEN_EOPNOTSUPP
        return -XEN_ENOSYS

    def take_root(self, mfn: int, *, show_m2p: bool = True) -> int:
        """A reference for a vCPU: -EINVAL and so on if the frame is no valid L4."""
        rc = self._pages.get_mfn_type(mfn, T_L4)
        if rc:
            return rc
        self.roots[mfn] = self.roots.get(mfn, 0) + 1
        if show_m2p:
            self._pages.show_m2p(mfn, True)
        return 0

    def drop_root(self, mfn: int) -> None:
        """The end of `take_root`. ValueError if no vCPU holds it."""
        left = self.roots.pop(mfn, 0) - 1
        if left < 0:
            raise ValueError(f"mfn {mfn:#x} is no root of a vCPU")
        if left:
            self.roots[mfn] = left
        self._pages.put_type(mfn - self._pages.base)

    def new_kernel_root(self, mfn: int) -> int:
        """MMUEXT_NEW_BASEPTR."""
        kernel, user = self._host.current_roots()
        if mfn != kernel:
            rc = self.take_root(mfn)
            if rc:
                return rc
            self._tables.drop_ldt_pages(self._host.current_vcpu())
        self._host.load_cr3(Mfn(mfn), user)
        if mfn != kernel:
            self.drop_root(kernel)
        return 0

    def new_user_root(self, mfn: int) -> int:
        """MMUEXT_NEW_USER_BASEPTR; 0 for none."""
        kernel, user = self._host.current_roots()
        if mfn == (user or 0):
            return 0
        if mfn:
            rc = self.take_root(mfn, show_m2p=False)
            if rc:
                return rc
            if self._pages.m2p_strict:
                self._pages.show_m2p(mfn, False)
        self._host.load_cr3(kernel, Mfn(mfn) if mfn else None)
        if user:
            self.drop_root(user)
        return 0

    def _store(self, mfn: int, source: int | None) -> int:
        """CLEAR_PAGE and COPY_PAGE: the target must be an ordinary page for the moment."""
        pages = self._pages
        index = pages.index(mfn)
        if index < 0 or pages.get_type(index, T_WRITABLE):
            return -XEN_EINVAL
        # A reference that lasts no longer than this leaves no stale translation behind.
        stale = pages.stale
        pages.own_page(index)[:] = bytes(4096) if source is None else bytes(pages.own_page(source))
        pages.put_type(index)
        pages.stale = stale
        self._host.drop_code(Mfn(mfn))
        return 0
