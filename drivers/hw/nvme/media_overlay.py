"""Writes over a read-only base: a sparse data file, and a bitmap that says which blocks of 4 KiB are in it.

Two promises: an acknowledged write outlives this process (data and bit are in the page cache then); and after the host lost power,
a block is as it was at the last flush, or newer. So there are two bitmaps in the file: `now`, kept up to date, which is believed only
under the host's boot in which it was written; and `flushed`, which is brought up to date after the data of its blocks is on the disk.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final

from drivers.hw.nvme.media import (
    FALLOC_PUNCH_HOLE,
    Media,
    MediaError,
    deallocate,
    file_size,
    read_exactly,
    sync,
    write_exactly,
)

MAGIC: Final = b"DOMOVL01"
HEADER: Final = 4096
BLOCK: Final = 4096
_HEAD: Final = struct.Struct("<8sQ36s")


def boot_id() -> bytes:
    """This boot of the host."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(36)


class OverlayMedia:
    """Implements Media."""

    def __init__(
        self, base: Media, data: int, bitmap: int, *, read_only: bool = False, boot: bytes | None = None
    ) -> None:
        """Takes over both descriptors; empty files begin a new overlay. MediaError: the bitmap is of another disk."""
        self.size = base.size
        self.read_only = read_only
        self._base = base
        self._data = data
        self._bitmap = bitmap
        self._map_bytes = -(-(-(-self.size // BLOCK) // 8) // HEADER) * HEADER
        boot = boot_id() if boot is None else boot
        try:
            if file_size(bitmap) == 0:
                os.ftruncate(bitmap, HEADER + 2 * self._map_bytes)
                write_exactly(bitmap, 0, _HEAD.pack(MAGIC, self.size, boot))
            if file_size(data) < self.size:
                os.ftruncate(data, self.size)
            if file_size(bitmap) != HEADER + 2 * self._map_bytes:
                raise MediaError("the overlay's bitmap is of a disk of another size")
            self._mapping = mmap.mmap(bitmap, HEADER + 2 * self._map_bytes)
        except OSError as error:
            raise MediaError(f"overlay: {error}") from None
        magic, size, was = _HEAD.unpack_from(self._mapping)
        if magic != MAGIC or size != self.size:
            raise MediaError("the overlay's bitmap is of another disk")
        view = memoryview(self._mapping)
        self._now = view[HEADER : HEADER + self._map_bytes]
        self._flushed = view[HEADER + self._map_bytes :]
        self._dirty: set[int] = set()
        """Pages of the bitmap in which `now` may be ahead of `flushed`."""
        if was != boot:
            self._now[:] = self._flushed
            sync(bitmap)  # before the header says that `now` can be believed
            _HEAD.pack_into(self._mapping, 0, MAGIC, self.size, boot)
        else:
            self._dirty = set(range(self._map_bytes // HEADER))

    def _has(self, block: int) -> bool:
        return bool(self._now[block >> 3] >> (block & 7) & 1)

    def _mark(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            self._now[block >> 3] |= 1 << (block & 7)
        self._dirty.update(range(first >> 15, (last >> 15) + 1))

    def read(self, offset: int, target: memoryview) -> None:
        """See Media. Runs of blocks that come from the same file are read in one step."""
        end = offset + len(target)
        at = offset
        while at < end:
            block = at // BLOCK
            here = self._has(block)
            block += 1
            while block * BLOCK < end and self._has(block) == here:
                block += 1
            stop = min(end, block * BLOCK)
            part = target[at - offset : stop - offset]
            if here:
                read_exactly(self._data, at, part)
            else:
                self._base.read(at, part)
            at = stop

    def _fill_edges(self, offset: int, end: int) -> None:
        """The parts of the first and last block that are not written come from the base."""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        for block in {first, last}:
            start, stop = block * BLOCK, min((block + 1) * BLOCK, self.size)
            if self._has(block) or (start >= offset and stop <= end):
                continue
            whole = bytearray(stop - start)
            self._base.read(start, memoryview(whole))
            write_exactly(self._data, start, whole)

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        """See Media."""
        end = offset + len(data)
        self._fill_edges(offset, end)
        write_exactly(self._data, offset, data)
        self._mark(offset // BLOCK, (end - 1) // BLOCK)
        if durable:
            self.flush()

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        """See Media. Zeroes are written as holes: the base must not show through."""
        end = offset + length
        self._fill_edges(offset, end)
        if not deallocate(self._data, offset, length, FALLOC_PUNCH_HOLE):
            for start in range(offset, end, 1 << 20):
                write_exactly(self._data, start, bytes(min(1 << 20, end - start)))
        self._mark(offset // BLOCK, (end - 1) // BLOCK)
        if durable:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        """See Media."""
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        """See Media. First the data, then the bits that say it is there."""
        sync(self._data)
        if not self._dirty:
            return
        for page in self._dirty:
            part = slice(page * HEADER, (page + 1) * HEADER)
            if self._flushed[part] != self._now[part]:
                self._flushed[part] = self._now[part]
        sync(self._bitmap)
        self._dirty.clear()

    def used(self) -> int:
        """See Media."""
        return min(self.size, os.fstat(self._data).st_blocks * 512 + self._base.used())

    def close(self) -> None:
        """See Media."""
        self._now.release()
        self._flushed.release()
        os.close(self._data)
        os.close(self._bitmap)
        self._base.close()
