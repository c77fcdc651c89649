"""Kernel files: every container and compression is recognised, notes are read, and garbage gives only
BuildErrors."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import tracemalloc
from collections.abc import Callable

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.addresses import Mfn, Port
from domains.dom0.builder import (
    BuildError,
    PvBuildRequest,
    PvhBuildRequest,
    build_pv,
    build_pvh,
    load_kernel,
)
from domains.dom0.builder.decompress import decompress
from domains.dom0.builder.notes import parse_features
from tests.unit.builder.elf_maker import Memory, Seg, bzimage, elf32, elf64, note, notes

KERNEL = elf64([Seg(0, bytes(range(256)) * 64)], notes({1: 0x10, 3: 0, 18: 0x20}, {6: b"test"}), entry=0x10)
SIZE = struct.pack("<I", len(KERNEL))


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), block):
        piece = lz4.block.compress(data[start : start + block], store_size=False)
        out += struct.pack("<I", len(piece)) + piece
    return out


COMPRESSED = {
    "gzip": gzip.compress(KERNEL, mtime=0),  # the same in each worker, whenever it collects
    "bzip2": bz2.compress(KERNEL) + SIZE,
    "xz": lzma.compress(KERNEL, check=lzma.CHECK_CRC32) + SIZE,
    "lzma": lzma.compress(KERNEL, format=lzma.FORMAT_ALONE) + SIZE,
    "zstd": zstandard.compress(KERNEL) + SIZE,
    "lz4": lz4_legacy(KERNEL) + SIZE,
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_bzimage_of_every_compression(name: str) -> None:
    """The kernel comes out of a bzImage whatever packed it, the size that Linux appends notwithstanding."""
    kernel = load_kernel(bzimage(COMPRESSED[name]))
    assert kernel.container == f"bzImage ({name})"
    assert kernel.elf.segments[0].data == bytes(range(256)) * 64
    assert kernel.notes is not None
    assert (kernel.notes.entry, kernel.notes.phys32_entry, kernel.notes.guest_os) == (0x10, 0x20, "test")


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_elf_without_wrapper(name: str) -> None:
    """An ELF that is compressed as a whole is taken too."""
    assert load_kernel(COMPRESSED[name]).container == name


@pytest.mark.parametrize("name", COMPRESSED)
def test_truncation_and_damage_are_told(name: str) -> None:
    """A stream cut anywhere is a BuildError, never a shorter kernel."""
    packed = COMPRESSED[name].removesuffix(SIZE)
    for cut in range(len(packed) // 2, len(packed) - 12, 7):
        with pytest.raises(BuildError):
            load_kernel(bzimage(packed[:cut]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),
    "zstd": lambda data: zstandard.compress(data, 1),
    "lz4": lz4_legacy,
}


@pytest.mark.parametrize("name", PACKERS)
def test_bombs_are_bounded(name: str) -> None:
    """64 MiB of zeros behind a cap of 1 MiB: refused, and memory stays near the cap."""
    packed = PACKERS[name](bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BuildError, match="more than"):
            decompress(packed, limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_lz4_of_several_blocks() -> None:
    """LZ4's legacy frame is a chain of blocks."""
    data = bytes(range(256)) * 70000
    assert decompress(lz4_legacy(data)) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, world" * 100, "neither"),
        (b"\x7fELF", "too few"),
        (b"\x7fELF\x03\x01" + bytes(100), "class"),
        (b"\x7fELF\x02\x02" + bytes(100), "little-endian"),
        (bzimage(b"MZ junk"), "unknown compression"),
        (bzimage(b"\x89LZO\x00\r\n\x1a\n" + bytes(50)), "lzo"),
        (bzimage(gzip.compress(b"no kernel", mtime=0)), "not an ELF"),
        (bzimage(COMPRESSED["xz"], version=0x205), "2.05"),
        (bzimage(COMPRESSED["xz"])[:700], "outside"),
        (KERNEL[:300], "outside the file"),
        (bzimage(b""), "no kernel inside .* type hvm"),
    ],
    ids=[
        "empty", "text", "short", "32-bit", "big-endian", "junk", "lzo", "no-elf", "old", "cut-payload", "cut-elf", "program",
    ],
)  # fmt: skip
def test_refused_by_name(data: bytes, message: str) -> None:
    """What is wrong with a file is in the error."""
    with pytest.raises(BuildError, match=message):
        load_kernel(data)


def test_features_syntax() -> None:
    """`|` separates, `!` requires; unknown names only matter when required; SUPPORTED_FEATURES adds its
    bits."""
    assert parse_features("!writable_page_tables|dom0||nonsense") == (
        {"writable_page_tables", "dom0"},
        {"writable_page_tables"},
    )
    with pytest.raises(BuildError, match="'nonsense'"):
        parse_features("dom0|!nonsense")
    both = notes({1: 0, 3: 0, 17: 1 << 11 | 1 << 4}, {10: b"!writable_page_tables"})
    found = load_kernel(elf64([Seg(0, b"x")], both)).notes
    assert found is not None
    assert found.supported == {"dom0", "pae_pgdir_above_4gb", "writable_page_tables"}


def test_notes_of_others_are_skipped() -> None:
    """Notes with another owner, and of unknown type, do not count; a note of 4 bytes is a number as well."""
    mixed = (
        note(1, struct.pack("<Q", 5), b"GNU\0") + note(18, struct.pack("<I", 7)) + note(0x1000001, b"crash")
    )
    found = load_kernel(elf64([Seg(0, b"x")], mixed)).notes
    assert found is not None
    assert (found.entry, found.phys32_entry) == (None, 7)
    padded = note(1, struct.pack("<Q", 5), b"Xen\0\0\0\0\0")  # a C string, as libelf compares it
    found = load_kernel(elf64([Seg(0, b"x")], padded)).notes
    assert found is not None
    assert found.entry == 5


def with_section(content: bytes) -> bytes:
    """An ELF64 file without notes, with a section `__xen_guest`."""
    image = bytearray(elf64([Seg(0x200000, bytes(8192))], b""))
    names = b"\0__xen_guest\0.names\0"
    at = len(image)
    image += names + content
    table = len(image)

    def header(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    image += header(0, 0, 0, 0) + header(1, 1, at + len(names), len(content)) + header(13, 3, at, len(names))
    struct.pack_into("<Q", image, 40, table)
    struct.pack_into("<HHH", image, 58, 64, 3, 2)
    return bytes(image)


def test_legacy_guest_section() -> None:
    """`__xen_guest`: its physical addresses are offset by VIRT_BASE, its hypercall page is a page number."""
    text = (
        b"GUEST_OS=old,XEN_VER=xen-3.0,VIRT_BASE=0x200000,HYPERCALL_PAGE=1,FEATURES=!writable_page_tables\0"
    )
    found = load_kernel(with_section(text)).notes
    assert found is not None
    assert found.legacy
    assert (found.virt_base, found.paddr_offset, found.hypercall_page) == (0x200000, 0x200000, 0x201000)
    assert found.required == {"writable_page_tables"}
    with pytest.raises(BuildError, match="VIRT_BASE is not a number"):
        load_kernel(with_section(b"VIRT_BASE=zero\0"))


def try_everything(data: bytes) -> None:
    """Parse and build both ways: only BuildError may come out."""
    try:
        kernel = load_kernel(data, limit=1 << 20)
    except BuildError as error:
        assert "\n" not in str(error)  # noqa: PT017  # success is a right outcome too
        return
    for build in (
        lambda: build_pv(PvBuildRequest(kernel, range(9, 1609), Mfn(1), Port(1), Port(2)), Memory(1600)),
        lambda: build_pvh(PvhBuildRequest(kernel, 1600), Memory(1600)),
    ):
        try:
            build()
        except BuildError as error:
            assert "\n" not in str(error)  # noqa: PT017  # success is a right outcome too


STARTS = [
    b"",
    b"\x7fELF\x02\x01\x01",
    b"\x7fELF\x01\x01\x01",
    *(packed[:12] for packed in COMPRESSED.values()),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=600))
def test_garbage(start: bytes, rest: bytes) -> None:
    """Random bytes behind each magic."""
    try_everything(start + rest)


WHOLE = [
    KERNEL,
    elf32([Seg(0x1000, b"y" * 100)], notes({18: 0x1000})),
    with_section(b"VIRT_BASE=0x200000,VIRT_ENTRY=0x200000\0"),
    *(bzimage(packed) for packed in COMPRESSED.values()),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6))
def test_damaged_kernels(whole: bytes, changes: list[tuple[int, int]]) -> None:
    """A good file with some bytes changed (most hits are in headers and notes)."""
    damaged = bytearray(whole)
    for where, value in changes:
        damaged[where % len(damaged)] = value
    try_everything(bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 700), st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 63, 0x1000, 1 << 40]))
def test_wild_numbers(where: int, value: int) -> None:
    """Extreme 64-bit values anywhere in headers and notes: no crash, no endless loop, no huge allocation."""
    damaged = bytearray(KERNEL)
    struct.pack_into("<Q", damaged, where, value)
    try_everything(bytes(damaged))
