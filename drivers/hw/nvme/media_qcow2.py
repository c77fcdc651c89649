"""Reading qcow2 images, versions 2 and 3 (QEMU's docs/interop/qcow2.txt). They are never written.

Everything in an image is checked: a table, a cluster or a compressed run outside the file is a MediaError, as is what is not supported
(encryption, external data files, extended L2 entries, internal snapshots are simply not looked at).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import OrderedDict
from typing import Final

import zstandard

from drivers.hw.nvme.media import SECTOR, Media, MediaError, file_size, read_exactly

MAGIC: Final = b"QFI\xfb"
MAX_SIZE: Final = 1 << 46
MAX_L1: Final = 1 << 22
"""Entries of the L1 table (32 MiB)."""
L2_TABLES: Final = 64
"""L2 tables kept in memory."""
CLUSTERS: Final = 8
"""Decompressed clusters kept in memory."""
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _EXTENDED = 1, 2, 4, 8, 16


def is_qcow2(fd: int) -> bool:
    """The file begins as a qcow2 image does."""
    return os.pread(fd, 4, 0) == MAGIC


class Qcow2Media:
    """Implements Media, read-only."""

    def __init__(self, fd: int, backing: Media | None = None) -> None:
        """Takes over `fd`. `backing`: what the image's backing file is (the name in the image is not followed). MediaError."""
        self.read_only = True
        self._fd = fd
        self._file_size = file_size(fd)
        self._backing = backing
        header = self._bytes(0, 104, "header")
        (
            magic, version, backing_offset, _backing_size, cluster_bits, size, crypt, l1_size, l1_offset,
        ) = struct.unpack_from(">4sIQIIQIIQ", header)  # fmt: skip
        if magic != MAGIC or version not in (2, 3):
            raise MediaError(f"not a qcow2 image of version 2 or 3 (magic {magic!r}, version {version})")
        incompatible, compression, header_length = 0, 0, 72
        if version == 3:
            incompatible, header_length = (
                struct.unpack_from(">Q", header, 72)[0],
                struct.unpack_from(">I", header, 100)[0],
            )
            if incompatible & _COMPRESSION and header_length > 104:
                compression = self._bytes(104, 1, "header")[0]
        self._check_features(incompatible, crypt, compression)
        if backing_offset and backing is None:
            raise MediaError("the image has a backing file, and none was given")
        if not 9 <= cluster_bits <= 21:
            raise MediaError(f"clusters of 2^{cluster_bits} bytes")
        if size % SECTOR or not 0 < size <= MAX_SIZE:
            raise MediaError(f"virtual size of {size} bytes")
        self.size: int = size
        self._bits: int = cluster_bits
        self._cluster = 1 << cluster_bits
        self._per_table = self._cluster // 8
        self._zstd = compression == 1
        needed = -(-size // (self._cluster * self._per_table))
        if not needed <= l1_size <= MAX_L1 or l1_offset % self._cluster:
            raise MediaError(f"L1 table of {l1_size} entries at {l1_offset}; {needed} entries are needed")
        self._l1 = struct.unpack(f">{needed}Q", self._bytes(l1_offset, 8 * needed, "L1 table"))
        self._l2: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._plain: OrderedDict[int, bytes] = OrderedDict()

    @staticmethod
    def _check_features(incompatible: int, crypt: int, compression: int) -> None:
        if crypt:
            raise MediaError("encrypted images are not supported")
        if incompatible & _CORRUPT:
            raise MediaError("the image is marked corrupt")
        if incompatible & _EXTERNAL:
            raise MediaError("external data files are not supported")
        if incompatible & _EXTENDED:
            raise MediaError("extended L2 entries are not supported")
        if incompatible & ~(_DIRTY | _COMPRESSION):  # dirty: reference counts, of no interest to a reader
            raise MediaError(f"unknown incompatible features {incompatible:#x}")
        if compression > 1:
            raise MediaError(f"unknown compression type {compression}")

    def _bytes(self, offset: int, length: int, what: str) -> bytes:
        if offset < 0 or offset + length > self._file_size:
            raise MediaError(f"{what} at {offset} is outside the image of {self._file_size} bytes")
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise MediaError(f"{what}: {error}") from None
        if len(data) != length:
            raise MediaError(f"{what}: {len(data)} of {length} bytes")
        return data

    def _entry(self, cluster: int) -> int:
        """L2 entry of a guest cluster; 0 if it has none."""
        table, index = divmod(cluster, self._per_table)
        offset = self._l1[table] & _OFFSET
        if not offset:
            return 0
        entries = self._l2.get(offset)
        if entries is None:
            if offset % self._cluster:
                raise MediaError(f"L2 table at {offset} is not aligned")
            entries = struct.unpack(f">{self._per_table}Q", self._bytes(offset, self._cluster, "L2 table"))
            self._l2[offset] = entries
            if len(self._l2) > L2_TABLES:
                self._l2.popitem(last=False)
        else:
            self._l2.move_to_end(offset)
        return int(entries[index])

    def read(self, offset: int, target: memoryview) -> None:
        """See Media."""
        done = 0
        while done < len(target):
            cluster, inside = divmod(offset + done, self._cluster)
            length = min(len(target) - done, self._cluster - inside)
            self._read_in(cluster, inside, target[done : done + length])
            done += length

    def _read_in(self, cluster: int, inside: int, target: memoryview) -> None:
        entry = self._entry(cluster)
        if entry & _COMPRESSED:
            data = self._decompressed(entry)
            target[:] = data[inside : inside + len(target)]
            return
        if entry & _ZERO:
            target[:] = bytes(len(target))
            return
        place = entry & _OFFSET
        if not place:
            self._read_backing((cluster << self._bits) + inside, target)
            return
        if place % self._cluster or place >= self._file_size:
            raise MediaError(f"cluster {cluster}: data at {place} of an image of {self._file_size} bytes")
        read_exactly(self._fd, place + inside, target)

    def _read_backing(self, offset: int, target: memoryview) -> None:
        length = 0
        if self._backing is not None:
            length = max(0, min(len(target), self._backing.size - offset))
            if length:
                self._backing.read(offset, target[:length])
        target[length:] = bytes(len(target) - length)

    def _decompressed(self, entry: int) -> bytes:
        known = self._plain.get(entry)
        if known is not None:
            return known
        shift = 62 - (self._bits - 8)
        start = entry & (1 << shift) - 1
        sectors = (entry >> shift & (1 << self._bits - 8) - 1) + 1
        end = min((start & ~(SECTOR - 1)) + sectors * SECTOR, self._file_size)
        if start >= end:
            raise MediaError(f"compressed cluster at {start} is outside the image")
        raw = self._bytes(start, end - start, "compressed cluster")
        try:
            if self._zstd:
                # Read, not decompressed as a whole: a few bytes can stand for gigabytes.
                with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw) as reader:
                    data = reader.read(self._cluster)
            else:
                data = zlib.decompressobj(-12).decompress(raw, self._cluster)
        except (zlib.error, zstandard.ZstdError) as error:
            raise MediaError(f"compressed cluster at {start}: {error}") from None
        if len(data) != self._cluster:
            raise MediaError(f"compressed cluster at {start}: {len(data)} bytes")
        self._plain[entry] = data
        if len(self._plain) > CLUSTERS:
            self._plain.popitem(last=False)
        return data

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        """Never: MediaError."""
        raise MediaError("qcow2 images are not written to")

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        """Never: MediaError."""
        raise MediaError("qcow2 images are not written to")

    def discard(self, offset: int, length: int) -> None:
        """Never: MediaError."""
        raise MediaError("qcow2 images are not written to")

    def flush(self) -> None:
        """Nothing was written."""

    def used(self) -> int:
        """See Media."""
        return min(self.size, self._file_size)

    def close(self) -> None:
        """See Media."""
        os.close(self._fd)
        if self._backing is not None:
            self._backing.close()
