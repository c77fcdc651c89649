"""Builds a PVH guest: an ELF kernel with PHYS32_ENTRY, an hvm_start_info and what it points to, in
guest-physical memory.

RAM is [0, the lower of the guest's size and 0xF0000000) and, for the rest, from 4 GiB on. Behind the kernel,
each on a page of its own: the modules (a ramdisk is the first), then the start info with its module list,
memory map and command lines.
The special pages (xenstore, console, ioreq ...) lie where libxenguest puts them, below 0xFF000000, outside
RAM: the caller populates them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final

from bus.abi.hvm import params
from bus.abi.hvm.e820 import HVM_BELOW_4G_RAM_END
from bus.abi.hvm.start_info import (
    HVM_MEMMAP_TABLE_ENTRY,
    HVM_MODLIST_ENTRY,
    HVM_START_INFO,
    XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_MEMMAP_TYPE_RESERVED,
    XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry,
    hvm_modlist_entry,
    hvm_start_info,
)
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Gfn

from .errors import BuildError
from .kernel import Kernel
from .notes import XenNotes
from .pv import MAX_PAGES, GuestMemory

MAX_CMDLINE: Final = 4096
"""Cap on the command line, bytes with the closing zero: a page, as much as Linux keeps twice over."""
MAX_MAP: Final = 128
CR0_START: Final = 0x11
"""CR0 at the entry: PE and ET."""

SPECIAL_END: Final = Gfn(0xFF000)
SPECIAL_COUNT: Final = 8
IOREQ_SERVERS: Final = 8
_SPECIAL_PARAMS: Final = (
    params.HVM_PARAM_PAGING_RING_PFN,
    params.HVM_PARAM_MONITOR_RING_PFN,
    params.HVM_PARAM_SHARING_RING_PFN,
    params.HVM_PARAM_BUFIOREQ_PFN,
    params.HVM_PARAM_STORE_PFN,
    params.HVM_PARAM_IOREQ_PFN,
    params.HVM_PARAM_IDENT_PT,
    params.HVM_PARAM_CONSOLE_PFN,
)
"""Which HVM parameter names the special page of each index, from the lowest."""


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A range of the memory map, bytes; `kind` is an XEN_HVM_MEMMAP_TYPE_* value."""

    address: int
    size: int
    kind: int


@dataclass(frozen=True, slots=True)
class Module:
    """A file beside the kernel; without a command line its address is 0 in the list."""

    content: bytes | memoryview
    cmdline: bytes = b""


@dataclass(frozen=True, slots=True)
class PvhBuildRequest:
    """All that a PVH guest is built from."""

    kernel: Kernel
    pages: int
    """RAM, in frames of 4 KiB; the special pages come on top."""
    modules: tuple[Module, ...] = ()
    cmdline: bytes = b""
    flags: int = 0
    """SIF_* flags."""
    rsdp: int = 0
    """Guest-physical address of the ACPI root pointer that the caller puts there; 0: no ACPI."""
    reserved: tuple[MapEntry, ...] = ()
    """Further ranges of the memory map, outside RAM (ACPI tables, ...)."""


@dataclass(frozen=True, slots=True)
class PvhBuilt:
    """What was built. The vCPU starts in 32-bit protected mode with flat segments, paging off, interrupts
    off."""

    entry: int
    ebx: int
    """Guest-physical address of the start info."""
    memory_map: tuple[MapEntry, ...]
    hvm_params: dict[int, int]
    """HVM_PARAM_* to set: each names the gfn of a special page, or a count."""
    special_pages: tuple[Gfn, ...]
    """Gfns to populate beside RAM, zero but for what `special_writes` says."""
    special_writes: tuple[tuple[Gfn, bytes], ...]
    """(gfn, content) of special pages that are not all zero."""
    first_free: Gfn
    """First RAM frame behind what was put there."""


def ram_ranges(pages: int) -> tuple[tuple[Gfn, int], ...]:
    """(first gfn, frames) of the RAM of a guest of that many frames."""
    low_most = HVM_BELOW_4G_RAM_END >> PAGE_SHIFT
    low = (Gfn(0), min(pages, low_most))
    return (low,) if pages <= low_most else (low, (Gfn(1 << 32 - PAGE_SHIFT), pages - low_most))


def special_pages() -> tuple[Gfn, ...]:
    """Gfns of the special pages and of those for ioreq servers, ascending."""
    return tuple(Gfn(g) for g in range(SPECIAL_END - SPECIAL_COUNT - IOREQ_SERVERS, SPECIAL_END))


def special_parameters() -> tuple[dict[int, int], tuple[tuple[Gfn, bytes], ...]]:
    """The HVM parameters that name the special pages, and (gfn, content) of those that are not all zero."""
    first = SPECIAL_END - SPECIAL_COUNT
    hvm_params = {param: first + index for index, param in enumerate(_SPECIAL_PARAMS)}
    # HVM_PARAM_IDENT_PT is an address, unlike the others.
    ident = Gfn(hvm_params[params.HVM_PARAM_IDENT_PT])
    hvm_params[params.HVM_PARAM_IDENT_PT] = ident << PAGE_SHIFT
    hvm_params[params.HVM_PARAM_IOREQ_SERVER_PFN] = first - IOREQ_SERVERS
    hvm_params[params.HVM_PARAM_NR_IOREQ_SERVER_PAGES] = IOREQ_SERVERS
    return hvm_params, ((ident, _identity_table()),)


def check_pvh(kernel: Kernel) -> XenNotes:
    """The notes of a kernel that can be a PVH guest. BuildError that says why it cannot."""
    notes = kernel.notes
    if notes is None:
        raise BuildError("kernel: no Xen ELF notes: not a kernel for Xen")
    if notes.phys32_entry is None:
        raise BuildError("kernel: no PVH entry (PHYS32_ENTRY): start it with type pv")
    if notes.phys32_entry >> 32:
        raise BuildError(f"kernel: PHYS32_ENTRY {notes.phys32_entry:#x} is not a 32-bit address")
    return notes


def build_pvh(request: PvhBuildRequest, memory: GuestMemory) -> PvhBuilt:
    """Build the guest (`memory` by gfn, zero before). BuildError before anything is written, if it cannot
    be."""
    kernel, elf = request.kernel, request.kernel.elf
    notes = check_pvh(kernel)
    entry = notes.phys32_entry or 0
    if not 0 < request.pages <= MAX_PAGES:
        raise BuildError(f"memory: {request.pages} pages (1 to {MAX_PAGES})")
    for line in (request.cmdline, *(module.cmdline for module in request.modules)):
        if len(line) >= MAX_CMDLINE or b"\0" in line:
            raise BuildError(f"command line: {len(line)} bytes (at most {MAX_CMDLINE - 1}, none of them 0)")
    low_end = ram_ranges(request.pages)[0][1] << PAGE_SHIFT
    if elf.end > low_end:
        raise BuildError(
            f"memory: {low_end >> 10} KiB below 4 GiB are too few: the kernel ends at {elf.end:#x}"
        )
    if not any(s.paddr <= entry < s.end for s in elf.segments):
        raise BuildError(f"kernel: PHYS32_ENTRY {entry:#x} is in none of its segments")
    memory_map = _memory_map(request)
    places, info_at = [], _page_up(elf.end)
    for module in request.modules:
        places.append(info_at)
        info_at = _page_up(info_at + len(module.content))
    info = start_info(request, info_at, places, memory_map)
    end = _page_up(info_at + len(info))
    if end > low_end:
        raise BuildError(
            f"memory: {low_end >> 10} KiB are too few: kernel, ramdisk and start info end at {end >> 10} KiB"
        )

    for segment in elf.segments:
        if len(segment.data):
            memory.write(segment.paddr >> PAGE_SHIFT, segment.paddr & PAGE_SIZE - 1, segment.data)
    for module, place in zip(request.modules, places, strict=True):
        memory.write(place >> PAGE_SHIFT, 0, module.content)
    memory.write(info_at >> PAGE_SHIFT, 0, info)
    hvm_params, special_writes = special_parameters()
    return PvhBuilt(
        entry=entry,
        ebx=info_at,
        memory_map=memory_map,
        hvm_params=hvm_params,
        special_pages=special_pages(),
        special_writes=special_writes,
        first_free=Gfn(end >> PAGE_SHIFT),
    )


def _page_up(address: int) -> int:
    return address + PAGE_SIZE - 1 & ~(PAGE_SIZE - 1)


def _memory_map(request: PvhBuildRequest) -> tuple[MapEntry, ...]:
    """RAM, the special pages and the caller's ranges, ascending. BuildError if ranges overlap or are
    empty."""
    if len(request.reserved) > MAX_MAP - 3:
        raise BuildError(f"memory map: {len(request.reserved)} ranges (at most {MAX_MAP - 3})")
    ram = [
        MapEntry(gfn << PAGE_SHIFT, count << PAGE_SHIFT, XEN_HVM_MEMMAP_TYPE_RAM)
        for gfn, count in ram_ranges(request.pages)
    ]
    pages = special_pages()
    special = MapEntry(pages[0] << PAGE_SHIFT, len(pages) << PAGE_SHIFT, XEN_HVM_MEMMAP_TYPE_RESERVED)
    out = sorted([*ram, special, *request.reserved], key=lambda entry: entry.address)
    end = 0
    for item in out:
        if item.size <= 0 or item.address < end or item.address + item.size > 1 << 52:
            raise BuildError(
                f"memory map: range at {item.address:#x} is empty, overlaps another or ends too high"
            )
        end = item.address + item.size
    return tuple(out)


def start_info(
    request: PvhBuildRequest, at: int, places: list[int], memory_map: tuple[MapEntry, ...]
) -> bytes:
    """The start info for guest-physical address `at` and, behind it, all that it points to but the modules,
    which are at `places`."""
    modules_at = at + HVM_START_INFO.size
    map_at = modules_at + HVM_MODLIST_ENTRY.size * len(request.modules)
    table = b"".join(
        HVM_MEMMAP_TABLE_ENTRY.pack(hvm_memmap_table_entry(item.address, item.size, item.kind, 0))
        for item in memory_map
    )
    lines_at = map_at + len(table)
    lines, modules = request.cmdline + b"\0", b""
    for module, place in zip(request.modules, places, strict=True):
        line_at = lines_at + len(lines) if module.cmdline else 0
        modules += HVM_MODLIST_ENTRY.pack(hvm_modlist_entry(place, len(module.content), line_at, 0))
        lines += module.cmdline + b"\0" if module.cmdline else b""
    record = hvm_start_info(
        magic=XEN_HVM_START_MAGIC_VALUE,
        version=1,
        flags=request.flags,
        nr_modules=len(request.modules),
        modlist_paddr=modules_at if modules else 0,
        cmdline_paddr=lines_at,
        rsdp_paddr=request.rsdp,
        memmap_paddr=map_at,
        memmap_entries=len(memory_map),
        reserved=0,
    )
    return HVM_START_INFO.pack(record) + modules + table + lines


def _identity_table() -> bytes:
    """A page directory of 1024 large pages that maps 4 GiB to itself, for vCPUs that run with paging off."""
    present, writable, user, accessed, dirty, large = 1, 2, 4, 0x20, 0x40, 0x80
    flags = present | writable | user | accessed | dirty | large
    return array("I", [index << 22 | flags for index in range(1024)]).tobytes()
