"""Hypercalls from 32-bit code: structures that differ from the 64-bit ones are translated, as Xen's compat layer does.

The 64-bit form lies in a translation area (`domains.hvm.cpu.XLAT`) that only handlers can address. What is not in the tables
here is refused with -ENOSYS: nothing is read in the wrong layout.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Any, Final, NamedTuple

from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import sched, vcpu, version, xen
from bus.abi.errno import XEN_EFAULT, XEN_ENOSYS
from bus.abi.hvm import hvm_op
from bus.abi.layout import Layout
from domains.hvm.cpu import XLAT, HvmCpu
from domains.pv.api import Continuation, GuestFault
from domains.pv.calls import Result
from domains.pv.hypercalls import Hypercalls

RESERVATION: Final = Struct("<IIIIHxx")


class _Translated(NamedTuple):
    layout: Layout[Any]
    compat: Struct
    """The same fields in the same order, as a 32-bit guest has them."""


_TRANSLATED: Final = {
    (xen.HYPERVISOR_memory_op, mem.XENMEM_add_to_physmap): _Translated(
        mem.XEN_ADD_TO_PHYSMAP, Struct("<HHIII")
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_remove_from_physmap): _Translated(
        mem.XEN_REMOVE_FROM_PHYSMAP, Struct("<HxxI")
    ),
    (xen.HYPERVISOR_memory_op, mem.XENMEM_memory_map): _Translated(mem.XEN_MEMORY_MAP, Struct("<II")),
    **{
        (xen.HYPERVISOR_memory_op, cmd): _Translated(mem.XEN_MEMORY_RESERVATION, RESERVATION)
        for cmd in (
            mem.XENMEM_increase_reservation,
            mem.XENMEM_decrease_reservation,
            mem.XENMEM_populate_physmap,
        )
    },
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_poll): _Translated(sched.SCHED_POLL, Struct("<IIQ")),
}
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
        )
    ),
    xen.HYPERVISOR_sched_op: frozenset(
        (sched.SCHEDOP_yield, sched.SCHEDOP_block, sched.SCHEDOP_shutdown, sched.SCHEDOP_watchdog)
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
        )
    ),
    xen.HYPERVISOR_console_io: frozenset((xen.CONSOLEIO_write, xen.CONSOLEIO_read)),
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
            vcpu.VCPUOP_set_singleshot_timer,
            vcpu.VCPUOP_stop_singleshot_timer,
            vcpu.VCPUOP_send_nmi,
        )
    ),
    xen.HYPERVISOR_grant_table_op: frozenset(
        (
            gt.GNTTABOP_map_grant_ref,
            gt.GNTTABOP_unmap_grant_ref,
            gt.GNTTABOP_query_size,
            gt.GNTTABOP_get_version,
            gt.GNTTABOP_set_version,
            gt.GNTTABOP_swap_grant_ref,
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
}
"""Commands whose structures have one layout for both (those of fixed-width fields, 64-bit ones at multiples of 8)."""


class CompatCalls:
    """Makes hypercalls for 32-bit code."""

    def __init__(self, cpu: HvmCpu, calls: Hypercalls) -> None:
        self._cpu: Final = cpu
        self._calls: Final = calls

    def call(self, number: int, a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """-ENOSYS for what is not translated."""
        if number in (xen.HYPERVISOR_sysctl, xen.HYPERVISOR_domctl):
            return self._calls.call(number, a1, 0, 0, 0, 0)  # their handles are 64 bits wide for everybody
        if number == xen.HYPERVISOR_set_timer_op:
            return self._calls.call(number, a1 | a2 << 32, 0, 0, 0, 0)
        command = a1 & 63 if number == xen.HYPERVISOR_memory_op else a1
        translated = _TRANSLATED.get((number, command))
        if translated is not None:
            return self._translated(translated, number, a1, a2)
        if command not in _SAME.get(number, ()):
            return -XEN_ENOSYS
        return self._calls.call(number, a1, a2, a3, a4, a5)

    def _translated(self, how: _Translated, number: int, a1: int, arg: int) -> Result:
        linear = self._cpu.linear
        try:
            raw = linear.read_virtual(arg, how.compat.size)
            values = how.compat.unpack(raw)
            linear.xlat = bytearray(how.layout.pack(how.layout.record(*values)))
            rc = self._calls.call(number, a1, XLAT, 0, 0, 0)
            if isinstance(rc, Continuation):
                return -XEN_ENOSYS
            out = how.compat.pack(*how.layout.unpack(linear.xlat))
            if out != raw:
                linear.write_virtual(arg, out)
        except (GuestFault, error):
            return -XEN_EFAULT
        finally:
            linear.xlat = bytearray()
        return rc


def hypercall_page() -> bytes:
    """64 stubs of 32 bytes that work in 32-bit and 64-bit code: mov $number, %eax; vmcall; ret. Number 23 (iret) is PV's: UD2."""
    out = bytearray()
    for number in range(64):
        stub = b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x01\xc1\xc3"
        out += (b"\x0f\x0b" if number == xen.HYPERVISOR_iret else stub).ljust(32, b"\xcc")
    return bytes(out).ljust(4096, b"\xcc")
