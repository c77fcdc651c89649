"""How a PV domain ends and which of its vCPUs are up, told to the hypervisor: shutdown codes, SHUTDOWN_crash with its reason."""

from __future__ import annotations

from bus.abi.hypercalls_model import VCPU_ARG, vcpu_arg
from bus.abi.sched import SCHED_SHUTDOWN, SCHEDOP_shutdown, sched_shutdown
from bus.abi.vcpu import VCPUOP_down, VCPUOP_up
from bus.abi.xen import HYPERVISOR_sched_op, HYPERVISOR_vcpu_op
from domains.pv.cpu import Cpu
from domains.pv.upstream import Upstream


class Life:
    """The domain's end, once. `shutdown_code` is a SHUTDOWN_*, None while it lives."""

    __slots__ = ("_cpu", "_upstream", "shutdown_code")

    def __init__(self, cpu: Cpu, upstream: Upstream) -> None:
        self._cpu = cpu
        self._upstream = upstream
        self.shutdown_code: int | None = None

    def shutdown(self, reason: int) -> int:
        """SCHEDOP_shutdown: no vCPU runs any more. The hypervisor is told; what it answers is returned."""
        if self.shutdown_code is not None:
            return 0
        rc, _ = self._upstream.hypercall(
            self._cpu.current.id,
            HYPERVISOR_sched_op,
            SCHEDOP_shutdown,
            SCHED_SHUTDOWN.pack(sched_shutdown(reason)),
        )
        if rc == 0:
            self.shutdown_code = reason
            self._cpu.vcpu.request_stop()
        return rc

    def resume(self) -> None:
        """The domain goes on after a suspend that was cancelled (XEN_DOMCTL_resumedomain)."""
        self.shutdown_code = None

    def vcpu_changed(self, vcpu: int, up: bool) -> int:
        """VCPUOP_up or VCPUOP_down took effect here: the scheduler must know."""
        rc, _ = self._upstream.hypercall(
            self._cpu.current.id,
            HYPERVISOR_vcpu_op,
            VCPUOP_up if up else VCPUOP_down,
            VCPU_ARG.pack(vcpu_arg(vcpu)),
        )
        return rc
