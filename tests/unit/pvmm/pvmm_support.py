"""A small PV guest without a CPU: its frames, Xen's map, page tables as a domain builder makes them, a fake host."""

from __future__ import annotations

import mmap
import struct

from bus.abi import xen
from bus.addresses import DomId, Mfn, VcpuId
from domains.pv.frames import DomainFrames
from domains.pv.mm import Mmu
from domains.pv.xenmap import XenMap

BASE = 0x1234
MAX_MFN = 0x40000
KERNEL = 0xFFFF_8800_0000_0000
P, RW, US, AC, DI = 1, 2, 4, 0x20, 0x40
KERNEL_RO = P | AC | DI
KERNEL_RW = KERNEL_RO | RW
TABLE = P | RW | US | AC | DI


class FakeHost:
    """Counts what the MMU asks of the CPU side."""

    def __init__(self) -> None:
        self.kernel = Mfn(0)
        self.user: Mfn | None = None
        self.flushes = 0
        self.loads = 0
        self.vcpu = VcpuId(0)
        self.dropped: list[int] = []
        self.tables_changed: list[int] = []

    def flush_tlb(self) -> None:
        self.flushes += 1

    def drop_code(self, mfn: Mfn) -> None:
        self.dropped.append(mfn)

    def load_cr3(self, kernel: Mfn, user: Mfn | None) -> None:
        self.kernel, self.user = kernel, user
        self.loads += 1

    def current_roots(self) -> tuple[Mfn, Mfn | None]:
        return self.kernel, self.user

    def is_kernel_mode(self) -> bool:
        return True

    def current_vcpu(self) -> VcpuId:
        return self.vcpu

    def descriptor_tables_changed(self, vcpu: VcpuId) -> None:
        self.tables_changed.append(vcpu)


class Registers:
    """`domains.vcpu.api.Registers` as plain attributes."""

    _NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")

    def __init__(self) -> None:
        self.rax = self.rcx = self.rdx = self.rbx = self.rsp = self.rbp = self.rsi = self.rdi = 0
        self.r8 = self.r9 = self.r10 = self.r11 = self.r12 = self.r13 = self.r14 = self.r15 = 0
        self.rip = 0
        self.rflags = 0x202
        self.cr0 = self.cr2 = self.cr3 = self.cr4 = self.efer = 0
        self.fs_base = self.gs_base = self.kernel_gs_base = 0
        self.gdtr_base = self.gdtr_limit = self.ldtr_base = self.ldtr_limit = 0
        self.cs = self.ss = self.ds = self.es = self.fs = self.gs = 0

    def gpr(self, index: int) -> int:
        value: int = getattr(self, self._NAMES[index] if index < 8 else f"r{index}")
        return value

    def set_gpr(self, index: int, value: int) -> None:
        setattr(self, self._NAMES[index] if index < 8 else f"r{index}", value)


class Guest:
    """`ram` frames, of which the first four are the initial L4, L3, L2 and L1 tables; the L1 maps up to 512 frames
    from KERNEL on, tables read-only. Two Xen-heap frames at the end (the first one shared)."""

    def __init__(self, ram: int = 64, *, adopt: bool = True, hardware: bool = False, vcpus: int = 2) -> None:
        self.memory = mmap.mmap(-1, (ram + 2) << 12)
        populated = range(BASE, BASE + ram)
        self.frames = DomainFrames(
            memoryview(self.memory), BASE, ram, populated=populated, shared=[BASE + ram]
        )
        self.xenmap = XenMap(BASE, ram + 2, MAX_MFN, vcpus)
        self.host = FakeHost()
        self.ram = ram
        self.words = self.frames.words
        self.l4, self.l3, self.l2, self.l1 = BASE, BASE + 1, BASE + 2, BASE + 3
        self.store(self.l4, KERNEL >> 39 & 511, self.l3 << 12 | TABLE)
        self.store(self.l3, KERNEL >> 30 & 511, self.l2 << 12 | TABLE)
        self.store(self.l2, KERNEL >> 21 & 511, self.l1 << 12 | TABLE)
        for pfn in range(min(ram, 512)):
            self.store(self.l1, pfn, BASE + pfn << 12 | (KERNEL_RO if pfn < 4 else KERNEL_RW))
        self.mmu = Mmu(self.frames, self.xenmap, self.host, DomId(5), hardware=hardware)
        self.scratch = KERNEL + (4 << 12)
        if adopt:
            assert self.mmu.adopt_initial_tables(self.l4) == 0
            self.host.kernel = Mfn(self.l4)
            self.clean()

    def store(self, mfn: int, slot: int, value: int) -> None:
        """Write a word of a frame directly, as only a builder can."""
        self.words[(mfn - BASE << 9) + slot] = value

    def load(self, mfn: int, slot: int) -> int:
        value: int = self.words[(mfn - BASE << 9) + slot]
        return value

    def va(self, mfn: int) -> int:
        """Kernel address of a frame."""
        return KERNEL + (mfn - BASE << 12)

    def pte(self, mfn: int) -> int:
        """Machine address of the L1 entry that maps a frame at its kernel address."""
        return self.l1 << 12 | (mfn - BASE) << 3

    def update(self, *pairs: tuple[int, int], domid: int = xen.DOMID_SELF) -> int:
        """mmu_update through guest memory."""
        raw = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
        self.mmu.write_virtual(self.scratch, raw)
        rc = self.mmu.mmu_update(self.scratch, len(pairs), 0, domid)
        assert isinstance(rc, int)
        return rc

    def ext(self, command: int, arg1: int = 0, arg2: int = 0, domid: int = xen.DOMID_SELF) -> int:
        """One mmuext_op through guest memory."""
        self.mmu.write_virtual(self.scratch, struct.pack("<QQQ", command, arg1, arg2))
        rc = self.mmu.mmuext_op(self.scratch, 1, 0, domid)
        assert isinstance(rc, int)
        return rc

    def read_only(self, mfn: int) -> int:
        """Make the kernel mapping of a frame read-only (as Linux does before it pins)."""
        return self.update((self.pte(mfn), mfn << 12 | KERNEL_RO))

    def writable(self, mfn: int) -> int:
        """Make the kernel mapping of a frame writable."""
        return self.update((self.pte(mfn), mfn << 12 | KERNEL_RW))

    def clean(self) -> None:
        """The invariants hold."""
        assert self.mmu.check_invariants() == []
