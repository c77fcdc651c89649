"""Linear addresses of an HVM guest: the page walk of its mode, and memory through it.

Modes: no paging (identity), 32-bit (with 4 MiB pages if CR4.PSE), PAE, and 4-level (Intel SDM volume 3, 4.3
to 4.5). Translations are not cached, and accessed and dirty bits are left alone.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final, NamedTuple, Protocol

from domains.vcpu.insides import library
from domains.vcpu.state import EnvRegisters

PG, PSE, PAE, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 10
PRESENT, WRITABLE, USER, LARGE, NX = 1, 2, 4, 1 << 7, 1 << 63
ADDRESS: Final = 0x000F_FFFF_FFFF_F000
PAGE: Final = 4096


class NotMapped(Exception):
    """A linear or physical address that leads to no memory. `error_code` is that of the #PF a read would
    get."""

    def __init__(self, address: int, error_code: int = 0) -> None:
        super().__init__(f"no memory at {address:#x}")
        self.address = address
        self.error_code = error_code


class Translation(NamedTuple):
    """Where a linear address leads."""

    physical: int
    page_size: int
    writable: bool
    user: bool
    executable: bool
    """The rights that all levels of the tables give together."""


class Space(Protocol):
    """Guest-physical memory: `domains.vcpu.memory.PhysicalMap`, or what a domain with shadow paging has."""

    def host_address(self, address: int, size: int = 1, *, writable: bool = False) -> int | None:
        """Where it is in this process; None: nowhere, or not in one piece, or not to be written."""

    def drop_code(self, address: int, size: int) -> None:
        """It was written: translations of code there are stale."""


class GuestMemory:
    """Physical and linear memory of a guest. NotMapped where there is none."""

    def __init__(self, memory: Space, registers: EnvRegisters, cpu: int) -> None:
        # QEMU's own walk for debuggers: all modes, no rights, no faults, no accessed bits; u32 attributes
        # come back.
        self._page: Final = library().held(
            "x86_cpu_get_phys_page_attrs_debug_x86_64",
            ctypes.c_int64,
            *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p),
        )
        self._cpu: Final = cpu
        self._attributes: Final = (ctypes.c_uint32 * 4)()
        self._attributes_at: Final = ctypes.addressof(self._attributes)
        self.space: Final = memory
        self._regs: Final = registers

    def read_physical(self, address: int, size: int) -> bytes:
        """Guest-physical memory; may cross regions. MMIO regions count as not mapped."""
        parts: list[bytes] = []
        while size:
            step = min(size, PAGE - address % PAGE)
            host = self.space.host_address(address, step)
            if host is None:
                raise NotMapped(address)
            parts.append(ctypes.string_at(host, step))
            address, size = address + step, size - step
        return b"".join(parts)

    def write_physical(self, address: int, data: bytes) -> None:
        """Write guest-physical memory and drop translations of it. Nothing is written if a part is
        missing, or must not be written."""
        pieces = []
        at = 0
        while at < len(data):
            step = min(len(data) - at, PAGE - (address + at) % PAGE)
            host = self.space.host_address(address + at, step, writable=True)
            if host is None:
                raise NotMapped(address + at)
            pieces.append((host, at, step))
            at += step
        for host, at, step in pieces:
            ctypes.memmove(host, data[at : at + step], step)
        if data:
            self.space.drop_code(address, len(data))

    def translate(self, linear: int) -> Translation:
        """The page walk for one linear address, in the mode and with the tables of now."""
        regs = self._regs
        cr0, cr4 = regs.cr0, regs.cr4
        if not cr0 & PG:
            return Translation(linear & 0xFFFFFFFF, PAGE, True, True, True)
        if not cr4 & PAE:
            return self._walk(linear & 0xFFFFFFFF, regs.cr3 & 0xFFFFF000, (22, 12), 4, bool(cr4 & PSE))
        if not regs.efer & LMA:
            linear &= 0xFFFFFFFF
            entry = self._entry((regs.cr3 & 0xFFFFFFE0) + (linear >> 30) * 8, 8)
            if not entry & PRESENT:
                raise NotMapped(linear)
            return self._walk(linear, entry & ADDRESS, (21, 12), 8, True)
        if linear >> 47 not in (0, 0x1FFFF):
            raise NotMapped(linear)
        return self._walk(linear, regs.cr3 & ADDRESS, (39, 30, 21, 12), 8, True)

    def _walk(self, linear: int, table: int, shifts: tuple[int, ...], width: int, large: bool) -> Translation:
        rights, executable = WRITABLE | USER, True
        bits = 10 if width == 4 else 9
        for shift in shifts:
            entry = self._entry(table + (linear >> shift & (1 << bits) - 1) * width, width)
            if not entry & PRESENT:
                raise NotMapped(linear)
            rights &= entry
            executable &= not entry & NX
            base = entry & ADDRESS
            if shift == 12 or (large and entry & LARGE and shift < 39):
                size = 1 << shift
                if width == 4 and shift == 22:
                    base = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32  # PSE-36
                physical = base & ~(size - 1) | linear & (size - 1)
                return Translation(physical, size, bool(rights & WRITABLE), bool(rights & USER), executable)
            table = base
        raise AssertionError("a walk ends at its last level")

    def physical(self, linear: int) -> int:
        """Where a linear address leads, whatever the rights. NotMapped if nowhere, or not canonical."""
        if linear >> 47 not in (0, 0x1FFFF):
            raise NotMapped(linear)
        page: int = self._page(self._cpu, linear & ~(PAGE - 1), self._attributes_at)
        if page < 0:
            raise NotMapped(linear)
        return page | linear & (PAGE - 1)

    def _entry(self, address: int, width: int) -> int:
        data = self.read_physical(address, width)
        value: int = struct.unpack("<I" if width == 4 else "<Q", data)[0]
        return value

    def read(self, linear: int, size: int) -> bytes:
        """Linear memory, page by page, without a check of rights."""
        out = b""
        while size:
            step = min(size, PAGE - linear % PAGE)
            out += self.read_physical(self.physical(linear), step)
            linear, size = linear + step, size - step
        return out

    def write(self, linear: int, data: bytes) -> None:
        """Write linear memory without a check of rights. Nothing is written if a part is not mapped."""
        pieces = []
        at = 0
        while at < len(data):
            step = min(len(data) - at, PAGE - (linear + at) % PAGE)
            pieces.append((self.physical(linear + at), at, step))
            at += step
        for physical, _, step in pieces:
            self.read_physical(physical, step)
        for physical, at, step in pieces:
            self.write_physical(physical, data[at : at + step])
