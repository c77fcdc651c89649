"""Machine memory in byte arrays: an implementation of `hypervisor.core.ports.MachineMemory`, and the views that processes have."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Mfn
from domains.hostmem import HostMemory

_ZEROS = bytes(PAGE_SIZE)


class SimMemory:
    """Extents and windows (the methods are documented in MachineMemory)."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._extents: dict[int, memoryview] = {}
        self._views: dict[int, memoryview] = {}
        """Of single frames, made once."""
        self._windows: dict[int, int] = {}
        self._placed: dict[int, tuple[int, int]] = {}
        self.home: set[int] = set()
        """Frames in a window whose owner has them back already: what the hypervisor writes there goes to what is left in the window."""

    def extent(self, base: int) -> memoryview:
        """The bytes of an extent."""
        return self._extents[base]

    def page(self, mfn: int) -> memoryview:
        """The bytes of a frame, as a view that the caller may release. KeyError if there is no such memory."""
        return self._page(mfn)[:]

    def _page(self, mfn: int) -> memoryview:
        view = self._views.get(mfn)
        if view is None:
            index = bisect_right(self._bases, mfn) - 1
            if index < 0:
                raise KeyError(f"no machine memory at mfn {mfn:#x}")
            base = self._bases[index]
            start = (mfn - base) << PAGE_SHIFT
            view = self._extents[base][start : start + PAGE_SIZE]
            if len(view) != PAGE_SIZE:
                raise KeyError(f"no machine memory at mfn {mfn:#x}")
            self._views[mfn] = view
        return view

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        return bytes(self._page(mfn)[offset : offset + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        if mfn not in self.home:
            self._page(mfn)[offset : offset + len(data)] = data

    def copy(self, source: Mfn, source_offset: int, target: Mfn, target_offset: int, length: int) -> None:
        self.write(target, target_offset, self.read(source, source_offset, length))

    def clear(self, mfn: Mfn, count: int = 1) -> None:
        for one in range(mfn, mfn + count):
            self._page(one)[:] = _ZEROS

    def create_extent(self, base: Mfn, frames: int) -> None:
        self._extents[base] = memoryview(bytearray(frames << PAGE_SHIFT))
        self._bases = sorted(self._extents)

    def drop_extent(self, base: Mfn) -> None:
        view = self._extents.pop(base)
        self._bases = sorted(self._extents)
        frames = range(base, base + (len(view) >> PAGE_SHIFT))
        self._views = {mfn: page for mfn, page in self._views.items() if mfn not in frames}
        self._placed = {mfn: place for mfn, place in self._placed.items() if mfn not in frames}

    def create_window(self, window: int, frames: int) -> None:
        self._windows[window] = frames

    def place(self, mfn: Mfn, window: int, index: int) -> None:
        if mfn in self._placed or not 0 <= index < self._windows[window]:
            raise ValueError(f"frame {mfn:#x} is placed twice, or beside its window")
        self._placed[mfn] = (window, index)
        self.home.discard(mfn)

    def restore(self, mfn: Mfn) -> None:
        self._placed.pop(mfn, None)
        self.home.discard(mfn)

    def drop_window(self, window: int) -> None:
        if any(number == window for number, _ in self._placed.values()):
            raise ValueError(f"window {window} is dropped with frames in it")
        self._windows.pop(window)


class SimHostMemory(HostMemory):
    """A process's own machine memory.

    A frame that moves to a window stays where it is in a process's address space (MAP_FIXED), so that views of it go on to be
    right. Here that is so because nothing is moved: owner, mapper and hypervisor look at the same bytes of the extent."""

    def __init__(self, memory: SimMemory, base: Mfn, frames: int) -> None:
        self.base = base
        self.frames = frames
        self.size = frames << PAGE_SHIFT
        self.address = 0
        self.octets = memory.extent(base)
        self._memory = memory
        self._moved: set[Mfn] = set()

    def move_to_window(self, mfn: Mfn, window_fd: int, index: int) -> None:
        self._moved.add(mfn)

    def find_in_window(self, mfn: Mfn, window_fd: int, index: int) -> None:
        self._moved.add(mfn)

    def move_back(self, mfn: Mfn) -> None:
        self._moved.discard(mfn)
        if mfn in self._memory._placed:
            self._memory.home.add(mfn)

    def close(self) -> None:
        """Nothing is held."""


class SimStaging:
    """A device's staging memory. Implements `hypervisor.core.iommu_dma.Staging`."""

    def __init__(self, memory: SimMemory, size: int) -> None:
        self.size = size
        self.view = memoryview(bytearray(size))
        self._memory = memory

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        """See Staging."""
        for page, start, size in self._parts(mfn, offset, length):
            page[start : start + size] = self.view[position : position + size]
            position += size

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        """See Staging."""
        for page, start, size in self._parts(mfn, offset, length):
            self.view[position : position + size] = page[start : start + size]
            position += size

    def _parts(self, mfn: Mfn, offset: int, length: int) -> Iterator[tuple[memoryview, int, int]]:
        """(frame, offset in it, bytes)."""
        while length:
            size = min(length, PAGE_SIZE - offset)
            yield self._memory._page(mfn), offset, size
            mfn, offset, length = Mfn(mfn + 1), 0, length - size
