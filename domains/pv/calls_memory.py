"""HYPERVISOR_memory_op and the page-table hypercalls: ownership changes go to the hypervisor and are mirrored in the page
types of this process; page tables and descriptor tables are this process's own business (memory.h, xen.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from struct import pack, unpack
from typing import Any, Final

from bus.abi import memory as mem
from bus.abi.arch_x86_64 import MACH2PHYS_VIRT_START
from bus.abi.errno import XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EPERM, XEN_ESRCH
from bus.abi.hypercalls_model import MAX_FRAMES, Command, State
from bus.abi.xen import (
    DOMID_FIRST_RESERVED,
    DOMID_SELF,
    HYPERVISOR_memory_op,
    HYPERVISOR_mmu_update,
    HYPERVISOR_mmuext_op,
    HYPERVISOR_set_gdt,
    HYPERVISOR_update_descriptor,
    HYPERVISOR_update_va_mapping,
    HYPERVISOR_update_va_mapping_otherdomain,
)
from bus.addresses import DomId, VcpuId
from domains.pv.api import GuestFault, PagingApi
from domains.pv.calls import LOW32, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.wire import Remote

EXTENT_SHIFT: Final = 6
"""MEMOP_EXTENT_SHIFT: bits of the command above it say where to go on."""
CHUNK: Final = 1024
"""Extents of one message to the hypervisor."""
MAX_ORDER: Final = 9
MAX_EXTENTS: Final = (1 << 64) - 1 >> EXTENT_SHIFT
"""Beyond it the rest of the command could not say where to go on."""

ARCH_COMMANDS: Final = frozenset(
    (
        mem.XENMEM_machphys_mfn_list,
        mem.XENMEM_machphys_compat_mfn_list,
        mem.XENMEM_machphys_mapping,
        mem.XENMEM_memory_map,
        mem.XENMEM_machine_memory_map,
        mem.XENMEM_set_memory_map,
        mem.XENMEM_set_pod_target,
        mem.XENMEM_get_pod_target,
    )
)
"""Commands of x86 that know no continuation."""
WHOLE_COMMANDS: Final = frozenset(
    (
        mem.XENMEM_maximum_ram_page,
        mem.XENMEM_current_reservation,
        mem.XENMEM_maximum_reservation,
        mem.XENMEM_maximum_gpfn,
        mem.XENMEM_add_to_physmap,
        mem.XENMEM_remove_from_physmap,
        mem.XENMEM_claim_pages,
    )
)
"""Commands common to all architectures that know none."""


def of_nothing(memory: PagingApi, number: int, arg: int) -> int | None:
    """Commands that count what a machine like this one has none of: shared pages, memory reserved for devices. None: another
    command. The flags and the count begin the structure of 64-bit and of 32-bit callers alike."""
    if number in (mem.XENMEM_get_sharing_freed_pages, mem.XENMEM_get_sharing_shared_pages):
        return 0
    if number != mem.XENMEM_reserved_device_memory_map:
        return None
    flags, _ = unpack("<II", memory.read_virtual(arg, 8))
    if flags & ~mem.XENMEM_RDM_ALL:
        return -XEN_EINVAL
    memory.write_virtual(arg + 4, bytes(4))
    return 0


class MemoryCalls:
    """See the module. `max_mfn`: the highest entry of the machine-to-physical table."""

    def __init__(
        self,
        cpu: Cpu,
        remote: Remote,
        commands: Callable[[int, int], Command | None],
        domain: DomId,
        max_mfn: int,
    ) -> None:
        self._cpu = cpu
        self._remote = remote
        self._commands = commands
        self._domain = domain
        self._max_mfn = max_mfn

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {
            HYPERVISOR_memory_op: self.memory_op,
            HYPERVISOR_mmu_update: self.mmu_update,
            HYPERVISOR_mmuext_op: self.mmuext_op,
            HYPERVISOR_update_va_mapping: self.update_va_mapping,
            HYPERVISOR_update_va_mapping_otherdomain: self.update_va_mapping_otherdomain,
            HYPERVISOR_update_descriptor: self.update_descriptor,
            HYPERVISOR_set_gdt: self.set_gdt,
        }

    # --- page tables

    def mmu_update(self, reqs: int, count: int, pdone: int, foreigndom: int, a5: int) -> Result:
        """See PagingApi."""
        rc: Result = self._cpu.mmu.mmu_update(reqs, count & LOW32, pdone, foreigndom & LOW32)
        if rc == -XEN_EPERM:
            rc = self._refused(rc, foreigndom & LOW32)
            if rc == -XEN_EPERM and not count & LOW32:
                return 0  # the right is asked for with each update
        return rc

    def mmuext_op(self, uops: int, count: int, pdone: int, foreigndom: int, a5: int) -> Result:
        """See PagingApi."""
        rc = self._cpu.mmu.mmuext_op(uops, count & LOW32, pdone, foreigndom & LOW32)
        return self._refused(rc, foreigndom & 0xFFFF) if rc == -XEN_EPERM else rc

    def _refused(self, rc: Result, foreigndom: int) -> Result:
        """The paging code knows of no other domain: -ESRCH of one that is not there comes from the hypervisor."""
        layout = mem.XEN_MEMORY_RESERVATION
        for domid in ((foreigndom >> 16) - 1, foreigndom & 0xFFFF):
            if 0 <= domid < DOMID_FIRST_RESERVED and domid != self._domain:
                request = layout.pack(mem.xen_memory_reservation(0, 0, 0, 0, domid))
                answer, _ = self._remote.raw(HYPERVISOR_memory_op, mem.XENMEM_decrease_reservation, request)
                return -XEN_ESRCH if answer == 0 else rc
        return rc

    def update_va_mapping(self, va: int, value: int, flags: int, a4: int, a5: int) -> Result:
        """See PagingApi."""
        return self._cpu.mmu.update_va_mapping(va, value, flags)

    def update_va_mapping_otherdomain(self, va: int, value: int, flags: int, domid: int, a5: int) -> Result:
        """See PagingApi."""
        rc = self._cpu.mmu.update_va_mapping_otherdomain(va, value, flags, domid & 0xFFFF)
        return self._refused(rc, domid & 0xFFFF) if rc == -XEN_EPERM else rc

    def update_descriptor(self, maddr: int, descriptor: int, a3: int, a4: int, a5: int) -> Result:
        """See PagingApi."""
        return self._cpu.mmu.update_descriptor(maddr, descriptor)

    def set_gdt(self, frame_list: int, entries: int, a3: int, a4: int, a5: int) -> Result:
        """The frame list is read here once, so that the frames installed are the frames remembered."""
        entries &= LOW32
        if entries > 14 * 512:
            return -XEN_EINVAL
        count = -(-entries // 512)
        cpu = self._cpu
        frames: tuple[int, ...] = (
            unpack(f"<{count}Q", cpu.mmu.read_virtual(frame_list, 8 * count)) if count else ()
        )
        s = cpu.current
        rc = cpu.mmu.install_gdt(VcpuId(s.id), frames, entries)
        if rc == 0:
            s.gdt_frames, s.gdt_entries = frames, entries
            cpu.flush_tlb()
        return rc

    # --- memory_op

    def memory_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for an unknown command; otherwise as the table of hypercalls says."""
        start = (cmd & LOW32) >> EXTENT_SHIFT
        number = cmd & (1 << EXTENT_SHIFT) - 1
        if number in (
            mem.XENMEM_populate_physmap,
            mem.XENMEM_increase_reservation,
            mem.XENMEM_decrease_reservation,
        ):
            return self._reservation(number, start, arg)
        if start and number in ARCH_COMMANDS:
            return -XEN_ENOSYS  # Xen compares the whole command number there
        if start and number in WHOLE_COMMANDS:
            return -XEN_EINVAL
        if number == mem.XENMEM_machphys_mapping:
            end = MACH2PHYS_VIRT_START + ((self._max_mfn >> 9) + 1 << 12)
            self._cpu.mmu.write_virtual(
                arg,
                mem.XEN_MACHPHYS_MAPPING.pack(
                    mem.xen_machphys_mapping(MACH2PHYS_VIRT_START, end, self._max_mfn)
                ),
            )
            return 0
        if number == mem.XENMEM_machphys_mfn_list:
            return self._machphys_list(arg)
        nothing = of_nothing(self._cpu.mmu, number, arg)
        if nothing is not None:
            return nothing
        command = self._commands(HYPERVISOR_memory_op, number)
        if command is None:
            return -XEN_ENOSYS
        if command.argument is not None:
            self._cpu.mmu.read_virtual(
                arg, command.argument.size
            )  # -EFAULT comes first, also of what is refused
        if command.state is State.REFUSED:
            return -command.refusal
        if number == mem.XENMEM_exchange:
            return self._exchange(command, arg)
        return self._remote.call(HYPERVISOR_memory_op, command, arg)

    def _machphys_list(self, arg: int) -> int:
        """No frame of the table is one that a domain could map: an empty list."""
        layout = mem.XEN_MACHPHYS_MFN_LIST
        item = layout.unpack(self._cpu.mmu.read_virtual(arg, layout.size))
        self._cpu.mmu.write_virtual(arg, layout.pack(item._replace(nr_extents=0)))
        return 0

    def _reservation(self, number: int, start: int, arg: int) -> int:
        """Returns how many extents, from the first, were done; what is refused, for whatever reason, is done for none."""
        layout = mem.XEN_MEMORY_RESERVATION
        memory = self._cpu.mmu
        try:
            item = layout.unpack(memory.read_virtual(arg, layout.size))
        except GuestFault:
            return start
        total = item.nr_extents
        foreign = item.domid not in (DOMID_SELF, self._domain)
        if start > total or total > MAX_EXTENTS or item.extent_order > MAX_ORDER or foreign:
            return start
        done = start
        while done < total:
            count = min(CHUNK, max(1, MAX_FRAMES >> item.extent_order), total - done)
            place = item.extent_start + 8 * done
            try:
                if number == mem.XENMEM_decrease_reservation:
                    step, rc = self._decrease(item, place, count)
                else:
                    step, rc = self._increase(number, item, place, count)
            except GuestFault:
                return done
            if rc < 0:
                return done
            done += step
            if step < count:
                break
        return done

    def _message(self, number: int, item: Any, extents: bytes) -> tuple[int, tuple[int, ...]]:
        """One message about len(extents) / 8 extents: (extents done or errno, the array of the reply)."""
        layout = mem.XEN_MEMORY_RESERVATION
        count = len(extents) // 8
        data = layout.pack(item._replace(nr_extents=count)) + extents
        rc, reply = self._remote.raw(HYPERVISOR_memory_op, number, data)
        if rc < 0 or len(reply) != layout.size + 8 * count:
            return rc, ()
        return min(rc, count), unpack(f"<{count}Q", reply[layout.size :])

    def _increase(self, number: int, item: Any, place: int, count: int) -> tuple[int, int]:
        """populate_physmap: the list names guest frames, and gets machine frames. increase_reservation: only gets them."""
        memory = self._cpu.mmu
        if number == mem.XENMEM_populate_physmap or item.extent_start:
            extents = memory.read_virtual(place, 8 * count)
        else:
            extents = bytes(8 * count)
        rc, mfns = self._message(number, item, extents)
        if rc <= 0 or not mfns:
            return 0, min(rc, 0)
        size = 1 << item.extent_order
        for base in mfns[:rc]:
            memory.populate_frames(range(base, base + size))
        if number == mem.XENMEM_populate_physmap:
            gpfns = unpack(f"<{count}Q", extents)
            for base, gpfn in zip(mfns[:rc], gpfns, strict=False):
                memory.set_m2p(base, range(gpfn, gpfn + size))
        if item.extent_start:
            memory.write_virtual(place, pack(f"<{rc}Q", *mfns[:rc]))
        return rc, 0

    def _decrease(self, item: Any, place: int, count: int) -> tuple[int, int]:
        """Frames go here first, so that nothing can reach them any more when the hypervisor takes them."""
        memory = self._cpu.mmu
        size = 1 << item.extent_order
        bases = unpack(f"<{count}Q", memory.read_virtual(place, 8 * count))
        frames = [base + i for base in bases for i in range(size)]
        pfns = [memory.get_m2p(frame) for frame in frames]
        gone = memory.release_frames(frames)
        whole = gone // size
        self._take_back(frames[whole * size : gone], pfns[whole * size : gone])
        if not whole:
            return 0, 0
        rc, _ = self._message(mem.XENMEM_decrease_reservation, item, pack(f"<{whole}Q", *bases[:whole]))
        done = max(rc, 0)
        self._take_back(frames[done * size : whole * size], pfns[done * size : whole * size])
        return done, min(rc, 0)

    def _take_back(self, frames: Sequence[int], pfns: Sequence[int]) -> None:
        """Frames that the hypervisor did not take stay the domain's."""
        memory = self._cpu.mmu
        memory.populate_frames(frames)
        for frame, pfn in zip(frames, pfns, strict=True):
            memory.set_m2p(frame, (pfn,))

    def _exchange(self, command: Command, arg: int) -> int:
        """XENMEM_exchange: all of the old frames go, or none."""
        layout = mem.XEN_MEMORY_EXCHANGE
        memory = self._cpu.mmu
        item = layout.unpack(memory.read_virtual(arg, layout.size))
        given, wanted = item.in_, item.out
        if max(given.extent_order, wanted.extent_order) > MAX_ORDER:
            return -XEN_EPERM
        if (
            item.nr_exchanged
            or given.domid != wanted.domid
            or given.nr_extents << given.extent_order != wanted.nr_extents << wanted.extent_order
            or max(given.nr_extents, wanted.nr_extents) > CHUNK
        ):
            return -XEN_EINVAL
        if given.domid not in (DOMID_SELF, self._domain):
            return -XEN_EPERM
        size = 1 << given.extent_order
        bases = unpack(f"<{given.nr_extents}Q", memory.read_virtual(given.extent_start, 8 * given.nr_extents))
        gpfns = unpack(
            f"<{wanted.nr_extents}Q", memory.read_virtual(wanted.extent_start, 8 * wanted.nr_extents)
        )
        frames = [base + i for base in bases for i in range(size)]
        pfns = [memory.get_m2p(frame) for frame in frames]
        released = memory.release_frames(frames)
        if released < len(frames):
            self._take_back(frames[:released], pfns[:released])
            return -XEN_EINVAL
        data = layout.pack(item) + pack(f"<{len(bases)}Q", *bases) + pack(f"<{len(gpfns)}Q", *gpfns)
        rc, reply = self._remote.raw(HYPERVISOR_memory_op, mem.XENMEM_exchange, data)
        if rc < 0 or len(reply) != layout.size + 8 * len(gpfns):
            self._take_back(frames, pfns)
            return rc if rc < 0 else -XEN_EFAULT
        mfns = unpack(f"<{len(gpfns)}Q", reply[layout.size :])
        out_size = 1 << wanted.extent_order
        for base, gpfn in zip(mfns, gpfns, strict=True):
            memory.populate_frames(range(base, base + out_size))
            memory.set_m2p(base, range(gpfn, gpfn + out_size))
        memory.write_virtual(wanted.extent_start, pack(f"<{len(mfns)}Q", *mfns))
        memory.write_virtual(arg, layout.pack(item._replace(nr_exchanged=given.nr_extents)))
        return 0
