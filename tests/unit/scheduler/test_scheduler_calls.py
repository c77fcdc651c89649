"""The toolstack's calls of the scheduler answer as Xen's credit2 does, and the lives of domains reach the scheduler."""

from __future__ import annotations

from errno import EINVAL, ESRCH
from typing import Any

import pytest

from bus.abi import domctl as dc
from bus.abi import sysctl
from bus.abi.xen import HYPERVISOR_sysctl
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.scheduler import CreditScheduler, State
from hypervisor.core.scheduler_calls import SchedulerCalls
from tests.unit.hvcore.hvcore_machine import Answer, Machine

PARAMS = dc.XEN_DOMCTL_SCHED_CREDIT2
U = dc.XEN_DOMCTL_SCHEDULER_OP.field_size("u")


class World:
    """A core with the scheduler, two CPUs, a domain of two vCPUs."""

    def __init__(self) -> None:
        config = MachineConfig(total_pages=1 << 14, pcpus=2)
        self.machine = Machine(config)
        core = self.machine.core
        self.calls = SchedulerCalls(CreditScheduler(2), core.domains, config, core.dispatcher)
        core.attach_hooks(self.calls)
        self.domid = self.machine.create(vcpus=2)

    def op(self, cmd: int, weight: int = 0, cap: int = 0, sched: int = dc.XEN_SCHEDULER_CREDIT2) -> Answer:
        packed = PARAMS.pack(dc.xen_domctl_sched_credit2(weight, cap)).ljust(U, b"\0")
        payload = dc.xen_domctl_scheduler_op(sched, cmd, packed)
        return self.machine.domctl(dc.XEN_DOMCTL_scheduler_op, self.domid, payload)

    def get(self) -> tuple[int, int]:
        answer = self.op(dc.XEN_DOMCTL_SCHEDOP_getinfo)
        assert answer.rc == 0
        now = PARAMS.unpack(answer.payload.u)
        return now.weight, now.cap

    def affinity(self, cmd: int, vcpu: int, flags: int, hard: bytes = b"\0", soft: bytes = b"\0") -> Answer:
        def bitmap(bits: bytes) -> Any:
            return dc.xenctl_bitmap(0x1000 if bits else 0, 8 * len(bits))

        payload = dc.xen_domctl_vcpuaffinity(vcpu, flags, bitmap(hard), bitmap(soft))
        arrays = {"cpumap_hard.bitmap": hard, "cpumap_soft.bitmap": soft}
        sent = arrays if cmd == dc.XEN_DOMCTL_setvcpuaffinity else None
        return self.machine.domctl(cmd, self.domid, payload, sent)

    def sysctl(
        self, cmd: int, limit: int = 0, pool: int = 0, sched: int = dc.XEN_SCHEDULER_CREDIT2
    ) -> Answer:
        layout = sysctl.XEN_SYSCTL_SCHEDULER_OP
        packed = sysctl.XEN_SYSCTL_CREDIT2_SCHEDULE.pack(sysctl.xen_sysctl_credit2_schedule(limit))
        op = sysctl.xen_sysctl_scheduler_op(pool, sched, cmd, packed.ljust(layout.field_size("u"), b"\0"))
        number = sysctl.XEN_SYSCTL_scheduler_op
        raw = layout.pack(op).ljust(sysctl.XEN_SYSCTL.field_size("u"), b"\0")
        item = sysctl.xen_sysctl(number, sysctl.XEN_SYSCTL_INTERFACE_VERSION, raw)
        return self.machine.call(0, HYPERVISOR_sysctl, number, item)


@pytest.fixture
def world() -> World:
    return World()


def test_weight_and_cap(world: World) -> None:
    """256 and none at first; weight 0 changes nothing, cap 0 takes the cap away."""
    assert world.get() == (256, 0)
    assert world.op(dc.XEN_DOMCTL_SCHEDOP_putinfo, 512, 25).rc == 0
    assert world.get() == (512, 25)
    assert world.op(dc.XEN_DOMCTL_SCHEDOP_putinfo, 0, 0).rc == 0
    assert world.get() == (512, 0)
    assert world.op(dc.XEN_DOMCTL_SCHEDOP_putinfo, 65535, 200).rc == 0
    assert world.get() == (65535, 200)


@pytest.mark.parametrize(
    ("cmd", "cap", "sched"),
    [
        (dc.XEN_DOMCTL_SCHEDOP_getinfo, 0, dc.XEN_SCHEDULER_CREDIT),
        (dc.XEN_DOMCTL_SCHEDOP_putvcpuinfo, 0, dc.XEN_SCHEDULER_CREDIT2),
        (dc.XEN_DOMCTL_SCHEDOP_getvcpuinfo, 0, dc.XEN_SCHEDULER_CREDIT2),
        (9, 0, dc.XEN_SCHEDULER_CREDIT2),
        (dc.XEN_DOMCTL_SCHEDOP_putinfo, 201, dc.XEN_SCHEDULER_CREDIT2),
    ],
)
def test_what_is_refused(world: World, cmd: int, cap: int, sched: int) -> None:
    """EINVAL, and nothing changed."""
    assert world.op(cmd, 0, cap, sched).rc == -EINVAL
    assert world.get() == (256, 0)


def test_affinity(world: World) -> None:
    """The map in force comes back; the scheduler keeps the domain to it; what is not of this machine is cut off."""
    both = dc.XEN_VCPUAFFINITY_HARD | dc.XEN_VCPUAFFINITY_SOFT
    answer = world.affinity(dc.XEN_DOMCTL_getvcpuaffinity, 0, both)
    assert (answer.rc, answer.arrays["cpumap_hard.bitmap"], answer.arrays["cpumap_soft.bitmap"]) == (
        0,
        b"\x03",
        b"\x03",
    )
    for vcpu in (0, 1):
        answer = world.affinity(dc.XEN_DOMCTL_setvcpuaffinity, vcpu, both, b"\xfe", b"\xff")
        assert answer.rc == 0
        assert (answer.arrays["cpumap_hard.bitmap"], answer.arrays["cpumap_soft.bitmap"]) == (
            b"\x02",
            b"\x02",
        )
    unit = world.calls.scheduler.get(DomId(world.domid))
    assert unit is not None
    assert unit.affinity == 2


@pytest.mark.parametrize(
    ("vcpu", "flags", "hard", "errno"),
    [(2, 1, b"\1", EINVAL), (0, 0, b"\1", EINVAL), (0, 1, b"\xfc", EINVAL), (0, 1, b"", EINVAL)],
)
def test_affinity_that_is_refused(world: World, vcpu: int, flags: int, hard: bytes, errno: int) -> None:
    """No such vCPU, no flag, no CPU of this machine, a null map."""
    assert world.affinity(dc.XEN_DOMCTL_setvcpuaffinity, vcpu, flags, hard).rc == -errno


def test_the_rate_limit(world: World) -> None:
    """In microseconds, 0 or 100 to 500,000."""
    get, put = sysctl.XEN_SYSCTL_SCHEDOP_getinfo, sysctl.XEN_SYSCTL_SCHEDOP_putinfo
    assert world.sysctl(put, 2000).rc == 0
    assert world.calls.scheduler.ratelimit == 2_000_000
    for limit in (99, 500_001):
        assert world.sysctl(put, limit).rc == -EINVAL
    assert world.sysctl(get, sched=dc.XEN_SCHEDULER_RTDS).rc == -EINVAL
    assert world.sysctl(5).rc == -EINVAL
    assert world.sysctl(get, pool=1).rc == -ESRCH


def test_a_domains_life(world: World) -> None:
    """Unpaused, it waits for a CPU and gets one; paused, it loses it; destroyed, it is forgotten."""
    m, s, domid = world.machine, world.calls.scheduler, DomId(world.domid)
    unit = s.get(domid)
    assert unit is not None
    assert not unit.enabled
    m.start(domid)
    s.schedule(m.now)
    assert unit.cpu >= 0
    assert m.domctl(dc.XEN_DOMCTL_pausedomain, domid).rc == 0
    assert unit.state is State.LEAVING
    s.returned(m.now, domid)
    assert unit.cpu == -1
    assert m.destroy(domid) == 0
    assert s.get(domid) is None


def test_cpu_time_is_told(world: World) -> None:
    """What the kernel measured, shared among the vCPUs as the domain says; a lie about the shares changes no sum."""
    m, domid = world.machine, world.domid
    domain = m.core.domains.get(domid)
    assert domain is not None
    for vcpu in domain.vcpus:
        vcpu.online = True
    world.calls.measured(DomId(domid), 1000, wants=True, current=1, vcpu_times=[1, 3])
    info = m.domctl(dc.XEN_DOMCTL_getvcpuinfo, domid, dc.xen_domctl_getvcpuinfo(1, 0, 0, 0, 0, 0)).payload
    assert info.cpu_time == 750
    assert m.info(domid).cpu_time == 1000
    world.calls.measured(DomId(domid), 1000, wants=False, current=0, vcpu_times=[0, 0])
    assert m.info(domid).flags & dc.XEN_DOMINF_blocked
