"""Proves: event channels have Xen 4.17's states and errno, channels are consistent at both ends, and the
right vCPU is
told."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOENT, ENOSPC, ENOSYS, EOPNOTSUPP, EPERM, ESRCH
from typing import Any

import pytest

from bus.abi import event_channel as abi
from bus.abi.domctl import XEN_DOMCTL_pausedomain, XEN_DOMCTL_set_virq_handler, xen_domctl_set_virq_handler
from bus.abi.xen import DOMID_SELF, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_DOM_EXC, VIRQ_TIMER
from bus.addresses import DomId, Port
from hypervisor.core.effects import Bind, Raise, Unbind
from hypervisor.core.errors import XenError
from hypervisor.core.invariants import InvariantChecker
from tests.unit.hvcore.hvcore_machine import Machine


class Pair:
    """Two running domains."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.a = self.machine.create(vcpus=2)
        self.b = self.machine.create()
        self.machine.start(self.a)
        self.machine.start(self.b)
        self.mark = len(self.machine.effects)

    def new(self, kind: type[Any]) -> list[Any]:
        """Effects of a kind since the last look."""
        found = [e for e in self.machine.effects[self.mark :] if isinstance(e, kind)]
        self.mark = len(self.machine.effects)
        return found

    def unbound(self, remote: int | None = None) -> int:
        op = abi.evtchn_alloc_unbound(DOMID_SELF, self.b if remote is None else remote, 0)
        answer = self.machine.event(self.a, abi.EVTCHNOP_alloc_unbound, op)
        assert answer.rc == 0
        port: int = answer.item.port
        return port

    def joined(self) -> tuple[int, int]:
        far = self.unbound()
        answer = self.machine.event(
            self.b, abi.EVTCHNOP_bind_interdomain, abi.evtchn_bind_interdomain(self.a, far, 0)
        )
        assert answer.rc == 0
        return far, answer.item.local_port

    def status(self, domid: int, port: int, caller: int | None = None) -> Any:
        op = abi.evtchn_status(domid, port, 0, 0, bytes(8))
        answer = self.machine.event(domid if caller is None else caller, abi.EVTCHNOP_status, op)
        return answer.item if answer.rc == 0 else answer.rc


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_ports_are_given_from_1_on_and_the_lowest_free_one_is_reused(pair: Pair) -> None:
    assert [pair.unbound() for _ in range(4)] == [1, 2, 3, 4]
    for port in (3, 2):
        assert pair.machine.event(pair.a, abi.EVTCHNOP_close, abi.evtchn_close(port)).rc == 0
    assert [pair.unbound() for _ in range(3)] == [2, 3, 5]


def test_binding_joins_both_ends_and_leaves_the_local_one_pending(pair: Pair) -> None:
    pair.new(Raise)
    far, near = pair.joined()
    assert [e for e in pair.machine.effects if isinstance(e, Bind)] == [
        Bind(DomId(pair.b), Port(near), DomId(pair.a), Port(far))
    ]
    assert Raise(DomId(pair.b), Port(near), 0) in pair.new(Raise)  # type: ignore[arg-type]
    item = pair.status(pair.a, far)
    assert item.status == abi.EVTCHNSTAT_interdomain
    assert abi.EVTCHN_STATUS_INTERDOMAIN.unpack(item.u) == (pair.b, near)


def test_a_send_raises_the_far_port_on_the_vcpu_it_is_bound_to(pair: Pair) -> None:
    far, near = pair.joined()
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_vcpu, abi.evtchn_bind_vcpu(far, 1)).rc == 0
    pair.new(Raise)
    assert pair.machine.event(pair.b, abi.EVTCHNOP_send, abi.evtchn_send(near)).rc == 0
    assert pair.new(Raise) == [Raise(DomId(pair.a), Port(far), 1)]  # type: ignore[arg-type]


def test_only_the_domain_that_was_named_can_bind(pair: Pair) -> None:
    port = pair.unbound(remote=pair.b)
    bind = abi.evtchn_bind_interdomain(pair.a, port, 0)
    other = pair.machine.create()
    assert pair.machine.event(other, abi.EVTCHNOP_bind_interdomain, bind).rc == -EINVAL
    assert pair.machine.event(pair.b, abi.EVTCHNOP_bind_interdomain, bind).rc == 0
    assert pair.machine.event(pair.b, abi.EVTCHNOP_bind_interdomain, bind).rc == -EINVAL
    nobody = bind._replace(remote_dom=999)
    assert pair.machine.event(pair.b, abi.EVTCHNOP_bind_interdomain, nobody).rc == -ESRCH
    assert (
        pair.machine.event(
            pair.b, abi.EVTCHNOP_alloc_unbound, abi.evtchn_alloc_unbound(pair.b, 0, 0)
        ).item.port
        == 2
    ), "a failed binding leaks no port"


def test_alloc_for_another_domain_needs_the_right_to_it(pair: Pair) -> None:
    op = abi.evtchn_alloc_unbound(pair.a, pair.b, 0)
    assert pair.machine.event(pair.b, abi.EVTCHNOP_alloc_unbound, op).rc == -EPERM
    assert pair.machine.event(0, abi.EVTCHNOP_alloc_unbound, op).rc == 0
    assert pair.machine.event(0, abi.EVTCHNOP_alloc_unbound, op._replace(dom=999)).rc == -ESRCH


def test_a_channel_within_one_domain_works(pair: Pair) -> None:
    port = pair.unbound(remote=DOMID_SELF)
    answer = pair.machine.event(
        pair.a, abi.EVTCHNOP_bind_interdomain, abi.evtchn_bind_interdomain(DOMID_SELF, port, 0)
    )
    assert answer.rc == 0
    pair.new(Raise)
    pair.machine.event(pair.a, abi.EVTCHNOP_send, abi.evtchn_send(port))
    assert [e.port for e in pair.new(Raise)] == [answer.item.local_port]
    InvariantChecker(pair.machine.core).assert_holds()
    assert pair.machine.destroy(pair.a) == 0


def test_closing_one_end_leaves_the_other_waiting_for_the_same_domain(pair: Pair) -> None:
    far, near = pair.joined()
    pair.new(Unbind)
    assert pair.machine.event(pair.b, abi.EVTCHNOP_close, abi.evtchn_close(near)).rc == 0
    assert set(pair.new(Unbind)) == {Unbind(DomId(pair.b), Port(near)), Unbind(DomId(pair.a), Port(far))}
    item = pair.status(pair.a, far)
    assert item.status == abi.EVTCHNSTAT_unbound
    assert abi.EVTCHN_STATUS_UNBOUND.unpack(item.u).dom == pair.b
    assert pair.machine.event(pair.a, abi.EVTCHNOP_send, abi.evtchn_send(far)).rc == 0, "dropped in silence"
    assert pair.machine.event(pair.b, abi.EVTCHNOP_send, abi.evtchn_send(near)).rc == -EINVAL


def test_the_death_of_a_domain_unbinds_its_peers(pair: Pair) -> None:
    far, _ = pair.joined()
    assert pair.machine.destroy(pair.b) == 0
    assert pair.status(pair.a, far).status == abi.EVTCHNSTAT_unbound
    InvariantChecker(pair.machine.core).assert_holds()


def test_virqs(pair: Pair) -> None:
    def bind(virq: int, vcpu: int, domid: int | None = None) -> Any:
        op = abi.evtchn_bind_virq(virq, vcpu, 0)
        return pair.machine.event(pair.a if domid is None else domid, abi.EVTCHNOP_bind_virq, op)

    assert bind(24, 0).rc == -EINVAL
    assert bind(VIRQ_TIMER, 2).rc == -ENOENT
    assert bind(VIRQ_CONSOLE, 1).rc == -EINVAL
    first, second = bind(VIRQ_TIMER, 0).item.port, bind(VIRQ_TIMER, 1).item.port
    assert first != second
    assert bind(VIRQ_TIMER, 1).rc == -EEXIST
    move = abi.evtchn_bind_vcpu(first, 1)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_vcpu, move).rc == -EINVAL
    assert pair.machine.event(pair.a, abi.EVTCHNOP_send, abi.evtchn_send(first)).rc == -EINVAL
    item = pair.status(pair.a, second)
    assert (item.status, item.vcpu, item.u[0]) == (abi.EVTCHNSTAT_virq, 1, VIRQ_TIMER)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_close, abi.evtchn_close(second)).rc == 0
    assert bind(VIRQ_TIMER, 1).rc == 0
    console = bind(VIRQ_CONSOLE, 0).item.port
    moved = abi.evtchn_bind_vcpu(console, 1)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_vcpu, moved).rc == 0, (
        "a global one may notify any vCPU"
    )
    assert pair.machine.event(pair.a, abi.EVTCHNOP_close, abi.evtchn_close(console)).rc == 0
    assert bind(VIRQ_CONSOLE, 0).rc == 0


def test_a_global_virq_goes_to_its_handler_and_to_dom0_when_that_is_gone(pair: Pair) -> None:
    events = pair.machine.core.events
    ports = {}
    for domid in (0, pair.a):
        op = abi.evtchn_bind_virq(VIRQ_DOM_EXC, 0, 0)
        ports[domid] = pair.machine.event(domid, abi.EVTCHNOP_bind_virq, op).item.port
    handler = xen_domctl_set_virq_handler(VIRQ_DOM_EXC)
    assert pair.machine.domctl(XEN_DOMCTL_set_virq_handler, pair.a, handler).rc == 0
    bad = xen_domctl_set_virq_handler(VIRQ_DEBUG)
    assert pair.machine.domctl(XEN_DOMCTL_set_virq_handler, pair.a, bad).rc == -EINVAL
    pair.new(Raise)
    events.send_global_virq(VIRQ_DOM_EXC)
    pair.machine.run()
    assert [e.domain for e in pair.new(Raise)] == [pair.a]
    pair.machine.destroy(pair.a)
    assert {e.domain for e in pair.new(Raise)} == {0}


def test_ipis_and_vcpus_that_are_not_there(pair: Pair) -> None:
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_ipi, abi.evtchn_bind_ipi(2, 0)).rc == -ENOENT
    port = pair.machine.event(pair.a, abi.EVTCHNOP_bind_ipi, abi.evtchn_bind_ipi(1, 0)).item.port
    pair.new(Raise)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_send, abi.evtchn_send(port)).rc == 0
    assert pair.new(Raise) == [Raise(DomId(pair.a), Port(port), 1)]  # type: ignore[arg-type]
    op = abi.evtchn_bind_vcpu(port, 0)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_vcpu, op).rc == -EINVAL
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_vcpu, op._replace(vcpu=9)).rc == -ENOENT


def test_interrupts_belong_to_those_who_were_given_them(pair: Pair) -> None:
    core = pair.machine.core
    bind = abi.evtchn_bind_pirq(40, 0, 0)
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_pirq, bind).rc == -EPERM
    core.events.permit_pirq(DomId(pair.a), 40, allowed=True)
    core.dispatcher.has_device = lambda domain: domain.domid == pair.a
    port = pair.machine.event(pair.a, abi.EVTCHNOP_bind_pirq, bind).item.port
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_pirq, bind).rc == -EEXIST
    assert pair.machine.event(pair.a, abi.EVTCHNOP_bind_pirq, bind._replace(pirq=256)).rc == -EINVAL
    pair.new(Raise)
    assert core.events.raise_pirq(DomId(pair.a), 40)
    assert not core.events.raise_pirq(DomId(pair.b), 40)
    pair.machine.run()
    assert [e.port for e in pair.new(Raise)] == [port]
    core.events.permit_pirq(DomId(pair.a), 40, allowed=False)
    assert not core.events.raise_pirq(DomId(pair.a), 40)
    assert pair.status(pair.a, port).status == abi.EVTCHNSTAT_closed


def test_limits_of_ports() -> None:
    machine = Machine()
    small = machine.create(max_evtchn_port=5)
    op = abi.evtchn_alloc_unbound(DOMID_SELF, 0, 0)
    results = [machine.event(small, abi.EVTCHNOP_alloc_unbound, op).rc for _ in range(6)]
    assert results == [0] * 5 + [-ENOSPC]
    big = machine.create()
    core, domain = machine.core, machine.core.domains.get(big)
    assert domain is not None
    for _ in range(abi.EVTCHN_2L_NR_CHANNELS - 1):
        core.events.alloc_unbound(domain, DOMID_SELF, 0)
    with pytest.raises(XenError) as caught:
        core.events.alloc_unbound(domain, DOMID_SELF, 0)
    assert caught.value.errno == ENOSPC


def test_the_hypervisors_own_ports_are_beyond_the_guests_reach(pair: Pair) -> None:
    core, domain = pair.machine.core, pair.machine.core.domains.get(pair.a)
    assert domain is not None
    heard: list[int] = []
    port = core.events.alloc_unbound_xen(domain, 1, DomId(pair.b), lambda now, vcpu: heard.append(vcpu))
    assert pair.machine.event(pair.a, abi.EVTCHNOP_close, abi.evtchn_close(port)).rc == -EINVAL
    assert pair.machine.event(pair.a, abi.EVTCHNOP_send, abi.evtchn_send(port)).rc == -EINVAL
    assert pair.status(pair.a, port).status == abi.EVTCHNSTAT_closed
    bind = abi.evtchn_bind_interdomain(pair.a, port, 0)
    near = pair.machine.event(pair.b, abi.EVTCHNOP_bind_interdomain, bind).item.local_port
    assert pair.machine.event(pair.b, abi.EVTCHNOP_send, abi.evtchn_send(near)).rc == 0
    assert heard == [1]
    pair.new(Raise)
    core.events.notify_xen(domain, port)
    pair.machine.run()
    assert [e.port for e in pair.new(Raise)] == [near]
    assert pair.machine.event(pair.a, abi.EVTCHNOP_reset, abi.evtchn_reset(DOMID_SELF)).rc == 0
    assert pair.status(pair.b, near).status == abi.EVTCHNSTAT_interdomain, "a reset leaves it alone"
    core.events.close_xen(domain, port)
    assert pair.status(pair.b, near).status == abi.EVTCHNSTAT_unbound


def test_reset_closes_all_and_another_domain_must_be_paused_first(pair: Pair) -> None:
    far, near = pair.joined()
    op = abi.evtchn_reset(pair.a)
    assert pair.machine.event(pair.b, abi.EVTCHNOP_reset, op).rc == -EPERM
    assert pair.machine.event(0, abi.EVTCHNOP_reset, op).rc == -EINVAL
    assert pair.machine.domctl(XEN_DOMCTL_pausedomain, pair.a).rc == 0
    assert pair.machine.event(0, abi.EVTCHNOP_reset, op).rc == 0
    assert pair.status(pair.a, far).status == abi.EVTCHNSTAT_closed
    assert pair.status(pair.b, near).status == abi.EVTCHNSTAT_unbound


def test_the_fifo_abi_holds_its_frames_and_lets_them_go(pair: Pair) -> None:
    machine = pair.machine
    core, domain = machine.core, machine.core.domains.get(pair.a)
    assert domain is not None
    frames = [core.memory_ops.allocate(domain, 0) for _ in range(3)]
    assert None not in frames
    control, array = int(frames[0] or 0), int(frames[1] or 0)

    def init(gfn: int, offset: int, vcpu: int) -> Any:
        op = abi.evtchn_init_control(gfn, offset, vcpu, 0, bytes(7))
        return machine.event(pair.a, abi.EVTCHNOP_init_control, op)

    def expand(gfn: int) -> int:
        return machine.event(pair.a, abi.EVTCHNOP_expand_array, abi.evtchn_expand_array(gfn)).rc

    priority = abi.evtchn_set_priority(pair.unbound(), 3)
    assert expand(array) == -EOPNOTSUPP
    assert machine.event(pair.a, abi.EVTCHNOP_set_priority, priority).rc == -ENOSYS
    assert init(control, 4096 - 64, 0).rc == -EINVAL
    assert init(control, 4, 0).rc == -EINVAL
    assert init(control, 0, 2).rc == -ENOENT
    assert init(0x1000, 0, 0).rc == -EINVAL, "a frame of Dom0"
    answer = init(control, 0, 0)
    assert (answer.rc, answer.item.link_bits) == (0, 17)
    assert init(control, 128, 0).rc == -EINVAL, "twice"
    assert init(control, 128, 1).rc == 0
    assert expand(array) == 0
    assert expand(0x1000) == -EINVAL
    assert machine.event(pair.a, abi.EVTCHNOP_set_priority, priority).rc == 0
    too_low = priority._replace(priority=16)
    assert machine.event(pair.a, abi.EVTCHNOP_set_priority, too_low).rc == -EINVAL
    assert core.frames.references(control) == 2
    assert core.frames.references(array) == 1
    InvariantChecker(core).assert_holds()
    for _ in range(abi.EVTCHN_2L_NR_CHANNELS):
        core.events.alloc_unbound(domain, DOMID_SELF, 0)
    assert machine.event(pair.a, abi.EVTCHNOP_reset, abi.evtchn_reset(DOMID_SELF)).rc == 0
    assert core.frames.references(control) == core.frames.references(array) == 0
    assert pair.unbound() == 1, "2-level again, all ports free"
    InvariantChecker(core).assert_holds()
