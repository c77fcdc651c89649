"""HYPERVISOR_domctl: build, control and examine domains, for the control domain.

Assignment of devices belongs to the IOMMU, scheduling parameters to the scheduler: they register their own
handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EACCES, EAGAIN, EBUSY, EINVAL, ENODATA, ENOSPC, ESRCH

from bus.abi import domctl as abi
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, VGCF_online
from bus.abi.xen import HYPERVISOR_domctl
from bus.addresses import PAGE_SHIFT, DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domain_info import DomainInfo
from hypervisor.core.domains import ROLES, Domain, DomainSpec, DomainTable, Dying, Kind, VcpuState
from hypervisor.core.errors import XenError
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.frames import FrameTable
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.lifecycle import Lifecycle
from hypervisor.core.outbox import Outbox

NO_DOMAIN_NEEDED = frozenset(
    (abi.XEN_DOMCTL_createdomain, abi.XEN_DOMCTL_getdomaininfo, abi.XEN_DOMCTL_test_assign_device)
)


class DomctlOps:
    """Each handler gets the payload of its command; the domain was looked up before (ESRCH)."""

    def __init__(
        self,
        domains: DomainTable,
        frames: FrameTable,
        lifecycle: Lifecycle,
        events: EventChannels,
        info: DomainInfo,
        outbox: Outbox,
        config: MachineConfig,
        dispatcher: Dispatcher,
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._lifecycle = lifecycle
        self._events = events
        self._info = info
        self._outbox = outbox
        self._config = config
        dispatcher.prechecks[HYPERVISOR_domctl] = self._precheck
        for cmd, handler in (
            (abi.XEN_DOMCTL_createdomain, self._createdomain),
            (abi.XEN_DOMCTL_destroydomain, self._destroydomain),
            (abi.XEN_DOMCTL_pausedomain, self._pausedomain),
            (abi.XEN_DOMCTL_unpausedomain, self._unpausedomain),
            (abi.XEN_DOMCTL_resumedomain, self._resumedomain),
            (abi.XEN_DOMCTL_getdomaininfo, self._getdomaininfo),
            (abi.XEN_DOMCTL_max_mem, self._max_mem),
            (abi.XEN_DOMCTL_max_vcpus, self._max_vcpus),
            (abi.XEN_DOMCTL_getvcpuinfo, self._getvcpuinfo),
            (abi.XEN_DOMCTL_getvcpucontext, self._getvcpucontext),
            (abi.XEN_DOMCTL_setvcpucontext, self._setvcpucontext),
            (abi.XEN_DOMCTL_setdomainhandle, self._setdomainhandle),
            (abi.XEN_DOMCTL_settimeoffset, self._settimeoffset),
            (abi.XEN_DOMCTL_hypercall_init, self._hypercall_init),
            (abi.XEN_DOMCTL_sendtrigger, self._sendtrigger),
            (abi.XEN_DOMCTL_irq_permission, self._irq_permission),
            (abi.XEN_DOMCTL_set_target, self._set_target),
            (abi.XEN_DOMCTL_set_virq_handler, self._set_virq_handler),
            (abi.XEN_DOMCTL_getpageframeinfo3, self._getpageframeinfo3),
            (abi.XEN_DOMCTL_get_address_size, self._get_address_size),
            (abi.XEN_DOMCTL_set_address_size, self._set_address_size),
            (abi.XEN_DOMCTL_gethvmcontext, self._gethvmcontext),
            (abi.XEN_DOMCTL_sethvmcontext, self._sethvmcontext),
        ):
            dispatcher.register(HYPERVISOR_domctl, cmd, handler)

    # -- helpers
    # --------------------------------------------------------------------------------------------------

    def _precheck(self, call: Call) -> None:
        if call.item.interface_version != abi.XEN_DOMCTL_INTERFACE_VERSION:
            raise XenError(EACCES)
        if call.item.cmd != call.command.number:
            raise XenError(EINVAL)
        if call.command.number not in NO_DOMAIN_NEEDED:
            self._domain(call)

    def _domain(self, call: Call) -> Domain:
        domain = self._domains.get(call.item.domain)
        if domain is None:
            raise XenError(ESRCH)
        return domain

    def _other(self, call: Call) -> Domain:
        """The domain, not the caller's own (EINVAL) and not dying (ESRCH)."""
        domain = self._domain(call)
        if domain is call.domain:
            raise XenError(EINVAL)
        if domain.dying is not Dying.ALIVE:
            raise XenError(ESRCH)
        return domain

    def _vcpu(self, domain: Domain, index: int, errno: int = EINVAL) -> VcpuState:
        vcpu = domain.vcpu(index)
        if vcpu is None:
            raise XenError(errno)
        return vcpu

    def _answer(self, call: Call) -> Callable[[int, int], None]:
        """Answer the call with a return value that comes later."""
        return lambda now, rc: call.answer(call.reply(rc) if rc >= 0 else Result(rc))

    def _ask(
        self,
        call: Call,
        domain: Domain,
        kind: str,
        body: dict[str, object],
        done: Callable[[bytes], Result],
    ) -> None:
        """Have the domain's process do something; its answer, which is not trusted, becomes the call's.
        EAGAIN if
        there is none in time, ESRCH if the process is gone."""
        if not domain.process_alive:
            raise XenError(ESRCH)

        def on_done(now: int, rc: int, data: bytes) -> None:
            if rc:
                call.answer(Result(rc if -4096 < rc < 0 else -EINVAL))
                return
            try:
                result = done(data)
            except XenError as error:
                result = Result(-error.errno)
            call.answer(result)

        def on_failed(now: int, why: str) -> None:
            call.answer(Result(-ESRCH if why == "dead" else -EAGAIN))

        timeout = self._config.start_timeout_ns
        self._outbox.ask(call.now, domain.domid, kind, body, on_done, on_failed, timeout_ns=timeout)

    # -- life
    # -----------------------------------------------------------------------------------------------------

    def _createdomain(self, call: Call) -> Result:
        op: abi.xen_domctl_createdomain = call.payload
        if op.flags & ~(abi.XEN_DOMCTL_CDF_MAX * 2 - 1) or op.ssidref not in ROLES or op.cpupool_id:
            raise XenError(EINVAL)
        version = op.grant_opts & abi.XEN_DOMCTL_GRANT_version_mask
        unbuilt = abi.XEN_DOMCTL_CDF_nested_virt | abi.XEN_DOMCTL_CDF_vpmu
        if version not in (1, 2) or op.flags & unbuilt or op.vmtrace_size:
            raise XenError(EINVAL)
        fixed_kind, role = ROLES[op.ssidref]
        kind = fixed_kind or (Kind.HVM if op.flags & abi.XEN_DOMCTL_CDF_hvm else Kind.PV)
        if kind is Kind.PV and op.arch.emulation_flags:
            raise XenError(EINVAL)
        spec = DomainSpec(
            kind,
            domid=call.item.domain,
            role=role,
            handle=op.handle,
            max_vcpus=op.max_vcpus,
            max_evtchn_port=min(op.max_evtchn_port, 0x7FFFFFFF),
            max_grant_frames=op.max_grant_frames,
            max_maptrack_frames=op.max_maptrack_frames,
            max_grant_version=version,
            flags=op.flags,
            ssidref=op.ssidref,
            emulation_flags=op.arch.emulation_flags,
            misc_flags=op.arch.misc_flags,
        )
        domain = self._lifecycle.create(call.now, call.domain, spec)
        return call.reply(0, call.item._replace(domain=domain.domid))

    def _destroydomain(self, call: Call) -> None:
        domain = self._domain(call)
        if domain is call.domain:
            raise XenError(EINVAL)
        self._lifecycle.destroy(call.now, domain, self._answer(call))

    def _pausedomain(self, call: Call) -> None:
        self._lifecycle.pause(call.now, self._other(call), self._answer(call))

    def _unpausedomain(self, call: Call) -> Result:
        self._lifecycle.unpause(call.now, self._other(call))
        return call.reply(0)

    def _resumedomain(self, call: Call) -> Result:
        self._lifecycle.resume(call.now, self._other(call))
        return call.reply(0)

    def _getdomaininfo(self, call: Call) -> Result:
        found = next((d for d in self._domains if d.domid >= call.item.domain), None)
        if found is None:
            raise XenError(ESRCH)
        item = call.item._replace(domain=found.domid)
        return call.reply(0, item, payload=self._info.describe(found))

    def _max_mem(self, call: Call) -> Result:
        pages = call.payload.max_memkb >> (PAGE_SHIFT - 10)
        self._lifecycle.set_max_mem(call.now, self._domain(call), pages)
        return call.reply(0)

    def _max_vcpus(self, call: Call) -> Result:
        self._lifecycle.set_max_vcpus(call.now, self._other(call), call.payload.max)
        return call.reply(0)

    # -- vCPUs
    # ----------------------------------------------------------------------------------------------------

    def _getvcpuinfo(self, call: Call) -> Result:
        op = call.payload
        vcpu = self._vcpu(self._domain(call), op.vcpu, ESRCH)
        payload = op._replace(
            online=int(vcpu.online),
            blocked=int(vcpu.blocked),
            running=int(vcpu.running),
            cpu_time=vcpu.cpu_time,
            cpu=vcpu.pcpu,
        )
        return call.reply(0, payload=payload)

    def _getvcpucontext(self, call: Call) -> None:
        domain = self._other(call)
        vcpu = self._vcpu(domain, call.payload.vcpu)
        if not vcpu.initialised:
            raise XenError(ENODATA)

        def done(data: bytes) -> Result:
            if len(data) != VCPU_GUEST_CONTEXT.size:
                raise XenError(EINVAL)
            return call.reply(0, arrays={"ctxt": data})

        self._ask(call, domain, "get_vcpu_context", {"vcpu": vcpu.index}, done)

    def _setvcpucontext(self, call: Call) -> None:
        domain = self._other(call)
        vcpu = self._vcpu(domain, call.payload.vcpu)
        if not domain.paused:
            raise XenError(EBUSY)
        context = call.array("ctxt")
        if not context:
            raise XenError(EINVAL)
        flags = VCPU_GUEST_CONTEXT.unpack(context).flags

        def done(data: bytes) -> Result:
            vcpu.initialised = True
            vcpu.online = bool(flags & VGCF_online)
            self._lifecycle.vcpus_changed(call.now, domain)
            return call.reply(0, arrays={})

        self._ask(call, domain, "set_vcpu_context", {"vcpu": vcpu.index, "context": context}, done)

    def _hvm_domain(self, call: Call) -> Domain:
        domain = self._other(call)
        if domain.kind is not Kind.HVM:
            raise XenError(EINVAL)
        return domain

    def _gethvmcontext(self, call: Call) -> None:
        domain, op = self._hvm_domain(call), call.payload

        def done(data: bytes) -> Result:
            if not op.buffer:
                return call.reply(0, payload=op._replace(size=len(data)), arrays={})
            if len(data) > op.size:
                raise XenError(ENOSPC)
            return call.reply(0, payload=op._replace(size=len(data)), arrays={"buffer": data})

        self._ask(call, domain, "get_hvm_context", {}, done)

    def _sethvmcontext(self, call: Call) -> None:
        """All vCPUs that were allocated are initialised; vCPU 0 is online, the others wait for INIT/SIPI or
        VCPUOP_up."""
        domain = self._hvm_domain(call)
        if not domain.paused:
            raise XenError(EBUSY)

        def done(data: bytes) -> Result:
            for vcpu in domain.vcpus:
                vcpu.initialised = True
                vcpu.online = vcpu.online or vcpu.index == 0
            self._lifecycle.vcpus_changed(call.now, domain)
            return call.reply(0, arrays={})

        self._ask(call, domain, "set_hvm_context", {"context": call.array("buffer")}, done)

    def _sendtrigger(self, call: Call) -> Result:
        """NMI to a vCPU; the power and sleep buttons of an HVM domain. What the process does with it is its
        matter."""
        domain, op = self._other(call), call.payload
        self._vcpu(domain, op.vcpu)
        buttons = (abi.XEN_DOMCTL_SENDTRIGGER_POWER, abi.XEN_DOMCTL_SENDTRIGGER_SLEEP)
        if op.trigger != abi.XEN_DOMCTL_SENDTRIGGER_NMI and (
            domain.kind is not Kind.HVM or op.trigger not in buttons
        ):
            raise XenError(EINVAL)
        self._outbox.tell(domain.domid, "trigger", {"trigger": op.trigger, "vcpu": op.vcpu})
        return call.reply(0)

    # -- attributes
    # -----------------------------------------------------------------------------------------------

    def _setdomainhandle(self, call: Call) -> Result:
        self._domain(call).handle = call.payload.handle
        return call.reply(0)

    def _settimeoffset(self, call: Call) -> Result:
        domain = self._domain(call)
        domain.time_offset = call.payload.time_offset_seconds
        self._outbox.tell(domain.domid, "time_offset", {"seconds": domain.time_offset})
        return call.reply(0)

    def _hypercall_init(self, call: Call) -> None:
        """The domain's process knows its hypercall page's form: it writes the page. EACCES: not a frame of
        its."""
        domain = self._other(call)
        number = call.payload.gmfn
        entry = domain.p2m.get(number) if domain.p2m is not None else None
        mfn = entry.mfn if entry is not None else number
        if (domain.p2m is not None and entry is None) or not self._frames.is_ram_of(mfn, domain.domid):
            raise XenError(EACCES)
        body: dict[str, object] = {"mfn": int(mfn)}
        self._ask(call, domain, "hypercall_page", body, lambda data: call.reply(0))

    def _irq_permission(self, call: Call) -> Result:
        op = call.payload
        if op.pirq >= self._config.max_pirqs:
            raise XenError(EINVAL)
        domain = self._domain(call)
        self._events.permit_pirq(domain.domid, op.pirq, allowed=bool(op.allow_access))
        return call.reply(0)

    def _set_target(self, call: Call) -> Result:
        """The device model gets rights over its target, and none of its memory: it reaches that by requests to the target's own
        process (docs/decisions/0007-device-model.md)."""
        domain = self._other(call)
        target = self._domains.get(call.payload.target)
        if target is None or target.dying is not Dying.ALIVE:
            raise XenError(ESRCH)
        if target is domain or domain.target is not None:
            raise XenError(EINVAL)
        domain.target = DomId(call.payload.target)
        return call.reply(0)

    def _set_virq_handler(self, call: Call) -> Result:
        self._events.set_virq_handler(self._domain(call), call.payload.virq)
        return call.reply(0)

    def _getpageframeinfo3(self, call: Call) -> Result:
        """A frame is either there, of no special type as far as the hypervisor knows (page types are the
        business of
        the domain's own process), or not there: PFINFO_XTAB."""
        domain = self._domain(call)
        raw = call.array("array")
        out = bytearray()
        for start in range(0, len(raw), 8):
            number = int.from_bytes(raw[start : start + 8], "little")
            if domain.p2m is not None:
                there = domain.p2m.get(number) is not None
            else:
                there = self._frames.is_ram_of(number, domain.domid)
            value = abi.XEN_DOMCTL_PFINFO_NOTAB if there else abi.XEN_DOMCTL_PFINFO_XTAB
            out += value.to_bytes(8, "little")
        return call.reply(0, arrays={"array": bytes(out)})

    def _get_address_size(self, call: Call) -> Result:
        size = self._domain(call).address_size
        return call.reply(0, payload=call.payload._replace(size=size))

    def _set_address_size(self, call: Call) -> Result:
        if call.payload.size != self._domain(call).address_size:
            raise XenError(EINVAL)
        return call.reply(0)
