"""Makes small ELF kernels with Xen notes for the builder's tests, and reads what was built back, on its own
terms."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple


class Seg(NamedTuple):
    paddr: int
    data: bytes
    mem_size: int = 0
    vaddr: int | None = None


def note(kind: int, data: bytes, name: bytes = b"Xen\0") -> bytes:
    head = struct.pack("<III", len(name), len(data), kind)
    return head + name.ljust(len(name) + 3 & ~3, b"\0") + data.ljust(len(data) + 3 & ~3, b"\0")


def notes(numbers: Mapping[int, int], strings: Mapping[int, bytes] = {}) -> bytes:  # never written
    out = b"".join(note(kind, struct.pack("<Q", value)) for kind, value in numbers.items())
    return out + b"".join(note(kind, text + b"\0") for kind, text in strings.items())


def elf64(segments: list[Seg], xen_notes: bytes, entry: int = 0, machine: int = 62, kind: int = 2) -> bytes:
    """An ELF64 file: header, program headers, notes, segment contents."""
    count = len(segments) + (1 if xen_notes else 0)
    offset = 64 + 56 * count
    body, programs = xen_notes, b""
    if xen_notes:
        programs += struct.pack("<IIQQQQQQ", 4, 4, offset, 0, 0, len(xen_notes), len(xen_notes), 4)
    for seg in segments:
        vaddr = seg.paddr if seg.vaddr is None else seg.vaddr
        size = seg.mem_size or len(seg.data)
        programs += struct.pack(
            "<IIQQQQQQ", 1, 7, offset + len(body), vaddr, seg.paddr, len(seg.data), size, 4096
        )
        body += seg.data
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return head + programs + body


def elf32(segments: list[Seg], xen_notes: bytes, entry: int = 0, machine: int = 3) -> bytes:
    """An ELF32 file of the same shape."""
    count = len(segments) + (1 if xen_notes else 0)
    offset = 52 + 32 * count
    body, programs = xen_notes, b""
    if xen_notes:
        programs += struct.pack("<8I", 4, offset, 0, 0, len(xen_notes), len(xen_notes), 4, 4)
    for seg in segments:
        size = seg.mem_size or len(seg.data)
        programs += struct.pack(
            "<8I", 1, offset + len(body), seg.paddr, seg.paddr, len(seg.data), size, 7, 4096
        )
        body += seg.data
    ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    head = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, machine, 1, entry, 52, 0, 0, 52, 32, count, 0, 0, 0)
    return head + programs + body


def bzimage(payload: bytes, setup_sectors: int = 3, version: int = 0x20F) -> bytes:
    """A Linux boot-protocol wrapper around a payload."""
    setup = bytearray((setup_sectors + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 0x40, len(payload))
    return bytes(setup) + bytes(0x40) + payload + b"trailer"


class Memory:
    """A guest's memory in a bytearray; refuses writes that leave it."""

    def __init__(self, pages: int) -> None:
        self.octets = bytearray(pages << 12)
        self.writes = 0

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        start = (pfn << 12) + offset
        if not (0 <= offset < 4096 and pfn >= 0 and start + len(data) <= len(self.octets)):
            raise AssertionError(f"write of {len(data)} bytes at frame {pfn} leaves the guest")
        self.octets[start : start + len(data)] = data
        self.writes += 1


class Mapping4K(NamedTuple):
    va: int
    pfn: int
    writable: bool


class Walk(NamedTuple):
    mappings: dict[int, Mapping4K]
    tables: list[tuple[int, int]]
    """(pfn, level), each once."""


def walk(memory: Memory, p2m: list[int] | range, cr3: int) -> Walk:
    """Follow every present entry from cr3; every frame named must be one of the guest's own."""
    m2p = {mfn: pfn for pfn, mfn in enumerate(p2m)}
    mappings: dict[int, Mapping4K] = {}
    tables: list[tuple[int, int]] = []

    def visit(mfn: int, level: int, base: int, writable: bool) -> None:
        pfn = m2p[mfn]  # KeyError: a frame of somebody else
        tables.append((pfn, level))
        entries = struct.unpack_from("<512Q", memory.octets, pfn << 12)
        for index, entry in enumerate(entries):
            if not entry & 1:
                assert entry == 0
                continue
            assert not entry & 0x80 or level == 1, "a large page"
            assert entry & 4, "an entry without the user bit: the guest runs at CPL3"
            va = base | index << 12 + 9 * (level - 1)
            if level == 4 and index >= 256:
                va |= 0xFFFF << 48
            target = entry >> 12 & (1 << 40) - 1
            allowed = writable and bool(entry & 2)
            if level == 1:
                mappings[va] = Mapping4K(va, m2p[target], allowed)
            else:
                visit(target, level - 1, va, allowed)

    visit(cr3, 4, 0, True)
    return Walk(mappings, tables)


def read_virtual(memory: Memory, found: Walk, va: int, size: int) -> bytes:
    """The bytes that the guest sees at a virtual address."""
    out = bytearray()
    while len(out) < size:
        at = va + len(out)
        page = found.mappings[at & ~0xFFF]
        start = (page.pfn << 12) + (at & 0xFFF)
        out += memory.octets[start : start + min(4096 - (at & 0xFFF), size - len(out))]
    return bytes(out)
