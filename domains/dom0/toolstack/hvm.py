"""Builds a full HVM domain: memory with a PC's holes, SeaBIOS and what hvmloader tells it, and the first vCPU in real mode.

On Xen the program hvmloader does this inside the guest. Here the toolstack writes the same into the guest's memory: the BIOS so that
it ends at 1 MiB, the information block at 0x1000 (signature XenHVMSeaBIOS), the memory map, the tables. The vCPU then starts where
hvmloader jumps to: F000:FFF0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from bus.abi import grant_table as gt
from bus.abi.hvm import params, save
from bus.abi.hvm.e820 import HVM_BELOW_4G_RAM_END
from bus.addresses import PAGE_SHIFT, DomId, Port
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.pvh import MapEntry, special_pages, special_parameters
from domains.dom0.toolstack.images import ForeignMemory
from domains.dom0.toolstack.pvh import (
    GuestFrames,
    grant_frame,
    hvm_context,
    set_context,
)
from domains.dom0.xc import ControlInterface
from domains.native.domain import NativeDomain

VGA_HOLE: Final = range(0xA0, 0xC0)
"""Guest frames of the VGA window: no memory."""
BIOS_END: Final = 0x100000
BIOS_MOST: Final = 256 << 10
INFO: Final = 0x1000
"""Where SeaBIOS looks for its information block (src/fw/xen.c)."""
INFO_SIGNATURE: Final = b"XenHVMSeaBIOS\0"
_INFO: Final = struct.Struct("<14sBBIIII")
_E820: Final = struct.Struct("<QQI")
RAM, RESERVED = 1, 2
EBDA: Final = 0x9FC00
RESERVED_START: Final = 0xFC000000
"""From here to 4 GiB: firmware tables, I/O APIC, HPET, local APIC, special pages."""


def ram_runs(pages: int) -> list[tuple[int, int]]:
    """(first gfn, frames) of the memory of a guest of that many frames; the VGA hole is left out and not made up for."""
    most = HVM_BELOW_4G_RAM_END >> PAGE_SHIFT
    low = min(pages, most)
    runs = [(0, VGA_HOLE.start), (VGA_HOLE.stop, low - VGA_HOLE.stop)]
    if pages > most:
        runs.append((1 << 32 - PAGE_SHIFT, pages - most))
    return runs


def memory_map(pages: int) -> list[MapEntry]:
    """The e820 that the firmware starts from, and that XENMEM_memory_map tells."""
    low_end = min(pages << PAGE_SHIFT, HVM_BELOW_4G_RAM_END)
    out = [
        MapEntry(0, EBDA, RAM),
        MapEntry(EBDA, 0xA0000 - EBDA, RESERVED),
        MapEntry(0xF0000, 0x10000, RESERVED),
        MapEntry(0x100000, low_end - 0x100000, RAM),
        MapEntry(RESERVED_START, (1 << 32) - RESERVED_START, RESERVED),
    ]
    if pages << PAGE_SHIFT > HVM_BELOW_4G_RAM_END:
        out.append(MapEntry(1 << 32, (pages << PAGE_SHIFT) - HVM_BELOW_4G_RAM_END, RAM))
    return out


@dataclass(frozen=True, slots=True)
class BuiltHvm:
    """What became of it."""

    console_gfn: int
    xenstore_gfn: int


def information_block(e820: list[MapEntry], tables: list[int]) -> bytes:
    """For INFO: the block, then the addresses of the tables, then the memory map."""
    tables_at = INFO + _INFO.size
    map_at = tables_at + 4 * len(tables) + 15 & ~15
    block = bytearray(_INFO.pack(INFO_SIGNATURE, _INFO.size, 0, tables_at, len(tables), map_at, len(e820)))
    block[15] = -sum(block) & 0xFF
    out = bytes(block) + struct.pack(f"<{len(tables)}I", *tables)
    out = out.ljust(map_at - INFO, b"\0")
    return out + b"".join(_E820.pack(entry.address, entry.size, entry.kind) for entry in e820)


def reset_context() -> bytes:
    """HVM context of vCPU 0 in real mode at F000:FFF0."""
    segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (0, 0, 65535, 147))
    segments["cs"] = (0xF000, 0xF0000, 0xFFFF, 0x9B)
    segments["tr"], segments["ldtr"] = (0, 0, 0xFFFF, 0x8B), (0, 0, 0xFFFF, 0x82)
    fields: dict[str, Any] = {}
    for name, (selector, base, limit, rights) in segments.items():
        fields |= {
            f"{name}_sel": selector,
            f"{name}_base": base,
            f"{name}_limit": limit,
            f"{name}_arbytes": rights,
        }
    cpu = save.HVM_HW_CPU.zero()._replace(
        cr0=0x10, rip=0xFFF0, rflags=2, dr6=0xFFFF0FF0, dr7=0x400, idtr_limit=0x3FF, **fields
    )
    return hvm_context(cpu)


def build_hvm_domain(
    host: NativeDomain,
    xc: ControlInterface,
    domid: DomId,
    bios: bytes,
    pages: int,
    vcpus: tuple[int, int],
    xenstore_port: Port,
    console_port: Port,
) -> BuiltHvm:
    """Everything up to a domain that can be unpaused once it has its device model. BuildError, ValueError, HypercallError."""
    if not bios or len(bios) > BIOS_MOST or len(bios) % 0x10000:
        raise BuildError(f"firmware: {len(bios)} bytes; an image of SeaBIOS has 128 or 256 KiB")
    if pages < 0x400:
        raise BuildError(f"memory: {pages >> 8} MB are too few for a PC: 4 MB at least")
    runs = [*ram_runs(pages), (int(special_pages()[0]), len(special_pages()))]
    for first, count in runs:
        xc.populate(domid, range(first, first + count))
    fd, extent = host.foreign_extents[domid]
    e820 = memory_map(pages)
    memory = ForeignMemory(fd, extent["base"], extent["frames"])
    try:
        frames = GuestFrames(memory, runs)
        frames.write((BIOS_END - len(bios)) >> PAGE_SHIFT, 0, bios)
        frames.write(INFO >> PAGE_SHIFT, 0, information_block(e820, []))
        xc.set_memory_map(domid, [(entry.address, entry.size, entry.kind) for entry in e820])
        values, writes = special_parameters()
        for gfn, content in writes:
            frames.write(gfn, 0, content)
        console, store = values[params.HVM_PARAM_CONSOLE_PFN], values[params.HVM_PARAM_STORE_PFN]
        grants = grant_frame(host, domid)
        for ref, ring in ((gt.GNTTAB_RESERVED_CONSOLE, console), (gt.GNTTAB_RESERVED_XENSTORE, store)):
            entry = gt.GRANT_ENTRY_V1.pack(gt.grant_entry_v1(gt.GTF_permit_access, DomId(0), ring))
            memory.write_mfn(grants, ref * gt.GRANT_ENTRY_V1.size, entry)
    finally:
        memory.close()
    values[params.HVM_PARAM_STORE_EVTCHN] = xenstore_port
    values[params.HVM_PARAM_CONSOLE_EVTCHN] = console_port
    for index, value in values.items():
        xc.set_hvm_param(domid, index, value)
    set_context(host, domid, reset_context())
    return BuiltHvm(console, store)
