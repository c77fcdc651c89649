"""Proves: a domain is created, runs, is paused, shuts down for each reason, crashes and is destroyed as on
Xen, and
whatever happens to its process, everything it had comes back."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, EPERM, ERESTART, ESRCH
from typing import Any

import pytest

from bus.abi import domctl, event_channel, memory, sched
from bus.abi import grant_table as gt
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, xen_arch_domainconfig
from bus.abi.xen import VIRQ_DOM_EXC, HYPERVISOR_grant_table_op, HYPERVISOR_sched_op
from bus.addresses import DomId, Port
from hypervisor.core.effects import Bind, KillProcess, Order, Raise, Reply, StartProcess, StopMachine
from hypervisor.core.hypercalls import Call, Result
from hypervisor.core.invariants import InvariantChecker
from tests.unit.hvcore.hvcore_machine import Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


def bind_dom_exc(machine: Machine) -> int:
    answer = machine.event(
        0, event_channel.EVTCHNOP_bind_virq, event_channel.evtchn_bind_virq(VIRQ_DOM_EXC, 0, 0)
    )
    port: int = answer.item.port
    return port


def orders(effects: list[Any], domid: int, kind: str) -> list[Order]:
    return [e for e in effects if isinstance(e, Order) and e.domain == domid and e.kind == kind]


def spec(domid: int = 0, **changes: Any) -> domctl.xen_domctl_createdomain:
    base = domctl.xen_domctl_createdomain(
        0, bytes(16), 0, 0, 1, 1023, -1, -1, 2, 0, 0, xen_arch_domainconfig(0, 0)
    )
    return base._replace(**changes)


def test_a_new_domain_is_paused_and_its_process_gets_its_memory_before_it_starts(machine: Machine) -> None:
    before = len(machine.effects)
    domid = machine.create(pages=64)
    machine.start(domid)
    mine = [e for e in machine.effects[before:] if getattr(e, "domain", None) == domid]
    kinds = [e.kind if isinstance(e, Order) else type(e).__name__ for e in mine]
    assert kinds == ["StartProcess", "configure", "extent", "start", "pause"]
    assert isinstance(mine[0], StartProcess)
    assert mine[0].role == "domu"
    assert isinstance(mine[2], Order)
    assert mine[2].extents == (mine[2].body["base"],)
    assert isinstance(mine[4], Order)
    assert mine[4].body == {"paused": False}


def test_the_builder_and_nobody_else_gets_the_memory_of_what_it_builds(machine: Machine) -> None:
    domid = machine.create()
    other = machine.create()
    base = machine.core.frames.extent_of(DomId(domid)).base  # type: ignore[union-attr]  # it has one
    holders = {e.domain for e in machine.effects if isinstance(e, Order) and base in e.extents}
    assert holders == {0, domid}
    assert other not in holders


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_vcpus": 0}, EINVAL),
        ({"max_vcpus": 129}, EINVAL),
        ({"flags": 1 << 20}, EINVAL),
        ({"flags": domctl.XEN_DOMCTL_CDF_hap}, EINVAL),
        ({"ssidref": 77}, EINVAL),
        ({"grant_opts": 0}, EINVAL),
        ({"vmtrace_size": 4096}, EINVAL),
    ],
)
def test_create_refuses_what_does_not_go_together(
    machine: Machine, change: dict[str, Any], error: int
) -> None:
    assert machine.domctl(domctl.XEN_DOMCTL_createdomain, 0, spec(**change)).rc == -error
    assert len(machine.core.domains) == 1


def test_domain_ids_are_chosen_or_wanted_and_never_used_twice(machine: Machine) -> None:
    assert machine.create(domid=7) == 7
    assert machine.domctl(domctl.XEN_DOMCTL_createdomain, 7, spec()).rc == -EEXIST
    first = machine.create()
    assert first not in (0, 7)
    assert machine.destroy(first) == 0
    assert machine.create() != first, "ids are not reused at once"


def test_only_the_control_domain_makes_domctls(machine: Machine) -> None:
    domid = machine.create()
    for command in (domctl.XEN_DOMCTL_pausedomain, domctl.XEN_DOMCTL_destroydomain):
        assert machine.domctl(command, domid, caller=domid).rc == -EPERM
    assert machine.domctl(domctl.XEN_DOMCTL_pausedomain, 999, caller=domid).rc == -ESRCH


def test_pauses_nest_and_are_answered_when_the_process_has_stopped(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    domain = machine.core.domains.get(domid)
    assert domain is not None
    assert domain.runnable
    for _ in range(2):
        assert machine.domctl(domctl.XEN_DOMCTL_pausedomain, domid).rc == 0
    machine.start(domid)
    assert not domain.runnable
    machine.start(domid)
    assert domain.runnable
    assert machine.domctl(domctl.XEN_DOMCTL_unpausedomain, domid).rc == -EINVAL


def test_a_process_that_does_not_pause_in_time_is_killed(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    machine.silent.add(domid)
    data = machine.domctl_data(domctl.XEN_DOMCTL_pausedomain, domid)
    token = machine.raw(0, 36, domctl.XEN_DOMCTL_pausedomain, data)
    assert token not in machine.replies
    effects = machine.advance(1.5)
    assert any(isinstance(e, KillProcess) and e.domain == domid for e in effects)
    assert machine.replies[token].rc == 0
    assert machine.info(domid).flags >> 16 & 255 == sched.SHUTDOWN_crash


@pytest.mark.parametrize("reason", range(6))
def test_each_reason_of_a_shutdown_reaches_the_toolstack(machine: Machine, reason: int) -> None:
    port = bind_dom_exc(machine)
    domid = machine.create()
    machine.start(domid)
    before = len(machine.effects)
    answer = machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, sched.sched_shutdown(reason))
    assert answer.rc == 0
    info = machine.info(domid)
    assert info.flags & domctl.XEN_DOMINF_shutdown
    assert info.flags >> domctl.XEN_DOMINF_shutdownshift & 255 == reason
    assert Raise(DomId(0), port, 0) in machine.effects[before:]  # type: ignore[arg-type]  # plain numbers
    assert not machine.core.domains.get(domid).runnable  # type: ignore[union-attr]  # it is there


def test_a_latched_code_wins_over_the_code_of_the_shutdown(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    code = sched.sched_shutdown(sched.SHUTDOWN_reboot)
    assert machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown_code, code).rc == 0
    off = sched.sched_shutdown(sched.SHUTDOWN_poweroff)
    machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, off)
    assert machine.info(domid).flags >> 16 & 255 == sched.SHUTDOWN_reboot
    assert machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown_code, code).rc == -EBUSY


def test_remote_shutdown_stops_the_process_first_and_needs_a_right(machine: Machine) -> None:
    domid, other = machine.create(), machine.create()
    machine.start(domid)
    op = sched.sched_remote_shutdown(domid, sched.SHUTDOWN_reboot)
    assert machine.call(other, HYPERVISOR_sched_op, sched.SCHEDOP_remote_shutdown, op).rc == -EPERM
    machine.silent.add(domid)
    assert machine.call(0, HYPERVISOR_sched_op, sched.SCHEDOP_remote_shutdown, op).rc == 0
    assert not machine.info(domid).flags & domctl.XEN_DOMINF_shutdown
    (order,) = orders(machine.effects, domid, "stop")
    machine.core.order_done(machine.now, DomId(domid), order.order_id, 0, b"")
    assert machine.info(domid).flags & domctl.XEN_DOMINF_shutdown
    assert machine.info(domid).flags >> 16 & 255 == sched.SHUTDOWN_reboot


def test_a_suspended_domain_resumes(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    suspend = sched.sched_shutdown(sched.SHUTDOWN_suspend)
    machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, suspend)
    assert machine.domctl(domctl.XEN_DOMCTL_resumedomain, domid).rc == 0
    assert orders(machine.effects, domid, "resume")
    assert machine.core.domains.get(domid).runnable  # type: ignore[union-attr]  # it is there
    assert not machine.info(domid).flags & domctl.XEN_DOMINF_shutdown


def test_a_watchdog_that_is_not_fed_shuts_the_domain_down(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)

    def watchdog(number: int, seconds: int) -> int:
        op = sched.sched_watchdog(number, seconds)
        return machine.call(domid, HYPERVISOR_sched_op, sched.SCHEDOP_watchdog, op).rc

    assert watchdog(1, 5) == -EINVAL
    assert watchdog(0, 5) == 1
    assert watchdog(0, 60) == 2
    assert watchdog(0, 60) < 0
    machine.advance(4)
    assert watchdog(1, 5) == 0
    machine.advance(4)
    assert not machine.info(domid).flags & domctl.XEN_DOMINF_shutdown
    assert watchdog(2, 0) == 0
    machine.advance(2)
    assert machine.info(domid).flags >> 16 & 255 == sched.SHUTDOWN_watchdog


def test_a_process_that_dies_is_a_crash_and_stays_for_the_toolstack(machine: Machine) -> None:
    port = bind_dom_exc(machine)
    domid = machine.create()
    machine.start(domid)
    before = len(machine.effects)
    machine.core.process_ended(machine.now, DomId(domid), "signal 9")
    machine.run()
    info = machine.info(domid)
    assert info.flags >> 16 & 255 == sched.SHUTDOWN_crash
    assert any(isinstance(e, Raise) and e.port == port for e in machine.effects[before:])
    assert machine.destroy(domid) == 0
    assert machine.info(domid) is None


def test_destroy_waits_for_the_process_and_gives_all_memory_back(machine: Machine) -> None:
    free = machine.core.frames.free_pages
    domid = machine.create(pages=100)
    machine.start(domid)
    machine.unkillable.add(domid)
    data = machine.domctl_data(domctl.XEN_DOMCTL_destroydomain, domid)
    token = machine.raw(0, 36, domctl.XEN_DOMCTL_destroydomain, data)
    assert token not in machine.replies
    assert machine.core.frames.free_pages < free, "memory is not given away while the process may live"
    machine.core.process_ended(machine.now, DomId(domid), "killed")
    machine.run()
    assert machine.replies[token].rc == 0
    assert machine.core.frames.free_pages == free
    assert machine.core.domains.get(domid) is None
    assert len(machine.memory.extents) == 1


def test_a_destroy_whose_process_does_not_end_is_answered_and_can_be_repeated(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    machine.unkillable.add(domid)
    data = machine.domctl_data(domctl.XEN_DOMCTL_destroydomain, domid)
    token = machine.raw(0, 36, domctl.XEN_DOMCTL_destroydomain, data)
    machine.advance(6)
    assert machine.replies[token].rc == -ERESTART
    again = machine.raw(0, 36, domctl.XEN_DOMCTL_destroydomain, data)
    machine.core.process_ended(machine.now, DomId(domid), "killed")
    machine.run()
    assert machine.replies[again].rc == 0


def test_a_dying_domain_gets_no_more_calls_served(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    machine.unkillable.add(domid)
    machine.raw(0, 36, domctl.XEN_DOMCTL_destroydomain, machine.domctl_data(2, domid))
    token = machine.raw(domid, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, bytes(4))
    assert machine.replies[token].rc == -ESRCH


def test_frames_that_others_hold_keep_a_zombie_until_they_are_let_go(machine: Machine) -> None:
    domid = machine.create(pages=16)
    mfn = machine.core.memory_ops.allocate(machine.core.domains.get(domid), 0)  # type: ignore[arg-type]
    assert mfn is not None
    machine.core.frames.get_ref(mfn)
    assert machine.destroy(domid) == 0
    info = machine.info(domid)
    assert info.flags & domctl.XEN_DOMINF_dying
    assert info.tot_pages == 1
    assert machine.domctl(domctl.XEN_DOMCTL_createdomain, domid, spec()).rc == -EEXIST
    machine.core.frames.put_ref(mfn)
    assert machine.info(domid) is None
    assert len(machine.memory.extents) == 1


def test_the_end_of_dom0_is_the_end_of_the_machine(machine: Machine) -> None:
    off = sched.sched_shutdown(sched.SHUTDOWN_poweroff)
    machine.call(0, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, off)
    assert StopMachine("poweroff") in machine.effects
    assert machine.destroy(0) == -EINVAL


def test_vcpu_contexts_go_to_the_process_whose_word_is_final(machine: Machine) -> None:
    domid = machine.create(vcpus=2)
    context = bytearray(VCPU_GUEST_CONTEXT.size)
    offset = VCPU_GUEST_CONTEXT.offset("flags")
    context[offset : offset + 4] = (1 << 5).to_bytes(4, "little")
    op = domctl.xen_domctl_vcpucontext(0, 0x1000)
    arrays = {"ctxt": bytes(context)}
    assert machine.domctl(domctl.XEN_DOMCTL_setvcpucontext, domid, op, arrays).rc == 0
    domain = machine.core.domains.get(domid)
    assert domain is not None
    assert [(v.initialised, v.online) for v in domain.vcpus] == [(True, True), (False, False)]
    bad = op._replace(vcpu=2)
    assert machine.domctl(domctl.XEN_DOMCTL_setvcpucontext, domid, bad, arrays).rc == -EINVAL
    machine.silent.add(domid)
    data = machine.domctl_data(domctl.XEN_DOMCTL_setvcpucontext, domid, op._replace(vcpu=1), arrays)
    token = machine.raw(0, 36, domctl.XEN_DOMCTL_setvcpucontext, data)
    order = orders(machine.effects, domid, "set_vcpu_context")[-1]
    assert not machine.core.order_done(machine.now, DomId(0), order.order_id, 0, b""), "another's order"
    machine.core.order_done(machine.now, DomId(domid), order.order_id, 1 << 40, b"x" * 9999)
    machine.run()
    assert machine.replies[token].rc == -EINVAL
    assert not domain.vcpus[1].initialised


def test_replies_to_dead_callers_are_not_sent(machine: Machine) -> None:
    domid = machine.create()
    machine.start(domid)
    machine.silent.add(domid)
    before = len(machine.effects)
    machine.raw(0, 36, domctl.XEN_DOMCTL_pausedomain, machine.domctl_data(3, domid))
    machine.core.process_ended(machine.now, DomId(0), "crashed")
    machine.advance(3)
    assert not [e for e in machine.effects[before:] if isinstance(e, Reply) and e.domain == 0]


def test_a_driver_domain_is_restarted_in_place_with_its_memory_and_channels(machine: Machine) -> None:
    domio, guest = machine.create(ssidref=1), machine.create()
    for domid in (domio, guest):
        machine.start(domid)
    item = memory.xen_memory_reservation(0, 3, 0, 0, domio)
    gfns = b"".join(n.to_bytes(8, "little") for n in (4, 5, 6))
    assert machine.memory_op(0, memory.XENMEM_populate_physmap, item, extent_start=gfns).rc == 3
    alloc = event_channel.evtchn_alloc_unbound(guest, domio, 0)
    far = machine.event(guest, event_channel.EVTCHNOP_alloc_unbound, alloc).item.port
    bind = event_channel.evtchn_bind_interdomain(guest, far, 0)
    near = machine.event(domio, event_channel.EVTCHNOP_bind_interdomain, bind).item.local_port
    assert machine.domctl(domctl.XEN_DOMCTL_resumedomain, domio).rc == 0, "nothing to do"
    machine.core.process_ended(machine.now, DomId(domio), "signal 9")
    machine.core.process_ended(machine.now, DomId(guest), "signal 9")
    machine.run()
    before = len(machine.effects)
    assert machine.domctl(domctl.XEN_DOMCTL_resumedomain, guest).rc == -EINVAL, "only driver domains"
    assert machine.domctl(domctl.XEN_DOMCTL_resumedomain, domio).rc == 0
    effects = machine.effects[before:]
    assert StartProcess(DomId(domio), "domio") in effects
    kinds = [e.kind for e in effects if isinstance(e, Order) and e.domain == domio]
    assert kinds == ["configure", "extent", "memory", "memory", "channels", "start", "pause"]
    (channels,) = orders(effects, domio, "channels")
    assert channels.body == {"channels": [[near, 2, 0, guest, far, 0, 7]]}
    p2m = orders(effects, domio, "memory")[1].body["p2m"]
    assert [run[0::2] for run in p2m] == [[4, 3]]  # type: ignore[attr-defined]  # a list of runs
    assert Bind(DomId(domio), Port(near), DomId(guest), Port(far)) in effects
    domain = machine.core.domains.get(domio)
    assert domain is not None
    assert domain.runnable
    assert not machine.info(domio).flags & domctl.XEN_DOMINF_shutdown
    InvariantChecker(machine.core).assert_holds()


def test_what_a_dead_process_asked_is_not_answered_to_its_successor(machine: Machine) -> None:
    """Tokens are a process's own: the next process of a driver domain waits for one of the same number, for another call."""
    asked: list[Call] = []
    machine.core.dispatcher.register(
        HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, lambda call: asked.append(call)
    )
    domio = machine.create(ssidref=1)
    machine.start(domio)
    op = gt.gnttab_map_grant_ref(0, gt.GNTMAP_host_map, 1, 0, 0, 0, 0)
    data = gt.GNTTAB_MAP_GRANT_REF.pack(op)
    machine.core.call(
        machine.now, DomId(domio), 0, 7, HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, data
    )
    machine.core.process_ended(machine.now, DomId(domio), "signal 9")
    machine.run()
    assert machine.domctl(domctl.XEN_DOMCTL_resumedomain, domio).rc == 0
    machine.core.call(
        machine.now, DomId(domio), 0, 7, HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, data
    )
    first, second = asked
    before = len(machine.effects)
    first.answer(Result(-1))
    machine.run()
    assert not [e for e in machine.effects[before:] if isinstance(e, Reply)]
    second.answer(Result(0))
    machine.run()
    assert [e.rc for e in machine.effects[before:] if isinstance(e, Reply)] == [0]
