"""XEN_DOMCTL_get_cpu_policy and set_cpu_policy: what CPUID a domain sees. The domain's own process makes its
CPUID and
knows what its vCPU can do, so both are asked of it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EAGAIN, EEXIST, EINVAL, ENOBUFS, ESRCH

from bus.abi import domctl as abi
from bus.abi.arch_x86 import XEN_CPUID_LEAF, XEN_MSR_ENTRY
from bus.abi.xen import HYPERVISOR_domctl
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Dying
from hypervisor.core.errors import XenError
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.outbox import Outbox

_COUNTS = struct.Struct("<II")


class CpuPolicyOps:
    """Orders `get_cpu_policy` (answered with u32 number of leaves, u32 number of MSRs, then both arrays) and
    `set_cpu_policy` {leaves, msrs} (answered with 0, or -EINVAL for a feature that the vCPU has not)."""

    def __init__(
        self, domains: DomainTable, outbox: Outbox, config: MachineConfig, dispatcher: Dispatcher
    ) -> None:
        self._domains = domains
        self._outbox = outbox
        self._config = config
        dispatcher.register(HYPERVISOR_domctl, abi.XEN_DOMCTL_get_cpu_policy, self._get)
        dispatcher.register(HYPERVISOR_domctl, abi.XEN_DOMCTL_set_cpu_policy, self._set)

    def _domain(self, call: Call) -> Domain:
        domain = self._domains.get(call.item.domain)
        if domain is None or domain.dying is not Dying.ALIVE or not domain.process_alive:
            raise XenError(ESRCH)
        if domain is call.domain:
            raise XenError(EINVAL)
        return domain

    def _ask(
        self,
        call: Call,
        domain: Domain,
        kind: str,
        body: dict[str, object],
        finish: Callable[[bytes], Result],
    ) -> None:
        def done(now: int, rc: int, data: bytes) -> None:
            if rc:
                call.answer(Result(rc if -4096 < rc < 0 else -EINVAL))
            else:
                call.answer(finish(data))

        def failed(now: int, why: str) -> None:
            call.answer(Result(-ESRCH if why == "dead" else -EAGAIN))

        timeout = self._config.start_timeout_ns
        self._outbox.ask(call.now, domain.domid, kind, body, done, failed, timeout_ns=timeout)

    def _get(self, call: Call) -> None:
        op = call.payload

        def finish(data: bytes) -> Result:
            """The process is not trusted: its counts must fit its bytes."""
            if len(data) < _COUNTS.size:
                return Result(-EINVAL)
            leaves, msrs = _COUNTS.unpack_from(data)
            middle = _COUNTS.size + leaves * XEN_CPUID_LEAF.size
            if len(data) != middle + msrs * XEN_MSR_ENTRY.size:
                return Result(-EINVAL)
            if (op.leaves and leaves > op.nr_leaves) or (op.msrs and msrs > op.nr_msrs):
                return Result(-ENOBUFS)
            arrays = {}
            if op.leaves:
                arrays["leaves"] = data[_COUNTS.size : middle]
            if op.msrs:
                arrays["msrs"] = data[middle:]
            return call.reply(0, payload=op._replace(nr_leaves=leaves, nr_msrs=msrs), arrays=arrays)

        self._ask(call, self._domain(call), "get_cpu_policy", {}, finish)

    def _set(self, call: Call) -> None:
        domain = self._domain(call)
        if domain.started:
            raise XenError(EEXIST)
        arrays = call.message.arrays
        body: dict[str, object] = {"leaves": arrays.get("leaves", b""), "msrs": arrays.get("msrs", b"")}
        self._ask(call, domain, "set_cpu_policy", body, lambda data: call.reply(0))
