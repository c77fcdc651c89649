"""The hypervisor's own frames: memory for tables, which no domain can reach."""

from __future__ import annotations

from errno import ENOMEM

from bus.addresses import Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.ports import MachineMemory


class XenPool:
    """Implements `hypervisor.core.iommu_tables.TablePool` over an extent of its own, beyond all domains' MFNs."""

    def __init__(self, memory: MachineMemory, base: Mfn, frames: int) -> None:
        """`frames` frames from `base` on; the extent is sparse, so that unused ones cost nothing."""
        self._memory = memory
        self._base = base
        self._frames = frames
        self._next = 0
        self._free: list[Mfn] = []
        memory.create_extent(base, frames)

    @property
    def used(self) -> int:
        """Frames handed out now."""
        return self._next - len(self._free)

    def allocate(self) -> Mfn:
        """A zeroed frame. XenError(ENOMEM) if there is none."""
        if self._free:
            return self._free.pop()
        if self._next >= self._frames:
            raise XenError(ENOMEM)
        self._next += 1
        return Mfn(self._base + self._next - 1)

    def free(self, mfn: Mfn) -> None:
        """Give a frame of `allocate` back; it is cleared."""
        self._memory.clear(mfn)
        self._free.append(mfn)
