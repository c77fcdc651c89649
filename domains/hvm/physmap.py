"""The guest-physical address space of an HVM domain in its own process: which machine frame, or granted page, is at each guest
frame, and the vCPU's memory map that follows from it.

The hypervisor's `memory` orders say what is where (`hypervisor.core.p2m`). Where nothing is, reads give ones and writes are
dropped, as for a guest of Xen without a device model: a page of nothing becomes a device page of the vCPU when it is first
touched (a device region over the whole address space would cost seconds whenever memory is put into it).
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

from bus.addresses import PAGE_SHIFT, PAGE_SIZE, Gfn, MachineAddr, Mfn

APIC_GFN: Final = 0xFEE00
"""The local APIC's page: always a device page."""
P2M_NOTHING: Final = 0
P2M_RAM: Final = 1
P2M_GRANTS: Final = (2, 3)
"""Types in the body of a `memory` order (hypervisor.core.p2m.P2mType)."""
ADDRESS_BITS: Final = 40
"""Guest-physical address bits that the vCPU serves, and that CPUID shows."""
GFN_END: Final = 1 << ADDRESS_BITS - PAGE_SHIFT
CHUNK: Final = 512
MAX_TOUCHED: Final = 1024
"""Pages of nothing that are device pages at a time; with one more all are forgotten."""


class Mapper(Protocol):
    """What is asked of the vCPU (`domains.vcpu.hvm_vcpu.UnicornHvmVcpu`)."""

    def map(self, address: MachineAddr, host_address: int, size: int, *, writable: bool = True) -> None:
        """Host memory at a guest-physical address."""

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """Accesses go to hooks."""

    def unmap(self, address: MachineAddr, size: int) -> None:
        """Nothing is there any more."""

    def drop_code(self, address: MachineAddr, size: int) -> None:
        """Translated code of these bytes is stale."""


class PhysicalMap:
    """gfn -> own machine frame, and back."""

    def __init__(self, base: Mfn, frames: int, host_address: int) -> None:
        """The domain's own frames are [base, base + frames), contiguous at `host_address` in this process."""
        self.base: Final = base
        self.frames: Final = frames
        self.host: Final = host_address
        self._chunks: dict[int, array[int]] = {}
        self._gfns = array("q", [-1]) * frames
        self._vcpu: Mapper | None = None
        self._granted: dict[int, tuple[int, bool]] = {}
        self._touched: set[int] = set()
        self._device_memory: dict[range, int] = {}
        """Guest frames -> host address."""

    def attach(self, vcpu: Mapper) -> None:
        """Build the vCPU's memory map from all that is known; it is kept up to date from now on."""
        self._vcpu = vcpu
        for gfn, mfn, count in self.runs():
            self._map(gfn, mfn, count)
        vcpu.map_mmio(MachineAddr(APIC_GFN << PAGE_SHIFT), PAGE_SIZE)

    def touch(self, gfn: int) -> bool:
        """The vCPU reached for a frame where it has nothing: make it a device page. False if that is not the cause."""
        if (
            gfn >= GFN_END
            or gfn == APIC_GFN
            or gfn in self._touched
            or gfn in self._granted
            or self.mfn(gfn) is not None
            or any(gfn in run for run in self._device_memory)
        ):
            return False
        assert self._vcpu is not None
        if len(self._touched) >= MAX_TOUCHED:
            for other in self._touched:
                self._vcpu.unmap(MachineAddr(other << PAGE_SHIFT), PAGE_SIZE)
            self._touched.clear()
        self._touched.add(gfn)
        self._vcpu.map_mmio(MachineAddr(gfn << PAGE_SHIFT), PAGE_SIZE)
        return True

    def runs(self) -> list[tuple[int, int, int]]:
        """(gfn, mfn, count) of all own frames that are mapped, ascending, as long as they can be."""
        out: list[tuple[int, int, int]] = []
        for number in sorted(self._chunks):
            for index, mfn in enumerate(self._chunks[number]):
                if mfn < 0:
                    continue
                gfn = number * CHUNK + index
                if out and out[-1][0] + out[-1][2] == gfn and out[-1][1] + out[-1][2] == mfn:
                    out[-1] = (out[-1][0], out[-1][1], out[-1][2] + 1)
                else:
                    out.append((gfn, mfn, 1))
        return out

    # --- news

    def changed(self, gfn: int, mfn: int, count: int, kind: int) -> None:
        """One run of a `memory` order. What lies beyond the guest's address bits cannot be reached and is left out."""
        count = min(count, GFN_END - gfn)
        if count <= 0 or kind in P2M_GRANTS:
            return  # a granted page is mapped when it is attached
        if kind == P2M_RAM and self.base <= mfn and mfn + count <= self.base + self.frames:
            self._forget(gfn, count)
            self._set(gfn, mfn, count)
            if self._vcpu is not None:
                self._map(gfn, mfn, count)
        elif kind == P2M_NOTHING:
            self._forget(gfn, count)
            if self._vcpu is not None:
                self._vcpu.unmap(MachineAddr(gfn << PAGE_SHIFT), count << PAGE_SHIFT)

    def map_granted(self, gfn: int, host_address: int, *, writable: bool) -> None:
        """Put a page that another domain granted at `gfn`."""
        if gfn >= GFN_END:
            return
        self._forget(gfn, 1)
        self._granted[gfn] = (host_address, writable)
        if self._vcpu is not None:
            self._vcpu.map(MachineAddr(gfn << PAGE_SHIFT), host_address, PAGE_SIZE, writable=writable)

    def unmap_granted(self, gfn: int) -> None:
        """Take it away."""
        if self._granted.pop(gfn, None) is not None and self._vcpu is not None:
            self._vcpu.unmap(MachineAddr(gfn << PAGE_SHIFT), PAGE_SIZE)

    def map_device_memory(self, gfn: int, host_address: int, count: int) -> bool:
        """Memory of a device (a frame buffer) where the guest has none of its own. False where it has, or beyond its reach."""
        if gfn + count > GFN_END or gfn <= APIC_GFN < gfn + count:
            return False
        if any(self.mfn(g) is not None or g in self._granted for g in range(gfn, gfn + count)):
            return False
        for run in [r for r in self._device_memory if r.start < gfn + count and gfn < r.stop]:
            self.unmap_device_memory(
                run.start, len(run)
            )  # wholly: what stuck out of the new one would be nobody's to unmap
        self._forget(gfn, count)
        if self._vcpu is not None:
            self._vcpu.map(MachineAddr(gfn << PAGE_SHIFT), host_address, count << PAGE_SHIFT)
        self._device_memory[range(gfn, gfn + count)] = host_address
        return True

    def unmap_device_memory(self, gfn: int, count: int) -> bool:
        """It goes. False if nothing of the kind is there."""
        if self._device_memory.pop(range(gfn, gfn + count), None) is None:
            return False
        if self._vcpu is not None:
            self._vcpu.unmap(MachineAddr(gfn << PAGE_SHIFT), count << PAGE_SHIFT)
            for each in range(gfn, gfn + count):  # what the guest got there meanwhile is its own
                mfn, granted = self.mfn(each), self._granted.get(each)
                if mfn is not None:
                    self._map(each, mfn, 1)
                elif granted is not None:
                    address, writable = granted
                    self._vcpu.map(MachineAddr(each << PAGE_SHIFT), address, PAGE_SIZE, writable=writable)
        return True

    def forget_device_memory(self, host_address: int, size: int) -> None:
        """Before [host_address, host_address + size) of this process is unmapped: no guest frame leads there any more."""
        for run, host in list(self._device_memory.items()):
            if host_address <= host < host_address + size:
                self.unmap_device_memory(run.start, len(run))

    def _map(self, gfn: int, mfn: int, count: int) -> None:
        assert self._vcpu is not None
        host = self.host + (mfn - self.base << PAGE_SHIFT)
        self._vcpu.map(MachineAddr(gfn << PAGE_SHIFT), host, count << PAGE_SHIFT)

    def _set(self, gfn: int, mfn: int, count: int) -> None:
        for step in range(count):
            number, index = divmod(gfn + step, CHUNK)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = array("q", [-1]) * CHUNK
            chunk[index] = mfn + step
            self._gfns[mfn + step - self.base] = gfn + step

    def _forget(self, gfn: int, count: int) -> None:
        if self._touched:
            self._touched.difference_update(range(gfn, gfn + count))
        for step in range(count):
            self._granted.pop(gfn + step, None)
            number, index = divmod(gfn + step, CHUNK)
            chunk = self._chunks.get(number)
            if chunk is not None and chunk[index] >= 0:
                at = chunk[index] - self.base
                if self._gfns[at] == gfn + step:
                    self._gfns[at] = -1
                chunk[index] = -1

    # --- questions

    def mfn(self, gfn: int) -> Mfn | None:
        """The own frame at a guest frame number; None: nothing, or another domain's."""
        chunk = self._chunks.get(gfn // CHUNK)
        found = -1 if chunk is None else chunk[gfn % CHUNK]
        return Mfn(found) if found >= 0 else None

    def gfn(self, mfn: int) -> Gfn | None:
        """Where an own frame is mapped."""
        index = mfn - self.base
        if not 0 <= index < self.frames or self._gfns[index] < 0:
            return None
        return Gfn(self._gfns[index])

    def drop_code(self, mfn: int) -> None:
        """Somebody else wrote to an own frame."""
        gfn = self.gfn(mfn)
        if gfn is not None and self._vcpu is not None:
            self._vcpu.drop_code(MachineAddr(gfn << PAGE_SHIFT), PAGE_SIZE)
