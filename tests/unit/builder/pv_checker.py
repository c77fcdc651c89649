"""Proves what xen.h promises of a PV guest's start of day, from the built memory alone: an independent
reading of it."""

from __future__ import annotations

import struct

from bus.abi.xen import SIF_MOD_START_PFN, START_INFO
from domains.dom0.builder import PvBuildRequest, PvBuilt
from tests.unit.builder.elf_maker import Memory, read_virtual, walk


def check(request: PvBuildRequest, memory: Memory, built: PvBuilt) -> None:
    """Everything that xen.h promises of the initial layout, from the memory's content alone."""
    p2m, context = request.p2m, built.context
    found = walk(memory, list(p2m), context.cr3)
    mfn_to_pfn = {mfn: pfn for pfn, mfn in enumerate(p2m)}
    assert [(mfn_to_pfn[m], level) for m, level in built.page_tables] == sorted(found.tables)
    assert built.page_tables[0] == (context.cr3, 4)
    table_frames = {pfn for pfn, _ in found.tables}
    assert len(table_frames) == len(found.tables), "a table that is used twice"
    for page in found.mappings.values():
        assert page.writable == (page.pfn not in table_frames), f"{page.va:#x}"
    # The region is a 1:1 map of the first frames, ends at 4 MiB, and has 512 KiB behind the stack.
    assert built.virt_end % (4 << 20) == 0
    for index in range((built.virt_end - built.virt_base) >> 12):
        assert found.mappings[built.virt_base + (index << 12)].pfn == index
    assert built.virt_end - context.rsp >= 512 << 10
    assert found.mappings[context.rsp - 4096].writable
    # Kernel.
    notes_ = request.kernel.notes
    assert notes_ is not None
    offset = (notes_.virt_base or 0) - (notes_.paddr_offset or 0)
    for segment in request.kernel.elf.segments:
        whole = bytes(segment.data).ljust(segment.mem_size, b"\0")
        seen = read_virtual(memory, found, segment.paddr + offset, segment.mem_size)
        if built.hypercall_page is not None:
            start = built.hypercall_page - segment.paddr - offset
            if 0 <= start < len(whole):
                whole = whole[:start] + seen[start : start + 4096] + whole[start + 4096 :]
        assert seen == whole
    # Start info.
    info = START_INFO.unpack(read_virtual(memory, found, context.rsi, START_INFO.size))
    assert found.mappings[context.rsi].pfn == built.start_info
    assert info.magic.rstrip(b"\0") == b"xen-3.0-x86_64"
    assert (info.nr_pages, info.shared_info) == (len(p2m), request.shared_info << 12)
    assert (info.store_mfn, info.store_evtchn) == (p2m[built.xenstore], request.xenstore_port)
    assert (info.console_mfn, info.console_evtchn) == (p2m[built.console], request.console_port)
    assert info.cmd_line.rstrip(b"\0") == request.cmdline
    assert found.mappings[info.pt_base].pfn == mfn_to_pfn[context.cr3]
    inside = [pfn for pfn in table_frames if pfn < (built.virt_end - built.virt_base) >> 12]
    assert info.nr_pt_frames == len(inside)
    first_table = mfn_to_pfn[context.cr3]
    assert sorted(inside) == list(range(first_table, first_table + len(inside)))
    # P2M list.
    assert info.mfn_list == built.p2m
    assert read_virtual(memory, found, info.mfn_list, 8 * len(p2m)) == struct.pack(f"<{len(p2m)}Q", *p2m)
    if notes_.init_p2m is not None:
        pages = -(-8 * len(p2m) // 4096)
        span = range(info.first_p2m_pfn, info.first_p2m_pfn + info.nr_p2m_frames)
        assert found.mappings[info.mfn_list].pfn == info.first_p2m_pfn
        assert set(span[pages:]) == table_frames - set(inside)
    else:
        assert (info.first_p2m_pfn, info.nr_p2m_frames) == (0, 0)
    # Ramdisk.
    assert info.mod_len == len(request.ramdisk)
    if info.mod_len:
        if info.flags & SIF_MOD_START_PFN:
            start = info.mod_start << 12
            assert memory.octets[start : start + info.mod_len] == request.ramdisk
            assert info.mod_start not in {m.pfn for m in found.mappings.values()}
        else:
            assert read_virtual(memory, found, info.mod_start, info.mod_len) == request.ramdisk
    # Order and no overlap of the elements.
    order: list[int] = [built.kernel_end]
    if info.mod_len and not info.flags & SIF_MOD_START_PFN:
        order.append(info.mod_start)
    if notes_.init_p2m is None:
        order.append(info.mfn_list)
    base = built.virt_base
    order += [base + (built.start_info << 12), base + (built.xenstore << 12), base + (built.console << 12)]
    order += [info.pt_base, context.rsp - 4096]
    assert order == sorted(order)
    assert len(set(order[1:])) == len(order) - 1
    assert memory.octets[built.xenstore << 12 : built.console + 1 << 12] == bytes(8192)
