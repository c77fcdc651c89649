"""Xen's own part of a PV guest's address space: L4 slots 256 to 271 (xen-x86_64.h, arch-x86/xen.h).

* Slot 256: the machine-to-physical table, read-only to the guest, at MACH2PHYS_VIRT_START. Entries of the
  domain's own frames are real; all others read INVALID_M2P_ENTRY, from one shared page.
* Slot 260: per-domain mappings, supervisor only. For each vCPU 32 pages: 16 of its GDT (14 of the guest's
  frames, then Xen's descriptors at FIRST_RESERVED_GDT_PAGE) and 16 of its LDT.

The tables live in private frames: anonymous memory of this process at MFNs that no machine frame ever has.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from bus.abi.arch_x86 import FIRST_RESERVED_GDT_PAGE
from bus.abi.arch_x86_64 import MACH2PHYS_VIRT_START
from bus.addresses import PAGE_SIZE, Mfn, VcpuId, VirtAddr

PRIVATE_MFN_BASE: Final = Mfn(0x0F00_0000)
"""First private frame: machine address 0xF0_0000_0000. Unicorn's page walk takes 40 address bits, and machine
frames must stay below this."""
INVALID_M2P_ENTRY: Final = 0xFFFF_FFFF_FFFF_FFFF
FIRST_XEN_SLOT: Final = 256
LAST_XEN_SLOT: Final = 271
PERDOMAIN_VIRT_START: Final = 0xFFFF_8200_0000_0000
VCPU_AREA_SHIFT: Final = 17
"""32 pages a vCPU: 16 for the GDT, 16 for the LDT."""
LDT_AREA_OFFSET: Final = 16 * PAGE_SIZE
MAX_VCPUS: Final = 128

# Present, user, accessed, no-execute: nothing of it can be written.
_M2P_LEAF: Final = 1 << 63 | 0x25
_M2P_TABLE: Final = 0x25
# Present, writable, accessed, dirty; supervisor only: the CPU reads descriptors and sets their accessed bits.
_AREA_LEAF: Final = 1 << 63 | 0x63
_AREA_TABLE: Final = 0x63

_XEN_DESCRIPTORS: Final = {
    4: 0x00CF_FB00_0000_FFFF,  # 0xe023 FLAT_RING3_CS32
    5: 0x00CF_F300_0000_FFFF,  # 0xe02b FLAT_RING3_DS32 and SS
    6: 0x00AF_FB00_0000_FFFF,  # 0xe033 FLAT_RING3_CS64
}


class XenPrivate:
    """A pool of zeroed frames in anonymous memory, with MFNs from PRIVATE_MFN_BASE up.

    The CPU side maps all of `memory` at `base << 12` (writable: access rights come from the page tables).
    """

    def __init__(self, frames: int) -> None:
        self.base: Final = PRIVATE_MFN_BASE
        self.memory: Final = mmap.mmap(-1, frames * PAGE_SIZE)
        self.words: Final = memoryview(self.memory).cast("Q")
        self._frames = frames
        self._next = 0

    @property
    def size(self) -> int:
        """Bytes of `memory`."""
        return self._frames * PAGE_SIZE

    def allocate(self, frames: int = 1) -> int:
        """Index in the pool of the first of `frames` consecutive new frames. MemoryError when none are
        left."""
        first = self._next
        if first + frames > self._frames:
            raise MemoryError(f"no {frames} of {self._frames} private frames left")
        self._next += frames
        return first

    def mfn(self, index: int) -> Mfn:
        """MFN of a pool frame."""
        return Mfn(self.base + index)


class XenMap:
    """The tables behind slots 256..271 for one domain, and what is written in them.

    `base` and `count` are the domain's own MFN range, `max_mfn` the machine's highest frame number.
    ValueError if machine frames would reach into the private range, or for too many vCPUs.
    """

    def __init__(self, base: int, count: int, max_mfn: int, vcpus: int = 1) -> None:
        if not (base >= 0 and count >= 1 and base + count - 1 <= max_mfn < PRIVATE_MFN_BASE):
            raise ValueError(
                f"frames {base:#x}+{count:#x} of {max_mfn:#x} do not lie below the private frames"
            )
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"{vcpus} vCPUs: at least 1, at most {MAX_VCPUS}")
        self.max_mfn: Final = max_mfn
        self.vcpus: Final = vcpus
        self._base = base
        self._count = count
        # Pages of the M2P that hold an entry of an own frame.
        first_page, last_page = base >> 9, (base + count - 1) >> 9
        leaf_pages = last_page - first_page + 1
        leaf_tables = (last_page >> 9) - (first_page >> 9) + 1
        upper = (last_page >> 18) - (first_page >> 18) + 1
        area_tables = (vcpus * 32 + 511) // 512
        self.private: Final = XenPrivate(leaf_pages + leaf_tables + upper + area_tables + 8)
        self._first_page = first_page
        self._m2p_frame = self.private.allocate(leaf_pages)
        self._m2p_pad = base & 511
        self.private.words[self._m2p_frame << 9 : (self._m2p_frame + leaf_pages) << 9] = _filled(
            INVALID_M2P_ENTRY, leaf_pages << 9
        )
        self.slots: Final = [0] * 16
        """Values of L4 entries 256..271 as Xen writes them into a guest's L4. [0] is the M2P: see `Mmu`."""
        self.slots[0] = self._table(self._build_m2p(first_page, leaf_pages), _M2P_TABLE)
        self.slots[4] = self._table(self._build_area(area_tables), _AREA_TABLE)

    # --- machine-to-physical table ---

    def set_m2p(self, mfn: int, pfns: Sequence[int]) -> None:
        """Entries from `mfn` on. ValueError if one lies outside the own range."""
        first = mfn - self._base
        if first < 0 or first + len(pfns) > self._count:
            raise ValueError(f"M2P entries {mfn:#x}+{len(pfns):#x} are not the domain's own")
        at = (self._m2p_frame << 9) + self._m2p_pad + first
        words = self.private.words
        for pfn in pfns:
            words[at] = pfn
            at += 1

    def get_m2p(self, mfn: int) -> int:
        """The entry as the guest reads it."""
        index = mfn - self._base
        if not 0 <= index < self._count:
            return INVALID_M2P_ENTRY
        value: int = self.private.words[(self._m2p_frame << 9) + self._m2p_pad + index]
        return value

    @property
    def m2p_end(self) -> VirtAddr:
        """End of the mapped M2P (xen_machphys_mapping.v_end): a whole number of pages."""
        return VirtAddr(MACH2PHYS_VIRT_START + (((self.max_mfn >> 9) + 1) << 12))

    # --- GDT and LDT areas ---

    def gdt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address of a vCPU's GDT."""
        return VirtAddr(PERDOMAIN_VIRT_START + (vcpu << VCPU_AREA_SHIFT))

    def ldt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address of a vCPU's LDT."""
        return VirtAddr(self.gdt_base(vcpu) + LDT_AREA_OFFSET)

    def map_gdt_page(self, vcpu: VcpuId, page: int, mfn: int | None) -> None:
        """Map a guest frame as page 0..13 of the GDT; None: the zero page."""
        if not 0 <= page < FIRST_RESERVED_GDT_PAGE:
            raise ValueError(f"GDT page {page} is not the guest's")
        self._map_area(vcpu, page, self.private.mfn(self._zero) if mfn is None else mfn)

    def map_ldt_page(self, vcpu: VcpuId, page: int, mfn: int | None) -> None:
        """Map a guest frame as page 0..15 of the LDT; None: not present, an access faults."""
        if not 0 <= page < 16:
            raise ValueError(f"LDT page {page}: there are 16")
        self._map_area(vcpu, 16 + page, mfn)

    def area_pages(self, vcpu: VcpuId) -> list[int | None]:
        """The MFN behind each of the vCPU's 32 area pages (for the invariant checker)."""
        at = (self._area << 9) + vcpu * 32
        return [value >> 12 & 0xFF_FFFF_FFFF if value else None for value in self.private.words[at : at + 32]]

    # --- building ---

    def _map_area(self, vcpu: VcpuId, page: int, mfn: int | None) -> None:
        if not 0 <= vcpu < self.vcpus:
            raise ValueError(f"no vCPU {vcpu}")
        self.private.words[(self._area << 9) + vcpu * 32 + page] = (
            0 if mfn is None else mfn << 12 | _AREA_LEAF
        )

    def _table(self, index: int, flags: int) -> int:
        return self.private.mfn(index) << 12 | flags

    def _build_m2p(self, first_page: int, leaf_pages: int) -> int:
        """L3 of the M2P: real leaves for the own range, shared all-ones pages for the rest up to max_mfn."""
        private, words = self.private, self.private.words
        ones = private.allocate()
        words[ones << 9 : (ones + 1) << 9] = _filled(INVALID_M2P_ENTRY, 512)
        ones_l1 = private.allocate()
        words[ones_l1 << 9 : (ones_l1 + 1) << 9] = _filled(self._table(ones, _M2P_LEAF), 512)
        ones_l2 = private.allocate()
        words[ones_l2 << 9 : (ones_l2 + 1) << 9] = _filled(self._table(ones_l1, _M2P_TABLE), 512)
        top = private.allocate()
        for slot in range((self.max_mfn >> 27) + 1):
            words[(top << 9) + slot] = self._table(ones_l2, _M2P_TABLE)
        tables: dict[int, int] = {}
        uppers: dict[int, int] = {}
        for page in range(first_page, first_page + leaf_pages):
            upper = uppers.get(page >> 18)
            if upper is None:
                upper = uppers[page >> 18] = private.allocate()
                words[upper << 9 : (upper + 1) << 9] = words[ones_l2 << 9 : (ones_l2 + 1) << 9]
                words[(top << 9) + (page >> 18)] = self._table(upper, _M2P_TABLE)
            table = tables.get(page >> 9)
            if table is None:
                table = tables[page >> 9] = private.allocate()
                words[table << 9 : (table + 1) << 9] = words[ones_l1 << 9 : (ones_l1 + 1) << 9]
                words[(upper << 9) + (page >> 9 & 511)] = self._table(table, _M2P_TABLE)
            leaf = self._m2p_frame + page - first_page
            words[(table << 9) + (page & 511)] = self._table(leaf, _M2P_LEAF)
        return top

    def _build_area(self, tables: int) -> int:
        """L3 of the per-domain area. The L1 tables are consecutive: page p of a vCPU is entry vcpu * 32 +
        p."""
        private, words = self.private, self.private.words
        self._area = private.allocate(tables)
        upper, top = private.allocate(), private.allocate()
        words[top << 9] = self._table(upper, _AREA_TABLE)
        for n in range(tables):
            words[(upper << 9) + n] = self._table(self._area + n, _AREA_TABLE)
        self._zero = private.allocate()
        descriptors = private.allocate()
        for n, value in _XEN_DESCRIPTORS.items():
            words[(descriptors << 9) + n] = value
        for vcpu in range(self.vcpus):
            for page in range(FIRST_RESERVED_GDT_PAGE):
                self._map_area(VcpuId(vcpu), page, private.mfn(self._zero))
            self._map_area(VcpuId(vcpu), FIRST_RESERVED_GDT_PAGE, private.mfn(descriptors))
            # Page 15 stays empty: the GDT's limit ends with page 14.
        return top


def _filled(value: int, count: int) -> memoryview:
    return memoryview(value.to_bytes(8, "little") * count).cast("Q")
