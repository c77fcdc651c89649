"""Builds a full HVM domain: memory with a PC's holes, SeaBIOS and what hvmloader tells it, and the first vCPU in real mode.

On Xen the program hvmloader does this inside the guest. Here the toolstack writes the same into the guest's memory
(`domains.dom0.builder.firmware.layout`). The vCPU then starts where hvmloader jumps to: F000:FFF0. Firmware that is an ELF program
takes hvmloader's own place (`domains.dom0.builder.firmware.program`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from bus.abi import grant_table as gt
from bus.abi.hvm import params, save
from bus.abi.hvm.e820 import HVM_BELOW_4G_RAM_END
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, DomId, Port
from domains.dom0.builder.elf import is_elf
from domains.dom0.builder.firmware.layout import BIOS_END, FirmwareConfig, build_e820, build_firmware
from domains.dom0.builder.firmware.program import build_program
from domains.dom0.builder.pvh import special_pages, special_parameters
from domains.dom0.toolstack.images import ForeignMemory
from domains.dom0.toolstack.pvh import (
    GuestFrames,
    first_context,
    grant_frame,
    hvm_context,
    set_context,
)
from domains.dom0.xc import ControlInterface
from domains.native.domain import NativeDomain

VGA_HOLE: Final = range(0xA0, 0xC0)
"""Guest frames of the VGA window: no memory."""


def ram_runs(pages: int) -> list[tuple[int, int]]:
    """(first gfn, frames) of the memory of a guest of that many frames; the VGA hole is left out and not made up for."""
    most = HVM_BELOW_4G_RAM_END >> PAGE_SHIFT
    low = min(pages, most)
    runs = [(0, VGA_HOLE.start), (VGA_HOLE.stop, low - VGA_HOLE.stop)]
    if pages > most:
        runs.append((1 << 32 - PAGE_SHIFT, pages - most))
    return runs


@dataclass(frozen=True, slots=True)
class BuiltHvm:
    """What became of it."""

    console_gfn: int
    xenstore_gfn: int


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
    uuid: bytes,
    serial: bool,
    xenstore_port: Port,
    console_port: Port,
    kernel: Sequence[tuple[int, bytes]] = (),
    module: bytes = b"",
) -> BuiltHvm:
    """Everything up to a domain that can be unpaused once it has its device model. `vcpus`: (most, at the start);
    `kernel`: what lies in memory of one that is started directly; `module`: the BIOS that an ELF program as firmware gets. BuildError, ValueError, HypercallError."""
    most = HVM_BELOW_4G_RAM_END >> PAGE_SHIFT
    low, high = min(pages, most) << PAGE_SHIFT, max(pages - most, 0) << PAGE_SHIFT
    config = FirmwareConfig(
        low_memory=low,
        high_memory=(1 << 32) + high if high else 0,
        vcpus=vcpus[0],
        online=vcpus[1],
        uuid=UUID(bytes=uuid),
        com1=serial,
    )
    pieces: tuple[tuple[int, bytes | memoryview], ...]
    runs = [*ram_runs(pages), (int(special_pages()[0]), len(special_pages()))]
    if is_elf(bios):
        program = build_program(config, bios, module)
        pieces, memory_map, context = (
            program.pieces,
            list(program.memory_map),
            first_context(program.entry, program.ebx),
        )
    else:
        image = build_firmware(config, bios)
        tables = image.special_pages()
        runs.insert(-1, (tables.start, len(tables)))
        pieces, memory_map, context = (
            image.pieces,
            build_e820(config, BIOS_END - len(bios)),
            reset_context(),
        )
    for first, count in runs:
        xc.populate(domid, range(first, first + count))
    fd, extent = host.foreign_extents[domid]
    memory = ForeignMemory(fd, extent["base"], extent["frames"])
    try:
        frames = GuestFrames(memory, runs)
        for address, data in (*pieces, *kernel):
            frames.write(address >> PAGE_SHIFT, address & PAGE_SIZE - 1, data)
        xc.set_memory_map(domid, memory_map)
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
    set_context(host, domid, context)
    return BuiltHvm(console, store)
