"""Linux's bzImage: finds the ELF kernel in the boot-protocol wrapper.

Offsets are those of the x86 boot protocol (Linux, Documentation/x86/boot.rst), from the file's start: 0x1F1
setup_sects (u8), 0x202 "HdrS", 0x206 version (u16), 0x248 payload_offset and 0x24C payload_length (u32, since
protocol 2.08; the offset counts from the protected-mode code).
"""

from __future__ import annotations

import struct
from typing import Final

from .decompress import MAX_UNPACKED, compression_of, decompress
from .errors import BuildError

_MAGIC_OFFSET: Final = 0x202
_MAGIC: Final = b"HdrS"
_PAYLOAD_SINCE: Final = 0x0208
_HEADER_END: Final = 0x250


def is_bzimage(data: bytes) -> bool:
    """The file carries the boot protocol's header."""
    return data[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] == _MAGIC


def payload(data: bytes) -> bytes:
    """The compressed (or plain ELF) payload of a bzImage. BuildError if there is none or it lies outside the
    file."""
    if len(data) < _HEADER_END:
        raise BuildError(f"bzImage: {len(data)} bytes are too few for a setup header")
    (version,) = struct.unpack_from("<H", data, 0x206)
    if version < _PAYLOAD_SINCE:
        raise BuildError(
            f"bzImage: boot protocol {version >> 8}.{version & 255:02d} has no payload offset (2.08 needed): a program for a PC boots from"
            " a disk, with type hvm"
        )
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if length == 0:
        raise BuildError(
            "bzImage: it has no kernel inside (a program for a PC?): boot it from a disk, with type hvm"
        )
    if start + length > len(data):
        raise BuildError(
            f"bzImage: payload [{start:#x}, {start + length:#x}) lies outside the {len(data):#x} byte file"
        )
    return data[start : start + length]


def unpack(data: bytes, *, limit: int = MAX_UNPACKED) -> tuple[bytes, str]:
    """(the ELF kernel in a bzImage, the name of its compression). BuildError as `payload` and
    `decompress`."""
    inner = payload(data)
    if inner.startswith(b"\x7fELF"):
        return inner, "uncompressed"
    return decompress(inner, limit=limit), compression_of(inner) or "uncompressed"
