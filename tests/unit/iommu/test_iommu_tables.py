"""I/O page tables against a dictionary, and their form in memory against the VT-d specification."""

from __future__ import annotations

import contextlib
import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.addresses import Mfn
from hypervisor.core.errors import XenError
from hypervisor.core.iommu_tables import PAGE_LIMIT, READ, WRITE, IoPageTables, XenPool

RW = READ | WRITE


class Frames:
    """Machine memory as a dictionary of pages."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def create_extent(self, base: Mfn, frames: int) -> None:
        pass

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        return bytes(self.pages.setdefault(mfn, bytearray(4096))[offset : offset + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        self.pages.setdefault(mfn, bytearray(4096))[offset : offset + len(data)] = data


def tree(frames: int = 0xC00) -> tuple[IoPageTables, Frames, XenPool]:
    memory = Frames()
    pool = XenPool(memory, frames=frames)  # type: ignore[arg-type]  # what the tables use of it
    return IoPageTables(memory, pool), memory, pool  # type: ignore[arg-type]  # as above


def walk_by_hand(memory: Frames, root: int, page: int) -> tuple[int, int] | None:
    """(frame, access) as a VT-d walker would read it, written from the specification."""
    table = root
    for level in (4, 3, 2, 1):
        (entry,) = struct.unpack_from("<Q", memory.pages[table], (page >> (level - 1) * 9) % 512 * 8)
        if not entry & 3:
            return None
        assert entry & ~(0x000F_FFFF_FFFF_F000 | 0x83) == 0, "reserved bits"
        frame = (entry >> 12) & (1 << 40) - 1
        if level == 1 or entry >> 7 & 1:
            low = (1 << (level - 1) * 9) - 1
            assert frame & low == 0, "a misaligned leaf"
            return frame | page & low, entry & 3
        table = frame
    raise AssertionError


def test_aligned_ranges_get_large_leaves() -> None:
    """1 GiB and 2 MiB leaves where both addresses are aligned; 4 KiB around them; few tables."""
    t, memory, _ = tree()
    t.map(0, Mfn(1 << 18), (1 << 18) + 512 + 3, RW)
    assert t.leaves[1:] == [3, 1, 1]
    assert t.table_count == 4
    assert [s.kind for s in t.walk(5)] == ["table", "leaf"]
    assert [s.level for s in t.walk((1 << 18) + 513)] == [4, 3, 2, 1]
    assert walk_by_hand(memory, t.root, (1 << 18) + 514) == ((2 << 18) + 514, RW)
    t.map(1 << 20, Mfn(512 + 1), 512, READ)  # aligned on one side only
    assert t.leaves[1:] == [515, 1, 1]


def test_a_change_splits_and_a_run_that_is_whole_again_is_promoted() -> None:
    """One page out of a 1 GiB leaf: two splits; put back: one leaf again."""
    t, _, pool = tree()
    t.map(0, Mfn(1 << 18), 1 << 18, RW)
    used = pool.used
    t.unmap(1000, 1)
    assert t.leaves[1:] == [511, 511, 0]
    assert t.lookup(1000) is None
    found = t.lookup(1001)
    assert found is not None
    assert found.mfn == (1 << 18) + 1001
    t.map(1000, Mfn((1 << 18) + 1000), 1, READ)  # the right frame with other rights is not a run
    assert t.leaves[1:] == [512, 511, 0]
    t.map(1000, Mfn((1 << 18) + 1000), 1, RW)
    assert t.leaves[1:] == [0, 0, 1]
    assert pool.used == used


def test_pages_entered_one_by_one_become_a_large_leaf() -> None:
    """As a domain's memory is populated page by page."""
    t, _, _ = tree()
    for i in range(512):
        t.map(1024 + i, Mfn(4096 + i), 1, RW)
    assert t.leaves[1:] == [0, 1, 0]


def test_all_frames_come_back() -> None:
    """Unmapping everything leaves the root alone; destroying leaves nothing."""
    t, _, pool = tree()
    t.map(7, Mfn(9), 3000, RW)
    t.map(1 << 30, Mfn(512), 1024, RW)
    t.unmap(0, PAGE_LIMIT)
    assert (t.table_count, t.leaves) == (1, [0, 0, 0, 0])
    t.destroy()
    assert pool.used == 0


def test_want_of_memory() -> None:
    """A map that cannot be leaves nothing of its range; an unmap takes away what it should even then."""
    t, _, pool = tree(frames=7)
    t.map(0, Mfn(1 << 18), 1 << 18, RW)  # root, one table, two in reserve
    with pytest.raises(XenError) as caught:
        t.map(1 << 27, Mfn(3), 512 * 3, RW)
    assert caught.value.errno == errno.ENOMEM
    assert t.lookup(1 << 27) is None
    with contextlib.suppress(XenError):
        while True:
            pool.allocate()
    with pytest.raises(XenError):
        t.map(5, Mfn(3), 1, RW)  # a split for a map does not use the reserve up, ...
    t.map(0, Mfn(1 << 18), 1 << 18, RW)
    t.unmap(5, 1)
    assert t.lookup(5) is None
    assert t.lookup(6) is not None  # ... one for an unmap does
    t.unmap(1 << 17, 1)
    assert t.lookup(1 << 17) is None
    assert t.lost_leaves == 1


@pytest.mark.parametrize(("page", "count"), [(-1, 1), (0, 0), (PAGE_LIMIT, 1), (PAGE_LIMIT - 1, 2)])
def test_bad_ranges(page: int, count: int) -> None:
    """Nothing outside the 48 bits."""
    t, _, _ = tree()
    with pytest.raises(ValueError, match="I/O pages"):
        t.map(page, Mfn(1), count, RW)
    with pytest.raises(ValueError, match="I/O pages"):
        t.unmap(page, count)


BASES = st.sampled_from([0, 1, 500, 511, 512, 1024, (1 << 18) - 1, 1 << 18, (1 << 27) - 3])
COUNTS = st.sampled_from([1, 2, 3, 11, 512, 513, 1024])
STEP = st.tuples(st.booleans(), BASES, COUNTS, st.sampled_from([0, 512, 1, 1 << 18]), st.sampled_from([1, 3]))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=12))
def test_against_a_dictionary(steps: list[tuple[bool, int, int, int, int]]) -> None:
    """Whatever is mapped, replaced and removed: lookup, our walk and a walk by hand say what a dictionary says, and the
    counts of leaves and tables are right."""
    t, memory, pool = tree()
    model: dict[int, tuple[int, int]] = {}
    for add, page, count, mfn, access in steps:
        if add:
            t.map(page, Mfn(mfn), count, access)
            model.update({page + i: (mfn + i, access) for i in range(count)})
        else:
            t.unmap(page, count)
            for i in range(count):
                model.pop(page + i, None)
    edges = {
        p for _, page, count, _, _ in steps for p in (page - 1, page, page + count // 2, page + count - 1)
    }
    for page in {p for p in edges if p >= 0} | set(list(model)[:50]):
        found = t.lookup(page)
        assert (None if found is None else (found.mfn, found.access)) == model.get(page)
        assert walk_by_hand(memory, t.root, page) == model.get(page)
        last = t.walk(page)[-1]
        assert (last.kind == "leaf") == (page in model)
    assert t.leaves[1] + 512 * t.leaves[2] + (1 << 18) * t.leaves[3] == len(model)
    assert pool.used == t.table_count + 2
