"""Changes to an auto-translated domain's physical map that are asked for by hypercall, with the references
they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY, EINVAL, ENOENT, ENOMEM, ENOSYS, EPERM

from bus.abi import memory as abi
from bus.addresses import Gfn, Mfn
from hypervisor.core.domains import Domain, may_target
from hypervisor.core.errors import XenError
from hypervisor.core.frames import RAM, XENHEAP, FrameTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.memory_news import MemoryNews
from hypervisor.core.p2m import GFN_LIMIT, P2m, P2mEntry, P2mType

GrantFrameSource = Callable[[Domain, int], Mfn]
"""(domain, index | XENMAPIDX_grant_table_status) -> the Xen-heap frame, growing the table if need be.
XenError.
"""


class PhysMap(DomainHooks):
    """What is at a gfn is replaced: the domain's own RAM there is freed, as on Xen; a foreign map ends. A
    gfn where a grant is mapped is EBUSY: it has to be unmapped first."""

    def __init__(self, frames: FrameTable, news: MemoryNews) -> None:
        self._frames = frames
        self._news = news
        self.grant_frame: GrantFrameSource | None = None
        """Set by the grant tables."""

    def is_obstructed(self, domain: Domain, gfn: int, count: int) -> bool:
        """Something other than frames of the domain's own (which are replaced) is mapped in the range, or the
        table has no room for the range."""
        p2m = self._p2m(domain)
        if count == 1:  # as nearly always: without generators
            entry = p2m.get(gfn)
            return not p2m.can_map(gfn) or (entry is not None and entry.type is not P2mType.RAM)
        if not all(p2m.can_map(gfn + step) for step in (*range(0, count, 512), count - 1)):
            return True
        entries = (p2m.get(gfn + step) for step in range(count))
        return any(entry is not None and entry.type is not P2mType.RAM for entry in entries)

    def _p2m(self, domain: Domain) -> P2m:
        if domain.p2m is None:
            raise AssertionError("not an auto-translated domain")
        return domain.p2m

    def add(self, caller: Domain, domain: Domain, space: int, index: int, gpfn: int) -> None:
        """XENMEM_add_to_physmap of one page. EINVAL, EBUSY; ENOSYS for a space that x86 does not have."""
        if gpfn >= GFN_LIMIT:
            raise XenError(EINVAL)
        if space == abi.XENMAPSPACE_shared_info:
            if index or domain.shared_info is None:
                raise XenError(EINVAL)
            mfn = domain.shared_info
        elif space == abi.XENMAPSPACE_grant_table:
            if self.grant_frame is None:
                raise XenError(EINVAL)
            mfn = self.grant_frame(domain, index)
        elif space == abi.XENMAPSPACE_gmfn:
            entry = self._p2m(domain).get(index)
            if entry is None or entry.type is not P2mType.RAM:
                raise XenError(EINVAL)
            mfn = entry.mfn
        else:
            raise XenError(ENOSYS)
        self.place(domain, gpfn, mfn)

    def place(self, domain: Domain, gpfn: int, mfn: Mfn) -> None:
        """Map a frame of the domain's own at `gpfn`, and nowhere else."""
        p2m = self._p2m(domain)
        old_gfn = p2m.gfn_of(mfn)
        if old_gfn == gpfn:
            return
        self._need_room(p2m, gpfn)
        self._vacate(domain, gpfn)
        if old_gfn is not None:
            p2m.clear(old_gfn)
        p2m.set(Gfn(gpfn), mfn, P2mType.RAM)

    def _need_room(self, p2m: P2m, gpfn: int) -> None:
        if not p2m.can_map(gpfn):
            raise XenError(ENOMEM)

    def _vacate(self, domain: Domain, gpfn: int) -> None:
        """Free the gfn: own RAM is given back, Xen-heap frames are only unmapped, foreign maps end."""
        entry = self._p2m(domain).get(gpfn)
        if entry is None:
            return
        if entry.type in (P2mType.GRANT_RW, P2mType.GRANT_RO):
            raise XenError(EBUSY)
        self._p2m(domain).clear(Gfn(gpfn))
        if entry.type is P2mType.FOREIGN:
            self._frames.put_ref(entry.mfn)
        elif entry.type is P2mType.RAM and self._frames.is_ram_of(entry.mfn, domain.domid):
            self._news.lost(domain.domid, entry.mfn)
            self._frames.release(entry.mfn)

    def add_foreign(self, domain: Domain, foreign: Domain, gfn: int, gpfn: int) -> None:
        """Map another domain's frame. The caller's right over `foreign` was checked; `domain` needs it too
        (EPERM): what it maps it can read. EINVAL: no such frame."""
        if domain is foreign or not may_target(domain, foreign):
            raise XenError(EPERM)
        if gpfn >= GFN_LIMIT:
            raise XenError(EINVAL)
        mfn = Mfn(gfn)
        if foreign.p2m is not None:
            entry = foreign.p2m.get(gfn)
            if entry is None or entry.type is not P2mType.RAM:
                raise XenError(EINVAL)
            mfn = entry.mfn
        if self._frames.owner(mfn) != foreign.domid:
            raise XenError(EINVAL)
        self._need_room(self._p2m(domain), gpfn)
        self._vacate(domain, gpfn)
        self._frames.get_ref(mfn)
        self._p2m(domain).set(Gfn(gpfn), mfn, P2mType.FOREIGN)

    def remove(self, domain: Domain, gpfn: int) -> None:
        """XENMEM_remove_from_physmap: own frames stay the domain's, unmapped. ENOENT, EBUSY."""
        entry = self._p2m(domain).get(gpfn)
        if entry is None or entry.type is P2mType.MMIO:
            raise XenError(ENOENT)
        if entry.type in (P2mType.GRANT_RW, P2mType.GRANT_RO):
            raise XenError(EBUSY)
        self._p2m(domain).clear(Gfn(gpfn))
        if entry.type is P2mType.FOREIGN:
            self._frames.put_ref(entry.mfn)

    def frame_at(self, domain: Domain, number: int) -> P2mEntry | None:
        """What a frame number of the domain means: its p2m entry, or, of a PV domain, the frame itself if
        it owns it.
        """
        if domain.p2m is not None:
            return domain.p2m.get(number)
        owned = self._frames.owner(number) == domain.domid and self._frames.kind(number) in (RAM, XENHEAP)
        return P2mEntry(Mfn(number), P2mType.RAM) if owned else None

    def gone(self, now: int, domain: Domain) -> None:
        """The dead domain's foreign maps end, and its table is emptied. Whoever follows the table has let go before: its process is
        gone, and its I/O page tables are (this hook is among the last)."""
        if domain.p2m is not None:
            for mfn in domain.p2m.drop():
                self._frames.put_ref(mfn)
