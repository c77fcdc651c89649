"""GDT and LDT of a guest's vCPUs: their frames hold only checked descriptors and are never mapped
writable."""

from __future__ import annotations

from collections.abc import Sequence

from bus.abi.arch_x86 import FIRST_RESERVED_GDT_ENTRY
from bus.abi.errno import XEN_EFAULT, XEN_EINVAL
from bus.addresses import VcpuId
from domains.pv.api import GuestFault, PagingHost
from domains.pv.mm.bits import ADDRESS_MASK, T_L4, T_NONE, T_SEGDESC, T_WRITABLE
from domains.pv.mm.pages import PageTypes
from domains.pv.mm.segments import check_descriptor
from domains.pv.mm.walk import GuestMemory, address_ok
from domains.pv.xenmap import LDT_AREA_OFFSET, XenMap

MAX_LDT_ENTRIES = 8192


class _Tables:
    """Descriptor tables of one vCPU."""

    __slots__ = ("gdt_entries", "gdt_frames", "ldt_base", "ldt_entries", "ldt_pages")

    def __init__(self) -> None:
        self.gdt_frames: list[int] = []  # indexes of frames, each with a typed reference
        self.gdt_entries = 0
        self.ldt_base = 0
        self.ldt_entries = 0
        self.ldt_pages: dict[int, int] = {}  # page of the LDT -> index of its frame, with a typed reference


class DescriptorTables:
    """set_gdt, update_descriptor, MMUEXT_SET_LDT and the pages behind them."""

    def __init__(self, pages: PageTypes, memory: GuestMemory, xenmap: XenMap, host: PagingHost) -> None:
        self._pages = pages
        self._memory = memory
        self._map = xenmap
        self._host = host
        self.vcpus = [_Tables() for _ in range(xenmap.vcpus)]

    def set_gdt(self, frame_list: int, entries: int) -> int:
        """HYPERVISOR_set_gdt: -EINVAL for too many entries or a frame that holds a bad descriptor,
        -EFAULT."""
        entries &= 0xFFFF_FFFF
        if entries > FIRST_RESERVED_GDT_ENTRY:
            return -XEN_EINVAL
        count = (entries + 511) // 512
        if not address_ok(frame_list):
            return -XEN_EFAULT
        try:
            raw = self._memory.read(frame_list, count * 8) if count else b""
        except GuestFault:
            return -XEN_EFAULT
        return self.install_gdt(self._host.current_vcpu(), memoryview(raw).cast("Q").tolist(), entries)

    def install_gdt(self, vcpu: VcpuId, frames: Sequence[int], entries: int) -> int:
        """Give a vCPU a GDT of `entries` descriptors in these MFNs."""
        if not 0 <= entries <= FIRST_RESERVED_GDT_ENTRY or not 0 <= vcpu < len(self.vcpus):
            return -XEN_EINVAL
        if len(frames) < (entries + 511) // 512:
            return -XEN_EINVAL
        taken: list[int] = []
        for mfn in frames[: (entries + 511) // 512]:
            if self._pages.get_mfn_type(mfn, T_SEGDESC):
                for index in taken:
                    self._pages.put_type(index)
                return -XEN_EINVAL
            taken.append(mfn - self._pages.base)
        tables = self.vcpus[vcpu]
        old = tables.gdt_frames
        tables.gdt_frames, tables.gdt_entries = taken, entries
        for page in range(max(len(old), len(taken))):
            now = self._pages.mfn(taken[page]) if page < len(taken) else None
            self._map.map_gdt_page(vcpu, page, now)
        for index in old:
            self._pages.put_type(index)
        self._pages.flush_wanted = True
        self._host.descriptor_tables_changed(vcpu)
        return 0

    def update_descriptor(self, maddr: int, value: int) -> int:
        """HYPERVISOR_update_descriptor: -EINVAL for a misaligned address, a bad descriptor, a frame that the
        domain does not own, or a page table."""
        fixed = check_descriptor(value)
        if maddr & 7 or fixed is None:
            return -XEN_EINVAL
        index = self._pages.index(maddr >> 12)
        if index < 0 or T_NONE < self._pages.ptype[index] <= T_L4:
            return -XEN_EINVAL
        # What is no descriptor table now takes a writable reference for the moment (T_NONE, T_WRITABLE).
        if self._pages.ptype[index] not in (T_NONE, T_WRITABLE, T_SEGDESC):
            return -XEN_EINVAL
        self._pages.words[(maddr >> 3) - (self._pages.base << 9)] = fixed
        return 0

    # --- LDT ---

    def set_ldt(self, vcpu: VcpuId, base: int, entries: int) -> int:
        """MMUEXT_SET_LDT: the pages are looked at when they are first used."""
        if entries > MAX_LDT_ENTRIES or (entries and (base & 0xFFF or not address_ok(base))):
            return -XEN_EINVAL
        tables = self.vcpus[vcpu]
        if (tables.ldt_base, tables.ldt_entries) != (base, entries):
            self.drop_ldt_pages(vcpu)
            tables.ldt_base, tables.ldt_entries = base, entries
            self._host.descriptor_tables_changed(vcpu)
        return 0

    def drop_ldt_pages(self, vcpu: VcpuId) -> None:
        """Unmap all LDT pages of a vCPU (invalidate_shadow_ldt); a later use looks at them anew."""
        tables = self.vcpus[vcpu]
        if tables.ldt_pages:
            held, tables.ldt_pages = tables.ldt_pages, {}
            for page, index in held.items():
                self._map.map_ldt_page(vcpu, page, None)
                self._pages.put_type(index)
            self._pages.flush_wanted = True

    def drop_all_ldt_pages(self) -> None:
        """The same for every vCPU: a mapping of some descriptor page went away."""
        for vcpu, tables in enumerate(self.vcpus):
            if tables.ldt_pages:
                self.drop_ldt_pages(VcpuId(vcpu))

    def ldt_fault(self, va: int, vcpu: VcpuId) -> bool | int:
        """See `PagingApi.ldt_fault`."""
        area = self._map.gdt_base(vcpu) + LDT_AREA_OFFSET
        offset = va - area
        if not 0 <= offset < LDT_AREA_OFFSET:
            return False
        tables = self.vcpus[vcpu]
        guest_va: int = tables.ldt_base + offset
        if offset >> 3 >= tables.ldt_entries or offset >> 12 in tables.ldt_pages:
            return guest_va
        try:
            at, _ = self._memory.l1_entry(guest_va, self._memory.root())
        except GuestFault:
            return guest_va
        entry = self._pages.words[at]
        index = self._pages.index((entry & ADDRESS_MASK) >> 12)
        if not entry & 1 or index < 0 or self._pages.get_type(index, T_SEGDESC):
            return guest_va
        tables.ldt_pages[offset >> 12] = index
        self._map.map_ldt_page(vcpu, offset >> 12, self._pages.mfn(index))
        return True

    def destroy(self, vcpu: VcpuId) -> None:
        """A vCPU ends (or the domain): its references go."""
        self.drop_ldt_pages(vcpu)
        tables = self.vcpus[vcpu]
        tables.ldt_base = tables.ldt_entries = 0
        self.install_gdt(vcpu, (), 0)
