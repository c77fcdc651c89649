"""HYPERVISOR_platform_op: the wall clock and the physical CPUs, for the control domain."""

from __future__ import annotations

from errno import EACCES, EINVAL

from bus.abi import platform as abi
from bus.abi.xen import HYPERVISOR_platform_op
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Dying
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.outbox import Outbox

NSEC = 1_000_000_000


class PlatformOps(DomainHooks):
    """A wall clock that Dom0 set is told to every domain (order `wallclock`); until then each domain's process takes the host's."""

    def __init__(
        self, domains: DomainTable, outbox: Outbox, config: MachineConfig, dispatcher: Dispatcher
    ) -> None:
        self._domains = domains
        self._outbox = outbox
        self._config = config
        self.wallclock_ns: int | None = None
        """Nanoseconds since 1970 at system time 0, if Dom0 set it."""
        dispatcher.prechecks[HYPERVISOR_platform_op] = self._precheck
        for cmd, handler in (
            (abi.XENPF_settime32, self._settime),
            (abi.XENPF_settime64, self._settime),
            (abi.XENPF_get_cpuinfo, self._get_cpuinfo),
            (abi.XENPF_get_cpu_version, self._get_cpu_version),
        ):
            dispatcher.register(HYPERVISOR_platform_op, cmd, handler)

    def _precheck(self, call: Call) -> None:
        if call.item.interface_version != abi.XENPF_INTERFACE_VERSION:
            raise XenError(EACCES)
        if call.item.cmd != call.command.number:
            raise XenError(EINVAL)

    def _settime(self, call: Call) -> Result:
        op = call.payload
        if getattr(op, "mbz", 0) or op.nsecs >= NSEC or op.secs >= 1 << 40:
            raise XenError(EINVAL)
        self.set_wallclock(op.secs * NSEC + op.nsecs - op.system_time)
        return call.reply(0)

    def set_wallclock(self, ns_at_system_time_0: int) -> None:
        """Tell all domains the time of day: ns since 1970 at system time 0."""
        self.wallclock_ns = ns_at_system_time_0
        for domain in self._domains:
            if domain.dying is Dying.ALIVE and domain.process_alive:
                self._tell(domain)

    def _tell(self, domain: Domain) -> None:
        self._outbox.tell(domain.domid, "wallclock", {"ns_at_system_time_0": self.wallclock_ns})

    def created(self, now: int, domain: Domain) -> None:
        if self.wallclock_ns is not None:
            self._tell(domain)

    def restarted(self, now: int, domain: Domain) -> None:
        self.created(now, domain)

    def _cpu(self, number: int) -> int:
        if number >= self._config.pcpus:
            raise XenError(EINVAL)
        return number

    def _get_cpuinfo(self, call: Call) -> Result:
        cpu = self._cpu(call.payload.xen_cpuid)
        info = abi.xenpf_pcpuinfo(cpu, self._config.pcpus - 1, abi.XEN_PCPU_FLAGS_ONLINE, cpu, cpu)
        return call.reply(0, payload=info)

    def _get_cpu_version(self, call: Call) -> Result:
        cpu = self._cpu(call.payload.xen_cpuid)
        vendor, family, model, stepping = self._config.cpu_version
        info = abi.xenpf_pcpu_version(cpu, self._config.pcpus - 1, vendor, family, model, stepping)
        return call.reply(0, payload=info)
