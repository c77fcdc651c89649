"""`HvmGuest` with shadow page tables: its memory is at machine addresses for the vCPU."""

from __future__ import annotations

import ctypes
import mmap

from bus.addresses import MachineAddr, Mfn
from domains.hvm.physmap import P2M_RAM, PhysicalMap
from domains.hvm.shadow import POOL, WINDOW, Shadow
from domains.vcpu.hvm_testing import MMIO, MMIO_SIZE, RESET, SIZE, HvmGuest
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.shadow_mmu import ShadowMmu
from domains.vcpu.shadow_vcpu import ShadowHvmVcpu

BASE = Mfn(0x12345)
PAGES = SIZE >> 12


class ShadowGuest(HvmGuest):
    """See the module. The memory below the reset vector is a page of its own, filled when the guest runs first."""

    pool_pages = 256

    def _machine(self) -> UnicornHvmVcpu:
        size = SIZE
        octets = memoryview((ctypes.c_ubyte * size).from_address(self.host)).cast("B")
        physmap = PhysicalMap(BASE, PAGES, self.host)
        mmu = ShadowMmu(self.pool_pages)
        self.shadow = Shadow(physmap, octets, memoryview(mmu.pool))
        vcpu = ShadowHvmVcpu(self.exits, self.shadow, mmu, POOL, WINDOW)
        self.shadow.attach(vcpu, vcpu.regs)
        physmap.changed(0, BASE, PAGES, P2M_RAM)
        physmap.attach(self.shadow)
        self.physmap = physmap
        self.upper = mmap.mmap(-1, SIZE // 2)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self.upper))
        self.shadow.map(MachineAddr(RESET), host, SIZE // 2)
        self.shadow.map_mmio(MachineAddr(MMIO), MMIO_SIZE)
        return vcpu

    def drop_code(self, address: int, size: int) -> None:
        """See HvmGuest."""
        self.upper[:] = self.memory[SIZE // 2 :]
        self.shadow.drop_code(address, size)
