"""Machine memory in memfds: one sparse, sealed memfd for each domain's extent, one for each window of granted frames."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bus import sealed
from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn
from bus.packets import close_all
from bus.sealed import read_only

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
MAP_NORESERVE: Final = 0x4000
_WINDOW_SHIFT: Final = 32
_PLACE_MASK: Final = (1 << _WINDOW_SHIFT) - 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@dataclass(slots=True)
class _Region:
    fd: int
    frames: int
    view: memoryview
    mapping: mmap.mmap

    def close(self) -> None:
        self.view.release()
        self.mapping.close()
        os.close(self.fd)


def _region(name: str, frames: int) -> _Region:
    size = frames << PAGE_SHIFT
    fd = sealed.create(name, size)
    mapping = mmap.mmap(fd, size, mmap.MAP_SHARED | MAP_NORESERVE)
    return _Region(fd, frames, memoryview(mapping), mapping)


class MemfdMemory:
    """Implements `hypervisor.core.ports.MachineMemory` (its methods are documented there)."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._extents: dict[int, _Region] = {}
        self._windows: dict[int, _Region] = {}
        self._placed: dict[int, int] = {}
        """Frames that are in windows: the window's number and, below _WINDOW_SHIFT, the frame's place there."""

    def place_of(self, mfn: int) -> tuple[memoryview, int]:
        """Where a frame is mapped here: a view, and the frame's offset in it. KeyError if there is no such memory."""
        return self._at(mfn)

    def places(self, mfn: int, offset: int, length: int) -> list[tuple[memoryview, int, int]]:
        """Where `length` bytes from `offset` in a frame on are mapped here, in the frame and those that follow it: (view, offset in it,
        bytes) of what lies in a row. KeyError if there is no such memory."""
        view, start = self._at(mfn)
        end = offset + length
        if end <= PAGE_SIZE:
            return [(view, start + offset, length)]
        count = (end + PAGE_SIZE - 1) >> PAGE_SHIFT
        frames = [*map(self._placed.get, range(mfn, mfn + count))]
        if (place := frames[0]) is not None:
            in_a_row = frames == [*range(place, place + count)]  # all in one window
        else:  # all at home, in one extent
            in_a_row = frames.count(None) == count and start + (count << PAGE_SHIFT) <= len(view)
        if in_a_row:
            return [(view, start + offset, length)]
        found: list[tuple[memoryview, int, int]] = []
        begin, next_start = start + offset, start
        for frame in range(mfn + 1, mfn + count):
            next_start += PAGE_SIZE
            other, at = self._at(frame)
            if other is not view or at != next_start:
                found.append((view, begin, next_start - begin))
                view, begin, next_start = other, at, at
        done = sum(size for _, _, size in found)
        found.append((view, begin, length - done))
        return found

    def _at(self, mfn: int) -> tuple[memoryview, int]:
        placed = self._placed.get(mfn)
        if placed is not None:
            return self._windows[placed >> _WINDOW_SHIFT].view, (placed & _PLACE_MASK) << PAGE_SHIFT
        index = bisect_right(self._bases, mfn) - 1
        if index >= 0:
            base = self._bases[index]
            region = self._extents[base]
            if mfn - base < region.frames:
                return region.view, (mfn - base) << PAGE_SHIFT
        raise KeyError(f"no machine memory at mfn {mfn:#x}")

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        """See MachineMemory."""
        view, start = self._at(mfn)
        start += offset
        return bytes(view[start : start + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        """See MachineMemory."""
        view, start = self._at(mfn)
        start += offset
        view[start : start + len(data)] = data

    def copy(self, source: Mfn, source_offset: int, target: Mfn, target_offset: int, length: int) -> None:
        """See MachineMemory."""
        from_view, from_start = self._at(source)
        to_view, to_start = self._at(target)
        from_start += source_offset
        to_start += target_offset
        to_view[to_start : to_start + length] = from_view[from_start : from_start + length]

    def clear(self, mfn: Mfn, count: int = 1) -> None:
        """See MachineMemory. Runs of frames in one extent become holes in one step; a frame that lives in a window is zeroed there as
        well."""
        run, placed = range(mfn, mfn + count), self._placed
        for one in run if count < len(placed) else list(placed):
            if one in placed and one in run:
                view, start = self._at(one)
                view[start : start + PAGE_SIZE] = bytes(PAGE_SIZE)
        flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        start, end = int(mfn), mfn + count
        while start < end:
            index = bisect_right(self._bases, start) - 1
            base = self._bases[index] if index >= 0 else Mfn(0)
            extent = self._extents.get(base)
            if extent is None or start >= base + extent.frames:
                raise KeyError(f"no machine memory at mfn {start:#x}")
            here = min(end, base + extent.frames) - start
            if _libc.fallocate(extent.fd, flags, (start - base) << PAGE_SHIFT, here << PAGE_SHIFT) != 0:
                raise OSError(ctypes.get_errno(), "fallocate(PUNCH_HOLE)")
            start += here

    @contextlib.contextmanager
    def lent(self, windows: Sequence[tuple[int, bool]], extents: Sequence[int]) -> Iterator[list[int]]:
        """Descriptors to send with an order, for as long as that takes: of windows (number, writable), then of extents."""
        copies: list[int] = []
        try:
            descriptors = []
            for window, writable in windows:
                fd = self.window_descriptor(window)
                if not writable:
                    fd = read_only(fd)
                    copies.append(fd)
                descriptors.append(fd)
            yield descriptors + [self.extent_descriptor(base) for base in extents]
        finally:
            close_all(copies)

    def create_extent(self, base: Mfn, frames: int) -> None:
        """See MachineMemory."""
        self._extents[base] = _region(f"domicile-extent-{base:x}", frames)
        self._bases = sorted(self._extents)

    def drop_extent(self, base: Mfn) -> None:
        """See MachineMemory."""
        region = self._extents.pop(base)
        self._bases = sorted(self._extents)
        for mfn in [mfn for mfn in self._placed if base <= mfn < base + region.frames]:
            del self._placed[mfn]
        region.close()

    def create_window(self, window: int, frames: int) -> None:
        """See MachineMemory."""
        self._windows[window] = _region(f"domicile-window-{window}", frames)

    def place(self, mfn: Mfn, window: int, index: int) -> None:
        """See MachineMemory."""
        if not 0 <= index < self._windows[window].frames:
            raise KeyError(f"window {window} has no place {index}")
        self._placed[mfn] = window << _WINDOW_SHIFT | index

    def restore(self, mfn: Mfn) -> None:
        """See MachineMemory."""
        self._placed.pop(mfn, None)

    def drop_window(self, window: int) -> None:
        """See MachineMemory."""
        self._windows.pop(window).close()

    def extent_descriptor(self, base: int) -> int:
        """The memfd of an extent; stays this object's. KeyError if there is none."""
        return self._extents[base].fd

    def window_descriptor(self, window: int) -> int:
        """The memfd of a window; stays this object's."""
        return self._windows[window].fd

    def close(self) -> None:
        """Give everything back."""
        self._placed.clear()
        for region in [*self._extents.values(), *self._windows.values()]:
            region.close()
        self._extents.clear()
        self._windows.clear()
        self._bases = []
