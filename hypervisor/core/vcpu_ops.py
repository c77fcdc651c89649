"""HYPERVISOR_vcpu_op's two commands that change what may be scheduled. (The rest is served in the domain's
process,
which also checks that a vCPU is initialised before it asks to bring it up.)"""

from __future__ import annotations

from errno import ENOENT

from bus.abi import vcpu as abi
from bus.abi.xen import HYPERVISOR_vcpu_op
from hypervisor.core.domains import Shutdown, VcpuState
from hypervisor.core.errors import XenError
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.lifecycle import Lifecycle


class VcpuOps:
    """Wire form: the vCPU's number."""

    def __init__(self, lifecycle: Lifecycle, dispatcher: Dispatcher) -> None:
        self._lifecycle = lifecycle
        dispatcher.register(HYPERVISOR_vcpu_op, abi.VCPUOP_up, self._up)
        dispatcher.register(HYPERVISOR_vcpu_op, abi.VCPUOP_down, self._down)

    def _vcpu(self, call: Call) -> VcpuState:
        vcpu = call.domain.vcpu(call.item.vcpuid)
        if vcpu is None:
            raise XenError(ENOENT)
        return vcpu

    def _up(self, call: Call) -> Result:
        vcpu = self._vcpu(call)
        vcpu.initialised = vcpu.online = True
        self._lifecycle.vcpus_changed(call.now, call.domain)
        return call.reply(0)

    def _down(self, call: Call) -> Result:
        self._vcpu(call).online = False
        self._lifecycle.vcpus_changed(call.now, call.domain)
        if not any(vcpu.online for vcpu in call.domain.vcpus):
            self._lifecycle.shutdown(call.now, call.domain, Shutdown.POWEROFF, by_itself=True)
        return call.reply(0)
