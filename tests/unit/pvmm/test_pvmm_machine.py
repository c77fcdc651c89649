"""Any sequence of memory operations, sensible or hostile, keeps the invariants: every count is what the
tables say, no table or descriptor page is mapped writable, no frame is mapped that is neither owned nor
granted."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bus.abi import xen
from bus.abi.grant_table import GNTMAP_contains_pte, GNTMAP_host_map, GNTMAP_readonly
from bus.addresses import DomId, Mfn, VcpuId
from domains.pv.api import GuestFault
from tests.unit.pvmm.pvmm_support import BASE, KERNEL, KERNEL_RO, KERNEL_RW, TABLE, Guest, P, Registers

RAM = 24
FOREIGN = Mfn(0x77)

mfns = st.one_of(
    st.integers(BASE, BASE + RAM + 1),
    st.integers(BASE + 5, BASE + 12),
    st.sampled_from([BASE - 1, FOREIGN, 0, 0x3FFFF, 0x50000, (1 << 40) - 1]),
)
tables = st.integers(BASE, BASE + 12)
flags = st.sampled_from(
    [0, P, KERNEL_RO, KERNEL_RW, TABLE, TABLE | 1 << 63, KERNEL_RO | 0x80, 1 << 52 | 1, TABLE | 0x100]
)
slots = st.sampled_from([0, 1, 5, 6, 7, 8, 9, 10, 256, 260, 272, 511])


class Operations(RuleBasedStateMachine):
    """A guest with a few frames, so that they are used as everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest(ram=RAM)
        self.guest.mmu.writable_page_tables = True
        self.guest.frames.add_foreign(FOREIGN, DomId(1), memoryview(bytearray(4096)), writable=True)
        self.held: list[tuple[int, bool]] = []

    def update_words(self, ptr: int, value: int) -> None:
        """A request that does not go through guest memory (which may be unmapped by now)."""
        self.guest.mmu._updates._run([ptr, value], 0)

    def ext(self, command: int, arg1: int, arg2: int = 0) -> int:
        return self.guest.mmu._ops.operate(command, arg1, arg2)

    @rule(table=tables, slot=slots, mfn=mfns, flags=flags, command=st.sampled_from([0, 0, 0, 2, 3]))
    def update(self, table: int, slot: int, mfn: int, flags: int, command: int) -> None:
        self.update_words(table << 12 | slot << 3 | command, mfn << 12 | flags)

    @rule(mfn=tables)
    def make_read_only(self, mfn: int) -> None:
        self.update_words(self.guest.pte(mfn), mfn << 12 | KERNEL_RO)

    @rule(mfn=tables)
    def unmap(self, mfn: int) -> None:
        self.update_words(self.guest.pte(mfn), 0)

    @rule(mfn=mfns, level=st.integers(0, 3))
    def pin(self, mfn: int, level: int) -> None:
        self.ext(level, mfn)

    @rule(mfn=mfns)
    def unpin(self, mfn: int) -> None:
        self.ext(xen.MMUEXT_UNPIN_TABLE, mfn)

    @rule(mfn=mfns)
    def kernel_root(self, mfn: int) -> None:
        self.ext(xen.MMUEXT_NEW_BASEPTR, mfn)

    @rule(mfn=st.one_of(mfns, st.just(0)))
    def user_root(self, mfn: int) -> None:
        self.ext(xen.MMUEXT_NEW_USER_BASEPTR, mfn)

    @rule(pfn=st.integers(0, RAM), mfn=mfns, flags=flags)
    def va_mapping(self, pfn: int, mfn: int, flags: int) -> None:
        self.guest.mmu.update_va_mapping(KERNEL + (pfn << 12), mfn << 12 | flags, xen.UVMF_INVLPG)

    @rule(mfns_=st.lists(mfns, max_size=2))
    def gdt(self, mfns_: list[int]) -> None:
        self.guest.mmu.install_gdt(VcpuId(0), mfns_, 512 * len(mfns_))

    @rule(pfn=st.integers(0, RAM), entries=st.sampled_from([0, 3, 8192]))
    def ldt(self, pfn: int, entries: int) -> None:
        self.ext(xen.MMUEXT_SET_LDT, KERNEL + (pfn << 12), entries)
        self.guest.mmu.ldt_fault(self.guest.mmu.ldt_base(VcpuId(0)), VcpuId(0))

    @rule(mfn=mfns, slot=slots, value=st.sampled_from([0, 0x00CF_9300_0000_FFFF, 0x0000_8900_0000_0067]))
    def descriptor(self, mfn: int, slot: int, value: int) -> None:
        self.guest.mmu.update_descriptor(mfn << 12 | slot << 3, value)

    @rule(mfn=mfns, source=mfns, copy=st.booleans())
    def clear_or_copy(self, mfn: int, source: int, copy: bool) -> None:
        self.ext(xen.MMUEXT_COPY_PAGE if copy else xen.MMUEXT_CLEAR_PAGE, mfn, source)

    @rule(pfn=st.integers(0, RAM), slot=slots, mfn=mfns, flags=flags)
    def guest_store(self, pfn: int, slot: int, mfn: int, flags: int) -> None:
        """A store of the guest kernel: where it may write, it writes; else the assist gets it."""
        va, value = KERNEL + (pfn << 12) + slot * 8, mfn << 12 | flags
        try:
            self.guest.mmu.write_virtual(va, struct.pack("<Q", value))
        except GuestFault:
            code = BASE + 14
            self.guest.frames.octets[code - BASE << 12 : (code - BASE << 12) + 3] = b"\x48\x89\x07"
            regs = Registers()
            regs.rip, regs.rdi, regs.rax = self.guest.va(code), va, value
            self.guest.mmu.write_fault(va, 3, regs)

    @rule(pfn=st.integers(0, RAM), slot=slots, mfn=mfns, read_only=st.booleans(), contains=st.booleans())
    def grant_map(self, pfn: int, slot: int, mfn: int, read_only: bool, contains: bool) -> None:
        kind = (
            GNTMAP_host_map | (GNTMAP_readonly if read_only else 0) | (GNTMAP_contains_pte if contains else 0)
        )
        address = BASE + pfn << 12 | slot << 3 if contains else KERNEL + (pfn << 12)
        self.guest.mmu.create_grant_mapping(address, mfn, kind)

    @rule(pfn=st.integers(0, RAM), mfn=mfns, new=st.one_of(st.none(), st.integers(0, RAM)))
    def grant_unmap(self, pfn: int, mfn: int, new: int | None) -> None:
        new_address = 0 if new is None else KERNEL + (new << 12)
        self.guest.mmu.replace_grant_mapping(KERNEL + (pfn << 12), mfn, new_address, GNTMAP_host_map)

    @rule(mfn=mfns, writable=st.booleans())
    def hold(self, mfn: int, writable: bool) -> None:
        if self.guest.mmu.hold_for_grant(mfn, writable) == 0:
            self.held.append((mfn, writable))

    @rule()
    def release_hold(self) -> None:
        if self.held:
            self.guest.mmu.release_from_grant(*self.held.pop())

    @rule(mfn=mfns)
    def release(self, mfn: int) -> None:
        self.guest.mmu.release_frames([mfn])

    @rule(mfn=st.integers(BASE, BASE + RAM - 1))
    def populate(self, mfn: int) -> None:
        self.guest.mmu.populate_frames([mfn])

    @rule(heap=st.integers(0, 1), shared=st.booleans())
    def share(self, heap: int, shared: bool) -> None:
        self.guest.mmu.share_frame(BASE + RAM + heap, shared)

    @rule(pfn=st.integers(0, RAM), length=st.integers(1, 9000))
    def read(self, pfn: int, length: int) -> None:
        try:
            data = self.guest.mmu.read_virtual(KERNEL + (pfn << 12), length)
        except GuestFault:
            return
        assert len(data) == length

    @invariant()
    def all_is_well(self) -> None:
        assert self.guest.mmu.check_invariants() == []

    @invariant()
    def remembered_walks_are_true(self) -> None:
        memory = self.guest.mmu._memory
        for key, found in self.guest.mmu.pages.walks.items():
            va = (key & (1 << 43) - 1) << 21
            assert memory._walk(va, key >> 43) == found


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 4))
def test_garbage_tables(seed: int, level: int) -> None:
    """Tables full of chance: accepted or refused, but never counted wrong."""
    chance = random.Random(seed)
    guest = Guest(ram=RAM)
    pages = range(BASE + 6, BASE + 12)
    for mfn in pages:
        assert guest.read_only(mfn) == 0
        for slot in range(512):
            if chance.random() < 0.03:
                target = chance.choice([*pages, BASE + 15, BASE - 1, chance.getrandbits(40)])
                low = chance.choice([TABLE, KERNEL_RO, KERNEL_RO, chance.getrandbits(12)])
                guest.store(mfn, slot, target << 12 | low)
            elif chance.random() < 0.002:
                guest.store(mfn, slot, chance.getrandbits(64))
    for mfn in pages:
        guest.ext(xen.MMUEXT_PIN_L1_TABLE + chance.randrange(level), mfn)
        guest.clean()
    for mfn in pages:
        guest.ext(xen.MMUEXT_UNPIN_TABLE, mfn)
    guest.clean()
    assert not any(guest.mmu.pages.pinned[mfn - BASE] for mfn in pages)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=0, max_size=160), st.integers(0, 12), st.integers(0, 1 << 32), st.booleans())
def test_garbage_calls(data: bytes, count: int, domid: int, ext: bool) -> None:
    """Random request bytes give an errno, never an exception."""
    guest = Guest(ram=RAM)
    at = guest.va(BASE + 5)
    guest.mmu.write_virtual(at, data)
    call = guest.mmu.mmuext_op if ext else guest.mmu.mmu_update
    rc = call(at, count, at + 2048, domid)
    assert isinstance(rc, int)
    assert -150 < rc <= 0
    guest.clean()


def spawn(guest: Guest, tables_: list[int], data: list[int]) -> None:
    """Linux's fork: four fresh pages become the tables of a new address space, pinned at its top."""
    l4, l3, l2, l1 = tables_
    for mfn in tables_:
        assert guest.ext(xen.MMUEXT_CLEAR_PAGE, mfn) == 0
    guest.store(l4, KERNEL >> 39 & 511, guest.load(guest.l4, KERNEL >> 39 & 511))
    guest.store(l4, 0, l3 << 12 | TABLE)
    guest.store(l3, 0, l2 << 12 | TABLE)
    guest.store(l2, 2, l1 << 12 | TABLE)
    for slot, mfn in enumerate(data):
        guest.store(l1, slot, mfn << 12 | P | 4 | (0 if slot % 3 else 2))
    assert guest.update(*((guest.pte(mfn), mfn << 12 | KERNEL_RO) for mfn in tables_)) == 0
    assert guest.ext(xen.MMUEXT_PIN_L4_TABLE, l4) == 0


def reap(guest: Guest, tables_: list[int]) -> None:
    """Linux's exit: unpin, then make the pages ordinary again."""
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, tables_[0]) == 0
    assert guest.update(*((guest.pte(mfn), mfn << 12 | KERNEL_RW) for mfn in tables_)) == 0


def test_fork_and_exit_leave_nothing_behind() -> None:
    guest = Guest(ram=128)
    mmu = guest.mmu
    before = list(mmu.pages.typed), list(mmu.pages.plain), bytes(mmu.pages.ptype)
    processes = []
    for n in range(6):
        tables_ = list(range(BASE + 40 + 4 * n, BASE + 44 + 4 * n))
        spawn(guest, tables_, list(range(BASE + 70, BASE + 120)))
        processes.append(tables_)
        assert guest.ext(xen.MMUEXT_NEW_BASEPTR, tables_[0]) == 0
        assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, tables_[0]) == 0
        assert mmu.translate(2 << 21, user=True) == BASE + 70 << 12
        # A copy-on-write fault: a new page at slot 1, writable.
        assert mmu.update_va_mapping((2 << 21) + 4096, BASE + 121 << 12 | P | 6, xen.UVMF_INVLPG) == 0
        mmu.write_virtual((2 << 21) + 4096, b"x")
        with pytest.raises(GuestFault):
            mmu.write_virtual((2 << 21) + 8192, b"x")
        guest.clean()
    # The last one's tables cannot go while it runs.
    last = processes.pop()
    assert guest.ext(xen.MMUEXT_UNPIN_TABLE, last[0]) == 0
    assert guest.writable(last[0]) < 0
    assert guest.ext(xen.MMUEXT_NEW_USER_BASEPTR, 0) == 0
    assert guest.ext(xen.MMUEXT_NEW_BASEPTR, guest.l4) == 0
    assert guest.update(*((guest.pte(mfn), mfn << 12 | KERNEL_RW) for mfn in last)) == 0
    for tables_ in processes:
        reap(guest, tables_)
        guest.clean()
    assert (mmu.pages.typed, mmu.pages.plain, bytes(mmu.pages.ptype)) == before
