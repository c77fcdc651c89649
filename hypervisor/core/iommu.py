"""The IOMMU: which device belongs to which domain, what its addresses mean, and what it may not do.

A device is known by its PCI address and asks with I/O virtual addresses. Each domain that can have devices has one tree
of I/O page tables (`iommu_tables`); it follows the domain's memory, and removing an entry, the tree's and the I/O TLB's,
is done before the call that removes it returns. As the hypervisor itself moves the bytes of DMA, in the same step in which
it translated the addresses (`iommu_dma`), there is no time at which a removed frame can still be reached.

Each assignment and each reset of a device begins a new *epoch*; a request says in which epoch it was made, and one of an
earlier epoch is refused. The epoch comes from the device's connection, so that a device process of before a restart
cannot know the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from errno import EBUSY, EEXIST, ENODEV, ENOENT, ESRCH
from typing import Final, NamedTuple

from bus.addresses import PAGE_MASK, PAGE_SHIFT, Bdf, DomId, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.iommu_faults import FaultLog, FaultReason, FaultRecord
from hypervisor.core.iommu_interrupts import InterruptEntry, InterruptTable
from hypervisor.core.iommu_tables import (
    ADDRESS_BITS,
    PAGE_LIMIT,
    READ,
    WRITE,
    IoPageTables,
    TablePool,
    WalkStep,
)
from hypervisor.core.iommu_tlb import DEFAULT_ENTRIES, IoTlb
from hypervisor.core.p2m import P2mChange, P2mType
from hypervisor.core.ports import MachineMemory

MAX_SEGMENTS: Final = 1024
"""Segments of one request's scatter-gather list."""
MAX_BYTES: Final = 4 << 20
"""Bytes of one request."""
MAX_DEVICES: Final = 256
INTERRUPT_PAGES: Final = range(0xFEE00, 0xFEF00)
"""I/O virtual pages that are not memory: writes to them are interrupt messages (VT-d, section 3.14)."""


class Segment(NamedTuple):
    """One piece of a request: `length` bytes at `iova`; `write`: the device writes memory."""

    iova: int
    length: int
    write: bool


class Piece(NamedTuple):
    """A part of a segment that lies in frames that follow each other: `length` bytes from `offset` in the first of them on."""

    mfn: Mfn
    offset: int
    length: int

    @property
    def frames(self) -> int:
        """How many they are."""
        return (self.offset + self.length + PAGE_MASK) >> PAGE_SHIFT


class DmaFault(Exception):  # the field's word; it is an answer to a device, not an error of ours
    """The request is refused; nothing was moved. It is recorded and counted already."""

    def __init__(self, bdf: Bdf, iova: int, write: bool, reason: FaultReason) -> None:
        super().__init__(f"{reason.name} at {iova:#x}")
        self.bdf = bdf
        self.iova = iova
        self.write = write
        self.reason = reason


@dataclass(slots=True)
class Device:
    """A device behind the IOMMU."""

    bdf: Bdf
    domain: DomId | None = None
    """To which it is assigned. Unassigned, every request of it is refused."""
    epoch: int = 1
    requests: int = 0
    """DMA items carried out."""
    bytes_read: int = 0
    bytes_written: int = 0
    interrupts: int = 0
    vectors: dict[int, int] = field(default_factory=dict)
    """MSI-X entry -> index in the remapping table."""


@dataclass(slots=True)
class DomainStatistics:
    """A domain's I/O page tables in numbers."""

    tables: int
    leaves_4k: int
    leaves_2m: int
    leaves_1g: int
    lost_leaves: int
    tlb_entries: int
    devices: list[Bdf] = field(default_factory=list)


class Iommu:
    """All of it but the moving of bytes. `on_fault` is told of each fault that is recorded."""

    def __init__(
        self,
        memory: MachineMemory,
        pool: TablePool,
        *,
        tlb_entries: int = DEFAULT_ENTRIES,
        on_fault: Callable[[FaultRecord], None] = lambda record: None,
    ) -> None:
        self._memory = memory
        self._pool = pool
        self._trees: dict[DomId, IoPageTables] = {}
        self._devices: dict[Bdf, Device] = {}
        self._on_fault = on_fault
        self.tlb = IoTlb(tlb_entries)
        self.faults = FaultLog()
        self.interrupts = InterruptTable()

    # -- domains --------------------------------------------------------------------------------------------------

    def create_context(self, domain: DomId) -> None:
        """An empty tree for the domain. EEXIST, ENOMEM."""
        if domain in self._trees:
            raise XenError(EEXIST)
        self._trees[domain] = IoPageTables(self._memory, self._pool)

    def destroy_context(self, domain: DomId) -> None:
        """The domain's tree goes, its devices are unassigned. Nothing happens if there is none."""
        for device in self._devices.values():
            if device.domain == domain:
                self.deassign(device.bdf)
        tree = self._trees.pop(domain, None)
        if tree is not None:
            tree.destroy()
        self.tlb.invalidate_domain(domain)

    def has_context(self, domain: DomId) -> bool:
        """The domain has I/O page tables."""
        return domain in self._trees

    def _tree(self, domain: DomId) -> IoPageTables:
        tree = self._trees.get(domain)
        if tree is None:
            raise XenError(ESRCH)
        return tree

    def map_range(self, domain: DomId, page: int, mfn: Mfn, count: int, *, writable: bool) -> None:
        """Map frames at I/O virtual pages, replacing what is there. ESRCH, ENOMEM (nothing of the range is mapped then).
        ValueError for pages outside the address space or in the interrupt range."""
        if page < INTERRUPT_PAGES.stop and page + count > INTERRUPT_PAGES.start:
            raise ValueError(f"I/O pages {page:#x}+{count:#x} are in the interrupt range")
        tree = self._tree(domain)
        try:
            tree.map(page, mfn, count, READ | (WRITE if writable else 0))
        finally:
            self.tlb.invalidate(domain, page, count)

    def unmap_range(self, domain: DomId, page: int, count: int) -> None:
        """Remove I/O virtual pages. When this returns, no DMA reaches what was there. ESRCH."""
        self._tree(domain).unmap(page, count)
        self.tlb.invalidate(domain, page, count)

    def map_page(self, domain: DomId, page: int, mfn: Mfn, writable: bool) -> bool:
        """One page; False if that cannot be (no frame for a table, no such place)."""
        try:
            self.map_range(domain, page, mfn, 1, writable=writable)
        except (XenError, ValueError):
            return False
        return True

    def unmap_page(self, domain: DomId, page: int) -> None:
        """One page."""
        self.unmap_range(domain, page, 1)

    def lookup(self, domain: DomId, page: int) -> tuple[Mfn, bool] | None:
        """(frame, writable) as the tables say it now."""
        tree = self._trees.get(domain)
        if tree is None or not 0 <= page < PAGE_LIMIT:
            return None
        found = tree.lookup(page)
        return None if found is None else (found.mfn, bool(found.access & WRITE))

    def p2m_changed(self, change: P2mChange) -> None:
        """Listener of an auto-translated domain's p2m: its own frames are at their guest frame numbers.

        Granted frames come and go by GNTMAP_device_map (grant_core), foreign ones are never reachable by DMA. A frame
        for whose table there is no memory stays unmapped: its DMA faults."""
        if change.domain not in self._trees:
            return
        if change.old is not None and change.old.type is P2mType.RAM:
            self.unmap_page(change.domain, change.gfn)
        if change.new is not None and change.new.type is P2mType.RAM:
            self.map_page(change.domain, change.gfn, change.new.mfn, True)

    def owned_changed(self, domain: DomId, mfn: int, count: int, owned: bool) -> None:
        """A PV domain got or lost frames: its own are at their machine frame numbers (as on Xen: one to one). A frame for
        whose table there is no memory stays unmapped: its DMA faults."""
        if domain not in self._trees:
            return
        if not owned:
            self.unmap_range(domain, mfn, count)
            return
        try:
            self.map_range(domain, mfn, Mfn(mfn), count, writable=True)
        except (XenError, ValueError):
            for step in range(count):
                self.map_page(domain, mfn + step, Mfn(mfn + step), True)

    def populate(self, domain: DomId, runs: Iterable[tuple[int, Mfn, int]]) -> None:
        """Enter memory that the domain has already: (first page, first frame, count) each. ESRCH, ENOMEM."""
        for page, mfn, count in runs:
            self.map_range(domain, page, mfn, count, writable=True)

    # -- devices --------------------------------------------------------------------------------------------------

    def add_device(self, bdf: Bdf) -> Device:
        """A device was plugged in; it belongs to nobody. EEXIST, ENODEV if there are too many."""
        if bdf in self._devices:
            raise XenError(EEXIST)
        if len(self._devices) >= MAX_DEVICES:
            raise XenError(ENODEV)
        device = self._devices[bdf] = Device(bdf)
        return device

    def remove_device(self, bdf: Bdf) -> None:
        """It was unplugged. ENODEV."""
        self.device(bdf)
        self.interrupts.release_device(bdf)
        del self._devices[bdf]

    def device(self, bdf: Bdf) -> Device:
        """The device's record. ENODEV."""
        device = self._devices.get(bdf)
        if device is None:
            raise XenError(ENODEV)
        return device

    def devices(self) -> list[Device]:
        """All devices, by address."""
        return [self._devices[bdf] for bdf in sorted(self._devices)]

    def assign(self, bdf: Bdf, domain: DomId) -> int:
        """Give the device to a domain; the new epoch. ENODEV; EBUSY if it has an owner; ESRCH without a tree."""
        device = self.device(bdf)
        if device.domain is not None:
            raise XenError(EBUSY)
        self._tree(domain)
        device.domain = domain
        return self._new_epoch(device)

    def deassign(self, bdf: Bdf) -> int:
        """Take it back: from now on every request of it is refused. ENODEV; ENOENT if it has no owner."""
        device = self.device(bdf)
        if device.domain is None:
            raise XenError(ENOENT)
        device.domain = None
        return self._new_epoch(device)

    def reset(self, bdf: Bdf) -> int:
        """The device (or its process, or its driver) starts anew: what it asked before is refused from now on, and
        its interrupts must be given to it again. The new epoch. ENODEV."""
        return self._new_epoch(self.device(bdf))

    def _new_epoch(self, device: Device) -> int:
        self.interrupts.release_device(device.bdf)
        device.vectors.clear()
        device.epoch += 1
        return device.epoch

    # -- requests -------------------------------------------------------------------------------------------------

    def refuse(self, now: int, bdf: Bdf, iova: int, write: bool, reason: FaultReason) -> DmaFault:
        """Record a fault; the exception to raise, or the answer to give."""
        device = self._devices.get(bdf)
        record = self.faults.report(now, bdf, device.domain if device else None, iova, write, reason)
        if record is not None:
            self._on_fault(record)
        return DmaFault(bdf, iova, write, reason)

    def translate(
        self, now: int, bdf: Bdf, epoch: int, segments: Sequence[tuple[int, int, bool]]
    ) -> list[list[Piece]]:
        """The pieces of each segment (a `Segment`, or a plain tuple of that shape), every frame of them allowed. DmaFault for the first that is not; nothing is returned then.

        The result is good only within this step of the core: whoever keeps it must translate again."""
        device = self._devices.get(bdf)
        first = Segment(*segments[0]) if segments else Segment(0, 0, False)
        if device is None or device.domain is None or device.epoch != epoch:
            raise self.refuse(now, bdf, first.iova, first.write, FaultReason.CONTEXT_NOT_PRESENT)
        if not 1 <= len(segments) <= MAX_SEGMENTS or sum([length for _, length, _ in segments]) > MAX_BYTES:
            raise self.refuse(now, bdf, first.iova, first.write, FaultReason.MALFORMED)
        domain = device.domain
        result: list[list[Piece]] = []
        hits = misses = 0
        part = self.tlb.of(domain)
        try:
            for iova, length, write in segments:
                if length < 1:
                    raise self.refuse(now, bdf, iova, write, FaultReason.MALFORMED)
                end = iova + length
                if iova < 0 or end > 1 << ADDRESS_BITS:
                    raise self.refuse(now, bdf, iova, write, FaultReason.ADDRESS_BEYOND_WIDTH)
                need = WRITE if write else READ
                pieces: list[Piece] = []
                page = iova >> PAGE_SHIFT
                count = (end - 1 >> PAGE_SHIFT) - page + 1
                value = part.get(page)
                if (
                    value is not None
                    and value & need
                    and (
                        count == 1
                        # As often as not frames follow each other, and are all in the TLB: looked at all at once.
                        or [*map(part.get, range(page, page + count))]
                        == [*range(value, value + 4 * count, 4)]
                    )
                ):
                    hits += count
                    result.append([Piece(Mfn(value >> 2), iova & PAGE_MASK, length)])
                    continue
                mfn, following, begin = -1, -1, iova  # of the piece that is being made
                for page in range(iova >> PAGE_SHIFT, (end + PAGE_MASK) >> PAGE_SHIFT):
                    value = part.get(page)
                    if value is None:
                        misses += 1
                        value = self._miss(now, bdf, domain, max(iova, page << PAGE_SHIFT), write)
                    else:
                        hits += 1
                    if not value & need:
                        raise self.refuse(now, bdf, max(iova, page << PAGE_SHIFT), write, _denied(write))
                    if value >> 2 != following:
                        if mfn >= 0:
                            at = page << PAGE_SHIFT
                            pieces.append(Piece(Mfn(mfn), begin & PAGE_MASK, at - begin))
                            begin = at
                        mfn = following = value >> 2
                    following += 1
                pieces.append(Piece(Mfn(mfn), begin & PAGE_MASK, end - begin))
                result.append(pieces)
        finally:
            self.tlb.hits += hits
            self.tlb.misses += misses
        return result

    def _miss(self, now: int, bdf: Bdf, domain: DomId, iova: int, write: bool) -> int:
        """Walk the tables; remember what they say."""
        page = iova >> PAGE_SHIFT
        if write and page in INTERRUPT_PAGES:
            raise self.refuse(now, bdf, iova, write, FaultReason.INTERRUPT_COMPATIBILITY_BLOCKED)
        found = self._trees[domain].lookup(page)
        if found is None:
            raise self.refuse(now, bdf, iova, write, _denied(write))
        value = found.mfn << 2 | found.access
        self.tlb.insert(domain, page, value)
        return value

    def raise_interrupt(self, now: int, bdf: Bdf, epoch: int, index: int) -> InterruptEntry:
        """The device raises the interrupt of a remapping index; where it goes. DmaFault if it may not."""
        device = self._devices.get(bdf)
        if device is None or device.domain is None or device.epoch != epoch:
            raise self.refuse(now, bdf, index, True, FaultReason.CONTEXT_NOT_PRESENT)
        entry = self.interrupts.lookup(bdf, index)
        if isinstance(entry, FaultReason):
            raise self.refuse(now, bdf, index, True, entry)
        device.interrupts += 1
        return entry

    def msi_mapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """The device's MSI-X entry is to raise this PIRQ of its owner (`physdev.MsiListener`). ENODEV, ENOSPC; ENOENT
        if the domain does not own the device."""
        device = self.device(bdf)
        if device.domain != domain:
            raise XenError(ENOENT)
        index = self.give_interrupt(bdf, pirq)
        old = device.vectors.pop(entry, None)
        if old is not None:
            self.interrupts.release(old)
        device.vectors[entry] = index

    def msi_unmapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """It raises nothing any more; nothing happens if it did not."""
        device = self._devices.get(bdf)
        index = device.vectors.pop(entry, None) if device is not None else None
        if index is not None:
            self.interrupts.release(index)

    def raise_vector(self, now: int, bdf: Bdf, epoch: int, entry: int) -> InterruptEntry:
        """The device raises the interrupt of an MSI-X entry of its own; where it goes. DmaFault if it may not."""
        device = self._devices.get(bdf)
        index = device.vectors.get(entry) if device is not None else None
        if device is not None and device.epoch == epoch and device.domain is not None and index is None:
            raise self.refuse(now, bdf, entry, True, FaultReason.INTERRUPT_NOT_PRESENT)
        return self.raise_interrupt(now, bdf, epoch, -1 if index is None else index)

    def give_interrupt(self, bdf: Bdf, pirq: int) -> int:
        """Let the device raise a PIRQ of its domain; the remapping index. ENODEV, ENOENT (no owner), ENOSPC."""
        device = self.device(bdf)
        if device.domain is None:
            raise XenError(ENOENT)
        return self.interrupts.allocate(bdf, device.domain, pirq)

    # -- views ----------------------------------------------------------------------------------------------------

    def walk(self, domain: DomId, iova: int) -> list[WalkStep]:
        """The path through the levels for an address, as it is in memory now. ESRCH; empty beyond 48 bits."""
        tree = self._tree(domain)
        return tree.walk(iova >> PAGE_SHIFT) if 0 <= iova < 1 << ADDRESS_BITS else []

    def statistics(self, domain: DomId) -> DomainStatistics:
        """The domain's tree in numbers. ESRCH."""
        tree = self._tree(domain)
        devices = [d.bdf for d in self.devices() if d.domain == domain]
        cached = len(self.tlb.of(domain))
        return DomainStatistics(
            tree.table_count,
            tree.leaves[1],
            tree.leaves[2],
            tree.leaves[3],
            tree.lost_leaves,
            cached,
            devices,
        )


def _denied(write: bool) -> FaultReason:
    return FaultReason.NO_WRITE_PERMISSION if write else FaultReason.NO_READ_PERMISSION
