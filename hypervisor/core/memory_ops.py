"""HYPERVISOR_memory_op: reservations, the guest's physical map, memory maps, claims."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from errno import E2BIG, EACCES, EFAULT, EINVAL, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, ESRCH

from bus.abi import memory as abi
from bus.abi.arch_x86 import ARCH_SHARED_INFO
from bus.abi.hypercalls_model import MAX_FRAMES
from bus.abi.xen import SHARED_INFO, HYPERVISOR_memory_op
from bus.addresses import PAGE_SHIFT, Gfn, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Dying
from hypervisor.core.errors import XenError
from hypervisor.core.frames import FrameTable
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.memory_news import MemoryNews
from hypervisor.core.p2m import GFN_LIMIT, P2mType
from hypervisor.core.physmap import PhysMap
from hypervisor.core.ports import MachineMemory

UNPRIVILEGED_ORDER = 9
"""Largest extent an unprivileged domain may ask for: 2 MiB."""
PRIVILEGED_ORDER = 18
E820_ENTRY = struct.Struct("<QQI")
E820_RAM, E820_RESERVED = 1, 2


class MemoryOps:
    """Lists that are too long for one message are split by the caller's process, as Xen's own
    continuations do.
    """

    def __init__(
        self,
        domains: DomainTable,
        frames: FrameTable,
        physmap: PhysMap,
        news: MemoryNews,
        memory: MachineMemory,
        config: MachineConfig,
        dispatcher: Dispatcher,
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._physmap = physmap
        self._news = news
        self._memory = memory
        self._config = config
        self.resources: dict[int, Callable[[Domain, int, int, int], list[int]]] = {}
        """XENMEM_acquire_resource by type: (domain, id, first frame, count) -> MFNs; count 0 asks for the
        size, which comes back as a list of one number. Raises XenError. Filled by the grant tables and
        ioreq servers."""
        for cmd, handler in (
            (abi.XENMEM_increase_reservation, self._increase_reservation),
            (abi.XENMEM_decrease_reservation, self._decrease_reservation),
            (abi.XENMEM_populate_physmap, self._populate_physmap),
            (abi.XENMEM_maximum_ram_page, self._maximum_ram_page),
            (abi.XENMEM_current_reservation, self._current_reservation),
            (abi.XENMEM_maximum_reservation, self._maximum_reservation),
            (abi.XENMEM_maximum_gpfn, self._maximum_gpfn),
            (abi.XENMEM_add_to_physmap, self._add_to_physmap),
            (abi.XENMEM_add_to_physmap_batch, self._add_to_physmap_batch),
            (abi.XENMEM_remove_from_physmap, self._remove_from_physmap),
            (abi.XENMEM_memory_map, self._memory_map),
            (abi.XENMEM_set_memory_map, self._set_memory_map),
            (abi.XENMEM_machine_memory_map, self._machine_memory_map),
            (abi.XENMEM_exchange, self._exchange),
            (abi.XENMEM_claim_pages, self._claim_pages),
            (abi.XENMEM_acquire_resource, self._acquire_resource),
        ):
            dispatcher.register(HYPERVISOR_memory_op, cmd, handler)

    # -- reservations
    # ---------------------------------------------------------------------------------------------

    def _reservation(self, call: Call) -> tuple[Domain, array[int], int, int] | None:
        """(domain, list of extents, order, how many extents this call may do). None where Xen answers 0, "nothing done". EPERM."""
        op: abi.xen_memory_reservation = call.item
        try:
            domain = self._domains.target(call.domain, op.domid)
        except XenError as error:
            if error.errno == ESRCH:
                return None
            raise
        limit = PRIVILEGED_ORDER if call.domain.privileged else UNPRIVILEGED_ORDER
        if op.extent_order > limit or domain.dying is not Dying.ALIVE:
            return None
        extents = array("Q")
        extents.frombytes(call.array("extent_start"))
        most = len(extents) if call.domain.privileged else max(1, MAX_FRAMES >> op.extent_order)
        return domain, extents, op.extent_order, most

    def allocate(self, domain: Domain, order: int, address_bits: int = 0) -> Mfn | None:
        """One extent within the domain's maximum, or None."""
        extent = self._frames.extent_of(domain.domid)
        count = 1 << order
        if extent is None or extent.ram + count > domain.max_pages:
            return None
        if address_bits and extent.base + extent.ram_capacity > 1 << max(0, address_bits - PAGE_SHIFT):
            return None
        try:
            mfn = self._frames.allocate_ram(domain.domid, order)
        except XenError:
            return None
        self._news.got(domain.domid, mfn, count)
        return mfn

    def _increase_reservation(self, call: Call) -> Result:
        found = self._reservation(call)
        if found is None:
            return self._extents_reply(call, 0, array("Q"))
        domain, given, order, most = found
        extents = array("Q", given)
        done = 0
        for index in range(min(most, len(extents))):
            mfn = self.allocate(domain, order, call.item.mem_flags & 0xFF)
            if mfn is None:
                break
            extents[index] = mfn
            done += 1
        return self._extents_reply(call, done, extents)

    def _populate_physmap(self, call: Call) -> Result:
        found = self._reservation(call)
        if found is None:
            return self._extents_reply(call, 0, array("Q"))
        domain, extents, order, most = found
        if call.item.mem_flags & abi.XENMEMF_populate_on_demand:
            return self._extents_reply(call, 0, extents)
        count, done = 1 << order, 0
        for index, gpfn in enumerate(extents[:most]):
            if domain.p2m is not None and (
                gpfn + count > GFN_LIMIT or self._physmap.is_obstructed(domain, gpfn, count)
            ):
                break
            mfn = self.allocate(domain, order, call.item.mem_flags & 0xFF)
            if mfn is None:
                break
            if domain.p2m is not None:
                try:
                    for step in range(count):
                        domain.p2m.set(Gfn(gpfn + step), Mfn(mfn + step), P2mType.RAM)
                except XenError:  # a range that crosses into too many chunks: its frames stay, unmapped
                    break
            else:
                extents[index] = mfn
                self._news.placed(domain.domid, gpfn, mfn, count)
            done += 1
        return self._extents_reply(call, done, extents)

    def _decrease_reservation(self, call: Call) -> Result:
        found = self._reservation(call)
        if found is None:
            return self._extents_reply(call, 0, array("Q"))
        domain, extents, order, most = found
        done = 0
        for first in extents[:most]:
            if not all(self._give_back(domain, first + step) for step in range(1 << order)):
                break
            done += 1
        return self._extents_reply(call, done, extents)

    def _give_back(self, domain: Domain, frame: int) -> bool:
        mfn = frame
        if domain.p2m is not None:
            entry = domain.p2m.get(frame)
            if entry is None or entry.type is not P2mType.RAM:
                return False
            mfn = entry.mfn
        if not self._frames.is_ram_of(mfn, domain.domid):
            return False
        if domain.p2m is not None:
            domain.p2m.clear(Gfn(frame))
        self._news.lost(domain.domid, mfn)
        self._frames.release(Mfn(mfn))
        return True

    def _extents_reply(self, call: Call, done: int, extents: array[int]) -> Result:
        raw = extents.tobytes() or call.array("extent_start")
        return call.reply(done, arrays={"extent_start": raw})

    def _exchange(self, call: Call) -> Result:
        """New frames first, then the old ones go: a caller never ends with less than it had. All or
        nothing."""
        op: abi.xen_memory_exchange = call.item
        if op.in_.domid != op.out.domid or op.nr_exchanged:
            raise XenError(EINVAL)
        domain = self._domains.target(call.domain, op.in_.domid)
        if domain.p2m is not None:
            raise XenError(EOPNOTSUPP)
        limit = PRIVILEGED_ORDER if call.domain.privileged else UNPRIVILEGED_ORDER
        if max(op.in_.extent_order, op.out.extent_order) > limit:
            raise XenError(EPERM)
        pages = op.in_.nr_extents << op.in_.extent_order
        if pages != op.out.nr_extents << op.out.extent_order or pages > self._frames.ram_pages(domain.domid):
            raise XenError(EINVAL)
        if pages > MAX_FRAMES and not call.domain.privileged:
            raise XenError(ENOMEM)
        given, wanted = array("Q"), array("Q")
        given.frombytes(call.array("in_.extent_start"))
        wanted.frombytes(call.array("out.extent_start"))
        old = [first + step for first in given for step in range(1 << op.in_.extent_order)]
        if len(set(old)) != len(old) or not all(self._frames.is_ram_of(mfn, domain.domid) for mfn in old):
            raise XenError(EINVAL)
        order, got = op.out.extent_order, list[Mfn]()
        try:
            for _ in wanted:
                got.append(self._frames.allocate_ram(domain.domid, order))  # undone if one fails
        except XenError:
            for first in got:
                for step in range(1 << order):
                    self._frames.release(Mfn(first + step))
            raise
        for first, pfn in zip(got, wanted, strict=True):
            self._news.got(domain.domid, first, 1 << order)
            self._news.placed(domain.domid, pfn, first, 1 << order)
        for mfn in old:
            self._news.lost(domain.domid, mfn)
            self._frames.release(Mfn(mfn))
        item = op._replace(nr_exchanged=op.in_.nr_extents)
        return call.reply(0, item, arrays={"out.extent_start": array("Q", got).tobytes()})

    # -- sizes
    # ----------------------------------------------------------------------------------------------------

    def _maximum_ram_page(self, call: Call) -> Result:
        return call.reply(self._frames.max_mfn())

    def _current_reservation(self, call: Call) -> Result:
        domain = self._domains.target(call.domain, call.item.domid)
        return call.reply(self._frames.ram_pages(domain.domid))

    def _maximum_reservation(self, call: Call) -> Result:
        return call.reply(self._domains.target(call.domain, call.item.domid).max_pages)

    def _maximum_gpfn(self, call: Call) -> Result:
        domain = self._domains.target(call.domain, call.item.domid)
        if domain.p2m is not None:
            return call.reply(domain.p2m.max_gfn())
        if domain.shared_info is None:
            return call.reply(0)
        offset = SHARED_INFO.offset("arch") + ARCH_SHARED_INFO.offset("max_pfn")
        pages = int.from_bytes(self._memory.read(domain.shared_info, offset, 8), "little")
        return call.reply(max(min(pages, 1 << 52), 1) - 1)  # written by the guest

    # -- the physical map
    # -----------------------------------------------------------------------------------------

    def _translated(self, caller: Domain, domid: int) -> Domain:
        """ESRCH; EACCES if it is not auto-translated; then EPERM."""
        if self._domains.by_id(caller, domid).p2m is None:
            raise XenError(EACCES)
        return self._domains.target(caller, domid)

    def _add_to_physmap(self, call: Call) -> Result:
        op: abi.xen_add_to_physmap = call.item
        if op.space == abi.XENMAPSPACE_gmfn_foreign:
            raise XenError(ENOSYS)
        domain = self._translated(call.domain, op.domid)
        if op.space != abi.XENMAPSPACE_gmfn_range:
            self._physmap.add(call.domain, domain, op.space, op.idx, op.gpfn)
            return call.reply(0)
        if op.size > MAX_FRAMES and not call.domain.privileged:
            raise XenError(E2BIG)
        for step in range(op.size):
            self._physmap.add(call.domain, domain, abi.XENMAPSPACE_gmfn, op.idx + step, op.gpfn + step)
        return call.reply(0)

    def _add_to_physmap_batch(self, call: Call) -> Result:
        op: abi.xen_add_to_physmap_batch = call.item
        domain = self._translated(call.domain, op.domid)
        foreign: Domain | None = None
        if op.space == abi.XENMAPSPACE_gmfn_foreign:
            foreign = self._domains.target(call.domain, op.u)
        elif op.space == abi.XENMAPSPACE_gmfn_range or op.u:
            raise XenError(EOPNOTSUPP if op.space == abi.XENMAPSPACE_gmfn_range else EINVAL)
        idxs, gpfns = array("Q"), array("Q")
        idxs.frombytes(call.array("idxs"))
        gpfns.frombytes(call.array("gpfns"))
        errors = array("i", bytes(4 * op.size))
        for index in range(op.size):
            try:
                if foreign is not None:
                    self._physmap.add_foreign(domain, foreign, idxs[index], gpfns[index])
                else:
                    self._physmap.add(call.domain, domain, op.space, idxs[index], gpfns[index])
            except XenError as error:
                errors[index] = -error.errno
        return call.reply(0, arrays={"errs": errors.tobytes()})

    def _remove_from_physmap(self, call: Call) -> Result:
        domain = self._translated(call.domain, call.item.domid)
        self._physmap.remove(domain, call.item.gpfn)
        return call.reply(0)

    # -- maps of memory
    # -------------------------------------------------------------------------------------------

    def _set_memory_map(self, call: Call) -> Result:
        op: abi.xen_foreign_memory_map = call.item
        domain = self._domains.target(call.domain, op.domid)
        domain.memory_map = call.array("map.buffer")
        return call.reply(0)

    def _memory_map(self, call: Call) -> Result:
        if not call.domain.memory_map:
            raise XenError(ENOSYS)
        return self._map_reply(call, call.domain.memory_map)

    def _machine_memory_map(self, call: Call) -> Result:
        entries = b""
        first = 0
        for start, end in (*self._config.mfn_holes, (self._config.mfn_limit, self._config.mfn_limit)):
            if start > first:
                size = (start - first) << PAGE_SHIFT
                entries += E820_ENTRY.pack(first << PAGE_SHIFT, size, E820_RAM)
            if end > start:
                size = (end - start) << PAGE_SHIFT
                entries += E820_ENTRY.pack(start << PAGE_SHIFT, size, E820_RESERVED)
            first = end
        return self._map_reply(call, entries)

    def _map_reply(self, call: Call, entries: bytes) -> Result:
        count = min(call.item.nr_entries, len(entries) // E820_ENTRY.size)
        item = call.item._replace(nr_entries=count)
        if not item.buffer:  # the wire form has no array then
            if count:
                raise XenError(EFAULT)
            return call.reply(0, item, arrays={})
        return call.reply(0, item, arrays={"buffer": entries[: count * E820_ENTRY.size]})

    # -- the rest
    # -------------------------------------------------------------------------------------------------

    def _claim_pages(self, call: Call) -> Result:
        op: abi.xen_memory_reservation = call.item
        if op.extent_start or op.extent_order or op.mem_flags:
            raise XenError(EINVAL)
        domain = self._domains.by_id(call.domain, op.domid)
        if op.nr_extents > domain.max_pages:
            raise XenError(EINVAL)
        self._frames.claim(domain.domid, op.nr_extents)
        return call.reply(0)

    def _acquire_resource(self, call: Call) -> Result:
        op: abi.xen_mem_acquire_resource = call.item
        if op.pad:
            raise XenError(EINVAL)
        domain = self._domains.remote(call.domain, op.domid)
        resource = self.resources.get(op.type)
        if resource is None:
            raise XenError(EOPNOTSUPP)
        if op.nr_frames == 0:
            (size,) = resource(domain, op.id, 0, 0)
            return call.reply(0, op._replace(nr_frames=size), arrays={"frame_list": b""})
        mfns = resource(domain, op.id, op.frame, op.nr_frames)
        return call.reply(0, arrays={"frame_list": array("Q", mfns).tobytes()})
