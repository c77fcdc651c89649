"""What is behind a namespace: the interface, and raw files.

A medium's write is acknowledged when the page cache has it: it outlives the device process. It is on the disk after `flush`
(fdatasync), or when it was written with `durable`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from typing import Final, Protocol

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 2
FALLOC_ZERO_RANGE: Final = 0x10
ZERO_CHUNK: Final = 1 << 20
SECTOR: Final = 512

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class MediaError(Exception):
    """The medium failed; the text says how. `full`: there is no room left for a write."""

    def __init__(self, text: str, *, full: bool = False) -> None:
        super().__init__(text)
        self.full = full


class Media(Protocol):
    """A disk. Offsets and lengths are bytes, checked by the caller against `size`; all methods may raise MediaError."""

    size: int
    """A multiple of 512."""
    read_only: bool

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target`."""

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        """Write; `durable`: on the disk when this returns (force unit access)."""

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        """Zeroes; with `deallocate_it` the space may be given back."""

    def discard(self, offset: int, length: int) -> None:
        """The content is not needed any more; it reads as zeroes then, or as before."""

    def flush(self) -> None:
        """Everything written so far is on the disk when this returns."""

    def used(self) -> int:
        """Bytes of space that it takes."""

    def close(self) -> None:
        """Close its descriptors."""


def read_exactly(fd: int, offset: int, target: memoryview) -> None:
    """pread; what is beyond the end of the file reads as zeroes. MediaError."""
    try:
        done = os.preadv(fd, (target,), offset)  # all of it, nearly always
        while done < len(target):
            count = os.preadv(fd, [target[done:]], offset + done)
            if count == 0:
                target[done:] = bytes(len(target) - done)
                return
            done += count
    except OSError as error:
        raise MediaError(f"read of {len(target)} bytes at {offset}: {error}") from None


def write_exactly(fd: int, offset: int, data: memoryview | bytes | bytearray, flags: int = 0) -> None:
    """pwrite. MediaError."""
    view = memoryview(data)
    try:
        done = os.pwritev(fd, (view,), offset, flags)
        while done < len(view):
            done += os.pwritev(fd, [view[done:]], offset + done, flags)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise MediaError(f"write of {len(view)} bytes at {offset}: {error}", full=full) from None


def file_size(fd: int) -> int:
    """Bytes of a regular file or a block device. MediaError if it is neither."""
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise MediaError("neither a file nor a block device")
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise MediaError(f"size: {error}") from None


def sync(fd: int) -> None:
    """fdatasync. MediaError: what was written since the last one may be lost."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise MediaError(f"fdatasync: {error}") from None


def deallocate(fd: int, offset: int, length: int, mode: int) -> bool:
    """fallocate; False if the file system has no such thing. MediaError."""
    if _libc.fallocate(fd, mode | FALLOC_KEEP_SIZE, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
        return False
    raise MediaError(f"fallocate: {os.strerror(code)}", full=code == errno.ENOSPC)


class RawMedia:
    """A raw file or block device. Implements Media."""

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        """Takes over `fd`. MediaError: not a file, empty, or its size is no multiple of 512."""
        self.size = file_size(fd)
        if self.size == 0 or self.size % SECTOR:
            raise MediaError(f"size of {self.size} bytes is not a multiple of {SECTOR}")
        self.read_only = read_only
        self._fd = fd

    def read(self, offset: int, target: memoryview) -> None:
        """See Media."""
        read_exactly(self._fd, offset, target)

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        """See Media."""
        write_exactly(self._fd, offset, data, os.RWF_DSYNC if durable else 0)

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        """See Media."""
        mode = FALLOC_PUNCH_HOLE if deallocate_it else FALLOC_ZERO_RANGE
        if not deallocate(self._fd, offset, length, mode):
            for start in range(offset, offset + length, ZERO_CHUNK):
                write_exactly(self._fd, start, bytes(min(ZERO_CHUNK, offset + length - start)))
        if durable:
            sync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """See Media."""
        deallocate(self._fd, offset, length, FALLOC_PUNCH_HOLE)

    def flush(self) -> None:
        """See Media."""
        sync(self._fd)

    def used(self) -> int:
        """See Media."""
        return min(self.size, os.fstat(self._fd).st_blocks * 512) or 0

    def close(self) -> None:
        """See Media."""
        os.close(self._fd)
