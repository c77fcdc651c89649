"""Cost of the IOMMU: translation by I/O TLB hit and miss, a page in batch; mapping; DMA of 4 KiB and 128 KiB.

    python benchmarks/iommu.py

Machine memory is a bytearray here: what is measured is the IOMMU's own code and one memory copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bus.addresses import Bdf, DomId, Mfn
from hypervisor.core.iommu import Iommu, Segment
from hypervisor.core.iommu_dma import DmaBatch, DmaItem, DmaResult, DmaService
from hypervisor.core.iommu_tables import XenPool

BASE, FRAMES = 0x400, 0x2400
BDF, DOMAIN = Bdf(0x0100), DomId(1)
BATCH = 32


class Memory:
    """Frames [BASE, BASE + FRAMES) in one buffer."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(FRAMES << 12))

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        at = (mfn - BASE << 12) + offset
        return bytes(self.view[at : at + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        at = (mfn - BASE << 12) + offset
        self.view[at : at + len(data)] = data

    def create_extent(self, base: Mfn, frames: int) -> None:
        pass


class Staging:
    """Staging memory beside it."""

    def __init__(self, memory: Memory, size: int) -> None:
        self.size = size
        self._view = memoryview(bytearray(size))
        self._memory = memory

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        at = (mfn - BASE << 12) + offset
        self._memory.view[at : at + length] = self._view[position : position + length]

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        at = (mfn - BASE << 12) + offset
        self._view[position : position + length] = self._memory.view[at : at + length]


class Still:
    """No frame ever moves."""

    any_moving = False

    def moving(self, mfn: Mfn) -> bool:
        return False

    def when_still(self, now: int, mfns: set[Mfn], domain: DomId, run: Callable[[bool], None]) -> None:
        raise AssertionError


def best(work: Callable[[], int], rounds: int = 15) -> float:
    """Nanoseconds for one of the units that `work` says it did: the best round."""
    result = float("inf")
    for _ in range(rounds):
        start = time.perf_counter_ns()
        units = work()
        result = min(result, (time.perf_counter_ns() - start) / units)
    return result


def main() -> None:
    """Print the figures."""
    memory = Memory()
    iommu = Iommu(memory, XenPool(memory), tlb_entries=4096)  # type: ignore[arg-type]  # all that they use of it
    iommu.create_context(DOMAIN)
    iommu.add_device(BDF)
    epoch = iommu.assign(BDF, DOMAIN)
    first = 0x1001  # one off the alignment: 4 KiB leaves, walks of four levels
    iommu.map_range(DOMAIN, 0x1000, Mfn(first), 4096, writable=True)
    requests = [
        [Segment(0x1000 + start + i << 12, 4096, True) for i in range(BATCH)]
        for start in range(0, 2048, BATCH)
    ]

    def translate() -> int:
        for segments in requests:
            iommu.translate(0, BDF, epoch, segments)
        return len(requests) * BATCH

    def miss() -> int:
        iommu.tlb.invalidate_all()
        return translate()

    translate()
    print(f"I/O TLB hit:  {best(translate):7.0f} ns a page, batches of {BATCH} pages (target: under 1,000)")
    print(f"I/O TLB miss: {best(miss):7.0f} ns a page, walk of four levels (target: under 10,000)")

    def change() -> int:
        for page in range(0x4000, 0x4000 + 256):
            iommu.map_page(DOMAIN, page, Mfn(first + page), True)
        for page in range(0x4000, 0x4000 + 256):
            iommu.unmap_page(DOMAIN, page)
        return 256

    print(f"map and unmap of one page: {best(change):7.0f} ns")
    service, staging = DmaService(iommu, Still(), lambda mfn, count: None), Staging(memory, 16 << 20)
    results: list[DmaResult] = []
    for size in (4096, 131072):
        items = [DmaItem((0x1000 << 12) + i * size, size, True, i * size) for i in range(BATCH)]
        batch = DmaBatch(BDF, epoch, items, [])

        def dma(batch: DmaBatch = batch) -> int:
            results.clear()
            service.submit(0, batch, staging, results.append)
            if results != [DmaResult(-1)]:
                raise AssertionError(results)
            return BATCH

        each = best(dma)
        print(f"DMA write of {size >> 10:3} KiB: {each / 1000:7.1f} us, {size / each:5.2f} GB/s")


if __name__ == "__main__":
    main()
