"""HYPERVISOR_sysctl: the machine as a whole, for the control domain."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from errno import EACCES, EINVAL

from bus.abi import sysctl as abi
from bus.abi.domctl import XEN_DOMCTL_GETDOMAININFO, XEN_SCHEDULER_CREDIT2
from bus.abi.xen import HYPERVISOR_sysctl
from bus.addresses import PAGE_SIZE
from hypervisor.core.config import MachineConfig
from hypervisor.core.console import Console
from hypervisor.core.domain_info import DomainInfo
from hypervisor.core.domains import DomainTable
from hypervisor.core.errors import XenError
from hypervisor.core.frames import FrameTable
from hypervisor.core.hypercalls import Call, Dispatcher, Result


class SysctlOps:
    """Each handler gets and gives the payload of its command."""

    def __init__(
        self,
        domains: DomainTable,
        frames: FrameTable,
        info: DomainInfo,
        console: Console,
        config: MachineConfig,
        dispatcher: Dispatcher,
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._info = info
        self._console = console
        self._config = config
        self.idle_ns: Callable[[int], int] = lambda cpu: 0
        """Idle time of a physical CPU in ns; set by the scheduler."""
        self.debug_key: Callable[[str], list[str]] = lambda key: []
        """Lines that a debug key prints."""
        dispatcher.prechecks[HYPERVISOR_sysctl] = self._precheck
        for cmd, handler in (
            (abi.XEN_SYSCTL_readconsole, self._readconsole),
            (abi.XEN_SYSCTL_physinfo, self._physinfo),
            (abi.XEN_SYSCTL_sched_id, self._sched_id),
            (abi.XEN_SYSCTL_getdomaininfolist, self._getdomaininfolist),
            (abi.XEN_SYSCTL_debug_keys, self._debug_keys),
            (abi.XEN_SYSCTL_getcpuinfo, self._getcpuinfo),
            (abi.XEN_SYSCTL_availheap, self._availheap),
            (abi.XEN_SYSCTL_cputopoinfo, self._cputopoinfo),
            (abi.XEN_SYSCTL_numainfo, self._numainfo),
            (abi.XEN_SYSCTL_get_cpu_levelling_caps, self._levelling_caps),
        ):
            dispatcher.register(HYPERVISOR_sysctl, cmd, handler)

    def _precheck(self, call: Call) -> None:
        if call.item.interface_version != abi.XEN_SYSCTL_INTERFACE_VERSION:
            raise XenError(EACCES)
        if call.item.cmd != call.command.number:
            raise XenError(EINVAL)

    def _readconsole(self, call: Call) -> Result:
        op = call.payload
        start = op.index_ if op.incremental else None
        data, end = self._console.ring.read(start, op.count_)
        if op.clear:
            self._console.ring.clear()
        payload = op._replace(index_=end, count_=len(data))
        return call.reply(0, payload=payload, arrays={"buffer": data})

    def _physinfo(self, call: Call) -> Result:
        capabilities = abi.XEN_SYSCTL_PHYSCAP_hvm | abi.XEN_SYSCTL_PHYSCAP_pv
        capabilities |= abi.XEN_SYSCTL_PHYSCAP_hap | abi.XEN_SYSCTL_PHYSCAP_shadow
        capabilities |= abi.XEN_SYSCTL_PHYSCAP_gnttab_v1 | abi.XEN_SYSCTL_PHYSCAP_gnttab_v2
        capabilities |= abi.XEN_SYSCTL_PHYSCAP_directio
        payload = abi.xen_sysctl_physinfo(
            threads_per_core=1,
            cores_per_socket=self._config.pcpus,
            nr_cpus=self._config.pcpus,
            max_cpu_id=self._config.pcpus - 1,
            nr_nodes=1,
            max_node_id=0,
            cpu_khz=self._config.cpu_khz,
            capabilities=capabilities,
            arch_capabilities=0,
            pad=0,
            total_pages=self._frames.total_pages,
            free_pages=self._frames.free_pages,
            scrub_pages=0,
            outstanding_pages=self._frames.outstanding_claims,
            max_mfn=self._frames.max_mfn(),
            hw_cap=(0,) * 8,
        )
        return call.reply(0, payload=payload)

    def _sched_id(self, call: Call) -> Result:
        return call.reply(0, payload=call.payload._replace(sched_id=XEN_SCHEDULER_CREDIT2))

    def _getdomaininfolist(self, call: Call) -> Result:
        op = call.payload
        found = [d for d in self._domains if d.domid >= op.first_domain][: op.max_domains]
        raw = b"".join(XEN_DOMCTL_GETDOMAININFO.pack(self._info.describe(d)) for d in found)
        return call.reply(0, payload=op._replace(num_domains=len(found)), arrays={"buffer": raw})

    def _debug_keys(self, call: Call) -> Result:
        for key in call.array("keys").decode("latin-1"):
            for line in self.debug_key(key):
                self._console.log(line)
        return call.reply(0)

    def _getcpuinfo(self, call: Call) -> Result:
        op = call.payload
        count = min(op.max_cpus, self._config.pcpus)
        idle = array("Q", [self.idle_ns(cpu) for cpu in range(count)])
        return call.reply(0, payload=op._replace(nr_cpus=count), arrays={"info": idle.tobytes()})

    def _availheap(self, call: Call) -> Result:
        return call.reply(0, payload=call.payload._replace(avail_bytes=self._frames.free_pages * PAGE_SIZE))

    def _cputopoinfo(self, call: Call) -> Result:
        """A null handle asks for the number of CPUs only, as on Xen."""
        op = call.payload
        if not op.cputopo:
            return call.reply(0, payload=op._replace(num_cpus=self._config.pcpus), arrays={})
        count = min(op.num_cpus, self._config.pcpus)
        entries = [abi.xen_sysctl_cputopo(core=cpu, socket=0, node=0) for cpu in range(count)]
        raw = b"".join(abi.XEN_SYSCTL_CPUTOPO.pack(entry) for entry in entries)
        return call.reply(0, payload=op._replace(num_cpus=count), arrays={"cputopo": raw})

    def _numainfo(self, call: Call) -> Result:
        op = call.payload
        arrays: dict[str, bytes] = {}
        count = min(op.num_nodes, 1) if op.meminfo or op.distance else 1
        if op.meminfo:
            info = abi.xen_sysctl_meminfo(
                memsize=self._frames.total_pages * PAGE_SIZE, memfree=self._frames.free_pages * PAGE_SIZE
            )
            arrays["meminfo"] = abi.XEN_SYSCTL_MEMINFO.pack(info) * count
        if op.distance:
            arrays["distance"] = (10).to_bytes(4, "little") * count
        return call.reply(0, payload=op._replace(num_nodes=count), arrays=arrays)

    def _levelling_caps(self, call: Call) -> Result:
        """No masking MSRs: each domain's CPUID is made by its own process."""
        return call.reply(0, payload=call.payload._replace(caps=0))
