"""Time, events and vCPUs of a PV domain: pvclock, timers, run states, 2-level and FIFO delivery, block, poll, turns."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from bus.abi import event_channel as ec
from bus.abi import vcpu as v
from bus.abi import xen
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, VGCF_IN_KERNEL
from bus.abi.sched import (
    SCHED_POLL,
    SCHED_SHUTDOWN,
    SCHEDOP_block,
    SCHEDOP_poll,
    SCHEDOP_shutdown,
    sched_poll,
)
from bus.addresses import Port, VcpuId
from domains.pv.time import pvclock
from tests.unit.pvcpu.rig import BASE, CODE, DATA, HANDLERS, KERNEL_STACK, STOP, Rig, call, hypercall

EINVAL, ENOENT, EEXIST, ENXIO, ENOSYS = 22, 2, 17, 6, 38


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- time


def test_pvclock_gives_the_very_clock(rig: Rig) -> None:
    """The guest's formula, applied to what RDTSC gives, is the time the timers go by; versions are even and go up."""
    info = xen.VCPU_TIME_INFO.unpack(rig.frames.octets, rig.state.info + 32)
    assert info.version % 2 == 0
    assert info.version > 0
    for now in (rig.now, rig.now + 1, rig.now + 123_456_789_012):
        assert pvclock(info, now) == now
    rig.domain.update_clocks()
    assert xen.VCPU_TIME_INFO.unpack(rig.frames.octets, rig.state.info + 32).version == info.version + 2


def test_wall_clock(rig: Rig) -> None:
    at = rig.domain._shared + 3072
    wc_version, seconds, nanoseconds, high = struct.unpack_from("<IIII", rig.frames.octets, at)
    assert wc_version % 2 == 0
    assert (high << 32 | seconds) * 10**9 + nanoseconds == rig.wall - rig.now


def bind_timer(rig: Rig, port: int = 5) -> None:
    rig.upstream.answer = lambda nr, cmd, data: (0, data[:8] + struct.pack("<I", port))
    rig.put(DATA, struct.pack("<III", xen.VIRQ_TIMER, 0, 0))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_bind_virq, DATA) == 0
    assert struct.unpack("<I", rig.get(DATA + 8, 4))[0] == port
    unmask_all(rig)


def unmask_all(rig: Rig) -> None:
    at = rig.domain._shared + 2560
    rig.frames.octets[at : at + 512] = bytes(512)


def is_pending(rig: Rig, port: int) -> bool:
    return bool(rig.frames.words[(rig.domain._shared + 2048 >> 3) + (port >> 6)] >> (port & 63) & 1)


def test_singleshot_never_fires_early_and_fires_once(rig: Rig) -> None:
    bind_timer(rig)
    rig.put(DATA, struct.pack("<QI4x", rig.now + 1000, 0))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_stop_periodic_timer, 0, 0) == 0
    rig.frames.octets[rig.state.info] = 0
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_set_singleshot_timer, 0, DATA) == 0
    assert rig.domain.next_deadline() == rig.now + 1000
    rig.now += 999
    rig.put(CODE + 1024, b"\xeb\xfe")  # jmp $
    rig.regs.rip = CODE + 1024
    rig.domain.run_slice()
    assert not is_pending(rig, 5)
    rig.now += 1
    rig.run(b"\x90")
    assert is_pending(rig, 5)
    assert rig.domain.next_deadline() is None


def test_timer_in_the_past_fires_on_the_way_back(rig: Rig) -> None:
    bind_timer(rig)
    assert call(rig, xen.HYPERVISOR_set_timer_op, rig.now - 1) == 0
    assert is_pending(rig, 5)


def test_timer_errors(rig: Rig) -> None:
    rig.put(DATA, struct.pack("<QI4x", rig.now - 1, 1))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_set_singleshot_timer, 0, DATA) == 0, "also if past"
    rig.put(DATA, struct.pack("<Q", 999_999))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_set_periodic_timer, 0, DATA) == -EINVAL
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_is_up, 1, 0) == -ENOENT
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_is_up, 0, 0) == 1
    assert call(rig, xen.HYPERVISOR_vcpu_op, 77, 0, 0) == -ENOSYS
    assert call(rig, xen.HYPERVISOR_set_timer_op, (1 << 64) - 5) == 0
    assert rig.state.singleshot == rig.now + 100_000_000


def test_periodic_timer_ticks_and_does_not_catch_up(rig: Rig) -> None:
    bind_timer(rig)
    rig.put(DATA, struct.pack("<Q", 1_000_000))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_set_periodic_timer, 0, DATA) == 0
    rig.now += 10_500_000
    rig.run(b"\x90")
    assert is_pending(rig, 5)
    assert rig.domain.next_deadline() == rig.now + 1_000_000


# --- events


def test_two_level_delivery(rig: Rig) -> None:
    """Pending bit, selector, upcall flag; a masked port stops at the pending bit and is delivered by unmask."""
    rig.mask = 1
    rig.domain.deliver(Port(70), VcpuId(0))
    assert is_pending(rig, 70)
    assert rig.frames.words[(rig.state.info >> 3) + 1] == 1 << 1
    assert rig.pending == 1
    rig.frames.octets[rig.state.info] = 0
    rig.frames.words[(rig.state.info >> 3) + 1] = 0
    rig.frames.words[rig.domain._shared + 2560 >> 3] = 1 << 9
    rig.domain.deliver(Port(9), VcpuId(0))
    assert is_pending(rig, 9)
    assert rig.pending == 0
    rig.put(DATA, struct.pack("<I", 9))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_unmask, DATA) == 0
    assert rig.pending == 1
    assert rig.frames.words[(rig.state.info >> 3) + 1] == 1
    rig.put(DATA, struct.pack("<I", 10))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_unmask, DATA) == -EINVAL
    for port in (0, 4096, 1 << 31):
        rig.domain.deliver(Port(port), VcpuId(0))
    rig.domain.deliver(Port(3), VcpuId(9))
    assert not is_pending(rig, 3)


def test_block_wakes_by_event_and_by_timer(rig: Rig) -> None:
    rig.put(HANDLERS, STOP)
    rig.state.event_callback = HANDLERS
    unmask_all(rig)
    rig.mask = 1
    rig.run(hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_block, 0))
    assert rig.state.blocked
    assert rig.mask == 0, "blocking enables upcalls"
    step = rig.domain.run_slice()
    assert not step.runnable
    assert step.deadline is None
    rig.domain.deliver(Port(5), VcpuId(0))
    rig.run()
    assert rig.regs.rip == HANDLERS + len(STOP)
    rig.mask = 1
    rig.frames.octets[rig.state.info] = 1
    rig.run(hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_block, 0))
    assert not rig.state.blocked, "an event was pending"


def test_poll(rig: Rig) -> None:
    unmask_all(rig)
    rig.mask = 1
    rig.put(DATA + 64, struct.pack("<2I", 6, 7))
    rig.put(DATA, SCHED_POLL.pack(sched_poll(DATA + 64, 2, rig.now + 50)))
    rig.run(hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_poll, DATA))
    assert rig.state.blocked
    assert rig.domain.next_deadline() == rig.now + 50
    rig.now += 50
    rig.run()
    assert not rig.state.blocked
    rig.domain.deliver(Port(7), VcpuId(0))
    assert call(rig, xen.HYPERVISOR_sched_op, SCHEDOP_poll, DATA) == 0
    rig.put(DATA, SCHED_POLL.pack(sched_poll(DATA + 64, 129, 0)))
    assert call(rig, xen.HYPERVISOR_sched_op, SCHEDOP_poll, DATA) == -EINVAL
    rig.put(DATA + 64, struct.pack("<I", 5000))
    rig.put(DATA, SCHED_POLL.pack(sched_poll(DATA + 64, 1, 0)))
    assert call(rig, xen.HYPERVISOR_sched_op, SCHEDOP_poll, DATA) == -EINVAL


def test_fifo_queue(rig: Rig) -> None:
    """Words, links, head, ready: two events queue up in order; a consumed queue starts anew; unmask queues."""
    rig.upstream.answer = lambda nr, cmd, data: (0, data)
    rig.put(DATA, ec.EVTCHN_INIT_CONTROL.pack(ec.evtchn_init_control(BASE + 50, 0, 0, 0, bytes(7))))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_init_control, DATA) == 0
    rig.put(DATA, struct.pack("<Q", BASE + 51))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_expand_array, DATA) == 0
    rig.mask = 1

    def word(port: int) -> int:
        return int(struct.unpack_from("<I", rig.frames.octets, 51 * 4096 + 4 * port)[0])

    for port in (8, 9):
        rig.domain.deliver(Port(port), VcpuId(0))
    ready = struct.unpack_from("<I", rig.frames.octets, 50 * 4096)[0]
    head = struct.unpack_from("<I", rig.frames.octets, 50 * 4096 + 8 + 4 * 7)[0]
    assert ready == 1 << 7
    assert head == 8
    assert word(8) == 1 << 31 | 1 << 29 | 9
    assert word(9) == 1 << 31 | 1 << 29
    assert rig.pending
    # The guest consumes both, then a third comes.
    for port in (8, 9):
        struct.pack_into("<I", rig.frames.octets, 51 * 4096 + 4 * port, 0)
    struct.pack_into("<I", rig.frames.octets, 50 * 4096, 0)
    rig.frames.octets[rig.state.info] = 0
    struct.pack_into("<I", rig.frames.octets, 51 * 4096 + 4 * 10, 1 << 30)
    rig.domain.deliver(Port(10), VcpuId(0))
    assert word(10) == 3 << 30
    assert not rig.pending
    rig.put(DATA, struct.pack("<I", 10))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_unmask, DATA) == 0
    assert word(10) == 1 << 31 | 1 << 29
    assert struct.unpack_from("<I", rig.frames.octets, 50 * 4096 + 8 + 4 * 7)[0] == 10
    assert rig.pending


def test_fifo_pages_must_be_plain(rig: Rig) -> None:
    """A page table cannot become a control block: Xen would write it."""
    rig.put(DATA, ec.EVTCHN_INIT_CONTROL.pack(ec.evtchn_init_control(BASE + 3, 0, 0, 0, bytes(7))))
    assert call(rig, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_init_control, DATA) == -EINVAL
    assert not rig.upstream.asked


def test_register_vcpu_info(rig: Rig) -> None:
    """Content moves, everything is pending; once only; a page table or a crossing structure is refused."""

    def register(mfn: int, offset: int) -> int:
        rig.put(DATA, struct.pack("<QII", mfn, offset, 0))
        return call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_register_vcpu_info, 0, DATA)

    rig.mask = 1
    assert register(BASE + 3, 0) == -EINVAL
    assert register(BASE + 60, 4096 - 63) == -ENXIO
    assert register(BASE + 99999, 0) == -EINVAL
    assert register(BASE + 60, 128) == 0
    assert rig.state.info == 60 * 4096 + 128
    assert rig.mask == 1
    assert rig.pending == 1
    assert rig.frames.words[(rig.state.info >> 3) + 1] == (1 << 64) - 1
    assert register(BASE + 61, 0) == -EINVAL
    assert call(rig, xen.HYPERVISOR_update_va_mapping, DATA + 40 * 4096, (BASE + 60) << 12 | 0x67, 2) == 0


def test_runstate_and_time_areas(rig: Rig) -> None:
    rig.put(DATA, struct.pack("<Q", DATA + 256))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_register_runstate_memory_area, 0, DATA) == 0
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_register_vcpu_time_memory_area, 0, DATA + 8) == 0
    rig.put(DATA, struct.pack("<Q", DATA + 512))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_register_vcpu_time_memory_area, 0, DATA) == 0
    info = xen.VCPU_TIME_INFO.unpack(rig.get(DATA + 512, 32))
    assert pvclock(info, rig.now) == rig.now
    entered = rig.now
    rig.domain.preempted()
    rig.now += 700
    rig.run(b"\x90")
    runstate = v.VCPU_RUNSTATE_INFO.unpack(rig.get(DATA + 256, v.VCPU_RUNSTATE_INFO.size))
    assert runstate.state == v.RUNSTATE_running
    assert not runstate.state_entry_time >> 63
    assert runstate.time[v.RUNSTATE_runnable] >= 700
    assert runstate.state_entry_time == entered + 700
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_get_runstate_info, 0, DATA + 1024) == 0
    got = v.VCPU_RUNSTATE_INFO.unpack(rig.get(DATA + 1024, v.VCPU_RUNSTATE_INFO.size))
    assert sum(got.time) == rig.now


# --- several vCPUs


def ap_context(rip: int, rsp: int, root: int, **changes: Any) -> bytes:
    zero = VCPU_GUEST_CONTEXT.zero()
    registers = zero.user_regs._replace(rip=rip, rsp=rsp, rdi=0x55, cs=0xE033, ss=0xE02B, rflags=0x202)
    context = zero._replace(
        flags=VGCF_IN_KERNEL,
        user_regs=registers,
        kernel_ss=0xE02B,
        kernel_sp=rsp,
        ctrlreg=(0, 0, 0, root << 12, 0, 0, 0, 0),
        gs_base_kernel=0x9000,
    )
    return VCPU_GUEST_CONTEXT.pack(context._replace(**changes))


def test_second_vcpu_runs_and_ipi_reaches_it() -> None:
    rig = Rig(2)
    place = DATA + 8 * 4096
    ap_code = CODE + 2048
    rig.put(ap_code, hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_block, 0))
    rig.put(place, ap_context(ap_code, KERNEL_STACK - 2048, int(rig.state.kernel_root)))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_up, 1, 0) == -EINVAL
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 1, place) == 0
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 1, place) == -EEXIST
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_is_up, 1, 0) == 0
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_up, 1, 0) == 0
    second = rig.domain.states[1]
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_is_up, 1, 0) == 1
    for _ in range(6):
        rig.regs.rip = CODE + 3000 if rig.cpu.current is rig.state else rig.regs.rip
        rig.put(CODE + 3000, b"\xeb\xfe")  # jmp $
        rig.domain.run_slice()
    assert second.blocked, "the second vCPU ran and blocked"
    unmask_all(rig)
    rig.domain.events.bind(11, 1, ipi=True)
    rig.domain.events.set_pending(11, 1)
    assert not second.blocked
    assert rig.frames.octets[second.info] == 1
    assert rig.frames.octets[rig.state.info] == 0


def test_registers_survive_the_switch_between_vcpus() -> None:
    """Both vCPUs count in their own registers; neither sees the other's."""
    rig = Rig(2)
    loop = b"\x48\xff\xc0\xeb\xfb"  # inc rax; jmp
    place = DATA + 8 * 4096
    rig.put(CODE + 2048, loop)
    rig.put(place, ap_context(CODE + 2048, KERNEL_STACK - 2048, int(rig.state.kernel_root)))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 1, place) == 0
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_up, 1, 0) == 0
    rig.put(CODE, b"\x48\xff\xcb\xeb\xfb")  # dec rbx; jmp
    rig.regs.rip, rig.regs.rbx, rig.regs.rax = CODE, 1 << 40, 0x77
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for _ in range(6):
        rig.domain.run_slice()
        seen[rig.cpu.current.id].append((rig.regs.rax, rig.regs.rbx))
    assert all(rax == 0x77 for rax, _ in seen[0])
    assert [rbx for _, rbx in seen[0]] == sorted((rbx for _, rbx in seen[0]), reverse=True)
    assert all(rbx == 0 for _, rbx in seen[1])
    assert seen[1][0][0] < seen[1][1][0] < seen[1][2][0]
    assert rig.cpu.regs.rdi in (0x55, rig.regs.rdi)


def test_bad_contexts_are_refused() -> None:
    rig = Rig(2)
    root = int(rig.state.kernel_root)
    place = DATA + 8 * 4096
    for changes in (
        {"kernel_sp": 1 << 50},
        {"ctrlreg": (0, 0, 0, (BASE + 77777) << 12, 0, 0, 0, 0)},
        {"flags": 0},
        {"gdt_ents": 9000},
        {"ldt_base": 5},
    ):
        rig.put(place, ap_context(CODE, KERNEL_STACK, root, **changes))
        assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 1, place) == -EINVAL, changes
    assert not rig.domain.mmu.check_invariants()


def test_last_vcpu_down_powers_off(rig: Rig) -> None:
    rig.run(hypercall(xen.HYPERVISOR_vcpu_op, v.VCPUOP_down, 0, 0))
    assert rig.domain.life.shutdown_code == 0
    assert rig.upstream.asked[-1][:2] == (xen.HYPERVISOR_sched_op, SCHEDOP_shutdown)


def test_shutdown_stops_the_domain(rig: Rig) -> None:
    rig.put(DATA, SCHED_SHUTDOWN.pack(SCHED_SHUTDOWN.zero()._replace(reason=1)))
    rig.run(hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_shutdown, DATA))
    assert rig.domain.finished
    assert rig.domain.life.shutdown_code == 1
    rip = rig.regs.rip
    rig.domain.run_slice()
    assert rig.regs.rip == rip


def test_pause(rig: Rig) -> None:
    rig.put(CODE, b"\xeb\xfe")
    rig.regs.rip = CODE
    rig.domain.pause()
    assert rig.domain.run_slice() == (False, None, False, False)
    rig.domain.unpause()
    assert rig.domain.run_slice().runnable
    rig.domain.ring()
    assert rig.domain.run_slice().bell, "a ring between two slices is not lost"
    step = rig.domain.run_slice()
    assert step.runnable
    assert not step.bell


def test_crash_that_the_guest_declares_keeps_the_registers(rig: Rig) -> None:
    rig.put(DATA, struct.pack("<I", 3))
    rig.run(hypercall(xen.HYPERVISOR_sched_op, SCHEDOP_shutdown, DATA))
    assert rig.domain.life.shutdown_code == 3
    assert rig.domain.crash_text is not None
    assert "declared SHUTDOWN_crash" in rig.domain.crash_text
    assert any("RIP:" in line for line in rig.upstream.lines)


def test_vcpu_beyond_the_shared_info_needs_its_own_place() -> None:
    """vCPU 32 has no vcpu_info at first: events for it touch no memory, and it cannot be initialised before it has one."""
    rig = Rig(34)
    last = rig.frames.octets[-1]
    rig.domain.deliver(Port(8), VcpuId(33))
    assert rig.frames.octets[-1] == last
    place = DATA + 8 * 4096
    rig.put(place, ap_context(CODE, KERNEL_STACK, int(rig.state.kernel_root)))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 33, place) == -EINVAL
    rig.put(DATA, struct.pack("<QII", BASE + 60, 0, 0))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_register_vcpu_info, 33, DATA) == 0
    assert rig.frames.octets[60 * 4096] == 1
    assert rig.frames.octets[60 * 4096 + 1] == 1
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 33, place) == 0
