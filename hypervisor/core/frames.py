"""The machine frame table: which domain owns which frame, of which kind, and how many hold it.

A domain's frames are one contiguous MFN range, its *extent*: room for guest RAM first, then its Xen-heap
frames (decision 0001). Populating and giving back memory changes the state of frames in the range; nothing
moves. A frame never changes hands: its owner is the owner of the extent for as long as anybody refers to it,
and a range is used again only when no reference to any of its frames is left.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EINVAL, ENOMEM
from itertools import groupby, pairwise

from bus.addresses import DomId, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.errors import XenError
from hypervisor.core.ports import MachineMemory

FREE = 0
RAM = 1
XENHEAP = 2
LEAVING = 4
"""Flag: given back by its owner, but still referred to; freed when the last reference is dropped."""


@dataclass(slots=True)
class Extent:
    """One domain's MFN range. `state` and `refs` are indexed by `mfn - base`."""

    domain: DomId
    base: Mfn
    ram_capacity: int
    """Frames of guest RAM there is room for; Xen-heap frames follow."""
    state: bytearray
    refs: array[int]
    """References beside the allocation itself: grants, IOMMU entries, foreign maps, FIFO event pages."""
    ram: int = 0
    """Frames of guest RAM allocated now (struct domain's tot_pages), those that are leaving included."""
    xenheap: int = 0
    referenced: int = 0
    """How many frames have a reference."""
    search: int = 0
    """No frame of RAM below this index is free."""
    dying: bool = False

    @property
    def count(self) -> int:
        return len(self.state)

    @property
    def end(self) -> int:
        return self.base + len(self.state)


class FrameTable:
    """All machine memory. Raises XenError(ENOMEM) where memory, or room in a range, is used up."""

    def __init__(self, memory: MachineMemory, config: MachineConfig) -> None:
        self._memory = memory
        self._config = config
        self._bases: list[int] = []
        self._extents: list[Extent] = []
        self._by_domain: dict[DomId, Extent] = {}
        self._used = 0
        self._claims: dict[DomId, int] = {}
        self.on_extent_dropped: Callable[[DomId, Mfn], None] = lambda domain, base: None
        """Called when the last frame of a dying domain is free and its range may be used again."""

    # -- the machine -----------------------------------------------------------------------------------------

    @property
    def total_pages(self) -> int:
        return self._config.total_pages

    @property
    def free_pages(self) -> int:
        """Frames that no domain owns (claims not subtracted)."""
        return self._config.total_pages - self._used

    @property
    def outstanding_claims(self) -> int:
        return sum(self._claims.values())

    def max_mfn(self) -> Mfn:
        """Highest MFN in any range (XENMEM_maximum_ram_page)."""
        return Mfn(self._extents[-1].end - 1 if self._extents else self._config.first_mfn)

    # -- ranges ----------------------------------------------------------------------------------------------

    def create_extent(self, domain: DomId, ram_capacity: int) -> Extent:
        """Give `domain` its MFN range, empty. ENOMEM if there is no room in the MFN space for it."""
        if domain in self._by_domain:
            raise AssertionError(f"domain {domain} has a range already")
        count = ram_capacity + self._config.xenheap_frames
        base = self._find_range(count)
        extent = Extent(domain, base, ram_capacity, bytearray(count), array("I", bytes(4 * count)))
        index = bisect_right(self._bases, base)
        self._bases.insert(index, base)
        self._extents.insert(index, extent)
        self._by_domain[domain] = extent
        self._memory.create_extent(base, count)
        return extent

    def _find_range(self, count: int) -> Mfn:
        taken = [*self._config.mfn_holes, *((int(e.base), e.end) for e in self._extents)]
        taken += [(0, self._config.first_mfn), (self._config.mfn_limit, 1 << 63)]
        taken.sort()
        align = self._config.extent_alignment
        reached = 0
        for (_, end), (start, _) in pairwise(taken):
            reached = max(reached, end)
            first = -(-reached // align) * align
            if first + count <= start:
                return Mfn(first)
        raise XenError(ENOMEM, f"no room for {count} frames in the MFN space")

    def discard_extent(self, domain: DomId) -> None:
        """Take back a range in which nothing was allocated."""
        extent = self._by_domain[domain]
        if extent.ram or extent.xenheap:
            raise AssertionError("the range is in use")
        self._remove(extent)

    def extent_of(self, domain: DomId) -> Extent | None:
        """The domain's range, if it has one."""
        return self._by_domain.get(domain)

    def extents(self) -> Iterator[Extent]:
        """All ranges by MFN."""
        return iter(self._extents)

    def find(self, mfn: int) -> Extent | None:
        """The range that holds this MFN."""
        index = bisect_right(self._bases, mfn) - 1
        if index >= 0:
            extent = self._extents[index]
            if mfn < extent.end:
                return extent
        return None

    # -- frames ----------------------------------------------------------------------------------------------

    def owner(self, mfn: int) -> DomId | None:
        """The domain that owns the frame now; None for a frame that is free, leaving, or not machine
        memory."""
        extent = self.find(mfn)
        if extent is None or extent.state[mfn - extent.base] not in (RAM, XENHEAP):
            return None
        return extent.domain

    def owned_of(self, domain: DomId) -> set[int]:
        """All frames that the domain owns now."""
        extent = self._by_domain.get(domain)
        if extent is None:
            return set()
        return {mfn for mfn, state in enumerate(extent.state, extent.base) if state in (RAM, XENHEAP)}

    def owners(self, mfn: int, count: int) -> Iterator[tuple[DomId, int, int]]:
        """(owner, first, count) of the frames from `mfn` on that somebody owns now, in as few runs as there can be."""
        end = mfn + count
        while mfn < end:
            extent = self.find(mfn)
            if extent is None:
                mfn += 1
                continue
            state, base = extent.state, extent.base
            stop = min(end, extent.end)
            kinds = state[mfn - base : stop - base]
            if kinds.count(RAM) == stop - mfn:  # nearly always
                yield extent.domain, mfn, stop - mfn
                mfn = stop
                continue
            for owned, group in groupby(kinds, lambda kind: kind in (RAM, XENHEAP)):
                length = len(list(group))
                if owned:
                    yield extent.domain, mfn, length
                mfn += length

    def is_ram_of(self, mfn: int, domain: DomId) -> bool:
        """The frame is guest RAM that the domain owns now."""
        extent = self._by_domain.get(domain)
        return (
            extent is not None and extent.base <= mfn < extent.end and extent.state[mfn - extent.base] == RAM
        )

    def kind(self, mfn: int) -> int:
        """FREE, RAM or XENHEAP (with LEAVING or'ed in)."""
        extent = self.find(mfn)
        return FREE if extent is None else extent.state[mfn - extent.base]

    def references(self, mfn: int) -> int:
        """How many references are held on the frame beside its allocation."""
        extent = self.find(mfn)
        return 0 if extent is None else extent.refs[mfn - extent.base]

    def ram_pages(self, domain: DomId) -> int:
        """The domain's tot_pages."""
        extent = self._by_domain.get(domain)
        return 0 if extent is None else extent.ram

    def room(self, domain: DomId) -> int:
        """Frames that the domain could get now, by the machine's memory and others' claims."""
        if not self._claims:
            return self._config.total_pages - self._used
        claimed_by_others = self.outstanding_claims - self._claims.get(domain, 0)
        return max(0, self.free_pages - claimed_by_others)

    def allocate_ram(self, domain: DomId, order: int) -> Mfn:
        """2^order contiguous aligned frames of guest RAM, reading as zero. ENOMEM if there are none."""
        extent = self._by_domain.get(domain)
        count = 1 << order
        if extent is None or extent.dying or count > self.room(domain):
            raise XenError(ENOMEM)
        wanted, state, limit = bytes(count), extent.state, extent.ram_capacity
        index = extent.search
        while True:
            index = state.find(wanted, index, limit)
            if index < 0:
                raise XenError(ENOMEM)
            misaligned = (extent.base + index) & (count - 1)
            if not misaligned:
                break
            index += count - misaligned
        self._take(extent, index, count, RAM)
        if index == extent.search:
            extent.search = index + count
        return Mfn(extent.base + index)

    def claim_frame(self, domain: DomId, mfn: Mfn) -> bool:
        """Take this very free frame of the domain's own range as guest RAM. False if that cannot be."""
        extent = self._by_domain.get(domain)
        if extent is None or extent.dying or not extent.base <= mfn < extent.base + extent.ram_capacity:
            return False
        if extent.state[mfn - extent.base] != FREE or not self.room(domain):
            return False
        self._take(extent, mfn - extent.base, 1, RAM)
        return True

    def allocate_xenheap(self, domain: DomId, count: int = 1) -> Mfn:
        """Contiguous Xen-heap frames that the domain's guest may map, reading as zero. ENOMEM if there are
        none."""
        extent = self._by_domain.get(domain)
        if extent is None or extent.dying or count > self.room(domain):
            raise XenError(ENOMEM)
        index = extent.state.find(bytes(count), extent.ram_capacity)
        if index < 0:
            raise XenError(ENOMEM, "the domain's Xen-heap frames are used up")
        self._take(extent, index, count, XENHEAP)
        return Mfn(extent.base + index)

    def _take(self, extent: Extent, index: int, count: int, kind: int) -> None:
        extent.state[index : index + count] = bytes((kind,)) * count
        if kind == RAM:
            extent.ram += count
        else:
            extent.xenheap += count
        self._used += count
        claim = self._claims.get(extent.domain)
        if claim is not None:
            if claim > count:
                self._claims[extent.domain] = claim - count
            else:
                del self._claims[extent.domain]

    def release(self, mfn: Mfn) -> bool:
        """The owner gives the frame back. True if it is free now, False if a reference still holds it.

        AssertionError if nobody owns it: the caller checks first."""
        extent = self.find(mfn)
        if extent is None or extent.state[mfn - extent.base] not in (RAM, XENHEAP):
            raise AssertionError(f"frame {mfn:#x} has no owner")
        index = mfn - extent.base
        if extent.refs[index]:
            extent.state[index] |= LEAVING
            return False
        self._free(extent, index)
        return True

    def _free(self, extent: Extent, index: int) -> None:
        if extent.state[index] & RAM:
            extent.ram -= 1
            if index < extent.search:
                extent.search = index
        else:
            extent.xenheap -= 1
        extent.state[index] = FREE
        self._used -= 1
        self._memory.clear(Mfn(extent.base + index))
        if extent.dying:
            self._drop_if_empty(extent)

    # -- references ------------------------------------------------------------------------------------------

    def get_ref(self, mfn: Mfn) -> None:
        """Hold the frame. XenError(ENOMEM) if the count is full. AssertionError for a frame that nobody
        owns."""
        extent = self.find(mfn)
        if extent is None or extent.state[mfn - extent.base] not in (RAM, XENHEAP):
            raise AssertionError(f"frame {mfn:#x} has no owner")
        index = mfn - extent.base
        if extent.refs[index] == 0xFFFFFFFF:
            raise XenError(ENOMEM, "the frame's reference count is full")
        if not extent.refs[index]:
            extent.referenced += 1
        extent.refs[index] += 1

    def put_ref(self, mfn: Mfn) -> None:
        """Let go of the frame: the last one frees a frame that its owner has given back."""
        extent = self.find(mfn)
        if extent is None or not extent.refs[mfn - extent.base]:
            raise AssertionError(f"frame {mfn:#x} has no reference to drop")
        index = mfn - extent.base
        extent.refs[index] -= 1
        if not extent.refs[index]:
            extent.referenced -= 1
            if extent.state[index] & LEAVING:
                self._free(extent, index)

    # -- the end of a domain ---------------------------------------------------------------------------------

    def release_domain(self, domain: DomId) -> bool:
        """Give all frames of a dying domain back. True if all are free; else the range lives on, as a
        zombie's, until its last reference is dropped (`on_extent_dropped` is then called)."""
        self._claims.pop(domain, None)
        extent = self._by_domain.get(domain)
        if extent is None:
            return True
        extent.dying = True
        if not extent.referenced:
            self._used -= extent.ram + extent.xenheap
            extent.ram = extent.xenheap = 0
            self._memory.clear(extent.base, extent.count)
            extent.state = bytearray(extent.count)
            self._drop_if_empty(extent)
            return True
        start = 0
        for index in [i for i, count in enumerate(extent.refs) if count] + [extent.count]:
            self._free_run(extent, start, index)
            if index < extent.count and extent.state[index] in (RAM, XENHEAP):
                extent.state[index] |= LEAVING
            start = index + 1
        self._drop_if_empty(extent)
        return domain not in self._by_domain

    def _free_run(self, extent: Extent, start: int, end: int) -> None:
        """Free what is allocated in a part of a range of which nothing is referenced: in one step, however much it is."""
        states = extent.state[start:end]
        ram, xenheap = states.count(RAM), states.count(XENHEAP)
        if not ram and not xenheap:
            return
        extent.ram -= ram
        extent.xenheap -= xenheap
        self._used -= ram + xenheap
        extent.state[start:end] = bytes(end - start)
        extent.search = min(extent.search, start)
        self._memory.clear(Mfn(extent.base + start), end - start)

    def _drop_if_empty(self, extent: Extent) -> None:
        if extent.ram or extent.xenheap:
            return
        self._remove(extent)
        self.on_extent_dropped(extent.domain, extent.base)

    def _remove(self, extent: Extent) -> None:
        index = bisect_right(self._bases, extent.base) - 1
        del self._bases[index], self._extents[index], self._by_domain[extent.domain]
        self._memory.drop_extent(extent.base)

    # -- claims (XENMEM_claim_pages) -------------------------------------------------------------------------

    def claim(self, domain: DomId, pages: int) -> None:
        """Stake a claim so that the domain's total reaches `pages`. 0 drops it. EINVAL if there is a claim
        already or the domain has as many pages; ENOMEM if memory does not suffice."""
        if pages == 0:
            self._claims.pop(domain, None)
            return
        more = pages - self.ram_pages(domain)
        if domain in self._claims or more <= 0:
            raise XenError(EINVAL)
        if more > self.room(domain):
            raise XenError(ENOMEM)
        self._claims[domain] = more

    def claimed(self, domain: DomId) -> int:
        """Pages of the domain's claim that are not allocated yet (outstanding_pages)."""
        return self._claims.get(domain, 0)

    # -- views -----------------------------------------------------------------------------------------------

    def ram_runs(self, domain: DomId) -> list[list[int]]:
        """[[first MFN, count], ...]: the guest RAM that the domain owns now."""
        extent = self._by_domain.get(domain)
        if extent is None:
            return []
        return [[extent.base + i, n] for i, n in _runs(extent.state, RAM, extent.ram_capacity)]


def _runs(state: bytearray, kind: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each run of `kind` below `limit`."""
    wanted = bytes((kind,))
    index = state.find(wanted, 0, limit)
    while index >= 0:
        tail = state[index:limit]
        length = len(tail) - len(tail.lstrip(wanted))
        yield index, length
        index = state.find(wanted, index + length, limit)
