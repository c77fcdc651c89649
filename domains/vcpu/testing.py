"""A small PV guest for tests and benchmarks of `domains.vcpu`: memory, page tables, recorded traps.

Guest-physical memory starts at `BASE`; guest-virtual addresses 0 .. size map to it linearly by 4 KiB pages,
so that virtual, guest-physical and host addresses all differ. Code is given as bytes.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final

from bus.addresses import MachineAddr
from domains.vcpu.api import PvTraps, StopReason, Trap
from domains.vcpu.unicorn_vcpu import UnicornVcpu

BASE: Final = 0x4000_0000
TABLES: Final = 0x1000
"""Offset of the page tables: PML4, PDPT, PD at +0, +0x1000, +0x2000, then page tables."""
CODE: Final = 0x10000
STACK: Final = 0x20000
"""Initial RIP and RSP."""
PRESENT_USER_RW: Final = 7


class Recorder(PvTraps):
    """Traps that stop the guest and are kept in `seen`, unless a handler is set."""

    vcpu: UnicornVcpu

    def __init__(self) -> None:
        self.seen: list[tuple[str, object, int]] = []
        self.syscall: Callable[[], None] | None = None
        self.trap: Callable[[Trap], None] | None = None
        self.port_in: Callable[[int, int], int] | None = None
        self.port_out: Callable[[int, int, int], None] | None = None
        self.cpuid: Callable[[int, int], tuple[int, int, int, int]] | None = None

    def _record(self, kind: str, what: object) -> None:
        self.seen.append((kind, what, self.vcpu.regs.rip))
        self.vcpu.request_stop()

    def on_syscall(self) -> None:
        """Handler, or record."""
        if self.syscall is not None:
            self.syscall()
        else:
            self._record("syscall", None)

    def on_sysenter(self) -> None:
        """Record."""
        self._record("sysenter", None)

    def on_trap(self, trap: Trap) -> None:
        """Handler, or record."""
        if self.trap is not None:
            self.trap(trap)
        else:
            self._record("trap", trap)

    def on_invalid_opcode(self) -> None:
        """Record."""
        self._record("invalid", None)

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """Handler, or the arguments back."""
        return self.cpuid(leaf, subleaf) if self.cpuid is not None else (leaf, subleaf, 0, 0)

    def on_port_in(self, port: int, size: int) -> int:
        """Handler, or record and all ones."""
        if self.port_in is not None:
            return self.port_in(port, size)
        self._record("in", (port, size))
        return 0xFFFFFFFF

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """Handler, or record."""
        if self.port_out is not None:
            self.port_out(port, size, value)
        else:
            self._record("out", (port, size, value))

    def on_rdtsc(self) -> int:
        """A constant."""
        return 0x1122334455667788


class PvGuest:
    """A vCPU with `size` bytes of memory and a linear map of it; code at `CODE`, stack below `STACK`."""

    def __init__(self, code: bytes = b"", size: int = 1 << 20, traps: Recorder | None = None) -> None:
        self.traps: Final = traps if traps is not None else Recorder()
        self.vcpu: Final = UnicornVcpu(self.traps)
        self.traps.vcpu = self.vcpu
        self.memory: Final = mmap.mmap(-1, size)
        self.host: Final = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.words: Final = memoryview(self.memory).cast("Q")
        self.vcpu.map(MachineAddr(BASE), self.host, size)
        for level in range(2):
            self.words[TABLES // 8 + 512 * level] = BASE + TABLES + 0x1000 * (level + 1) | PRESENT_USER_RW
        pages = size >> 12
        for number in range((pages + 511) // 512):
            self.words[TABLES // 8 + 1024 + number] = (
                BASE + TABLES + 0x3000 + 0x1000 * number | PRESENT_USER_RW
            )
        for page in range(pages):
            self.set_entry(page << 12, BASE + (page << 12) | PRESENT_USER_RW)
        self.restart()
        self.write(CODE, code)

    def restart(self, rip: int = CODE) -> None:
        """RIP, RSP and CR3 as at first."""
        regs = self.vcpu.regs
        regs.cr3 = BASE + TABLES
        self.vcpu.flush_tlb()
        regs.rip, regs.rsp = rip, STACK

    def set_entry(self, address: int, entry: int) -> None:
        """Write the page-table entry of a guest-virtual address. The TLB is not flushed."""
        self.words[(TABLES + 0x3000) // 8 + (address >> 12)] = entry

    def write(self, address: int, data: bytes) -> None:
        """Write memory behind the guest's back."""
        self.memory[address : address + len(data)] = data

    def run(self, blocks: int = 1_000_000) -> StopReason:
        """Run; a guest that does nothing wrong ends by a recorded trap."""
        return self.vcpu.run(blocks)


__all__ = ["BASE", "CODE", "PRESENT_USER_RW", "STACK", "TABLES", "PvGuest", "Recorder"]
