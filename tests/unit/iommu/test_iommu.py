"""Devices, translation, faults, interrupts: what a device may do, and that it may do nothing else."""

from __future__ import annotations

import errno

import pytest

from bus.addresses import Bdf, DomId, Gfn, Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.iommu import MAX_BYTES, MAX_SEGMENTS, DmaFault, Iommu, Piece, Segment
from hypervisor.core.iommu_faults import BURST, MAX_SOURCES, OTHERS, FaultLog, FaultReason
from hypervisor.core.iommu_tables import XenPool
from hypervisor.core.iommu_tlb import IoTlb
from hypervisor.core.p2m import P2m, P2mType
from tests.unit.iommu.test_iommu_tables import Frames

NVME, NIC = Bdf(0x0100), Bdf(0x0200)
ONE, TWO = DomId(1), DomId(2)


def machine(tlb_entries: int = 64, frames: int = 0xC00) -> Iommu:
    memory = Frames()
    pool = XenPool(memory, frames=frames)  # type: ignore[arg-type]  # what the tables use of it
    iommu = Iommu(memory, pool, tlb_entries=tlb_entries)  # type: ignore[arg-type]  # as above
    for bdf in (NVME, NIC):
        iommu.add_device(bdf)
    for domain in (ONE, TWO):
        iommu.create_context(domain)
    return iommu


def reason(iommu: Iommu, bdf: Bdf, epoch: int, *segments: tuple[int, int, bool]) -> FaultReason | None:
    try:
        iommu.translate(0, bdf, epoch, [Segment(*s) for s in segments])
    except DmaFault as fault:
        return fault.reason
    return None


def test_a_request_is_cut_at_frames_and_all_or_nothing() -> None:
    """Pieces in order, across frames that are not neighbours; one bad page refuses the whole list."""
    m = machine()
    epoch = m.assign(NVME, ONE)
    m.map_range(ONE, 0x10, Mfn(0x500), 2, writable=True)
    m.map_range(ONE, 0x12, Mfn(0x900), 1, writable=False)
    pieces = m.translate(0, NVME, epoch, [Segment(0x10FF0, 0x1010, True), Segment(0x12FFF, 1, False)])
    assert pieces == [
        [Piece(Mfn(0x500), 0xFF0, 0x1010)],
        [Piece(Mfn(0x900), 0xFFF, 1)],
    ]
    m.map_range(ONE, 0x13, Mfn(0x901), 3, writable=False)
    (run,) = m.translate(0, NVME, epoch, [Segment(0x10800, 0x5001, False)])
    assert run == [Piece(Mfn(0x500), 0x800, 0x1800), Piece(Mfn(0x900), 0, 0x3801)]
    assert [piece.frames for piece in run] == [2, 4]
    m.unmap_range(ONE, 0x13, 3)
    assert reason(m, NVME, epoch, (0x10000, 16, True), (0x12000, 16, True)) is FaultReason.NO_WRITE_PERMISSION
    assert reason(m, NVME, epoch, (0x11FFF, 2, True)) is FaultReason.NO_WRITE_PERMISSION
    assert reason(m, NVME, epoch, (0x12FFF, 2, False)) is FaultReason.NO_READ_PERMISSION
    record = m.faults.records()[-1]
    assert (record.bdf, record.domain, record.iova, record.write) == (NVME, ONE, 0x13000, False)
    assert m.faults.total(NVME) == 3


def test_addresses_that_are_none() -> None:
    """Wrap-around, beyond 48 bits, nothing, too much: each is refused with its reason and moves no byte."""
    m = machine()
    epoch = m.assign(NVME, ONE)
    m.map_range(ONE, 0, Mfn(0x500), 2, writable=True)
    m.map_range(ONE, (1 << 36) - 1, Mfn(0x600), 1, writable=True)
    beyond, malformed = FaultReason.ADDRESS_BEYOND_WIDTH, FaultReason.MALFORMED
    assert reason(m, NVME, epoch, ((1 << 48) - 16, 16, True)) is None
    for segment, expected in {
        ((1 << 48) - 16, 17, True): beyond,
        ((1 << 64) - 16, 32, True): beyond,
        (0xFFFF_8000_0000_0000, 16, False): beyond,
        (1 << 48, 1, False): beyond,
        (-4096, 4096, False): beyond,
        (0, 0, True): malformed,
        (0, -1, True): malformed,
        (0, MAX_BYTES + 1, True): malformed,
        (0, 1 << 64, True): malformed,
        (0xFEE00000, 4, True): FaultReason.INTERRUPT_COMPATIBILITY_BLOCKED,
        (0xFEE00000, 4, False): FaultReason.NO_READ_PERMISSION,
    }.items():
        assert reason(m, NVME, epoch, segment) is expected, segment
    assert reason(m, NVME, epoch) is malformed
    assert reason(m, NVME, epoch, *[(0, 1, True)] * (MAX_SEGMENTS + 1)) is malformed
    with pytest.raises(ValueError, match="interrupt range"):
        m.map_range(ONE, 0xFEDFF, Mfn(1), 2, writable=True)


def test_a_device_belongs_to_one_domain_or_to_none() -> None:
    """It reaches its domain's memory only; unassigned or unknown it reaches nothing; contexts are not shared."""
    m = machine()
    none = FaultReason.CONTEXT_NOT_PRESENT
    assert reason(m, NVME, 1, (0, 1, False)) is none
    assert reason(m, Bdf(0x999), 1, (0, 1, False)) is none
    one, two = m.assign(NVME, ONE), m.assign(NIC, TWO)
    m.map_range(ONE, 0, Mfn(0x500), 1, writable=True)
    m.map_range(TWO, 0, Mfn(0x600), 1, writable=True)
    assert m.translate(0, NVME, one, [Segment(0, 1, True)])[0][0].mfn == 0x500
    assert m.translate(0, NIC, two, [Segment(0, 1, True)])[0][0].mfn == 0x600
    with pytest.raises(XenError) as caught:
        m.assign(NVME, TWO)
    assert caught.value.errno == errno.EBUSY
    m.deassign(NVME)
    assert reason(m, NVME, one, (0, 1, False)) is none
    assert reason(m, NVME, m.device(NVME).epoch, (0, 1, False)) is none
    m.destroy_context(TWO)
    assert m.device(NIC).domain is None
    assert reason(m, NIC, two, (0, 1, False)) is none


def test_requests_of_an_earlier_epoch_are_fenced_off() -> None:
    """After a reset, or assignment to the same domain again, what was asked before is refused."""
    m = machine()
    m.map_range(ONE, 0, Mfn(0x500), 1, writable=True)
    old = m.assign(NVME, ONE)
    new = m.reset(NVME)
    assert reason(m, NVME, old, (0, 1, True)) is FaultReason.CONTEXT_NOT_PRESENT
    assert reason(m, NVME, new, (0, 1, True)) is None
    m.deassign(NVME)
    newest = m.assign(NVME, ONE)
    assert len({old, new, newest}) == 3
    assert reason(m, NVME, new, (0, 1, True)) is FaultReason.CONTEXT_NOT_PRESENT
    assert reason(m, NVME, newest, (0, 1, True)) is None


def test_the_tlb_never_says_what_the_tables_no_longer_say() -> None:
    """Unmap, remap, fewer rights, split of a large leaf, and the end of a domain, each after a hit."""
    m = machine()
    epoch = m.assign(NVME, ONE)
    m.map_range(ONE, 0x200, Mfn(0x200), 512, writable=True)

    def hit(page: int) -> FaultReason | None:
        return reason(m, NVME, epoch, (page << 12, 1, True))

    assert [hit(0x200), hit(0x200), hit(0x201)] == [None] * 3
    assert (m.tlb.hits, m.tlb.misses) == (1, 2)
    m.unmap_range(ONE, 0x200, 1)
    assert [hit(0x200), hit(0x201)] == [FaultReason.NO_WRITE_PERMISSION, None]
    m.map_range(ONE, 0x201, Mfn(0x999), 1, writable=True)
    assert m.translate(0, NVME, epoch, [Segment(0x201000, 1, True)])[0][0].mfn == 0x999
    m.map_range(ONE, 0x201, Mfn(0x999), 1, writable=False)
    assert hit(0x201) is FaultReason.NO_WRITE_PERMISSION
    m.unmap_range(ONE, 0, 1 << 20)
    assert hit(0x202) is FaultReason.NO_WRITE_PERMISSION
    assert m.tlb.size == 0


def test_the_tlb_is_bounded() -> None:
    """The oldest entry goes; counts stay right through every kind of invalidation."""
    tlb = IoTlb(4)
    for page in range(6):
        tlb.insert(ONE, page, page << 2 | 3)
    assert (tlb.size, tlb.evictions, sorted(tlb.of(ONE))) == (4, 2, [2, 3, 4, 5])
    tlb.insert(TWO, 9, 7)
    assert (tlb.size, len(tlb.of(ONE))) == (4, 3)
    tlb.insert(TWO, 9, 11)
    assert tlb.of(TWO)[9] == 11
    tlb.invalidate(ONE, 0, 1 << 40)
    assert (tlb.size, tlb.of(ONE)) == (1, {})
    tlb.invalidate(TWO, 8, 2)
    assert tlb.size == 0
    tlb.insert(TWO, 9, 7)
    tlb.invalidate_domain(TWO)
    tlb.insert(ONE, 1, 7)
    tlb.invalidate_all()
    assert tlb.size == 0


def test_a_p2m_is_followed() -> None:
    """Own frames are at their guest frame numbers; granted, foreign and MMIO pages are not entered by it."""
    m = machine()
    p2m = P2m(ONE)
    p2m.subscribe(m.p2m_changed)
    p2m.set(Gfn(5), Mfn(0x500), P2mType.RAM)
    assert m.lookup(ONE, 5) == (0x500, True)
    p2m.set(Gfn(5), Mfn(0x501), P2mType.RAM)
    assert m.lookup(ONE, 5) == (0x501, True)
    for kind in (P2mType.GRANT_RW, P2mType.FOREIGN, P2mType.MMIO):
        p2m.set(Gfn(6), Mfn(0x502), kind)
        assert m.lookup(ONE, 6) is None
    m.map_page(ONE, 7, Mfn(0x700), True)  # GNTMAP_device_map, at the same place as a CPU mapping
    p2m.set(Gfn(7), Mfn(0x700), P2mType.GRANT_RW)
    p2m.clear(Gfn(7))
    assert m.lookup(ONE, 7) == (0x700, True)
    p2m.clear(Gfn(5))
    assert m.lookup(ONE, 5) is None


def test_interrupts_are_given_to_a_device() -> None:
    """An index works for its device in its epoch only."""
    m = machine()
    with pytest.raises(XenError):
        m.give_interrupt(NVME, 5)
    epoch, other = m.assign(NVME, ONE), m.assign(NIC, TWO)
    index = m.give_interrupt(NVME, 5)
    assert m.raise_interrupt(0, NVME, epoch, index)[1:] == (ONE, 5)
    cases = [
        (NIC, other, index, FaultReason.INTERRUPT_SOURCE_INVALID),
        (NVME, epoch, index + 1, FaultReason.INTERRUPT_NOT_PRESENT),
        (NVME, epoch, 1 << 20, FaultReason.INTERRUPT_INDEX_BEYOND),
        (NVME, epoch, -1, FaultReason.INTERRUPT_INDEX_BEYOND),
        (NVME, epoch - 1, index, FaultReason.CONTEXT_NOT_PRESENT),
    ]
    for bdf, when, number, expected in cases:
        with pytest.raises(DmaFault) as caught:
            m.raise_interrupt(0, bdf, when, number)
        assert caught.value.reason is expected
    epoch = m.reset(NVME)
    with pytest.raises(DmaFault) as caught:
        m.raise_interrupt(0, NVME, epoch, index)
    assert caught.value.reason is FaultReason.INTERRUPT_NOT_PRESENT


def test_fault_records_are_limited_and_counts_are_not() -> None:
    """A device that faults without end fills neither the log nor memory, and hides no other device's faults."""
    log = FaultLog()
    for i in range(10_000):
        log.report(i, NVME, ONE, i, True, FaultReason.NO_WRITE_PERMISSION)
    log.report(10_000, NIC, TWO, 7, False, FaultReason.NO_READ_PERMISSION)
    assert len(log.records(NVME)) == BURST
    assert len(log.records(NIC)) == 1
    assert (log.total(NVME), log.suppressed) == (10_000, 10_000 - BURST)
    log.report(2_000_000_000, NVME, ONE, 1, True, FaultReason.NO_WRITE_PERMISSION)
    assert len(log.records(NVME)) == BURST + 1
    assert "0000:01:00.0 (d1) write of 0x1" in log.records(NVME)[-1].text()
    assert log.records(after=log.records()[-2].sequence) == log.records()[-1:]
    for i in range(MAX_SOURCES + 500):
        log.report(0, Bdf(0x10000 + i), None, 0, True, FaultReason.CONTEXT_NOT_PRESENT)
    assert len(log.counts) == MAX_SOURCES + 1
    assert log.total(OTHERS) > 0


def test_the_walk_can_be_shown() -> None:
    """The path level by level, with the entries as they are in memory."""
    m = machine()
    m.map_range(ONE, 0x10, Mfn(0x500), 1, writable=True)
    steps = m.walk(ONE, 0x10123)
    assert [(s.level, s.slot, s.kind) for s in steps] == [
        (4, 0, "table"),
        (3, 0, "table"),
        (2, 0, "table"),
        (1, 16, "leaf"),
    ]
    assert steps[-1].entry == 0x500003
    assert m.walk(ONE, 0x11000)[-1].kind == "not present"
    assert m.walk(ONE, 1 << 60) == []
    m.assign(NVME, ONE)
    statistics = m.statistics(ONE)
    assert (statistics.tables, statistics.leaves_4k, statistics.devices) == (4, 1, [NVME])
