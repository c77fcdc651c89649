"""Xen's memory management for one PV domain, put together: `domains.pv.api.PagingApi`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from bus.abi import xen
from bus.abi.errno import XEN_EBUSY, XEN_EINVAL
from bus.addresses import DomId, MachineAddr, Mfn, VcpuId, VirtAddr
from domains.pv.api import FRAME_NONE, FRAME_RAM, FRAME_XEN, Continuation, GuestFrames, PagingHost
from domains.pv.mm.bits import T_L4, T_UNOWNED
from domains.pv.mm.check import check_pages
from domains.pv.mm.descriptors import DescriptorTables
from domains.pv.mm.extops import ExtendedOps
from domains.pv.mm.grants import GrantMappings
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.ptwr import WritableTables
from domains.pv.mm.updates import Updates
from domains.pv.mm.walk import GuestMemory
from domains.pv.xenmap import XenMap
from domains.vcpu.api import Registers


class Mmu:
    """See `PagingApi` for the methods. The TLB is flushed once at the end of a call that needs it: when the
    guest asked for it, when a frame that may still be written through a cached translation becomes a table,
    when a grant or a frame goes, and when Xen's own area changed. As on Xen, other changes take effect when
    the guest flushes.

    `hardware`: the domain has access to I/O memory or ports, and so may set cache attributes and flush
    caches. `linear_page_tables`: a table may map itself read-only (Xen's pv-linear-pt); one that maps
    another of the same level is always refused.
    """

    def __init__(
        self,
        frames: GuestFrames,
        xenmap: XenMap,
        host: PagingHost,
        domain: DomId,
        *,
        hardware: bool = False,
        linear_page_tables: bool = True,
        flush_page: Callable[[int], None] | None = None,
    ) -> None:
        self.frames: Final = frames
        self.xenmap: Final = xenmap
        self.host: Final = host
        self.writable_page_tables = False
        self._flush_page: Final = flush_page
        self.pages: Final = PageTypes(
            frames, xenmap.max_mfn, xenmap.slots, cache_attributes=hardware, linear=linear_page_tables
        )
        self._memory: Final = GuestMemory(self.pages, host)
        self._updates: Final = Updates(self.pages, self._memory, xenmap, host, domain)
        self._tables: Final = DescriptorTables(self.pages, self._memory, xenmap, host)
        self._ops: Final = ExtendedOps(
            self.pages, self._memory, self._updates, self._tables, host, domain, cache_flush=hardware
        )
        self._grants: Final = GrantMappings(self.pages, self._memory)
        self._assist: Final = WritableTables(self.pages, self._memory)
        self.pages.on_segdesc_unmapped = self._tables.drop_all_ldt_pages

    @property
    def m2p_strict(self) -> bool:
        """VMASST_TYPE_m2p_strict: the M2P is not shown in user roots."""
        return self.pages.m2p_strict

    @m2p_strict.setter
    def m2p_strict(self, strict: bool) -> None:
        self.pages.m2p_strict = strict

    def _flush(self) -> None:
        """Flush the TLB if something in this call asked for it."""
        pages = self.pages
        if pages.flush_wanted or (pages.pages_wanted and self._flush_page is None):
            pages.flush_wanted = pages.stale = False
            self.host.flush_tlb()
        elif self._flush_page is not None:
            # A stale writable translation may stay: `pages.stale` stands.
            for va in pages.pages_wanted:
                self._flush_page(va)
        pages.pages_wanted.clear()

    # --- hypercalls ---

    def mmu_update(self, reqs: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmu_update."""
        rc = self._updates.mmu_update(reqs, count, pdone, foreigndom)
        self._flush()
        return rc

    def mmuext_op(self, uops: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmuext_op."""
        rc = self._ops.mmuext_op(uops, count, pdone, foreigndom)
        self._flush()
        return rc

    def update_va_mapping(self, va: int, value: int, flags: int) -> int:
        """HYPERVISOR_update_va_mapping."""
        return self.update_va_mapping_otherdomain(va, value, flags, xen.DOMID_SELF)

    def update_va_mapping_otherdomain(self, va: int, value: int, flags: int, domid: int) -> int:
        """HYPERVISOR_update_va_mapping_otherdomain."""
        rc = self._updates.update_va_mapping(va, value, flags, domid)
        self._flush()
        return rc

    def update_descriptor(self, maddr: int, descriptor: int) -> int:
        """HYPERVISOR_update_descriptor."""
        return self._tables.update_descriptor(maddr, descriptor)

    def set_gdt(self, frame_list: int, entries: int) -> int:
        """HYPERVISOR_set_gdt."""
        rc = self._tables.set_gdt(frame_list, entries)
        self._flush()
        return rc

    def install_gdt(self, vcpu: VcpuId, frames: Sequence[int], entries: int) -> int:
        """A GDT for any vCPU."""
        rc = self._tables.install_gdt(vcpu, frames, entries)
        self._flush()
        return rc

    # --- roots and vCPU state ---

    def adopt_initial_tables(self, cr3_mfn: int) -> int:
        """Validate and pin the builder's L4; vCPU 0 holds a second reference."""
        rc = self.pages.pin(cr3_mfn, T_L4)
        if not rc:
            rc = self.take_root(cr3_mfn)
        self._flush()
        return rc

    def take_root(self, mfn: int) -> int:
        """An L4 becomes root of a vCPU."""
        rc = self._ops.take_root(mfn)
        self._flush()
        return rc

    def drop_root(self, mfn: int) -> None:
        """A vCPU no longer uses a root. ValueError if none does."""
        self._ops.drop_root(mfn)

    def destroy_vcpu(self, vcpu: VcpuId) -> None:
        """Release the GDT and LDT frames of a vCPU."""
        self._tables.destroy(vcpu)
        self._flush()

    def gdt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address of the vCPU's GDT."""
        return self.xenmap.gdt_base(vcpu)

    def gdt_entries(self, vcpu: VcpuId) -> int:
        """Descriptors that the guest installed."""
        return self._tables.vcpus[vcpu].gdt_entries

    def ldt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address of the vCPU's LDT in Xen's area."""
        return self.xenmap.ldt_base(vcpu)

    def ldt_entries(self, vcpu: VcpuId) -> int:
        """Entries of the LDT that the guest set."""
        return self._tables.vcpus[vcpu].ldt_entries

    def ldt_address(self, vcpu: VcpuId) -> int:
        """Where the guest has it."""
        return self._tables.vcpus[vcpu].ldt_base

    # --- faults ---

    def write_fault(self, va: int, error_code: int, regs: Registers) -> bool:
        """Writable page-table assist."""
        if not self.writable_page_tables or not self._assist.write_fault(va, error_code, regs):
            return False
        self._flush()
        return True

    def ldt_fault(self, va: int, vcpu: VcpuId) -> bool | int:
        """A fault in Xen's LDT area."""
        answer = self._tables.ldt_fault(va, vcpu)
        self._flush()
        return answer

    # --- guest memory ---

    def translate(self, va: int, *, write: bool = False, user: bool = False) -> MachineAddr:
        """Machine address. Raises GuestFault."""
        return self._memory.translate(va, write=write, user=user)

    def read_virtual(self, va: int, length: int, *, user: bool = False) -> bytes:
        """Copy from guest memory. Raises GuestFault."""
        return self._memory.read(va, length, user=user)

    def write_virtual(self, va: int, data: bytes | bytearray | memoryview, *, user: bool = False) -> None:
        """Copy to guest memory. Raises GuestFault."""
        self._memory.write(va, data, user=user)

    # --- grants ---

    def create_grant_mapping(self, address: int, mfn: int, flags: int) -> int:
        """GNTMAP_host_map. GNTST_*."""
        rc = self._grants.create(address, mfn, flags)
        self._flush()
        return rc

    def replace_grant_mapping(self, address: int, mfn: int, new_address: int, flags: int) -> int:
        """Unmap, or unmap and replace. GNTST_*."""
        rc = self._grants.replace(address, mfn, new_address, flags)
        self._flush()
        return rc

    def can_grant_writable(self, mfn: int) -> bool:
        """A writable type reference could be had."""
        return self._grants.can_grant_writable(mfn)

    def is_table(self, mfn: int) -> bool:
        """An own frame that is a page table or a descriptor table."""
        return self._grants.is_table(mfn)

    def hold_for_grant(self, mfn: int, writable: bool) -> int:
        """A domain maps this own frame by a grant."""
        return self._grants.hold(mfn, writable)

    def release_from_grant(self, mfn: int, writable: bool) -> None:
        """End of `hold_for_grant`. ValueError if nothing is held."""
        self._grants.release(mfn, writable)

    # --- ownership ---

    def populate_frames(self, mfns: Iterable[int]) -> None:
        """The hypervisor gave these frames. ValueError outside the RAM range; an owned one stays as it is."""
        for mfn in mfns:
            index = mfn - self.pages.base
            if not 0 <= index < self.frames.ram_count:
                raise ValueError(f"mfn {mfn:#x} is not in the domain's RAM range")
            if self.pages.ptype[index] == T_UNOWNED:
                self.frames.set_owned(Mfn(mfn), True)
                self.pages.set_ownership(index, FRAME_RAM)

    def releasable(self, mfn: int) -> bool:
        """Owned RAM without a reference."""
        index = mfn - self.pages.base
        return 0 <= index < self.frames.ram_count and self.pages.index(mfn) >= 0 and self.pages.is_free(index)

    def release_frames(self, mfns: Sequence[int]) -> int:
        """Give frames up, from the first on; how many could be."""
        done = 0
        for mfn in mfns:
            if not self.releasable(mfn):
                break
            self.frames.set_owned(Mfn(mfn), False)
            self.pages.set_ownership(mfn - self.pages.base, FRAME_NONE)
            self.set_m2p(mfn, (0xFFFF_FFFF_FFFF_FFFF,))
            self.host.drop_code(Mfn(mfn))
            done += 1
        if done:
            self.pages.flush_wanted = True
            self._flush()
        return done

    def share_frame(self, mfn: int, shared: bool) -> int:
        """A Xen-heap frame becomes mappable, or no longer. -EINVAL for any other, -EBUSY while it is
        mapped."""
        index = mfn - self.pages.base
        if not self.frames.ram_count <= index < self.pages.count:
            return -XEN_EINVAL
        if self.frames.shared_by_xen(Mfn(mfn)) == shared:
            return 0
        if not shared and (self.pages.typed[index] > 1 or self.pages.plain[index]):
            return -XEN_EBUSY
        self.frames.share(Mfn(mfn), shared)
        self.pages.set_ownership(index, FRAME_XEN if shared else FRAME_NONE)
        if not shared:
            self.pages.flush_wanted = True
            self._flush()
        return 0

    def foreign_mappings(self, mfn: int) -> int:
        """How many L1 entries map a granted frame of another domain: it must be 0 before the frame goes."""
        return self.pages.foreign_maps.get(mfn, 0)

    # --- machine-to-physical table ---

    def set_m2p(self, mfn: int, pfns: Sequence[int]) -> None:
        """Entries from `mfn` on. ValueError outside the own range."""
        self.xenmap.set_m2p(mfn, pfns)

    def get_m2p(self, mfn: int) -> int:
        """The entry of a frame."""
        return self.xenmap.get_m2p(mfn)

    # --- debugging ---

    def check_invariants(self) -> list[str]:
        """Recompute every count from the tables; each difference is a line."""
        base = self.pages.base
        roots = [mfn - base for mfn, held in self._ops.roots.items() for _ in range(held)]
        descriptors = [
            index for vcpu in self._tables.vcpus for index in (*vcpu.gdt_frames, *vcpu.ldt_pages.values())
        ]
        holds = [key for key, held in self._grants.held.items() for _ in range(held)]
        return check_pages(self.pages, roots, descriptors, holds)
