"""Firmware that is an ELF program: where it lies, what it is told, and what is refused."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from bus.abi.hvm.hvm_info_table import HVM_INFO_PADDR
from bus.abi.hvm.start_info import (
    HVM_MEMMAP_TABLE_ENTRY,
    HVM_MODLIST_ENTRY,
    HVM_START_INFO,
    XEN_HVM_START_MAGIC_VALUE,
)
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.firmware.layout import FirmwareConfig
from domains.dom0.builder.firmware.program import build_program
from tests.unit.builder.elf_maker import Seg, elf32, notes

CONFIG = FirmwareConfig(64 << 20, (1 << 32) + (16 << 20), 2, UUID(int=1))
CODE = b"\xfa\xf4" * 8


def program(place: int = 1 << 20, entry: int = 1 << 20, more: bytes = b"") -> bytes:
    """An ELF32 with one segment of 16 bytes."""
    return elf32([Seg(place, CODE)], more, entry=entry)


def test_where_it_lies_and_what_it_is_told() -> None:
    built = build_program(CONFIG, program(entry=(1 << 20) + 2))
    pieces = dict(built.pieces)
    assert bytes(pieces[1 << 20]) == CODE
    assert bytes(pieces[HVM_INFO_PADDR][:8]) == b"HVM INFO"
    assert built.entry == (1 << 20) + 2
    info = HVM_START_INFO.unpack(bytes(pieces[built.ebx][: HVM_START_INFO.size]))
    assert built.ebx == 0x101000
    assert (info.magic, info.version, info.memmap_entries) == (XEN_HVM_START_MAGIC_VALUE, 1, 2)
    raw = bytes(pieces[built.ebx])[info.memmap_paddr - built.ebx :]
    ranges = HVM_MEMMAP_TABLE_ENTRY.unpack_array(raw[: 2 * HVM_MEMMAP_TABLE_ENTRY.size], 2)
    assert [(r.addr, r.size, r.type) for r in ranges] == [(1 << 20, 63 << 20, 1), (1 << 32, 16 << 20, 1)]
    assert built.memory_map == ((1 << 20, 63 << 20, 1), (1 << 32, 16 << 20, 1))


def test_a_bios_is_its_module() -> None:
    """hvmloader looks for the module whose command line is "firmware"."""
    bios = b"BIOS" * 0x4000
    built = build_program(CONFIG, program(), bios)
    pieces = {address: bytes(data) for address, data in built.pieces}
    info = HVM_START_INFO.unpack(pieces[built.ebx][: HVM_START_INFO.size])
    assert info.nr_modules == 1
    raw = pieces[built.ebx]
    module = HVM_MODLIST_ENTRY.unpack(raw[info.modlist_paddr - built.ebx :][: HVM_MODLIST_ENTRY.size])
    assert pieces[module.paddr] == bios
    assert module.size == len(bios)
    assert raw[module.cmdline_paddr - built.ebx :].startswith(b"firmware\0")
    assert module.paddr >= built.ebx + len(raw)
    with pytest.raises(BuildError, match="is not all memory"):
        build_program(CONFIG, program(), bytes(63 << 20))


def test_the_note_of_a_pvh_kernel_names_the_entry() -> None:
    assert build_program(CONFIG, program(more=notes({18: (1 << 20) + 4}))).entry == (1 << 20) + 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (program(place=0xB0000, entry=0xB0000), "is not all memory"),
        (program(place=0x9FFF8, entry=0x9FFF8), "is not all memory"),
        (program(place=64 << 20, entry=64 << 20), "is not all memory"),
        (program(entry=0x1234), "in none of its segments"),
        (struct.pack("<4sB", b"\x7fELF", 1), "ELF"),
    ],
)
def test_what_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(BuildError, match=words):
        build_program(CONFIG, content)
