"""Builds a 64-bit PV guest in its memory: the start-of-day layout of xen.h, as libxenguest lays it out.

In the contiguous virtual region from VIRT_BASE on, where page i is pseudophysical frame i:

    kernel image | ramdisk (unless MOD_START_PFN) | p2m list (unless INIT_P2M) | start info | xenstore page |
    console page | page tables (mapped read-only) | boot stack | padding of 512 KiB or more, up to a multiple
    of 4 MiB

Behind the region, in pseudophysical frames only: an unmapped ramdisk, then the p2m list and the page tables
that map it at INIT_P2M. Nothing here does I/O: the caller's `GuestMemory` takes what is written.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

from bus.abi.arch_x86_64 import FLAT_KERNEL_CS64, FLAT_KERNEL_SS64, HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from bus.abi.xen import MAX_GUEST_CMDLINE, SIF_MOD_START_PFN, START_INFO, start_info
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn, Pfn, Port, VirtAddr

from .elf import Segment
from .errors import BuildError
from .hypercall_page import PV_HYPERCALL_PAGE
from .kernel import Kernel
from .notes import XenNotes
from .pagetables import PageTables

GUEST_TYPE: Final = b"xen-3.0-x86_64"
"""start_info's magic for this kind of guest, and the machine type in xen_version's capabilities."""
MAX_PAGES: Final = 1 << 26
"""Cap on a guest's memory: 256 GiB."""
MAX_MFN: Final = (1 << 40) - 1
"""A page-table entry holds 52 bits of machine address."""
PADDING: Final = 512 << 10
REGION_ALIGN: Final = 4 << 20
RFLAGS_IF: Final = 1 << 9

FEATURES_GIVEN: Final = frozenset(
    {
        "writable_page_tables",  # by the VM assist: writes to page tables are emulated
        "pae_pgdir_above_4gb",
        "mmu_pt_update_preserve_ad",
        "highmem_assist",
        "gnttab_map_avail_bits",
        "memory_op_vnode_supported",
        "dom0",
        "not_direct_mapped",
    }
)
"""What a kernel may require of a 64-bit PV machine. The others are of auto-translated, ring 0 or Arm
guests."""


class GuestMemory(Protocol):
    """The new guest's memory, all zero at first."""

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        """Store `data` from byte `offset` of frame `pfn` on; it may go on over any number of the frames that
        follow."""


@dataclass(frozen=True, slots=True)
class PvBuildRequest:
    """All that a guest is built from."""

    kernel: Kernel
    p2m: Sequence[int]
    """MFN of each pseudophysical frame (a `range` where they are contiguous); its length is the guest's
    memory now."""
    shared_info: Mfn
    xenstore_port: Port
    console_port: Port
    ramdisk: bytes | memoryview = b""
    cmdline: bytes = b""
    flags: int = 0
    """SIF_* flags to start with; SIF_MOD_START_PFN is added where it applies."""


@dataclass(frozen=True, slots=True)
class PvContext:
    """vCPU 0's first state; registers that are not named are 0."""

    rip: VirtAddr
    rsp: VirtAddr
    rsi: VirtAddr
    """Of the start info."""
    cr3: Mfn
    """Frame of the level 4 table."""
    rflags: int = RFLAGS_IF
    cs: int = FLAT_KERNEL_CS64
    ss: int = FLAT_KERNEL_SS64
    """Also the stack segment of kernel_ss; kernel_sp is `rsp`. DS, ES, FS and GS are null selectors."""


@dataclass(frozen=True, slots=True)
class PvBuilt:
    """What was built, and where."""

    context: PvContext
    start_info: Pfn
    xenstore: Pfn
    console: Pfn
    page_tables: tuple[tuple[Mfn, int], ...]
    """(MFN, level 4..1) of every page table; the root is the first, and to be pinned."""
    virt_base: VirtAddr
    virt_end: VirtAddr
    """End of the region that the tables map, from `virt_base`."""
    kernel_start: VirtAddr
    kernel_end: VirtAddr
    p2m: VirtAddr
    pt_base: VirtAddr
    hypercall_page: VirtAddr | None
    """Filled already; None: the kernel brings its own stubs."""
    first_free: Pfn
    """First frame behind all that was put there (padding included)."""
    supported: frozenset[str]
    """Features that the kernel says it can use."""


class _Plan:
    """Where things go in the virtual region: frames are handed out in order behind the kernel."""

    def __init__(self, virt_base: int, kernel_end: int, pages: int) -> None:
        self.virt_base = virt_base
        self.pages = pages
        self.next = -(-(kernel_end - virt_base) >> PAGE_SHIFT)

    def take(self, what: str, count: int) -> int:
        """First pfn of `count` new frames. BuildError if the memory ends before."""
        first = self.next
        if first + count > self.pages:
            need = first + count << PAGE_SHIFT
            have = self.pages << PAGE_SHIFT >> 10
            raise BuildError(f"memory: {have} KiB are too few: {what} ends at {need >> 10} KiB")
        self.next += count
        return first

    def virt(self, pfn: int) -> VirtAddr:
        return VirtAddr(self.virt_base + (pfn << PAGE_SHIFT))


def _pages(size: int) -> int:
    return -(-size >> PAGE_SHIFT)


def check_pv(kernel: Kernel) -> XenNotes:
    """The notes of a kernel that can be a 64-bit PV guest. BuildError that says why it cannot."""
    notes, elf = kernel.notes, kernel.elf
    if notes is None:
        raise BuildError("kernel: no Xen ELF notes: not a kernel for Xen")
    if elf.bits != 64 or elf.machine != "EM_X86_64":
        mend = (
            "it runs in Xen's shim (type pvh with pvshim)"
            if notes.phys32_entry is None
            else "start it with type pvh"
        )
        raise BuildError(
            f"kernel: a {elf.bits}-bit {elf.machine[3:]} ELF file: PV guests are 64-bit x86 here: {mend}"
        )
    if notes.virt_base is None and notes.entry is None and notes.phys32_entry is not None:
        raise BuildError("kernel: has only a PVH entry (PHYS32_ENTRY): start it with type pvh")
    if notes.xen_version and notes.xen_version != "xen-3.0":
        raise BuildError(f"kernel: for Xen version {notes.xen_version[:32]!r}, not 'xen-3.0'")
    if notes.loader and notes.loader != "generic" and notes.guest_os != "linux":
        raise BuildError(f"kernel: needs the loader {notes.loader[:32]!r}, not 'generic'")
    lacking = sorted(notes.required - FEATURES_GIVEN)
    if lacking:
        raise BuildError(f"kernel: requires {', '.join(lacking)}, which a PV guest does not get")
    if notes.paddr_offset is not None and notes.virt_base is None:
        raise BuildError("kernel: PADDR_OFFSET without VIRT_BASE in its Xen ELF notes")
    if notes.hv_start_low is not None and notes.hv_start_low > HYPERVISOR_VIRT_START:
        raise BuildError(f"kernel: HV_START_LOW {notes.hv_start_low:#x} is above {HYPERVISOR_VIRT_START:#x}")
    if notes.bsd_symtab == "yes":
        raise BuildError("kernel: wants its symbol table loaded (BSD_SYMTAB), which is not supported")
    return notes


def _region_ok(start: int, end: int) -> bool:
    """[start, end) is canonical, in one half, and outside the hypervisor's range."""
    low = 0 <= start < end <= 1 << 47
    high = HYPERVISOR_VIRT_END <= start < end <= 1 << 64
    return low or high


def _check_kernel(kernel: Kernel, notes: XenNotes, pages: int) -> tuple[int, int, int, int]:
    """(virt_base, offset from a segment's physical to its virtual address, kernel start, kernel end)."""
    base = notes.virt_base or 0
    offset = base - (notes.paddr_offset or 0)
    start, end = kernel.elf.start + offset, kernel.elf.end + offset
    if base & PAGE_SIZE - 1:
        raise BuildError(f"kernel: VIRT_BASE {base:#x} is not the start of a page")
    if start < base or not _region_ok(base, end):
        raise BuildError(f"kernel: image [{start:#x}, {end:#x}) does not fit behind VIRT_BASE {base:#x}")
    if _pages(end - base) > pages:
        have, need = pages << PAGE_SHIFT >> 10, end - base + 1023 >> 10
        raise BuildError(f"memory: {have} KiB are too few: the kernel ends at {need} KiB")
    entry = kernel.elf.entry if notes.entry is None else notes.entry
    if not start <= entry < end:
        raise BuildError(f"kernel: entry point {entry:#x} is outside its image [{start:#x}, {end:#x})")
    page = notes.hypercall_page
    if page is not None and (page & PAGE_SIZE - 1 or not start <= page <= end - PAGE_SIZE):
        raise BuildError(
            f"kernel: hypercall page {page:#x} is not a page of its image [{start:#x}, {end:#x})"
        )
    return base, offset, start, end


def build_pv(request: PvBuildRequest, memory: GuestMemory) -> PvBuilt:
    """Build the guest. Its memory must read as zero before. BuildError before anything is written, if it
    cannot be."""
    kernel, pages = request.kernel, len(request.p2m)
    notes = check_pv(kernel)
    if not 0 < pages <= MAX_PAGES:
        raise BuildError(f"memory: {pages} pages (1 to {MAX_PAGES})")
    p2m = _checked_p2m(request.p2m)
    if len(request.cmdline) >= MAX_GUEST_CMDLINE or b"\0" in request.cmdline:
        raise BuildError(
            f"command line: {len(request.cmdline)} bytes (at most {MAX_GUEST_CMDLINE - 1}, none of them 0)"
        )
    base, offset, kernel_start, kernel_end = _check_kernel(kernel, notes, pages)
    plan = _Plan(base, kernel_end, pages)
    ramdisk, unmapped = request.ramdisk, bool(notes.mod_start_pfn)
    flags, mod_start, ramdisk_pfn = request.flags, 0, 0
    if len(ramdisk) and not unmapped:
        ramdisk_pfn = plan.take("the ramdisk", _pages(len(ramdisk)))
        mod_start = plan.virt(ramdisk_pfn)
    p2m_pages = _pages(pages * 8)
    p2m_pfn = plan.take("the p2m list", p2m_pages) if notes.init_p2m is None else 0
    info = plan.take("the start info", 1)
    xenstore = plan.take("the xenstore page", 1)
    console = plan.take("the console page", 1)
    tables = PageTables(p2m)
    table_count, region_end = _size_region(tables, plan, base)
    tables_pfn = plan.take("the page tables", table_count)
    stack = plan.take("the boot stack", 1)
    plan.take("the initial mapping", (region_end - base >> PAGE_SHIFT) - plan.next)
    tables.add(base, region_end, tables_pfn)
    read_only = range(tables_pfn, tables_pfn + table_count)
    tables.fill(base, 0, region_end - base >> PAGE_SHIFT, read_only)
    if len(ramdisk) and unmapped:
        ramdisk_pfn = mod_start = plan.take("the ramdisk", _pages(len(ramdisk)))
        flags |= SIF_MOD_START_PFN
    first_p2m = p2m_frames = 0
    if notes.init_p2m is None:
        p2m_virt = plan.virt(p2m_pfn)
    else:
        p2m_virt = VirtAddr(notes.init_p2m)
        p2m_pfn, p2m_frames = _map_p2m(tables, plan, notes.init_p2m, p2m_pages, base, region_end)
        first_p2m = p2m_pfn

    _write_kernel(memory, kernel.elf.segments, offset - base)
    if notes.hypercall_page is not None:
        memory.write(notes.hypercall_page - base >> PAGE_SHIFT, 0, PV_HYPERCALL_PAGE)
    if len(ramdisk):
        memory.write(ramdisk_pfn, 0, ramdisk)
    memory.write(p2m_pfn, 0, p2m.tobytes())
    for pfn, content in tables.runs():
        memory.write(pfn, 0, content)
    record = start_info(
        magic=GUEST_TYPE.ljust(32, b"\0"),
        nr_pages=pages,
        shared_info=request.shared_info << PAGE_SHIFT,
        flags=flags,
        store_mfn=p2m[xenstore],
        store_evtchn=request.xenstore_port,
        console_mfn=p2m[console],
        console_evtchn=request.console_port,
        pt_base=plan.virt(tables_pfn),
        nr_pt_frames=table_count,
        mfn_list=p2m_virt,
        mod_start=mod_start,
        mod_len=len(ramdisk),
        cmd_line=request.cmdline.ljust(MAX_GUEST_CMDLINE, b"\0"),
        first_p2m_pfn=first_p2m,
        nr_p2m_frames=p2m_frames,
    )
    memory.write(info, 0, START_INFO.pack(record))
    entry = kernel.elf.entry if notes.entry is None else notes.entry
    return PvBuilt(
        context=PvContext(
            VirtAddr(entry),
            VirtAddr(plan.virt(stack) + PAGE_SIZE),
            plan.virt(info),
            Mfn(p2m[tables.root]),
        ),
        start_info=Pfn(info),
        xenstore=Pfn(xenstore),
        console=Pfn(console),
        page_tables=tables.levels(),
        virt_base=VirtAddr(base),
        virt_end=VirtAddr(region_end),
        kernel_start=VirtAddr(kernel_start),
        kernel_end=VirtAddr(kernel_end),
        p2m=p2m_virt,
        pt_base=plan.virt(tables_pfn),
        hypercall_page=None if notes.hypercall_page is None else VirtAddr(notes.hypercall_page),
        first_free=Pfn(plan.next),
        supported=notes.supported,
    )


def _checked_p2m(frames: Sequence[int]) -> array[int]:
    """The p2m list as 64-bit words. BuildError if a frame number does not fit a page-table entry."""
    try:
        p2m = array("Q", frames)
    except (OverflowError, TypeError) as error:
        raise BuildError(f"memory: not a list of machine frames: {error}") from None
    if max(p2m) > MAX_MFN:
        raise BuildError(f"memory: machine frame {max(p2m):#x} does not fit a page-table entry")
    return p2m


def _size_region(tables: PageTables, plan: _Plan, base: int) -> tuple[int, int]:
    """(number of page tables, end of the region): more tables make the region longer and the other way
    round."""
    count = 0
    while True:
        end = plan.virt(plan.next + count + 1) + PADDING  # the one page is the boot stack
        end = -(-end // REGION_ALIGN) * REGION_ALIGN
        if not _region_ok(base, end):
            raise BuildError(
                f"kernel: the initial mapping [{base:#x}, {end:#x}) leaves the guest's address space"
            )
        needed = tables.missing(base, end)
        if needed <= count:
            return count, end
        count = needed


def _map_p2m(
    tables: PageTables, plan: _Plan, start: int, pages: int, base: int, region_end: int
) -> tuple[int, int]:
    """Put the p2m list at its own virtual address. (First pfn, number of frames: the list, then its page
    tables.)"""
    end = start + (pages << PAGE_SHIFT)
    if start & PAGE_SIZE - 1 or not _region_ok(start, end):
        raise BuildError(f"kernel: INIT_P2M {start:#x} is no place for a p2m list")
    if start < region_end and base < end:
        raise BuildError(
            f"kernel: INIT_P2M {start:#x} lies in the initial mapping [{base:#x}, {region_end:#x})"
        )
    first = plan.take("the p2m list", pages)
    count = tables.missing(start, end)
    table_pfn = plan.take("the page tables of the p2m list", count)
    tables.add(start, end, table_pfn)
    tables.fill(start, first, pages, range(0))
    return first, pages + count


def _write_kernel(memory: GuestMemory, segments: tuple[Segment, ...], offset: int) -> None:
    """Store the segments; what the file does not hold stays zero. `offset` leads from a physical address to
    the region's."""
    for before, after in pairwise(segments):
        assert before.end <= after.paddr  # parse_elf promises it; a write here must not undo another
    for segment in segments:
        if len(segment.data):
            pfn, byte = divmod(segment.paddr + offset, PAGE_SIZE)
            memory.write(pfn, byte, segment.data)
