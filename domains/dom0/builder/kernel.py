"""A kernel file of any kind that Xen's tools take, as one thing: ELF segments and Xen's notes.

Kinds: ELF64, ELF32 (PVH only), a Linux bzImage around an ELF, and an ELF compressed as a whole (gzip, xz,
...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from . import bzimage, decompress
from .elf import ElfImage, is_elf, parse_elf
from .errors import BuildError
from .notes import XenNotes, find_notes

MAX_FILE: Final = 512 << 20
"""Cap on a kernel file, bytes."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A parsed kernel."""

    container: str
    """What the file was: "ELF", "bzImage (xz)", "gzip", ..."""
    elf: ElfImage
    notes: XenNotes | None
    content: bytes
    """The ELF file, unpacked."""


def load_kernel(data: bytes | bytearray | memoryview, *, limit: int = decompress.MAX_UNPACKED) -> Kernel:
    """Recognise and parse a kernel file; `limit` caps its unpacked size in bytes.

    BuildError: not a kernel, damaged, too large, or notes that do not parse. A kernel without Xen's notes is
    returned: whether they are needed depends on the kind of guest.
    """
    if len(data) > MAX_FILE:
        raise BuildError(f"kernel: {len(data)} bytes (at most {MAX_FILE})")
    content, container = bytes(data), "ELF"
    if not content:
        raise BuildError("kernel: the file is empty")
    if not is_elf(content):
        if bzimage.is_bzimage(content):
            content, compression = bzimage.unpack(content, limit=limit)
            container = f"bzImage ({compression})"
        elif (name := decompress.compression_of(content)) is not None:
            content, container = decompress.decompress(content, limit=limit), name
        else:
            raise BuildError("kernel: neither an ELF file nor a bzImage, nor compressed")
        if not is_elf(content):
            raise BuildError(f"kernel: what the {container} holds is not an ELF file")
    elf = parse_elf(content)
    return Kernel(container, elf, find_notes(elf), content)
