"""Hypercalls from 32-bit code: structures that differ from the 64-bit ones are translated, as Xen's compat layer does.

The 64-bit form lies in a translation area (`domains.hvm.cpu.XLAT`) that only handlers can address, with the arrays behind it whose
elements differ as well. What is not in the tables here is refused with -ENOSYS: nothing is read in the wrong layout.

Source: the public headers, with the sizes and alignments of 32-bit code (`xen_pfn_t`, `xen_ulong_t` and handles have 4 bytes; 64-bit
words are aligned to 4); tests/unit/hvm/test_hvm_compat.py compares them with a compiler's.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final, NamedTuple

from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import physdev, sched, vcpu, version, xen
from bus.abi.errno import XEN_E2BIG, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS
from bus.abi.hvm import hvm_op
from domains.hvm.cpu import XLAT, HvmCpu
from domains.pv.api import Continuation, GuestFault
from domains.pv.calls import Result
from domains.pv.hypercalls import CHUNK, MAX_MULTICALL, Hypercalls

MAX_ELEMENTS: Final = 1 << 20
"""Of an array that is translated: frames of 4 GiB."""
MAX_LIST: Final = 1 << 16
"""Structures of one grant_table_op."""
MAX_GRANT_FRAMES: Final = 1 << 12
MAX_BUFFERS: Final = 2
"""XEN_DMOP's: more are refused by whoever reads them."""
M32: Final = 0xFFFFFFFF
ENTRY: Final = Struct("<8I")
"""multicall_entry of 32-bit code: op, result, args[6]."""
RESULT_OFFSET: Final = 4


class _Array(NamedTuple):
    """A handle to 32-bit numbers, which the handler sees as 64-bit ones."""

    handle: int
    """Index among the structure's values."""
    number: int
    """Index of how many there are."""
    back: bool = False
    """The handler writes it."""
    most: int = MAX_ELEMENTS
    refused: int = XEN_E2BIG
    """If there are more; 0: the handler refuses them by itself."""


class _Translated(NamedTuple):
    native: Struct
    compat: Struct
    """The same values in the same order, as a 32-bit guest has them."""
    arrays: tuple[_Array, ...] = ()


RESERVATION: Final = _Translated(Struct("<QQIIHxxxxxx"), Struct("<IIIIHxx"))
"""Its extents are the handler's own business (`HvmMemoryCalls.guest32`)."""
RUNSTATE: Final = _Translated(Struct("<IxxxxQ4Q"), Struct("<IQ4Q"))
DM_BUFFER: Final = _Translated(Struct("<QQ"), Struct("<II"))
AREA: Final = _Translated(Struct("<Q"), Struct("<I"))
"""vcpu_register_runstate_memory_area, vcpu_register_time_memory_area: of 32-bit code's union only the pointer counts."""

_TRANSLATED: Final = {
    (xen.HYPERVISOR_memory_op, mem.XENMEM_add_to_physmap): _Translated(Struct("<HHIQQ"), Struct("<HHIII")),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_add_to_physmap_batch): _Translated(
        Struct("<HHHHQQQ"), Struct("<HHHHIII"), (_Array(4, 2), _Array(5, 2))
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_remove_from_physmap): _Translated(
        Struct("<HxxxxxxQ"), Struct("<HxxI")
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_memory_map): _Translated(Struct("<IxxxxQ"), Struct("<II")),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_set_memory_map): _Translated(
        Struct("<HxxxxxxIxxxxQ"), Struct("<HxxII")
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_acquire_resource): _Translated(
        Struct("<HHIIIQQ"), Struct("<HHIIIQI"), (_Array(6, 3, back=True),)
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_increase_reservation): RESERVATION,
    (xen.HYPERVISOR_memory_op, mem.XENMEM_decrease_reservation): RESERVATION,
    (xen.HYPERVISOR_memory_op, mem.XENMEM_populate_physmap): RESERVATION,
    (xen.HYPERVISOR_memory_op, mem.XENMEM_claim_pages): RESERVATION,
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_poll): _Translated(Struct("<QIxxxxQ"), Struct("<IIQ")),
    (xen.HYPERVISOR_vcpu_op, vcpu.VCPUOP_set_singleshot_timer): _Translated(Struct("<QIxxxx"), Struct("<QI")),
    (xen.HYPERVISOR_vcpu_op, vcpu.VCPUOP_get_runstate_info): RUNSTATE,
    (xen.HYPERVISOR_vcpu_op, vcpu.VCPUOP_register_runstate_memory_area): AREA,
    (xen.HYPERVISOR_vcpu_op, vcpu.VCPUOP_register_vcpu_time_memory_area): AREA,
    (xen.HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq): _Translated(
        Struct("<HxxiiiiiixxxxQ"), Struct("<HxxiiiiiiQ")
    ),
    (xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table): _Translated(
        Struct("<HxxIhxxxxxxQ"),
        Struct("<HxxIhxxI"),
        (_Array(3, 1, back=True, most=MAX_GRANT_FRAMES, refused=0),),
    ),
    (xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_get_status_frames): _Translated(
        Struct("<IHhQ"), Struct("<IHhI")
    ),
    (xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_copy): _Translated(
        Struct("<QHHxxxxQHHxxxxHHhxx"), Struct("<IHHIHHHHhxx")
    ),
}
"""Those of grant_table_op are lists of structures."""
_EVENT_COMMANDS: Final = frozenset(range(ec.EVTCHNOP_bind_interdomain, ec.EVTCHNOP_set_priority + 1))
_SAME: Final = {
    xen.HYPERVISOR_event_channel_op: _EVENT_COMMANDS,
    xen.HYPERVISOR_hvm_op: frozenset(
        (
            hvm_op.HVMOP_set_param,
            hvm_op.HVMOP_get_param,
            hvm_op.HVMOP_set_evtchn_upcall_vector,
            hvm_op.HVMOP_get_time,
            hvm_op.HVMOP_flush_tlbs,
            hvm_op.HVMOP_guest_request_vm_event,
            hvm_op.HVMOP_pagetable_dying,
            hvm_op.HVMOP_get_mem_type,
            hvm_op.HVMOP_xentrace,
        )
    ),
    xen.HYPERVISOR_sched_op: frozenset(
        (
            sched.SCHEDOP_yield,
            sched.SCHEDOP_block,
            sched.SCHEDOP_shutdown,
            sched.SCHEDOP_shutdown_code,
            sched.SCHEDOP_remote_shutdown,
            sched.SCHEDOP_watchdog,
        )
    ),
    xen.HYPERVISOR_xen_version: frozenset(
        (
            version.XENVER_version,
            version.XENVER_extraversion,
            version.XENVER_compile_info,
            version.XENVER_capabilities,
            version.XENVER_changeset,
            version.XENVER_get_features,
            version.XENVER_pagesize,
            version.XENVER_guest_handle,
            version.XENVER_commandline,
            version.XENVER_build_id,
        )
    ),
    xen.HYPERVISOR_console_io: frozenset((xen.CONSOLEIO_write, xen.CONSOLEIO_read)),
    xen.HYPERVISOR_vm_assist: frozenset((xen.VMASST_CMD_enable, xen.VMASST_CMD_disable)),
    xen.HYPERVISOR_vcpu_op: frozenset(
        (
            vcpu.VCPUOP_initialise,
            vcpu.VCPUOP_get_physid,
            vcpu.VCPUOP_up,
            vcpu.VCPUOP_down,
            vcpu.VCPUOP_is_up,
            vcpu.VCPUOP_register_vcpu_info,
            vcpu.VCPUOP_set_periodic_timer,
            vcpu.VCPUOP_stop_periodic_timer,
            vcpu.VCPUOP_stop_singleshot_timer,
            vcpu.VCPUOP_send_nmi,
        )
    ),
    xen.HYPERVISOR_grant_table_op: frozenset(
        (
            gt.GNTTABOP_map_grant_ref,
            gt.GNTTABOP_unmap_grant_ref,
            gt.GNTTABOP_unmap_and_replace,
            gt.GNTTABOP_query_size,
            gt.GNTTABOP_get_version,
            gt.GNTTABOP_set_version,
            gt.GNTTABOP_swap_grant_ref,
            gt.GNTTABOP_cache_flush,
        )
    ),
    xen.HYPERVISOR_memory_op: frozenset(
        (
            mem.XENMEM_maximum_ram_page,
            mem.XENMEM_get_sharing_freed_pages,
            mem.XENMEM_get_sharing_shared_pages,
            mem.XENMEM_reserved_device_memory_map,
            mem.XENMEM_current_reservation,
            mem.XENMEM_maximum_reservation,
            mem.XENMEM_maximum_gpfn,
        )
    ),
    xen.HYPERVISOR_physdev_op: frozenset(
        (
            physdev.PHYSDEVOP_eoi,
            physdev.PHYSDEVOP_irq_status_query,
            physdev.PHYSDEVOP_unmap_pirq,
            physdev.PHYSDEVOP_setup_gsi,
            physdev.PHYSDEVOP_get_free_pirq,
            physdev.PHYSDEVOP_pci_mmcfg_reserved,
            physdev.PHYSDEVOP_pci_device_add,
            physdev.PHYSDEVOP_pci_device_remove,
        )
    ),
}
"""Commands whose structures have one layout for both (those of fixed-width fields, 64-bit ones at multiples of 8)."""


class CompatCalls:
    """Makes hypercalls for 32-bit code."""

    def __init__(self, cpu: HvmCpu, calls: Hypercalls) -> None:
        self._cpu: Final = cpu
        self._calls: Final = calls
        self._in_multicall = False

    def call(self, number: int, a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for what is not translated; -EFAULT for a structure or array that is not in memory; -E2BIG for over 2^20 elements."""
        if number in (xen.HYPERVISOR_sysctl, xen.HYPERVISOR_domctl, xen.HYPERVISOR_platform_op):
            return self._native(number, a1)  # one layout for everybody
        if number == xen.HYPERVISOR_set_timer_op:
            return self._native(number, a1 | a2 << 32)
        if number == xen.HYPERVISOR_multicall:
            return self._multicall(a1, a2)
        if (number, a1) == (xen.HYPERVISOR_xen_version, version.XENVER_platform_parameters):
            return self._platform_parameters(a2)
        if number == xen.HYPERVISOR_dm_op:
            return self._dm_op(a1, a2, a3)
        command = a1 & 63 if number == xen.HYPERVISOR_memory_op else a1
        how = _TRANSLATED.get((number, command))
        if how is not None and number == xen.HYPERVISOR_grant_table_op and a3:
            if a3 > MAX_LIST:
                return -XEN_EINVAL
            return self._translated(how, a2, a3, (number, a1, XLAT, a3))
        if how is not None and number == xen.HYPERVISOR_vcpu_op:
            return self._translated(how, a3, 1, (number, a1, a2, XLAT))
        if how is not None and number != xen.HYPERVISOR_grant_table_op:
            return self._translated(how, a2, 1, (number, a1, XLAT, 0))
        if how is None and command not in _SAME.get(number, ()):
            return -XEN_ENOSYS
        return self._calls.call(number, a1, a2, a3, a4, a5)

    def _native(self, number: int, a1: int, a2: int = 0, a3: int = 0) -> Result:
        """The 64-bit call, to its end."""
        arguments = (a1, a2, a3, 0, 0)
        rc = self._calls.call(number, *arguments)
        while isinstance(rc, Continuation):
            arguments = (rc.args + arguments[len(rc.args) :])[:5]  # type: ignore[assignment]  # five again
            rc = self._calls.call(number, *arguments)
        return rc

    def _platform_parameters(self, arg: int) -> Result:
        """virt_start has 4 bytes; Xen shows an HVM guest none."""
        try:
            self._cpu.linear.write_virtual(arg, bytes(4))
        except GuestFault:
            return -XEN_EFAULT
        return 0

    def _translated(
        self, how: _Translated, at: int, count: int, arguments: tuple[int, int, int, int]
    ) -> Result:
        """The call with `arguments`, for `count` structures at `at`, which the handler finds at XLAT."""
        linear = self._cpu.linear
        size = how.compat.size
        try:
            raw = linear.read_virtual(at, size * count)
            given = [list(values) for values in how.compat.iter_unpack(raw)]
            area = bytearray(how.native.size * count)
            for index, values in enumerate(given):
                wide = values.copy()
                for array in how.arrays:
                    rc = self._widen(area, wide, array)
                    if rc:
                        return rc
                how.native.pack_into(area, how.native.size * index, *wide)
            linear.xlat = area
            result = self._native(*arguments)
            area, linear.xlat = linear.xlat, bytearray()
            if isinstance(result, int):
                out = b"".join(
                    self._back(how, area, how.native.size * index, values, good=result >= 0)
                    for index, values in enumerate(given)
                )
                if out != raw:
                    linear.write_virtual(at, out)
        except (GuestFault, error):
            return -XEN_EFAULT
        finally:
            linear.xlat = bytearray()
        return result

    def _widen(self, area: bytearray, values: list[int], array: _Array) -> int:
        """Put the array behind what is in the area, as 64-bit words, and have the structure's handle name it."""
        count, at = values[array.number], values[array.handle]
        if not at:
            return 0
        if count > array.most:
            if array.refused:
                return -array.refused
            count = 0  # the handler refuses so many before it looks at the list
        numbers = Struct(f"<{count}I").unpack(self._cpu.linear.read_virtual(at, 4 * count))
        values[array.handle] = XLAT + len(area)
        area += Struct(f"<{count}Q").pack(*numbers)
        return 0

    def _back(self, how: _Translated, area: bytearray, at: int, given: list[int], *, good: bool) -> bytes:
        """One structure as the handler left it, in 32-bit form; arrays that it wrote go to the guest. GuestFault; struct.error for a number of
        over 32 bits."""
        changed = list(how.native.unpack_from(area, at))
        for array in how.arrays:
            start, count = changed[array.handle] - XLAT, given[array.number]
            if good and array.back and given[array.handle] and count <= array.most:
                numbers = Struct(f"<{count}Q").unpack_from(area, start)
                self._cpu.linear.write_virtual(given[array.handle], Struct(f"<{count}I").pack(*numbers))
            changed[array.handle] = given[array.handle]
        return how.compat.pack(*changed)

    def _dm_op(self, domid: int, count: int, buffers: int) -> Result:
        """A list of xen_dm_op_buf, a handle and a size each; what they name has one layout for everybody."""
        if not 0 < count <= MAX_BUFFERS:
            return self._calls.call(xen.HYPERVISOR_dm_op, domid, count, buffers, 0, 0)
        return self._translated(DM_BUFFER, buffers, count, (xen.HYPERVISOR_dm_op, domid, count, XLAT))

    def _multicall(self, calls: int, count: int) -> Result:
        """As `Hypercalls.multicall`, of entries of 32 bytes."""
        if self._in_multicall or count > MAX_MULTICALL:
            return -XEN_EINVAL
        self._calls.counts[xen.HYPERVISOR_multicall] += 1
        self._in_multicall = True
        try:
            return self._entries(calls, count)
        except GuestFault:
            return -XEN_EFAULT
        finally:
            self._in_multicall = False

    def _entries(self, calls: int, count: int) -> Result:
        memory = self._cpu.linear
        for done in range(0, count, CHUNK):
            place = calls + done * ENTRY.size
            entries = memory.read_virtual(place, min(CHUNK, count - done) * ENTRY.size)
            for op, _, a1, a2, a3, a4, a5, _ in ENTRY.iter_unpack(entries):
                result = self.call(op, a1, a2, a3, a4, a5)
                if not isinstance(result, int):
                    return result
                memory.write_virtual(place + RESULT_OFFSET, (result & M32).to_bytes(4, "little"))
                place += ENTRY.size
                if self._cpu.crash_reason is not None:
                    return 0
        return 0


def hypercall_page() -> bytes:
    """64 stubs of 32 bytes that work in 32-bit and 64-bit code: mov $number, %eax; vmcall; ret. Number 23 (iret) is PV's: UD2."""
    out = bytearray()
    for number in range(64):
        stub = b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x01\xc1\xc3"
        out += (b"\x0f\x0b" if number == xen.HYPERVISOR_iret else stub).ljust(32, b"\xcc")
    return bytes(out).ljust(4096, b"\xcc")
