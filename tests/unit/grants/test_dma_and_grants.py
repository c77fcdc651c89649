"""Grants, p2m and IOMMU together: invariants 2 and 3 of docs/architecture.md, whatever guests, processes and devices do.

2: no mapping, grant or I/O entry exists for a frame that the domain neither owns nor holds by a live grant.
3: a device reaches memory through the tables of its owner's, or moves no byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus.abi.grant_table import GNTMAP_device_map, GNTMAP_readonly
from bus.addresses import Bdf, DomId, Gfn, Mfn
from bus.trace import MAGIC, NOBODY, ON_WORD, RECORD_SIZE, RING_AT, Trace, TraceReader
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import (
    FAULT_EPOCH,
    FAULT_VECTOR,
    NO_FAULT,
    DmaBatch,
    DmaItem,
    DmaResult,
    DmaService,
)
from hypervisor.core.iommu_faults import FaultReason
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.iommu_tables import XenPool
from hypervisor.core.p2m import P2m, P2mType
from tests.unit.grants.grants_world import HOST, RO, World

BDF = Bdf(0x0100)
ONE, TWO = DomId(1), DomId(2)
DEVICE, DEVICE_RO = GNTMAP_device_map, GNTMAP_device_map | GNTMAP_readonly


class Staging:
    """Staging memory over the test's machine memory."""

    def __init__(self, world: Machine, size: int = 65536) -> None:
        self.size = size
        self.data = bytearray(size)
        self._memory = world.memory

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        for frame, start, size in self._parts(mfn, offset, length):
            self._memory.write(frame, start, bytes(self.data[position : position + size]))
            position += size

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        for frame, start, size in self._parts(mfn, offset, length):
            self.data[position : position + size] = self._memory.read(frame, start, size)
            position += size

    @staticmethod
    def _parts(mfn: Mfn, offset: int, length: int) -> Iterator[tuple[Mfn, int, int]]:
        while length:
            size = min(length, 4096 - offset)
            yield mfn, offset, size
            mfn, offset, length = Mfn(mfn + 1), 0, length - size


class Machine(World):
    """The world of the grant tests with a real p2m for domain 1 (DomIO) and a real IOMMU behind which it has a device."""

    def make_dma(self) -> Any:
        self.iommu = Iommu(self.memory, XenPool(self.memory), tlb_entries=8)
        self.iommu.create_context(ONE)
        return self.iommu

    def __init__(self, *kinds: str, owner: str = "native") -> None:
        """`owner`: kind of the device's owner."""
        self.p2m = P2m(ONE)
        super().__init__(owner, *kinds)
        self.p2m.subscribe(self.iommu.p2m_changed)
        for gfn, mfn in enumerate(self.doms[ONE].ram):
            self.p2m.set(Gfn(gfn), mfn, P2mType.RAM)
        self.iommu.add_device(BDF)
        self.epoch = self.iommu.assign(BDF, ONE)
        self.dma_written: list[Mfn] = []
        self.raised: list[InterruptEntry] = []
        self.service = DmaService(
            self.iommu, self.grants, self.note_written, lambda now, entry: self.raised.append(entry)
        )
        self.staging = Staging(self)

    def note_written(self, mfn: Mfn, count: int) -> None:
        self.dma_written += [Mfn(mfn + step) for step in range(count)]

    def translate(self, domain: DomId, gfn: int) -> Mfn | None:
        if domain != ONE:
            return super().translate(domain, gfn)
        entry = self.p2m.get(gfn)
        return entry.mfn if entry is not None and entry.type is P2mType.RAM else None

    def enter_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn, writable: bool) -> bool:
        if domain != ONE:
            return super().enter_grant(domain, gfn, mfn, writable)
        if self.p2m.get(gfn) is not None:
            return False
        self.p2m.set(gfn, mfn, P2mType.GRANT_RW if writable else P2mType.GRANT_RO)
        return True

    def remove_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn) -> bool:
        if domain != ONE:
            return super().remove_grant(domain, gfn, mfn)
        entry = self.p2m.get(gfn)
        if entry is None or entry.mfn != mfn or entry.type is P2mType.RAM:
            return False
        self.p2m.clear(gfn)
        return True

    def request(
        self, *segments: tuple[int, int, bool], epoch: int | None = None, vectors: tuple[int, ...] = ()
    ) -> list[DmaResult]:
        """One batch; its items follow each other in the staging memory."""
        results: list[DmaResult] = []
        items, position = [], 0
        for iova, length, write in segments:
            items.append(DmaItem(iova, length, write, position))
            position += length
        batch = DmaBatch(BDF, self.epoch if epoch is None else epoch, items, list(vectors))
        self.service.submit(self.now, batch, self.staging, results.append)
        return results


DONE = DmaResult(NO_FAULT)


def test_dma_moves_bytes_both_ways() -> None:
    """Between staging memory and frames, a scatter list in turn; the driver's guest frames are the addresses."""
    m = Machine("pv")
    m.staging.data[:8] = b"12345678"
    assert m.request((0x1FFE, 4, True), (0x3000, 4, True)) == [DONE]
    ram = m.doms[ONE].ram
    assert m.memory.read(ram[1], 0xFFE, 2) + m.memory.read(ram[2], 0, 2) == b"1234"
    assert m.memory.read(ram[3], 0, 4) == b"5678"
    assert set(m.dma_written) == {ram[1], ram[2], ram[3]}
    assert m.request((0x3000, 4, False), (0x1FFE, 4, False)) == [DONE]
    assert m.staging.data[:8] == b"56781234"
    device = m.iommu.device(BDF)
    assert (device.requests, device.bytes_read, device.bytes_written) == (4, 8, 8)


def test_the_trace_has_each_piece_and_each_fault() -> None:
    """What `domicile trace --dma` shows as steps 2 and 3; nothing while nobody watches."""
    m = Machine("pv")
    memory = memoryview(bytearray(RING_AT + 64 * RECORD_SIZE))
    memory[:8] = MAGIC.to_bytes(8, "little")
    trace, reader = Trace(memory, lambda: 9), TraceReader(memory)
    m.service = DmaService(m.iommu, m.grants, m.note_written, trace=trace, owner=lambda mfn: ONE)
    assert m.request((0x1FFE, 4, True)) == [DONE]
    assert reader.take() == []
    trace.words[ON_WORD] = 1
    assert m.request((0x1FFE, 4, True)) == [DONE]
    (refused,) = m.request((0x3000, 4, False), (0x7FFF000, 4, True))
    ram = m.doms[ONE].ram
    assert [(record.subject, record.values[1:]) for record in reader.take()] == [
        (BDF, (1, 0x1FFE, 2, (ram[1] << 12) + 0xFFE, ONE)),
        (BDF, (1, 0x2000, 2, ram[2] << 12, ONE)),
        (BDF, (0, 0x3000, 4, ram[3] << 12, ONE)),
        (BDF, (3, 0x7FFF000, 4, 0, FaultReason.NO_WRITE_PERMISSION << 16 | NOBODY)),
    ]
    assert refused.fault == 1


def test_a_fault_moves_no_byte_of_its_item_and_ends_the_batch() -> None:
    """What was before it in the batch is done, what is behind it is not, and no interrupt is raised."""
    m = Machine("pv")
    m.iommu.msi_mapped(BDF, 0, ONE, 40)
    m.staging.data[:16] = b"0123456789abcdef"
    ram = m.doms[ONE].ram
    result = m.request((0x1000, 4, True), (0xFFFE, 4, True), (0x2000, 4, True), vectors=(0,))
    assert result == [DmaResult(1, FaultReason.NO_WRITE_PERMISSION, 0x10000)]
    assert m.memory.read(ram[1], 0, 4) == b"0123"
    assert m.memory.read(ram[15], 0xFFE, 2) == m.memory.read(ram[2], 0, 2) == bytes(2)
    assert m.raised == []
    assert m.request((0, 65537, True))[0] != DONE
    assert m.request((0x1000, 4, True), epoch=m.epoch - 1)[0].fault == FAULT_EPOCH
    machine_address = m.doms[TWO].ram[0] << 12
    assert m.request((machine_address, 4, True))[0].reason is FaultReason.NO_WRITE_PERMISSION
    assert m.request(*[(0, 1, False)] * 1025)[0].reason is FaultReason.MALFORMED


def test_a_batch_raises_its_vectors_at_its_end() -> None:
    """Only those that the device was given, and not after a reset."""
    m = Machine("pv")
    m.iommu.msi_mapped(BDF, 3, ONE, 40)
    assert m.request((0x1000, 4, True), vectors=(3,)) == [DONE]
    assert [(e.domain, e.pirq) for e in m.raised] == [(ONE, 40)]
    refused = m.request((0x1000, 4, True), vectors=(2,))[0]
    assert (refused.fault, refused.reason) == (FAULT_VECTOR, FaultReason.INTERRUPT_NOT_PRESENT)
    m.iommu.msi_mapped(BDF, 3, ONE, 41)
    m.request(vectors=(3,))
    assert m.raised[-1].pirq == 41
    m.iommu.msi_unmapped(BDF, 3, ONE, 41)
    assert m.request(vectors=(3,))[0].fault == FAULT_VECTOR
    m.iommu.msi_mapped(BDF, 3, ONE, 42)
    old, m.epoch = m.epoch, m.iommu.reset(BDF)
    assert m.request(vectors=(3,), epoch=old)[0].fault == FAULT_EPOCH
    assert m.request(vectors=(3,))[0].fault == FAULT_VECTOR
    assert len(m.raised) == 2


def test_batches_of_a_device_complete_in_order() -> None:
    """One that waits for a frame holds up those behind it."""
    m = Machine("pv", "pv")
    m.grant(2, 8, 1, 3)
    m.grant(2, 9, 3, 3)
    m.map(1, (2, 8, DEVICE, 0x77000))
    m.start_map(3, (2, 9, HOST, 0x1000))
    first, second = m.request((0x77000, 4, True)), m.request((0x1000, 4, True))
    assert (first, second, m.service.waiting(BDF)) == ([], [], 2)
    m.pump()
    assert (first, second, m.service.waiting(BDF)) == ([DONE], [DONE], 0)


def test_a_granted_frame_is_reachable_while_it_is_mapped() -> None:
    """At DomIO's guest frame, with the grant's rights; not before, not after, and gone with its granter's entry clear."""
    m = Machine("pv")
    mfn = m.grant(2, 8, 1, 3)
    m.staging.data[:4] = b"disk"
    assert m.request((0x77000, 4, True))[0] != DONE
    (answer,) = m.map(1, (2, 8, DEVICE_RO, 0x77000))
    assert m.request((0x77000, 4, True))[0].reason is FaultReason.NO_WRITE_PERMISSION
    assert m.request((0x77000, 4, False))[0] == DONE
    m.unmap(1, (answer.handle, 0, 0x77000))
    (answer,) = m.map(1, (2, 8, DEVICE, 0x77000))
    m.staging.data[:4] = b"disk"
    assert m.request((0x77000, 4, True))[0] == DONE
    assert m.process(TWO).page(mfn)[:4] == b"disk"
    unmap = m.start_unmap(1, (answer.handle, 0, 0x77000))
    assert m.request((0x77000, 4, True))[0].reason is FaultReason.NO_WRITE_PERMISSION
    m.pump()
    assert unmap[0].status == 0
    m.clean()


def test_an_hvm_guests_device_reaches_what_it_maps_for_itself() -> None:
    """As on Xen, where p2m and I/O page tables are one: a back end of Linux's never says GNTMAP_device_map."""
    m = Machine("pv", owner="hvm")
    mfn = m.grant(2, 8, 1, 3)
    m.staging.data[:4] = b"disk"
    (answer,) = m.map(1, (2, 8, RO, 0x77000))
    assert answer.dev_bus_addr == 0
    assert m.request((0x77000, 4, True))[0].reason is FaultReason.NO_WRITE_PERMISSION
    assert m.request((0x77000, 4, False))[0] == DONE
    m.unmap(1, (answer.handle, 0x77000, 0))
    (answer,) = m.map(1, (2, 8, HOST, 0x77000))
    m.staging.data[:4] = b"disk"
    assert m.request((0x77000, 4, True))[0] == DONE
    assert m.process(TWO).page(mfn)[:4] == b"disk"
    unmap = m.start_unmap(1, (answer.handle, 0x77000, 0))
    assert m.request((0x77000, 4, True))[0].reason is FaultReason.NO_WRITE_PERMISSION
    m.pump()
    assert unmap[0].status == 0
    m.clean()


def test_a_native_domains_device_does_not_reach_what_only_its_cpu_maps() -> None:
    """DomIO's rings are its own business."""
    m = Machine("pv")
    m.grant(2, 8, 1, 3)
    m.map(1, (2, 8, HOST, 0x77000))
    assert m.request((0x77000, 4, False))[0].reason is FaultReason.NO_READ_PERMISSION


def test_dma_waits_while_the_frame_moves_and_is_translated_anew() -> None:
    """Another mapper takes the frame into a window meanwhile: the bytes arrive where it then is."""
    m = Machine("pv", "pv")
    mfn = m.grant(2, 8, 1, 3)
    m.grant(2, 9, 3, 3)
    (answer,) = m.map(1, (2, 8, DEVICE, 0x77000))
    other = m.start_map(3, (2, 9, HOST, 0x1000))
    m.staging.data[:4] = b"late"
    result = m.request((0x77000, 4, True))
    assert result == []
    m.step(TWO)
    assert result == []  # the mapper has not attached it yet
    m.pump()
    assert result == [DONE]
    assert m.process(TWO).page(mfn)[:4] == b"late"
    again = m.start_unmap(3, (other[0].handle, 0x1000, 0))
    result = m.request((0x77000, 4, True))
    assert result == []
    m.start_unmap(1, (answer.handle, 0, 0x77000))
    m.pump()
    assert again[0].status == 0
    assert result[0].reason in (None, FaultReason.NO_WRITE_PERMISSION)
    m.clean()


def test_dma_on_a_frame_whose_granter_is_silent_is_refused() -> None:
    """The device has its answer after a second, whatever the granter does."""
    m = Machine("pv", "pv")
    m.grant(2, 8, 1, 3)
    m.grant(2, 9, 3, 3)
    m.map(1, (2, 8, DEVICE, 0x77000))
    m.start_map(3, (2, 9, HOST, 0x1000))
    result = m.request((0x77000, 4, True))
    m.wait(1.1, 2)
    assert result[0] != DONE


class Everything(RuleBasedStateMachine):
    """DomIO (1) with a device, two PV guests (2, 3), any operation at any time, orders carried out when it pleases."""

    owner = "native"

    def __init__(self) -> None:
        super().__init__()
        self.m = Machine("pv", "pv", owner=self.owner)
        self.handles: list[tuple[int, int, int, int]] = []  # mapper, handle, host_addr, dev_bus_addr
        self.calls: list[tuple[int, int, list[Any], int]] = []
        self.seen = 0
        self.place = 0x70
        self.age = 0
        for domain in (2, 3):
            self.m.setup(domain)

    def alive(self, domain: int) -> bool:
        return not self.m.doms[DomId(domain)].dying

    domains = st.integers(1, 3)
    guests = st.integers(2, 3)
    refs = st.integers(8, 11)
    indexes = st.integers(0, 3)

    @rule(guest=guests, ref=refs, to=domains, index=indexes, readonly=st.booleans())
    def write_entry(self, guest: int, ref: int, to: int, index: int, readonly: bool) -> None:
        # A guest leaves an entry alone while Xen's bits are set: whether it does must not matter for safety.
        if self.alive(guest):
            self.m.grant(guest, ref, to, index, readonly=readonly)

    @rule(
        mapper=domains,
        granter=guests,
        first=refs,
        indexes=st.lists(indexes, min_size=1, max_size=4),
        flags=st.sampled_from([HOST, RO, DEVICE, DEVICE_RO, HOST | DEVICE]),
    )
    def grant_and_map(self, mapper: int, granter: int, first: int, indexes: list[int], flags: int) -> None:
        """What frontends and backends do: fresh entries, mapped at free places."""
        if not self.alive(mapper) or not self.alive(granter) or self.m.grants.busy > 12:
            return
        if mapper != 1 and flags & DEVICE:
            flags = HOST
        active = self.m.table(granter).active
        batch = []
        for number, index in enumerate(indexes):
            ref = first + number
            if ref not in active:
                self.m.grant(granter, ref, mapper, index)
            self.place = 0x70 + (self.place - 0x70 + 1) % 8
            batch.append((granter, ref, flags, self.place << 12))
        self.calls.append((mapper, 0, self.m.start_map(mapper, *batch), len(batch)))

    @rule(
        mapper=domains,
        ops=st.lists(
            st.tuples(guests, refs, st.sampled_from([HOST, RO, DEVICE, DEVICE_RO]), st.integers(0x70, 0x74)),
            min_size=1,
            max_size=4,
        ),
    )
    def start_map(self, mapper: int, ops: list[tuple[int, int, int, int]]) -> None:
        if self.alive(mapper) and self.m.grants.busy < 12:
            batch = [(dom, ref, flags, addr << 12) for dom, ref, flags, addr in ops]
            self.calls.append((mapper, 0, self.m.start_map(mapper, *batch), len(batch)))

    @rule(data=st.data())
    @precondition(lambda self: self.handles)
    def start_unmap(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.handles))
        self.handles.remove(chosen)
        mapper, handle, host, dev = chosen
        if self.alive(mapper):
            self.calls.append((mapper, 1, self.m.start_unmap(mapper, (handle, host, dev)), 1))

    @rule(domain=domains)
    def step(self, domain: int) -> None:
        self.m.step(DomId(domain))

    @rule()
    def everybody(self) -> None:
        self.m.pump()

    @rule(frozen=domains, chance=st.integers(0, 3))
    def a_second_passes(self, frozen: int, chance: int) -> None:
        self.m.wait(1.1 if not chance else 0.1, *([frozen] if not chance else []))

    @rule(guest=guests, chance=st.integers(0, 3))
    def die(self, guest: int, chance: int) -> None:
        self.age += not chance
        if self.alive(guest) and self.age > 1 and not chance:
            self.m.destroy(DomId(guest))

    @rule(chance=st.integers(0, 3))
    def restart_domio(self, chance: int) -> None:
        if chance:
            return
        self.m.grants.release_mappings(self.m.now, ONE)
        old, self.m.epoch = self.m.epoch, self.m.iommu.reset(BDF)
        fenced = self.m.request((0, 1, True), epoch=old)
        assert all(result.fault == FAULT_EPOCH for result in fenced)

    @rule(gfn=st.integers(0, 3))
    def balloon(self, gfn: int) -> None:
        entry = self.m.p2m.get(gfn)
        if entry is not None:
            self.m.p2m.clear(Gfn(gfn))
            self.m.frames.release(entry.mfn)
            assert DONE not in self.m.request((gfn << 12, 1, True))
        else:
            self.m.p2m.set(Gfn(gfn), self.m.frames.allocate_ram(ONE, 0), P2mType.RAM)

    @rule(
        page=st.sampled_from([0, 1, 2, 3, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77]),
        write=st.booleans(),
    )
    def dma(self, page: int, write: bool) -> None:
        self.seen = (self.seen + 1) & 255
        self.m.staging.data[:2] = bytes((self.seen, 1))
        said = self.m.iommu.lookup(ONE, page)
        waiting = self.m.service.waiting(BDF)
        result = self.m.request(((page << 12) + 8, 2, write))
        if said is None or (write and not said[1]):
            # Behind a batch that waits it may come to be allowed; at once it is not.
            assert result == [] if waiting else result[0] != DONE
        elif result:
            assert result[0] == DONE

    @rule(guest=guests, index=indexes)
    def touch(self, guest: int, index: int) -> None:
        if self.alive(guest):
            self.seen = (self.seen + 1) & 255
            dom = self.m.doms[DomId(guest)]
            self.m.process(guest).page(dom.ram[index])[:2] = bytes((self.seen, 2))

    def collect(self) -> None:
        """Handles of the calls that were answered meanwhile."""
        for call in [c for c in self.calls if len(c[2]) == c[3]]:
            mapper, kind, answers, _ = call
            self.calls.remove(call)
            if kind == 0 and self.alive(mapper):
                for a in answers:
                    if a.status == 0:
                        device = a.flags & GNTMAP_device_map
                        host = a.host_addr if a.flags & HOST else 0
                        self.handles.append((mapper, a.handle, host, a.dev_bus_addr if device else 0))

    @invariant()
    def records_are_consistent(self) -> None:
        self.collect()
        assert self.m.grants.check() == []

    @invariant()
    def io_entries_are_owned_or_granted(self) -> None:
        m = self.m
        for page in [*range(0x10), *range(0x70, 0x78)]:
            found = m.iommu.lookup(ONE, page)
            if found is None:
                continue
            mfn, writable = found
            if m.frames.is_ram_of(mfn, ONE):
                continue
            table = [t for d in (2, 3) if (t := m.grants.table(DomId(d))) is not None]
            entries = [e for t in table for e in t.active.values() if e.mfn == mfn and e.grantee == ONE]
            if self.owner == "native":
                assert any(e.device_write if writable else e.device_read + e.device_write for e in entries)
            assert any(e.bits & (0x10 if writable else 0x08) for e in entries)
            assert m.frames.references(mfn) > 0

    @invariant()
    def the_tlb_agrees_with_the_tables(self) -> None:
        for page, value in self.m.iommu.tlb.of(ONE).items():
            found = self.m.iommu.lookup(ONE, page)
            assert found is not None
            mfn, writable = found
            assert value >> 2 == mfn
            assert bool(value & 2) == writable

    @invariant()
    def descriptors_show_granted_frames_only(self) -> None:
        """A process that kept every descriptor it ever got reaches no frame whose granter may think it private."""
        m = self.m
        for domain in (1, 2, 3):
            process = m.doms[DomId(domain)].process
            for number, writable in process.descriptors.items() if process else ():
                live = [f for f, (w, _) in m.memory.placed.items() if w == number]
                for mfn in live:
                    if mfn in m.doms[DomId(domain)].ram:
                        continue
                    owner = next(d for d in (2, 3) if mfn in m.doms[DomId(d)].ram)
                    active = m.table(owner).active.values()
                    entries = [e for e in active if e.mfn == mfn and e.grantee == domain]
                    assert any(e.bits & (0x10 if writable else 0x08) for e in entries)

    @invariant()
    def both_sides_see_the_same_bytes(self) -> None:
        m = self.m
        for domain in (2, 3):
            dom = m.doms[DomId(domain)]
            if dom.process is None:
                continue
            for mfn in dom.ram[:4]:
                if not m.grants.moving(mfn) and m.frames.owner(mfn) == domain:
                    assert dom.process.page(mfn) is m.memory.page(mfn)

    def teardown(self) -> None:
        m = self.m
        m.pump()
        m.grants.release_mappings(m.now, ONE)
        for domain in (2, 3):
            if self.alive(domain):
                m.destroy(DomId(domain))
            else:
                m.frames.release_domain(DomId(domain))
        m.pump()
        m.clean()
        assert all(m.grants.quiet(DomId(d)) for d in (1, 2, 3))
        assert all(m.frames.extent_of(DomId(d)) is None for d in (2, 3))


Everything.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestEverything = Everything.TestCase


class EverythingHvm(Everything):
    """The same with a driver domain that is a PVH guest."""

    owner = "hvm"


EverythingHvm.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestEverythingHvm = EverythingHvm.TestCase


def test_a_batch_is_of_no_more_bytes_than_the_staging_memory_has() -> None:
    """A thousand items that all name the same megabyte would keep the hypervisor busy for a second a message: nothing of it is done."""
    m = Machine("pv")
    results: list[DmaResult] = []
    items = [DmaItem(0, 60_000, False, 0)] * 2
    m.service.submit(m.now, DmaBatch(BDF, m.epoch, items, []), m.staging, results.append)
    assert results[0].reason is FaultReason.MALFORMED
    assert m.iommu.device(BDF).requests == 0
    assert m.request((0, 60_000, False)) == [DONE]
