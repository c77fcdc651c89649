"""ELF files of kernels: header, load segments, and the places where Xen's notes may be. Nothing is trusted.

pyelftools gives the layouts (`ELFStructs`); its walker (`ELFFile`) is not used, because it follows links in
the file without bounds: a symbol table whose `sh_link` names itself makes it recurse until Python stops it.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from .errors import BuildError

MAX_SEGMENTS: Final = 128
MAX_SECTIONS: Final = 4096
MAX_NOTE_BYTES: Final = 1 << 20
"""Cap on the bytes of all note segments or sections of a file."""

_MACHINES: Final = {"EM_386": 3, "EM_X86_64": 62}
_PT_NOTE: Final = "PT_NOTE"
_SHT_NOTE: Final = "SHT_NOTE"


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD segment. All values are bytes."""

    paddr: int
    vaddr: int
    data: memoryview
    """What the file holds of it; the rest, up to `mem_size`, is zero."""
    mem_size: int
    writable: bool

    @property
    def end(self) -> int:
        """First physical address behind it."""
        return self.paddr + self.mem_size


@dataclass(frozen=True, slots=True)
class ElfImage:
    """What the builder needs of an ELF executable."""

    bits: int
    """32 or 64: the file's class."""
    machine: str
    """EM_386 or EM_X86_64."""
    entry: int
    segments: tuple[Segment, ...]
    """In ascending physical order, without overlap, none empty."""
    note_segments: tuple[memoryview, ...]
    note_sections: tuple[memoryview, ...]
    guest_section: memoryview | None
    """The legacy `__xen_guest` section."""

    @property
    def start(self) -> int:
        """Lowest physical address of a segment."""
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        """First physical address behind the last segment."""
        return self.segments[-1].end


def is_elf(data: bytes) -> bool:
    """The file starts with ELF's magic."""
    return data[:4] == b"\x7fELF"


def parse_elf(data: bytes) -> ElfImage:
    """Read an ELF executable for x86. BuildError on anything wrong with it."""
    if not is_elf(data):
        raise BuildError("kernel: not an ELF file")
    if len(data) < 64:
        raise BuildError(f"kernel: {len(data)} bytes are too few for an ELF header")
    if data[4] not in (1, 2):
        raise BuildError(f"kernel: unknown ELF class {data[4]}")
    if data[5] != 1:
        raise BuildError("kernel: not a little-endian ELF file")
    bits = 32 * data[4]
    structs = _structs(bits)
    stream = io.BytesIO(data)
    try:
        header = struct_parse(structs.Elf_Ehdr, stream, stream_pos=0)
        if header["e_type"] not in ("ET_EXEC", "ET_DYN"):
            raise BuildError(f"kernel: not an executable ELF file (type {header['e_type']})")
        if header["e_machine"] not in _MACHINES:
            raise BuildError(f"kernel: for another machine ({header['e_machine']}), not x86")
        programs = _table(structs.Elf_Phdr, stream, header, "ph", MAX_SEGMENTS, len(data))
        sections = _table(structs.Elf_Shdr, stream, header, "sh", MAX_SECTIONS, len(data))
    except (ELFError, OverflowError) as error:
        raise BuildError(f"kernel: damaged ELF file: {error}") from None
    view = memoryview(data)
    segments = _load_segments(programs, view)
    notes = tuple(_piece(view, p, "p_offset", "p_filesz") for p in programs if p["p_type"] == _PT_NOTE)
    section_notes = tuple(
        _piece(view, s, "sh_offset", "sh_size") for s in sections if s["sh_type"] == _SHT_NOTE
    )
    if max(sum(map(len, notes)), sum(map(len, section_notes))) > MAX_NOTE_BYTES:
        raise BuildError(f"kernel: more than {MAX_NOTE_BYTES} bytes of ELF notes")
    return ElfImage(
        bits=bits,
        machine=header["e_machine"],
        entry=header["e_entry"],
        segments=segments,
        note_segments=notes,
        note_sections=section_notes,
        guest_section=_guest_section(sections, header["e_shstrndx"], view),
    )


@functools.cache
def _structs(bits: int) -> ELFStructs:
    """Layouts of ELF's tables, little-endian: made once, they never change."""
    structs = ELFStructs(little_endian=True, elfclass=bits)
    structs.create_basic_structs()
    structs.create_advanced_structs()
    return structs


def _table(layout: Any, stream: io.BytesIO, header: Any, prefix: str, most: int, size: int) -> list[Any]:
    """The program or section header table; an absent one is empty."""
    what = "program" if prefix == "ph" else "section"
    offset, count, step = header[f"e_{prefix}off"], header[f"e_{prefix}num"], header[f"e_{prefix}entsize"]
    if count == 0 or offset == 0:
        return []
    if count > most:
        raise BuildError(f"kernel: {count} ELF {what} headers (at most {most})")
    if step < layout.sizeof() or offset + count * step > size:
        raise BuildError(f"kernel: ELF {what} headers lie outside the file")
    return [struct_parse(layout, stream, stream_pos=offset + i * step) for i in range(count)]


def _piece(view: memoryview, item: Any, offset: str, size: str) -> memoryview:
    start, length = item[offset], item[size]
    if start + length > len(view):
        raise BuildError(f"kernel: ELF notes at [{start:#x}, {start + length:#x}) lie outside the file")
    return view[start : start + length]


def _load_segments(programs: list[Any], view: memoryview) -> tuple[Segment, ...]:
    out: list[Segment] = []
    for item in programs:
        if item["p_type"] != "PT_LOAD" or item["p_memsz"] == 0:
            continue
        start, held, size = item["p_offset"], item["p_filesz"], item["p_memsz"]
        if held > size:
            raise BuildError(f"kernel: segment at {item['p_paddr']:#x} holds {held:#x} bytes in {size:#x}")
        if start + held > len(view):
            raise BuildError(f"kernel: segment at {item['p_paddr']:#x} lies outside the file (truncated?)")
        if item["p_paddr"] + size > 1 << 64 or item["p_vaddr"] + size > 1 << 64:
            raise BuildError(f"kernel: segment at {item['p_paddr']:#x} wraps around the address space")
        data = view[start : start + held]
        out.append(Segment(item["p_paddr"], item["p_vaddr"], data, size, bool(item["p_flags"] & 2)))
    if not out:
        raise BuildError("kernel: no segment to load")
    out.sort(key=lambda s: s.paddr)
    for before, after in pairwise(out):
        if before.end > after.paddr:
            raise BuildError(f"kernel: segments at {before.paddr:#x} and {after.paddr:#x} overlap")
    return tuple(out)


def _guest_section(sections: list[Any], names_index: int, view: memoryview) -> memoryview | None:
    """The section named `__xen_guest`. A name table that is absent or out of the file means that there is
    none."""
    if not 0 < names_index < len(sections):
        return None
    table = sections[names_index]
    names = bytes(view[table["sh_offset"] : table["sh_offset"] + min(table["sh_size"], 1 << 20)])
    wanted = b"__xen_guest\0"
    for item in sections:
        if names[item["sh_name"] : item["sh_name"] + len(wanted)] == wanted:
            piece = _piece(view, item, "sh_offset", "sh_size")
            if len(piece) > MAX_NOTE_BYTES:
                raise BuildError(f"kernel: __xen_guest is longer than {MAX_NOTE_BYTES} bytes")
            return piece
    return None
