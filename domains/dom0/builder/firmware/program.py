"""An ELF program that takes the place of hvmloader and the BIOS (`firmware_override=`): where it lies, and what it is told.

As Xen's domain builder has it: the segments at their physical addresses; the vCPU in 32-bit flat protected mode at PHYS32_ENTRY,
or at the ELF entry where there is no such note; EBX at an hvm_start_info (arch-x86/hvm/start_info.h); hvm_info_table at
HVM_INFO_PADDR. No tables, and no BIOS in its place: those are the program's own business. It finds a BIOS as the module whose
command line is "firmware", as hvmloader looks for one.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.abi.hvm.hvm_info_table import HVM_INFO_PADDR
from bus.addresses import PAGE_SIZE
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.firmware.layout import BIOS_END, RAM, FirmwareConfig, build_hvm_info
from domains.dom0.builder.kernel import load_kernel
from domains.dom0.builder.pvh import MapEntry, Module, PvhBuildRequest, start_info

VGA_HOLE_START = 0xA0000
BIOS_MODULE = b"firmware"
INFO_ROOM = 2 * PAGE_SIZE
"""Bytes between the start info and the module behind it."""


@dataclass(frozen=True, slots=True)
class Program:
    """`pieces`: guest-physical address and content. `entry`, `ebx`: the first vCPU's. `memory_map`: (address, size, type)."""

    pieces: tuple[tuple[int, bytes | memoryview], ...]
    entry: int
    ebx: int
    memory_map: tuple[tuple[int, int, int], ...]


def memory_map(config: FirmwareConfig) -> tuple[tuple[int, int, int], ...]:
    """RAM as libxl tells it of a guest with a device model: from 1 MiB on."""
    low = (BIOS_END, config.low_memory - BIOS_END, RAM)
    high = (1 << 32, config.high_memory - (1 << 32), RAM)
    return (low, high) if config.high_memory else (low,)


def build_program(config: FirmwareConfig, content: bytes, bios: bytes = b"") -> Program:
    """BuildError: not an ELF file, or one that does not fit below the VGA hole or between 1 MiB and the end of low memory."""
    kernel = load_kernel(content)
    elf = kernel.elf
    entry = elf.entry
    if kernel.notes is not None and kernel.notes.phys32_entry is not None:
        entry = kernel.notes.phys32_entry
    ebx = elf.end + PAGE_SIZE - 1 & ~(PAGE_SIZE - 1)
    ranges = memory_map(config)
    modules = (Module(bios, BIOS_MODULE),) if bios else ()
    request = PvhBuildRequest(kernel=kernel, pages=config.low_memory // PAGE_SIZE, modules=modules)
    bios_at = ebx + INFO_ROOM
    info = start_info(request, ebx, [bios_at] * len(modules), tuple(MapEntry(*item) for item in ranges))
    if len(info) > INFO_ROOM:
        raise BuildError(f"firmware: its start info has {len(info)} bytes, at most {INFO_ROOM}")
    end_of_all = bios_at + len(bios) if bios else ebx + len(info)
    for first, end in [*((s.paddr, s.end) for s in elf.segments), (ebx, end_of_all)]:
        if first < VGA_HOLE_START < end or VGA_HOLE_START <= first < BIOS_END or end > config.low_memory:
            raise BuildError(f"firmware: {first:#x} to {end:#x} is not all memory of the guest")
    if not any(s.paddr <= entry < s.end for s in elf.segments):
        raise BuildError(f"firmware: its entry {entry:#x} is in none of its segments")
    pieces: list[tuple[int, bytes | memoryview]] = [(HVM_INFO_PADDR, build_hvm_info(config))]
    pieces += [(s.paddr, s.data) for s in elf.segments if len(s.data)]
    pieces.append((ebx, info))
    if bios:
        pieces.append((bios_at, bios))
    return Program(tuple(pieces), entry, ebx, ranges)
