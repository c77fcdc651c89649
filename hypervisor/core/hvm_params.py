"""HVMOP_set_param and HVMOP_get_param: the parameters of auto-translated domains, and who may set which."""

from __future__ import annotations

from errno import EEXIST, EINVAL, EPERM

from bus.abi.hvm import hvm_op, params
from bus.abi.xen import HYPERVISOR_hvm_op
from bus.addresses import DomId
from hypervisor.core.domains import Domain, DomainTable, Kind
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.outbox import Outbox
from hypervisor.core.p2m import P2mType
from hypervisor.core.physmap import PhysMap

GUEST_SETS = frozenset(
    (
        params.HVM_PARAM_CALLBACK_IRQ,
        params.HVM_PARAM_VM86_TSS,
        params.HVM_PARAM_VM86_TSS_SIZED,
        params.HVM_PARAM_ACPI_IOPORTS_LOCATION,
        params.HVM_PARAM_VM_GENERATION_ID_ADDR,
        params.HVM_PARAM_STORE_EVTCHN,
        params.HVM_PARAM_CONSOLE_EVTCHN,
        params.HVM_PARAM_X87_FIP_WIDTH,
    )
)
"""What a guest may set of its own; all others are the toolstack's."""
GUEST_GETS = GUEST_SETS | {
    params.HVM_PARAM_STORE_PFN,
    params.HVM_PARAM_CONSOLE_PFN,
    params.HVM_PARAM_ALTP2M,
}
SET_ONCE = frozenset(
    (
        params.HVM_PARAM_VIRIDIAN,
        params.HVM_PARAM_IOREQ_SERVER_PFN,
        params.HVM_PARAM_NR_IOREQ_SERVER_PAGES,
        params.HVM_PARAM_ALTP2M,
        params.HVM_PARAM_MCA_CAP,
    )
)
WITHDRAWN = frozenset(
    (
        params.HVM_PARAM_PAE_ENABLED,
        params.HVM_PARAM_DM_DOMAIN,
        params.HVM_PARAM_MEMORY_EVENT_CR0,
        params.HVM_PARAM_MEMORY_EVENT_CR3,
        params.HVM_PARAM_MEMORY_EVENT_CR4,
        params.HVM_PARAM_MEMORY_EVENT_INT3,
        params.HVM_PARAM_NESTEDHVM,
        params.HVM_PARAM_MEMORY_EVENT_SINGLE_STEP,
        params.HVM_PARAM_MEMORY_EVENT_MSR,
    )
)
"""Numbers that once meant something."""
_LIMITS = {
    params.HVM_PARAM_TIMER_MODE: params.HVMPTM_one_missed_tick_pending,
    params.HVM_PARAM_ACPI_S_STATE: 3,
    params.HVM_PARAM_ALTP2M: params.XEN_ALTP2M_disabled,  # no alternate p2m here
    params.HVM_PARAM_ACPI_IOPORTS_LOCATION: 1,
    params.HVM_PARAM_NR_IOREQ_SERVER_PAGES: 8,
    params.HVM_PARAM_MCA_CAP: 0,
}
"""Largest value that is accepted, where there is one."""


class HvmParams(DomainHooks):
    """A parameter that somebody else set is told to the domain's process (order `hvm_param`)."""

    def __init__(
        self, domains: DomainTable, physmap: PhysMap, outbox: Outbox, dispatcher: Dispatcher
    ) -> None:
        self._domains = domains
        self._physmap = physmap
        self._outbox = outbox
        self._values: dict[DomId, dict[int, int]] = {}
        dispatcher.register(HYPERVISOR_hvm_op, hvm_op.HVMOP_set_param, self._set)
        dispatcher.register(HYPERVISOR_hvm_op, hvm_op.HVMOP_get_param, self._get)
        dispatcher.register(HYPERVISOR_hvm_op, hvm_op.HVMOP_get_mem_type, self._get_mem_type)

    def value(self, domid: DomId, index: int) -> int:
        """A parameter's value; 0 if it was never set."""
        return self._values.get(domid, {}).get(index, 0)

    def _target(self, call: Call, domid: int) -> Domain:
        domain = self._domains.target(call.domain, domid)
        if domain.kind is Kind.PV:
            raise XenError(EINVAL)
        return domain

    def _check_index(self, call: Call) -> int:
        index: int = call.item.index_
        if index >= params.HVM_NR_PARAMS or index in WITHDRAWN:
            raise XenError(EINVAL)
        return index

    def _set(self, call: Call) -> Result:
        index = self._check_index(call)
        domain = self._target(call, call.item.domid)
        value: int = call.item.value
        if domain is call.domain and index not in GUEST_SETS:
            raise XenError(EPERM)
        values = self._values.setdefault(domain.domid, {})
        if index in SET_ONCE and values.get(index, 0) not in (0, value):
            raise XenError(EEXIST)
        if value > _LIMITS.get(index, value):
            raise XenError(EINVAL)
        if index == params.HVM_PARAM_X87_FIP_WIDTH and value not in (0, 4, 8):
            raise XenError(EINVAL)
        values[index] = value
        if domain is not call.domain:
            self._outbox.tell(domain.domid, "hvm_param", {"index": index, "value": value})
        return call.reply(0)

    def _get(self, call: Call) -> Result:
        index = self._check_index(call)
        domain = self._target(call, call.item.domid)
        if domain is call.domain and index not in GUEST_GETS:
            raise XenError(EPERM)
        return call.reply(0, call.item._replace(value=self.value(domain.domid, index)))

    def _get_mem_type(self, call: Call) -> Result:
        domain = self._target(call, call.item.domid)
        entry = self._physmap.frame_at(domain, call.item.pfn)
        kind = hvm_op.HVMMEM_mmio_dm
        if entry is not None and entry.type is P2mType.GRANT_RO:
            kind = hvm_op.HVMMEM_ram_ro
        elif entry is not None and entry.type is not P2mType.MMIO:
            kind = hvm_op.HVMMEM_ram_rw
        return call.reply(0, call.item._replace(mem_type=kind))

    def removed(self, now: int, domain: Domain) -> None:
        self._values.pop(domain.domid, None)
