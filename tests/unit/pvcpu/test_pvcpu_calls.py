"""Hypercalls: values, errnos, bad pointers, multicall; ownership and grants mirrored in this process; what crosses the bus."""

from __future__ import annotations

import struct

import pytest

from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import vcpu as v
from bus.abi import version, xen
from bus.abi.callback import CALLBACK_REGISTER, CALLBACKOP_register, CALLBACKOP_unregister, callback_register
from bus.abi.hvm import dm_op, hvm_op
from bus.abi.hypercalls_model import DM_OP_ARG
from bus.abi.sched import (
    SCHEDOP_poll,
    SCHEDOP_shutdown,
)
from tests.unit.pvcpu.rig import (
    BASE,
    CODE,
    DATA,
    HANDLERS,
    KERNEL_STACK,
    STOP,
    UNMAPPED,
    Rig,
    call,
    hypercall,
    mov_rax,
)

EFAULT, EINVAL, ENOSYS, ENOENT, EPERM, ETIME, EEXIST, ENXIO, ENODATA, EACCES = (
    14,
    22,
    38,
    2,
    1,
    62,
    17,
    6,
    61,
    13,
)


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- values and errnos


def test_version_and_features(rig: Rig) -> None:
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_version, 0) == 4 << 16 | 17
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_pagesize, 0) == 4096
    rig.put(DATA, struct.pack("<II", 0, 0))
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_get_features, DATA) == 0
    word = struct.unpack("<I", rig.get(DATA + 4, 4))[0]
    assert word == 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13 | 1 << 17
    rig.put(DATA, struct.pack("<II", 1, 0))
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_get_features, DATA) == -EINVAL
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_build_id, 0) == -EPERM
    assert call(rig, xen.HYPERVISOR_xen_version, version.XENVER_commandline, DATA) == 0
    assert rig.get(DATA, 9) == b"<denied>\0"
    assert call(rig, xen.HYPERVISOR_xen_version, 99, DATA) == -ENOSYS


def test_a_reservation_that_cannot_be_read_is_none_done(rig: Rig) -> None:
    """Xen answers every refusal of these three with the number of extents done, be it by a continuation's count."""
    for cmd in (
        mem.XENMEM_increase_reservation,
        mem.XENMEM_decrease_reservation,
        mem.XENMEM_populate_physmap,
    ):
        assert call(rig, xen.HYPERVISOR_memory_op, cmd, UNMAPPED) == 0
        assert call(rig, xen.HYPERVISOR_memory_op, cmd | 3 << 6, UNMAPPED) == 3


@pytest.mark.parametrize(
    ("number", "args"),
    [
        (xen.HYPERVISOR_xen_version, (version.XENVER_extraversion, UNMAPPED)),
        (xen.HYPERVISOR_xen_version, (version.XENVER_get_features, UNMAPPED)),
        (xen.HYPERVISOR_set_trap_table, (UNMAPPED,)),
        (xen.HYPERVISOR_callback_op, (CALLBACKOP_register, UNMAPPED)),
        (xen.HYPERVISOR_sched_op, (SCHEDOP_shutdown, UNMAPPED)),
        (xen.HYPERVISOR_sched_op, (SCHEDOP_poll, UNMAPPED)),
        (xen.HYPERVISOR_event_channel_op, (ec.EVTCHNOP_send, UNMAPPED)),
        (xen.HYPERVISOR_event_channel_op, (ec.EVTCHNOP_bind_virq, UNMAPPED)),
        (xen.HYPERVISOR_grant_table_op, (gt.GNTTABOP_map_grant_ref, UNMAPPED, 1)),
        (xen.HYPERVISOR_memory_op, (mem.XENMEM_memory_map, UNMAPPED)),
        (xen.HYPERVISOR_memory_op, (mem.XENMEM_machphys_mapping, UNMAPPED)),
        (xen.HYPERVISOR_vcpu_op, (v.VCPUOP_set_singleshot_timer, 0, UNMAPPED)),
        (xen.HYPERVISOR_vcpu_op, (v.VCPUOP_register_vcpu_info, 0, UNMAPPED)),
        (xen.HYPERVISOR_multicall, (UNMAPPED, 1)),
        (xen.HYPERVISOR_console_io, (0, 4, UNMAPPED)),
        (xen.HYPERVISOR_physdev_op, (6, UNMAPPED)),
        (xen.HYPERVISOR_set_gdt, (UNMAPPED, 8)),
        (xen.HYPERVISOR_xen_version, (version.XENVER_extraversion, 0xFFFF_8000_0000_0000)),
    ],
)
def test_bad_pointers_are_efault(rig: Rig, number: int, args: tuple[int, ...]) -> None:
    """Also an address in Xen's own area; and nothing went to the hypervisor."""
    assert call(rig, number, *args) == -EFAULT
    assert not rig.upstream.asked


@pytest.mark.parametrize("number", [11, 43, 47, 61, 64, 1 << 40])
def test_numbers_that_do_not_exist(rig: Rig, number: int) -> None:
    rig.run(mov_rax(number) + b"\x0f\x05\x48\x89\xc3")
    assert rig.regs.rbx == (1 << 64) - ENOSYS


def test_trap_table_and_callbacks(rig: Rig) -> None:
    rig.put(DATA, struct.pack("<BBH4xQ", 14, 4, 0xE030, 0x1234) + bytes(16))
    assert call(rig, xen.HYPERVISOR_set_trap_table, DATA) == 0
    assert (rig.state.trap_address[14], rig.state.trap_flags[14], rig.state.trap_cs[14]) == (
        0x1234,
        4,
        0xE033,
    )
    rig.put(DATA, struct.pack("<BBH4xQ", 14, 0, 0, 1 << 50) + bytes(16))
    assert call(rig, xen.HYPERVISOR_set_trap_table, DATA) == -EINVAL
    assert call(rig, xen.HYPERVISOR_set_trap_table, 0) == 0
    assert rig.state.trap_address[14] == 0
    for kind, rc in (
        (0, 0),
        (1, 0),
        (2, 0),
        (3, -ENOSYS),
        (4, 0),
        (5, 0),
        (6, -ENOSYS),
        (7, 0),
        (9, -ENOSYS),
    ):
        rig.put(DATA, CALLBACK_REGISTER.pack(callback_register(kind, 1, 0x4000)))
        assert call(rig, xen.HYPERVISOR_callback_op, CALLBACKOP_register, DATA) == rc, kind
    assert rig.state.syscall_masks
    rig.put(DATA, struct.pack("<HH", 0, 0))
    assert call(rig, xen.HYPERVISOR_callback_op, CALLBACKOP_unregister, DATA) == -EINVAL
    rig.put(DATA, struct.pack("<HH", 4, 0))
    assert call(rig, xen.HYPERVISOR_callback_op, CALLBACKOP_unregister, DATA) == 0
    assert rig.state.trap_address[2] == 0


def test_segment_bases(rig: Rig) -> None:
    assert call(rig, xen.HYPERVISOR_set_segment_base, 0, 0x1000) == 0
    assert call(rig, xen.HYPERVISOR_set_segment_base, 1, 0x2000) == 0
    assert call(rig, xen.HYPERVISOR_set_segment_base, 2, 0x3000) == 0
    assert (rig.regs.fs_base, rig.regs.kernel_gs_base, rig.regs.gs_base) == (0x1000, 0x2000, 0x3000)
    assert call(rig, xen.HYPERVISOR_set_segment_base, 0, 1 << 50) == -EINVAL
    assert call(rig, xen.HYPERVISOR_set_segment_base, 4, 0) == -EINVAL
    assert call(rig, xen.HYPERVISOR_set_segment_base, 3, 0) == 0
    assert rig.regs.kernel_gs_base == 0


def test_vm_assist(rig: Rig) -> None:
    assert call(rig, xen.HYPERVISOR_vm_assist, 0, xen.VMASST_TYPE_writable_pagetables) == 0
    assert rig.domain.mmu.writable_page_tables
    assert call(rig, xen.HYPERVISOR_vm_assist, 1, xen.VMASST_TYPE_writable_pagetables) == 0
    assert not rig.domain.mmu.writable_page_tables
    assert call(rig, xen.HYPERVISOR_vm_assist, 0, 17) == -EINVAL
    assert call(rig, xen.HYPERVISOR_vm_assist, 2, 4) == -ENOSYS


# --- multicall


def entry(op: int, *args: int) -> bytes:
    return struct.pack("<8Q", op, 0xDEAD, *args, *[0] * (6 - len(args)))


def test_multicall_mixes_local_and_remote(rig: Rig) -> None:
    """Each entry gets its own result; one that faults does not stop the rest; a nested multicall is refused."""
    rig.upstream.answer = lambda nr, cmd, data: (1234, b"")
    rig.put(DATA + 2048, struct.pack("<H", 0x7FF0))
    calls = [
        entry(xen.HYPERVISOR_stack_switch, 0xE02B, 0x5000),
        entry(xen.HYPERVISOR_memory_op, mem.XENMEM_current_reservation, DATA + 2048),
        entry(xen.HYPERVISOR_callback_op, CALLBACKOP_register, UNMAPPED),
        entry(xen.HYPERVISOR_multicall, DATA, 1),
        entry(99),
        entry(xen.HYPERVISOR_update_va_mapping, HANDLERS, (BASE + 17) << 12 | 0x61, 2),
    ]
    rig.put(DATA, b"".join(calls))
    assert call(rig, xen.HYPERVISOR_multicall, DATA, len(calls)) == 0
    results = [struct.unpack("<q", rig.get(DATA + 64 * i + 8, 8))[0] for i in range(len(calls))]
    assert results == [0, 1234, -EFAULT, -EINVAL, -ENOSYS, 0]
    assert rig.state.kernel_sp == 0x5000
    assert rig.domain.calls.counts[xen.HYPERVISOR_stack_switch] == 1


def test_iret_in_a_multicall_does_not_come_back(rig: Rig) -> None:
    target = CODE + 512
    rig.put(target, STOP)
    rig.put(
        KERNEL_STACK - 256, struct.pack("<9Q", 0, 0, 0, 0, target, 0xE030, 0x202, KERNEL_STACK - 512, 0xE02B)
    )
    rig.put(DATA, entry(xen.HYPERVISOR_iret) + entry(xen.HYPERVISOR_stack_switch, 0xE02B, 0x7777))
    rig.regs.rsp = KERNEL_STACK - 256
    rig.run(hypercall(xen.HYPERVISOR_multicall, DATA, 2))
    assert rig.regs.rip == target + len(STOP)
    assert rig.state.kernel_sp != 0x7777


# --- memory and grants


def test_decrease_and_populate_mirror_ownership(rig: Rig) -> None:
    """A frame that is mapped cannot go; an unmapped one goes and comes back under its new PFN."""

    def op(number: int, extents: list[int]) -> int:
        rig.put(DATA + 512, struct.pack(f"<{len(extents)}Q", *extents))
        rig.put(DATA, struct.pack("<QQIIH6x", DATA + 512, len(extents), 0, 0, xen.DOMID_SELF))
        return call(rig, xen.HYPERVISOR_memory_op, number, DATA)

    rig.upstream.answer = lambda nr, cmd, data: (struct.unpack_from("<Q", data, 8)[0], data)
    assert op(mem.XENMEM_decrease_reservation, [BASE + 245, BASE + 100, BASE + 246]) == 1
    assert not rig.frames.owned(BASE + 245)  # type: ignore[arg-type]  # a plain number is an MFN here
    assert rig.frames.owned(BASE + 246)  # type: ignore[arg-type]  # a plain number is an MFN here
    data = rig.upstream.asked[-1][2]
    assert struct.unpack_from("<Q", data, 8)[0] == 1
    rig.upstream.answer = lambda nr, cmd, data: (1, data[:32] + struct.pack("<Q", BASE + 245))
    assert op(mem.XENMEM_populate_physmap, [0x4444]) == 1
    assert rig.frames.owned(BASE + 245)  # type: ignore[arg-type]  # a plain number is an MFN here
    assert rig.domain.mmu.get_m2p(BASE + 245) == 0x4444
    assert rig.qwords(DATA + 512, 1) == (BASE + 245,)
    rig.upstream.answer = lambda nr, cmd, data: (-12, b"")
    assert op(mem.XENMEM_decrease_reservation, [BASE + 246]) == 0
    assert rig.frames.owned(BASE + 246)  # type: ignore[arg-type]  # a plain number is an MFN here


def test_grant_map_enters_and_unmap_takes_away(rig: Rig) -> None:
    foreign = bytearray(b"granted!" * 512)
    mfn = 0x900
    rig.frames.add_foreign(mfn, 3, memoryview(foreign), writable=True)  # type: ignore[arg-type]  # plain numbers
    target = DATA + 221 * 4096

    def answer(nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        if cmd == gt.GNTTABOP_map_grant_ref:
            item = gt.GNTTAB_MAP_GRANT_REF.unpack(data)
            return 0, gt.GNTTAB_MAP_GRANT_REF.pack(item._replace(status=0, handle=4, dev_bus_addr=mfn << 12))
        item2 = gt.GNTTAB_UNMAP_GRANT_REF.unpack(data)
        return 0, gt.GNTTAB_UNMAP_GRANT_REF.pack(item2._replace(status=0))

    rig.upstream.answer = answer
    slot = rig.frames.words
    rig.put(
        DATA, gt.GNTTAB_MAP_GRANT_REF.pack(gt.gnttab_map_grant_ref(target, gt.GNTMAP_host_map, 8, 3, 0, 0, 0))
    )
    assert call(rig, xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, 1) == 0
    mapped = gt.GNTTAB_MAP_GRANT_REF.unpack(rig.get(DATA, gt.GNTTAB_MAP_GRANT_REF.size))
    assert mapped.status == 0
    assert slot[3 * 512 + 241] >> 12 & 0xFFFFFF == mfn
    rig.put(DATA, gt.GNTTAB_UNMAP_GRANT_REF.pack(gt.gnttab_unmap_grant_ref(target, 0, 4, 0)))
    assert call(rig, xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, DATA, 1) == 0
    assert slot[3 * 512 + 241] == 0
    assert call(rig, xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, 1 << 31) == -EINVAL
    assert call(rig, xen.HYPERVISOR_grant_table_op, 99, DATA, 1) == -ENOSYS


def test_grant_that_cannot_be_entered_is_given_back(rig: Rig) -> None:
    seen = []

    def answer(nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        seen.append(cmd)
        item = gt.GNTTAB_MAP_GRANT_REF.unpack(data) if cmd == 0 else None
        if item is None:
            return 0, data
        return 0, gt.GNTTAB_MAP_GRANT_REF.pack(item._replace(status=0, handle=4, dev_bus_addr=0x900 << 12))

    rig.upstream.answer = answer
    rig.put(
        DATA,
        gt.GNTTAB_MAP_GRANT_REF.pack(gt.gnttab_map_grant_ref(UNMAPPED, gt.GNTMAP_host_map, 8, 3, 0, 0, 0)),
    )
    assert call(rig, xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, 1) == 0
    assert gt.GNTTAB_MAP_GRANT_REF.unpack(rig.get(DATA, gt.GNTTAB_MAP_GRANT_REF.size)).status < 0
    assert seen == [gt.GNTTABOP_map_grant_ref, gt.GNTTABOP_unmap_grant_ref]


def test_control_hypercalls_are_refused_or_forwarded(rig: Rig) -> None:
    """domctl, sysctl, platform_op: the hypervisor decides; unknown commands are answered here: -EACCES for another interface
    version, -EPERM for an unprivileged domain."""
    for number, interface in (
        (xen.HYPERVISOR_domctl, 0x15),
        (xen.HYPERVISOR_sysctl, 0x15),
        (xen.HYPERVISOR_platform_op, 0x03000001),
    ):
        rig.put(DATA, struct.pack("<II", 0x7FFF, interface))
        assert call(rig, number, DATA) == -EPERM
        rig.put(DATA, struct.pack("<II", 0x7FFF, interface + 1))
        assert call(rig, number, DATA) == -EACCES
    assert not rig.upstream.asked
    assert call(rig, xen.HYPERVISOR_xsm_op, DATA) == -ENOSYS
    rig.put(DATA, b"hello")
    rig.upstream.answer = lambda nr, cmd, data: (0, b"")
    assert call(rig, xen.HYPERVISOR_console_io, 0, 5, DATA) == 0
    assert rig.upstream.asked[-1][2] == struct.pack("<I", 5) + b"hello"


def test_the_device_model_operations_of_a_pv_domain(rig: Rig) -> None:
    """The structure crosses the bus as one piece and comes back into the buffer; who may is said before what is wrong with it."""
    nr = xen.HYPERVISOR_dm_op

    def buffer(size: int, at: int = DATA + 64) -> None:
        rig.put(DATA, dm_op.XEN_DM_OP_BUF.pack(dm_op.xen_dm_op_buf(at, size)))

    def served(number: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        item = DM_OP_ARG.unpack(data)
        assert (number, cmd, item.domid, item.op.op) == (nr, dm_op.XEN_DMOP_nr_vcpus, 9, cmd)
        return 0, DM_OP_ARG.pack(item._replace(op=item.op._replace(u=b"\5".ljust(len(item.op.u), b"\0"))))

    rig.upstream.answer = served
    rig.put(DATA + 64, struct.pack("<IIIQ", dm_op.XEN_DMOP_nr_vcpus, 0, 0, 0x5555555555555555))
    buffer(12)
    assert call(rig, nr, 1 << 16 | 9, 1, DATA) == 0, "the domain's number has 16 bits"
    assert rig.get(DATA + 64, 20) == struct.pack("<IIIQ", dm_op.XEN_DMOP_nr_vcpus, 0, 5, 0x5555555555555555)
    assert call(rig, nr, 9, 3, DATA) == -7, "E2BIG"
    assert call(rig, nr, 9, 1, UNMAPPED) == -EFAULT
    assert call(rig, nr, 9, 0, 0) == -EFAULT, "no buffer"
    buffer(11)
    assert call(rig, nr, 9, 1, DATA) == -EFAULT, "too small for the command"
    buffer(12, UNMAPPED)
    assert call(rig, nr, 9, 1, DATA) == -EFAULT
    rig.put(DATA + 64, struct.pack("<II", 99, 0))
    buffer(8)
    assert call(rig, nr, 9, 1, DATA) == -95, "EOPNOTSUPP"
    rig.upstream.answer = lambda number, cmd, data: (-3, b"")
    assert call(rig, nr, 9, 1, DATA) == -3, "ESRCH comes first"
    assert call(rig, nr, 9, 0, 0) == -3


def test_commands_of_hvm_op_that_are_for_others(rig: Rig) -> None:
    assert call(rig, xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_flush_tlbs, 0) == -EINVAL
    assert call(rig, xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_set_evtchn_upcall_vector, UNMAPPED) == -EINVAL
    assert call(rig, xen.HYPERVISOR_hvm_op, 0x777, 0) == -ENOSYS


def test_a_request_for_a_monitor_is_made_and_nobody_listens(rig: Rig) -> None:
    """HVMOP_guest_request_vm_event is of any guest, and has no argument."""
    assert call(rig, xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_guest_request_vm_event, 0) == 0
    assert call(rig, xen.HYPERVISOR_hvm_op, hvm_op.HVMOP_guest_request_vm_event, DATA) == -EINVAL
