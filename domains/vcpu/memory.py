"""Guest-physical memory of one Unicorn instance: which host memory is at which address.

Regions are kept here as well as in Unicorn, one to one, so that a part of a region can be replaced, taken
away or protected: Unicorn's own splitting is not used (it may copy the memory it was given, which would end
the sharing).
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

from unicorn import UC_ERR_OK, UC_PROT_EXEC, UC_PROT_READ, UC_PROT_WRITE

from bus.addresses import PAGE_MASK
from domains.vcpu.api import VcpuError
from domains.vcpu.insides import error_text, library

MAX_REGIONS: Final = 16384
"""A cap: every region slows each TLB miss of Unicorn a little."""


class Region(NamedTuple):
    """Host memory `host` .. at guest-physical `start` .. `end` (exclusive); `host` 0: a device region."""

    start: int
    end: int
    host: int
    writable: bool


class PhysicalMap:
    """Maps, unmaps and protects; all on the vCPU's thread, between runs or inside hooks."""

    def __init__(self, uc: int, cpu: int) -> None:
        lib = library()
        u64, size = ctypes.c_uint64, ctypes.c_size_t
        self._uc: Final = uc
        self._cpu: Final = cpu
        self._map = lib.held("uc_mem_map_ptr", ctypes.c_int, ctypes.c_void_p, u64, size, ctypes.c_uint32, u64)
        self._unmap = lib.held("uc_mem_unmap", ctypes.c_int, ctypes.c_void_p, u64, size)
        self._ram_address = lib.held("qemu_ram_addr_from_host_x86_64", u64, ctypes.c_void_p, u64)
        self._invalidate = lib.held("tb_invalidate_phys_range_x86_64", None, ctypes.c_void_p, u64, u64)
        self.undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext
        """Around calls that may change the CPU's state of exceptions: see `_carve`."""
        self.map_device: Callable[[Region], int] | None = None
        """Makes a device region in Unicorn and returns its error number (HVM)."""
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def regions(self) -> tuple[Region, ...]:
        """All regions, by address."""
        return tuple(self._regions)

    def map(self, address: int, host: int, size: int, *, writable: bool) -> None:
        """Put host memory at [address, address + size); replaces what was there. VcpuError if Unicorn
        refuses."""
        _check(address, size)
        if host & PAGE_MASK or not host:
            raise VcpuError(f"host address {host:#x} is not that of a page")
        self._carve(address, address + size)
        self._add(Region(address, address + size, host, writable))

    def map_mmio(self, address: int, size: int) -> None:
        """Make [address, address + size) a device region; replaces what was there."""
        _check(address, size)
        self._carve(address, address + size)
        self._add(Region(address, address + size, 0, True))

    def unmap(self, address: int, size: int) -> None:
        """Take [address, address + size) away; parts with nothing mapped are ignored."""
        _check(address, size)
        self._carve(address, address + size)

    def protect(self, address: int, size: int, *, writable: bool) -> None:
        """Change the permission of mapped memory; VcpuError if a part is not mapped."""
        _check(address, size)
        pieces = self._pieces(address, address + size)
        if sum(piece.end - piece.start for piece in pieces) != size:
            raise VcpuError(f"[{address:#x}, {address + size:#x}) is not mapped throughout")
        for piece in pieces:
            if piece.host and piece.writable != writable:
                self._carve(piece.start, piece.end)
                self._add(piece._replace(writable=writable))

    def drop_code(self, address: int, size: int) -> None:
        """Forget translations of the code in [address, address + size). Safe inside hooks."""
        for piece in self._pieces(address, address + size):
            if not piece.host:
                continue
            first = self._ram_address(self._uc, piece.host)
            if first == M64:
                raise VcpuError(f"Unicorn does not know its own memory at {piece.start:#x}")
            self._invalidate(self._uc, first, first + piece.end - piece.start)

    def host_address(self, address: int, size: int = 1, *, writable: bool = False) -> int | None:
        """Host address of guest-physical memory, or None if [address, address + size) is not in one
        region, or not in one that may be written if that is asked for."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        region = self._regions[index]
        if address + size > region.end or not region.host or (writable and not region.writable):
            return None
        return region.host + address - region.start

    def _pieces(self, start: int, end: int) -> list[Region]:
        """The regions' parts inside [start, end)."""
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        found = []
        while index < len(self._regions) and self._regions[index].start < end:
            region = self._regions[index]
            low, high = max(region.start, start), min(region.end, end)
            if low < high:
                host = region.host + low - region.start if region.host else 0
                found.append(Region(low, high, host, region.writable))
            index += 1
        return found

    def _carve(self, start: int, end: int) -> None:
        """Make [start, end) empty; what sticks out of it stays."""
        self.drop_code(start, end - start)
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        keep: list[Region] = []
        while index < len(self._regions) and self._regions[index].start < end:
            region = self._regions[index]
            if region.end <= start:
                index += 1
                continue
            # Unicorn drops translations by walking the guest's tables from the region's *physical* address: the page fault
            # that it gets and ignores would stay behind, and make the guest's next one a double fault.
            with self.undisturbed():
                _ok(self._unmap(self._uc, region.start, region.end - region.start), "unmap", region)
            del self._regions[index], self._starts[index]
            if region.start < start:
                keep.append(Region(region.start, start, region.host, region.writable))
            if region.end > end:
                host = region.host + end - region.start if region.host else 0
                keep.append(Region(end, region.end, host, region.writable))
        for region in keep:
            self._add(region)

    def _add(self, region: Region) -> None:
        if len(self._regions) >= MAX_REGIONS:
            raise VcpuError(f"more than {MAX_REGIONS} regions of physical memory")
        rights = UC_PROT_READ | UC_PROT_EXEC | (UC_PROT_WRITE if region.writable else 0)
        size = region.end - region.start
        if region.host:
            _ok(self._map(self._uc, region.start, size, rights, region.host), "map", region)
        elif self.map_device is not None:
            _ok(self.map_device(region), "map of a device region", region)
        else:
            raise VcpuError("this vCPU has no device regions")
        index = bisect.bisect_left(self._starts, region.start)
        self._starts.insert(index, region.start)
        self._regions.insert(index, region)


M64: Final = (1 << 64) - 1


def _check(address: int, size: int) -> None:
    if address & PAGE_MASK or size & PAGE_MASK or size <= 0 or address < 0 or address + size > 1 << 52:
        raise VcpuError(f"[{address:#x}, +{size:#x}) is not a range of whole physical pages")


def _ok(error: int, what: str, region: Region) -> None:
    if error != UC_ERR_OK:
        raise VcpuError(f"{what} of [{region.start:#x}, {region.end:#x}): {error_text(error)}")
