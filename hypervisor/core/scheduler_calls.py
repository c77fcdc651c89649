"""The scheduler in the machine: lives of domains, the toolstack's calls, and what `getvcpuinfo` and `getdomaininfo` tell.

Native domains (Dom0, driver domains) have parameters but no leases: the host runs them, as their code is the project's own.
The vCPUs of a domain take turns on one thread, which may use every CPU that one of its vCPUs may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL, ESRCH

from bus.abi import domctl as abi
from bus.abi import sysctl
from bus.abi.xen import HYPERVISOR_domctl, HYPERVISOR_sysctl
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Kind, VcpuState
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.scheduler import CreditScheduler, State


class SchedulerCalls(DomainHooks):
    """Registers XEN_DOMCTL_scheduler_op, _setvcpuaffinity, _getvcpuaffinity and XEN_SYSCTL_scheduler_op."""

    def __init__(
        self,
        scheduler: CreditScheduler,
        domains: DomainTable,
        config: MachineConfig,
        dispatcher: Dispatcher,
    ) -> None:
        self.scheduler = scheduler
        self._domains = domains
        self._all = (1 << config.pcpus) - 1
        for cmd, handler in (
            (abi.XEN_DOMCTL_scheduler_op, self._scheduler_op),
            (abi.XEN_DOMCTL_setvcpuaffinity, self._set_affinity),
            (abi.XEN_DOMCTL_getvcpuaffinity, self._get_affinity),
        ):
            dispatcher.register(HYPERVISOR_domctl, cmd, handler)
        dispatcher.register(HYPERVISOR_sysctl, sysctl.XEN_SYSCTL_scheduler_op, self._sysctl)

    # ------------------------------------------------------------------ lives of domains

    def created(self, now: int, domain: Domain) -> None:
        self.scheduler.add(now, domain.domid)

    def runnable_changed(self, now: int, domain: Domain) -> None:
        if domain.kind is Kind.NATIVE:
            return
        self.scheduler.enable(now, domain.domid, domain.runnable)
        self.scheduler.woke(now, domain.domid)

    def process_ended(self, now: int, domain: Domain) -> None:
        self.scheduler.enable(now, domain.domid, False)
        self.scheduler.returned(now, domain.domid)

    def removed(self, now: int, domain: Domain) -> None:
        self.scheduler.remove(now, domain.domid)

    # ------------------------------------------------------------------ what is measured

    def measured(
        self, domid: DomId, used: int, *, wants: bool, current: int, vcpu_times: Sequence[int] = ()
    ) -> None:
        """A domain's process has used `used` ns of CPU time since it started. The rest is what it says of itself, and serves
        for display only: whether it wants to run, which vCPU runs, how the time was shared among its vCPUs."""
        domain, unit = self._domains.get(domid), self.scheduler.get(domid)
        if domain is None or unit is None or not domain.vcpus:
            return
        total = sum(vcpu_times)
        for vcpu in domain.vcpus:
            if total and vcpu.index < len(vcpu_times):
                share = used * vcpu_times[vcpu.index] // total
            else:
                share = used // len(domain.vcpus)
            vcpu.cpu_time = max(vcpu.cpu_time, share)
            native = domain.kind is Kind.NATIVE
            vcpu.running = (
                vcpu.online and wants and vcpu.index == current and (native or unit.state is State.HOLDING)
            )
            vcpu.blocked = vcpu.online and not wants
            vcpu.pcpu = max(0, unit.last_cpu)

    # ------------------------------------------------------------------ domctl

    def _domain(self, call: Call) -> Domain:
        domain = self._domains.get(call.item.domain)
        if domain is None:
            raise XenError(ESRCH)
        return domain

    def _scheduler_op(self, call: Call) -> Result:
        """EINVAL: another scheduler, parameters of single vCPUs (credit2 has none), a cap above 100 % a vCPU. A weight of 0 leaves
        the weight as it is; a cap of 0 takes the cap away."""
        op: abi.xen_domctl_scheduler_op = call.payload
        domain = self._domain(call)
        unit = self.scheduler.get(domain.domid)
        if op.sched_id != abi.XEN_SCHEDULER_CREDIT2:
            raise XenError(EINVAL)
        if unit is None:
            raise XenError(ESRCH)
        layout = abi.XEN_DOMCTL_SCHED_CREDIT2
        if op.cmd == abi.XEN_DOMCTL_SCHEDOP_getinfo:
            packed = layout.pack(abi.xen_domctl_sched_credit2(unit.weight, unit.cap)).ljust(len(op.u), b"\0")
            return call.reply(0, payload=op._replace(u=packed))
        if op.cmd != abi.XEN_DOMCTL_SCHEDOP_putinfo:
            raise XenError(EINVAL)
        new = layout.unpack(op.u)
        if new.weight:
            self.scheduler.set_weight(domain.domid, new.weight)
        if new.cap > 100 * len(domain.vcpus):
            raise XenError(EINVAL)
        self.scheduler.set_cap(call.now, domain.domid, new.cap)
        return call.reply(0)

    def _affinity_of(self, call: Call) -> tuple[Domain, VcpuState, abi.xen_domctl_vcpuaffinity]:
        """EINVAL: no such vCPU, no flag, a null map that is asked for."""
        domain, op = self._domain(call), call.payload
        if op.vcpu >= domain.spec.max_vcpus:
            raise XenError(EINVAL)
        vcpu = domain.vcpu(op.vcpu)
        if vcpu is None:
            raise XenError(ESRCH)
        hard, soft = op.flags & abi.XEN_VCPUAFFINITY_HARD, op.flags & abi.XEN_VCPUAFFINITY_SOFT
        if not (hard or soft) or (hard and not op.cpumap_hard.bitmap) or (soft and not op.cpumap_soft.bitmap):
            raise XenError(EINVAL)
        return domain, vcpu, op

    def _maps(self, op: abi.xen_domctl_vcpuaffinity, hard: int, soft: int) -> dict[str, bytes]:
        """Both maps, as long as the caller has room."""

        def cut(mask: int, bits: int) -> bytes:
            size = (bits + 7) // 8
            return (mask & self._all & ((1 << bits) - 1)).to_bytes(size, "little")

        return {
            "cpumap_hard.bitmap": cut(hard, op.cpumap_hard.nr_bits),
            "cpumap_soft.bitmap": cut(soft, op.cpumap_soft.nr_bits),
        }

    def _get_affinity(self, call: Call) -> Result:
        _, vcpu, op = self._affinity_of(call)
        return call.reply(0, arrays=self._maps(op, vcpu.affinity_hard, vcpu.affinity_soft))

    def _set_affinity(self, call: Call) -> Result:
        """EINVAL if no CPU of the machine is left. The reply has the map in force: soft, what of it is also hard."""
        domain, vcpu, op = self._affinity_of(call)
        if op.flags & abi.XEN_VCPUAFFINITY_HARD:
            hard = int.from_bytes(call.array("cpumap_hard.bitmap"), "little") & self._all
            if not hard:
                raise XenError(EINVAL)
            vcpu.affinity_hard = hard
        if op.flags & abi.XEN_VCPUAFFINITY_SOFT:
            soft = int.from_bytes(call.array("cpumap_soft.bitmap"), "little") & self._all
            if not soft:
                raise XenError(EINVAL)
            vcpu.affinity_soft = soft
        union = 0
        for each in domain.vcpus:
            union |= each.affinity_hard & self._all
        self.scheduler.set_affinity(call.now, domain.domid, union)
        return call.reply(
            0, arrays=self._maps(op, vcpu.affinity_hard, vcpu.affinity_soft & vcpu.affinity_hard)
        )

    # ------------------------------------------------------------------ sysctl

    def _sysctl(self, call: Call) -> Result:
        """credit2's rate limit. ESRCH: another CPU pool; EINVAL: another scheduler or command, or out of range (100 us to 0.5 s, 0
        for none)."""
        op: sysctl.xen_sysctl_scheduler_op = call.payload
        if op.cmd not in (sysctl.XEN_SYSCTL_SCHEDOP_putinfo, sysctl.XEN_SYSCTL_SCHEDOP_getinfo):
            raise XenError(EINVAL)
        if op.cpupool_id:
            raise XenError(ESRCH)
        if op.sched_id != abi.XEN_SCHEDULER_CREDIT2:
            raise XenError(EINVAL)
        layout = sysctl.XEN_SYSCTL_CREDIT2_SCHEDULE
        if op.cmd == sysctl.XEN_SYSCTL_SCHEDOP_putinfo:
            limit = layout.unpack(op.u).ratelimit_us
            low, high = sysctl.XEN_SYSCTL_SCHED_RATELIMIT_MIN, sysctl.XEN_SYSCTL_SCHED_RATELIMIT_MAX
            if limit and not low <= limit <= high:
                raise XenError(EINVAL)
            self.scheduler.ratelimit = limit * 1000
        now = layout.pack(sysctl.xen_sysctl_credit2_schedule(self.scheduler.ratelimit // 1000))
        return call.reply(0, payload=op._replace(u=now.ljust(len(op.u), b"\0")))
