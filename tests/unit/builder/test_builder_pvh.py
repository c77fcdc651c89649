"""The PVH builder: segments at their physical addresses, and a start info whose every pointer leads to what
it says."""

from __future__ import annotations

import pytest

from bus.abi.hvm import params
from bus.abi.hvm.start_info import HVM_MEMMAP_TABLE_ENTRY, HVM_MODLIST_ENTRY, HVM_START_INFO
from domains.dom0.builder import BuildError, MapEntry, PvhBuildRequest, build_pvh, load_kernel, ram_ranges
from domains.dom0.builder.pvh import Module
from tests.unit.builder.elf_maker import Memory, Seg, elf32, elf64, notes

PHYS32 = 18
NOTES = notes({PHYS32: 0x100010})
SEGMENTS = [Seg(0x100000, b"kernel" * 1000, 0x8000), Seg(0x200123, b"data", 0x1000)]


@pytest.mark.parametrize("make", [elf32, elf64])
@pytest.mark.parametrize(
    "modules",
    [(), (Module(b"initrd" * 5000),), (Module(b"kernel" * 3000, b"console=hvc0 root=x"), Module(b"initrd"))],
)
def test_start_info_points_at_everything(make, modules) -> None:  # type: ignore[no-untyped-def]  # parametrised
    """From EBX alone one finds the modules, the command line and the memory map; segments are where they
    belong."""
    memory = Memory(2048)
    built = build_pvh(
        PvhBuildRequest(load_kernel(make(SEGMENTS, NOTES)), 2048, modules, b"console=hvc0", rsdp=0xFC000000),
        memory,
    )
    octets = memory.octets
    assert built.entry == 0x100010
    assert octets[0x100000 : 0x100000 + 6000] == b"kernel" * 1000
    assert octets[0x200123:0x200128] == b"data\0"
    info = HVM_START_INFO.unpack(octets, built.ebx)
    assert (info.magic, info.version, info.rsdp_paddr) == (0x336EC578, 1, 0xFC000000)
    assert info.nr_modules == len(modules)
    for number, given in enumerate(modules):
        module = HVM_MODLIST_ENTRY.unpack(octets, info.modlist_paddr + number * HVM_MODLIST_ENTRY.size)
        assert octets[module.paddr : module.paddr + module.size] == given.content
        assert module.paddr % 4096 == 0
        line = module.cmdline_paddr
        assert (
            octets[line : line + len(given.cmdline) + 1] == given.cmdline + b"\0"
            if given.cmdline
            else not line
        )
    assert octets[info.cmdline_paddr : info.cmdline_paddr + 13] == b"console=hvc0\0"
    entries = [
        HVM_MEMMAP_TABLE_ENTRY.unpack(octets, info.memmap_paddr + i * HVM_MEMMAP_TABLE_ENTRY.size)
        for i in range(info.memmap_entries)
    ]
    assert [(e.addr, e.size, e.type) for e in entries] == [
        (m.address, m.size, m.kind) for m in built.memory_map
    ]
    assert (entries[0].addr, entries[0].size, entries[0].type) == (0, 2048 << 12, 1)
    assert built.first_free << 12 > info.cmdline_paddr


def test_special_pages() -> None:
    """Xenstore and console pages are where libxenguest puts them, reserved in the map, outside RAM."""
    built = build_pvh(PvhBuildRequest(load_kernel(elf64(SEGMENTS, NOTES)), 2048), Memory(2048))
    assert built.hvm_params[params.HVM_PARAM_STORE_PFN] == 0xFEFFC
    assert built.hvm_params[params.HVM_PARAM_CONSOLE_PFN] == 0xFEFFF
    assert built.hvm_params[params.HVM_PARAM_IDENT_PT] == 0xFEFFE000
    reserved = built.memory_map[-1]
    assert reserved.kind == 2
    assert all(reserved.address <= g << 12 < reserved.address + reserved.size for g in built.special_pages)


def test_ram_above_the_hole() -> None:
    """Memory beyond 0xF0000000 goes on at 4 GiB, none of it is lost."""
    assert ram_ranges(0xF0000) == ((0, 0xF0000),)
    assert ram_ranges(0x100000) == ((0, 0xF0000), (0x100000, 0x10000))


@pytest.mark.parametrize(
    ("kernel", "more", "message"),
    [
        (elf64(SEGMENTS, b""), {}, "no Xen ELF notes"),
        (elf64(SEGMENTS, notes({1: 0})), {}, "type pv"),
        (elf64(SEGMENTS, notes({PHYS32: 1 << 32})), {}, "32-bit"),
        (elf64(SEGMENTS, notes({PHYS32: 0x10000})), {}, "none of its segments"),
        (elf64([Seg(0x100000, b"x", 1 << 34)], NOTES), {}, "too few"),
        (elf64(SEGMENTS, NOTES), {"modules": (Module(bytes(8 << 20)),)}, "too few"),
        (elf64(SEGMENTS, NOTES), {"cmdline": b"x" * 5000}, "command line"),
        (elf64(SEGMENTS, NOTES), {"modules": (Module(b"x", b"a\0b"),)}, "command line"),
        (elf64(SEGMENTS, NOTES), {"pages": 0}, "pages"),
        (elf64(SEGMENTS, NOTES), {"reserved": (MapEntry(0x1000, 0x1000, 3),)}, "overlaps"),
        (elf64(SEGMENTS, NOTES), {"reserved": (MapEntry(0xFC000000, 1, 3),) * 200}, "ranges"),
    ],
)
def test_refusals(kernel: bytes, more: dict[str, object], message: str) -> None:
    """What cannot be built is refused by name before a byte is written."""
    memory = Memory(2048)
    request = PvhBuildRequest(**{"kernel": load_kernel(kernel), "pages": 2048, **more})  # type: ignore[arg-type]  # by name
    with pytest.raises(BuildError, match=message):
        build_pvh(request, memory)
    assert memory.writes == 0
