"""Payloads of compressed kernels: recognised by their magic, unpacked under a cap.

The formats are those that Linux builds for x86 (Documentation/x86/boot.rst, `payload_offset`): gzip, bzip2,
LZMA (the "alone" format), XZ, LZ4 (legacy frame) and Zstandard. LZO is recognised and refused: there is no
decoder here.
"""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from typing import Final

import lz4.block
import zstandard

from .errors import BuildError

MAX_UNPACKED: Final = 512 << 20
"""Default cap on the size of an unpacked kernel, bytes."""

_DECODER_MEMORY: Final = 256 << 20
"""Cap on what an LZMA or Zstandard decoder may take for its dictionary or window, bytes."""

_LZ4_BLOCK: Final = 8 << 20
"""Every block of an LZ4 legacy frame but the last unpacks to this many bytes."""

_MAGICS: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO\x00\r\n\x1a\n", "lzo"),
)


def compression_of(payload: bytes) -> str | None:
    """Name of the compression by the magic at the start of `payload`; None if it is none of those known."""
    for magic, name in _MAGICS:
        if payload.startswith(magic):
            return name
    return None


def decompress(payload: bytes, *, limit: int = MAX_UNPACKED) -> bytes:
    """The unpacked payload; bytes behind the end of the compressed stream are ignored (Linux appends the size
    there).

    BuildError: unknown compression, a damaged or truncated stream, or more than `limit` bytes.
    """
    name = compression_of(payload)
    if name is None:
        raise BuildError(
            f"kernel payload: unknown compression (starts with {payload[:6].hex() or 'nothing'})"
        )
    try:
        if name == "gzip":
            out, finished = _gzip(payload, limit)
        elif name == "bzip2":
            bz = bz2.BZ2Decompressor()
            out = bz.decompress(payload, limit + 1)
            finished = bz.eof
        elif name in ("xz", "lzma"):
            kind = lzma.FORMAT_XZ if name == "xz" else lzma.FORMAT_ALONE
            xz = lzma.LZMADecompressor(kind, memlimit=_DECODER_MEMORY)
            out = xz.decompress(payload, limit + 1)
            finished = xz.eof
        elif name == "lz4":
            out, finished = _lz4_legacy(payload, limit), True
        elif name == "zstd":
            out, finished = _zstd(payload, limit), True
        else:
            raise BuildError(f"kernel payload: {name} compression is not supported")
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError) as error:
        if isinstance(error, BuildError):
            raise
        raise BuildError(f"kernel payload: damaged {name} stream: {error}") from None
    if len(out) > limit:
        raise BuildError(f"kernel payload: unpacks to more than {limit} bytes")
    if not finished:
        raise BuildError(f"kernel payload: truncated {name} stream")
    return out


def _gzip(payload: bytes, limit: int) -> tuple[bytes, bool]:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    out = stream.decompress(payload, limit + 1)
    return out, stream.eof


def _zstd(payload: bytes, limit: int) -> bytes:
    """One Zstandard frame. Its end is found first (RFC 8878, 3.1.1): the decoder does not tell truncation."""
    header = zstandard.get_frame_parameters(payload)
    offset = zstandard.frame_header_size(payload)
    last = False
    while not last:
        block = int.from_bytes(payload[offset : offset + 3], "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        offset += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
        if offset > len(payload):
            raise BuildError("kernel payload: truncated zstd stream")
    end = offset + (4 if header.has_checksum else 0)
    if end > len(payload):
        raise BuildError("kernel payload: truncated zstd stream")
    decoder = zstandard.ZstdDecompressor(max_window_size=_DECODER_MEMORY)
    out = io.BytesIO()
    with decoder.stream_reader(payload[:end]) as reader:
        while out.tell() <= limit and (piece := reader.read(1 << 20)):
            out.write(piece)
    return out.getvalue()


def _lz4_legacy(payload: bytes, limit: int) -> bytes:
    """Blocks of (u32 compressed size, data) behind the magic; the stream ends with the payload.

    Linux appends the unpacked size as a u32, so fewer than 5 bytes that follow the last block are the end
    too.
    """
    out: list[bytes] = []
    total = 0
    offset = 4
    while offset + 4 < len(payload):
        (size,) = struct.unpack_from("<I", payload, offset)
        offset += 4
        if size == 0x184C2102:  # frames may be put one after another
            continue
        if not 0 < size <= len(payload) - offset:
            raise BuildError("kernel payload: truncated lz4 stream")
        try:
            block = lz4.block.decompress(payload[offset : offset + size], uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise BuildError(f"kernel payload: damaged lz4 stream: {error}") from None
        out.append(block)
        total += len(block)
        if total > limit:
            raise BuildError(f"kernel payload: unpacks to more than {limit} bytes")
        offset += size
    if not out:
        raise BuildError("kernel payload: truncated lz4 stream")
    return b"".join(out)
