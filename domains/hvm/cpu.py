"""The processor that the vCPUs of an HVM domain take turns on, for the hypercall handlers that PV and HVM share
(`domains.pv.calls_*`): the current vCPU, its registers, and guest memory by linear address.
"""

from __future__ import annotations

from typing import Any, Final, cast

from bus.addresses import PAGE_SHIFT, Mfn
from domains.hvm.physmap import PhysicalMap
from domains.hvm.state import HvmState
from domains.pv.api import GuestFault, PagingApi
from domains.pv.cpu import Cpu
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.walk import NotMapped

XLAT: Final = 1 << 62
"""Address of the translation area, which no guest can name: it is not canonical, and 32-bit code has no such numbers. A 32-bit hypercall's
structure is put there in its 64-bit layout for the handler, with arrays behind it, and read back."""
XLAT_END: Final = XLAT + (1 << 25)
MAX_COPY: Final = 1 << 24


class LinearMemory:
    """What the shared handlers use of `PagingApi`: copies by linear address, and holds on frames, which an HVM guest names by
    guest frame number."""

    def __init__(self, physmap: PhysicalMap) -> None:
        self._physmap: Final = physmap
        self.vcpu: UnicornHvmVcpu | None = None
        self.xlat = bytearray()

    def read_virtual(self, va: int, length: int, *, user: bool = False) -> bytes:
        """Copy from guest memory. GuestFault."""
        if self.xlat and XLAT <= va < XLAT_END:
            return bytes(self.xlat[va - XLAT : va - XLAT + length])
        assert self.vcpu is not None
        if not 0 <= length <= MAX_COPY:
            raise GuestFault(va)
        try:
            return self.vcpu.memory.read(va, length)
        except NotMapped as error:
            raise GuestFault(error.address) from None

    def write_virtual(self, va: int, data: bytes | bytearray | memoryview, *, user: bool = False) -> None:
        """Copy to guest memory. GuestFault."""
        if self.xlat and XLAT <= va < XLAT_END:
            self.xlat[va - XLAT : va - XLAT + len(data)] = data
            return
        assert self.vcpu is not None
        try:
            self.vcpu.memory.write(va, bytes(data))
        except NotMapped as error:
            raise GuestFault(error.address, write=True) from None

    def hold_for_grant(self, mfn: int, writable: bool) -> int:
        """There are no page types here: any own frame may be written by Xen for the guest."""
        return 0 if self._physmap.gfn(mfn) is not None else -1

    def release_from_grant(self, mfn: int, writable: bool) -> None:
        """Nothing is held."""


class HvmCpu(Cpu):
    """`Cpu` without the PV parts. Guest memory is reached through `mmu`, which here is `LinearMemory`."""

    __slots__ = ("hvm", "linear", "physmap")

    hvm: UnicornHvmVcpu

    def __init__(
        self, base: Mfn, octets: memoryview, words: memoryview, first: HvmState, physmap: PhysicalMap
    ) -> None:
        super().__init__(base, octets, words, first)
        self.physmap: Final = physmap
        self.linear: Final = LinearMemory(physmap)
        # The shared handlers use only what LinearMemory has; the rest of PagingApi is PV's.
        self.mmu = cast(PagingApi, self.linear)

    def attach(self, vcpu: Any) -> None:
        """The vCPU object."""
        super().attach(vcpu)
        self.hvm = vcpu
        self.linear.vcpu = vcpu

    def drop_code(self, mfn: Mfn) -> None:
        """Translated code of an own frame is stale."""
        self.physmap.drop_code(mfn)

    def place(self, gfn: int) -> int | None:
        """Byte index in `octets` of the own frame at `gfn`."""
        mfn = self.physmap.mfn(gfn)
        return None if mfn is None else mfn - self.base << PAGE_SHIFT

    def write_physical(self, address: int, data: bytes) -> bool:
        """Write guest-physical memory; False if a part of it is not RAM."""
        try:
            self.hvm.memory.write_physical(address, data)
        except NotMapped:
            return False
        return True
