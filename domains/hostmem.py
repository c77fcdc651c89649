"""A domain's machine memory in its own process: one reserved range of host addresses, into which its memfd and the windows of
granted frames are mapped with MAP_FIXED (docs/architecture.md, section 4).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

from bus import sealed
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, offset)
    if result is None or result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes: {os.strerror(code)}")
    return int(result)


class Window:
    """Frames granted by another domain, mapped here."""

    def __init__(self, fd: int, frames: int, writable: bool) -> None:
        """Maps the window and closes the descriptor. ValueError if it is not a sealed memfd of that size."""
        try:
            sealed.check(fd, frames << PAGE_SHIFT)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self.address = _mmap(None, frames << PAGE_SHIFT, protection, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        self.frames = frames
        self.writable = writable
        octets = memoryview((ctypes.c_ubyte * (frames << PAGE_SHIFT)).from_address(self.address)).cast("B")
        self.octets = octets if writable else octets.toreadonly()

    def page(self, index: int) -> memoryview:
        """The 4096 bytes of one frame."""
        return self.octets[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT]

    def close(self) -> None:
        """Unmap. Views that are still held must not be used any more."""
        if self.address:
            _libc.munmap(self.address, self.frames << PAGE_SHIFT)
            self.address = 0


class HostMemory:
    """The own MFN range [base, base + frames) at one contiguous range of host addresses."""

    def __init__(self, fd: int, base: Mfn, frames: int) -> None:
        """Takes over the extent's memfd. ValueError if it is not a sealed memfd of that size."""
        sealed.check(fd, frames << PAGE_SHIFT)
        self._fd = fd
        self.base = base
        self.frames = frames
        self.size = frames << PAGE_SHIFT
        read_write = mmap.PROT_READ | mmap.PROT_WRITE
        self.address = _mmap(None, self.size, read_write, mmap.MAP_SHARED | MAP_NORESERVE, fd, 0)
        self.octets = memoryview((ctypes.c_ubyte * self.size).from_address(self.address)).cast("B")
        self.words = self.octets.cast("Q")
        self._moved: set[Mfn] = set()

    def page(self, mfn: Mfn) -> memoryview:
        """The 4096 bytes of an own frame."""
        offset = self._offset(mfn)
        return self.octets[offset : offset + PAGE_SIZE]

    def address_of(self, mfn: Mfn) -> int:
        """Host address of an own frame."""
        return self.address + self._offset(mfn)

    def _offset(self, mfn: Mfn) -> int:
        index = mfn - self.base
        if not 0 <= index < self.frames:
            raise ValueError(f"mfn {mfn:#x} is outside [{self.base:#x}, {self.base + self.frames:#x})")
        return index << PAGE_SHIFT

    def move_to_window(self, mfn: Mfn, window_fd: int, index: int) -> None:
        """Copy a frame into frame `index` of a window and put that at the frame's place. The vCPUs must be stopped."""
        offset = self._offset(mfn)
        os.pwrite(window_fd, self.octets[offset : offset + PAGE_SIZE], index << PAGE_SHIFT)
        self._map_window(offset, window_fd, index)
        self._moved.add(mfn)

    def find_in_window(self, mfn: Mfn, window_fd: int, index: int) -> None:
        """A new process of the domain finds a frame in a window: map it at the frame's place. Nothing is copied."""
        self._map_window(self._offset(mfn), window_fd, index)
        self._moved.add(mfn)

    def _map_window(self, offset: int, window_fd: int, index: int) -> None:
        _mmap(
            self.address + offset,
            PAGE_SIZE,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | MAP_FIXED,
            window_fd,
            index << PAGE_SHIFT,
        )

    def move_back(self, mfn: Mfn) -> None:
        """Copy a frame back into the own memfd, which nobody else holds, and map that again. The vCPUs must be stopped."""
        offset = self._offset(mfn)
        if mfn not in self._moved:
            return
        os.pwrite(self._fd, self.octets[offset : offset + PAGE_SIZE], offset)
        _mmap(
            self.address + offset,
            PAGE_SIZE,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | MAP_FIXED,
            self._fd,
            offset,
        )
        self._moved.discard(mfn)

    def close(self) -> None:
        """Unmap all and close the memfd. Views that are still held must not be used any more."""
        if self.address:
            _libc.munmap(self.address, self.size)
            self.address = 0
            os.close(self._fd)
