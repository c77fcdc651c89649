"""Domctls that give a domain a device's registers: I/O memory, its mapping in the p2m, I/O ports."""

from __future__ import annotations

from errno import E2BIG, EBUSY, EINVAL, EPERM, ESRCH

from bus.abi import domctl as abi
from bus.abi.xen import HYPERVISOR_domctl
from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Dying
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.p2m import GFN_LIMIT, P2mType

MAX_MAPPING = 64
"""Most frames of one XEN_DOMCTL_memory_mapping, as on Xen."""
MAX_RANGES = 256
"""Most ranges that one domain may be permitted."""

Ranges = list[tuple[int, int]]


def _grant(ranges: Ranges, first: int, end: int) -> Ranges:
    """The ranges with [first, end) added, merged and sorted."""
    out: Ranges = []
    for start, stop in sorted([*ranges, (first, end)]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def _revoke(ranges: Ranges, first: int, end: int) -> Ranges:
    """The ranges without [first, end)."""
    out: Ranges = []
    for start, stop in ranges:
        out += [(a, b) for a, b in ((start, min(stop, first)), (max(start, end), stop)) if a < b]
    return out


class IoPermissions(DomainHooks):
    """I/O memory is what lies in the machine's MFN holes; RAM is never given this way."""

    def __init__(self, domains: DomainTable, config: MachineConfig, dispatcher: Dispatcher) -> None:
        self._domains = domains
        self._config = config
        self._memory: dict[DomId, Ranges] = {}
        self._ports: dict[DomId, Ranges] = {}
        for cmd, handler in (
            (abi.XEN_DOMCTL_iomem_permission, self._iomem_permission),
            (abi.XEN_DOMCTL_ioport_permission, self._ioport_permission),
            (abi.XEN_DOMCTL_memory_mapping, self._memory_mapping),
        ):
            dispatcher.register(HYPERVISOR_domctl, cmd, handler)

    def may_reach(self, domid: DomId, mfn: int, count: int = 1) -> bool:
        """The domain has permission for these frames of I/O memory."""
        return any(start <= mfn and mfn + count <= end for start, end in self._memory.get(domid, ()))

    def ports(self, domid: DomId) -> Ranges:
        """[first, end) ranges of I/O ports that the domain may use."""
        return list(self._ports.get(domid, ()))

    def _domain(self, call: Call) -> Domain:
        domain = self._domains.get(call.item.domain)
        if domain is None or domain.dying is not Dying.ALIVE:
            raise XenError(ESRCH)
        return domain

    def _change(
        self, table: dict[DomId, Ranges], domain: Domain, first: int, end: int, *, allow: bool
    ) -> None:
        ranges = table.get(domain.domid, [])
        ranges = _grant(ranges, first, end) if allow else _revoke(ranges, first, end)
        if len(ranges) > MAX_RANGES:
            raise XenError(E2BIG)
        table[domain.domid] = ranges

    def _iomem_permission(self, call: Call) -> Result:
        op = call.payload
        first, end = op.first_mfn, op.first_mfn + op.nr_mfns
        if not op.nr_mfns or not any(a <= first and end <= b for a, b in self._config.mfn_holes):
            raise XenError(EINVAL)
        domain = self._domain(call)
        self._change(self._memory, domain, first, end, allow=bool(op.allow_access))
        if not op.allow_access and domain.p2m is not None:
            for gfn, entry in list(domain.p2m.entries()):
                if entry.type is P2mType.MMIO and first <= entry.mfn < end:
                    domain.p2m.clear(gfn)
        return call.reply(0)

    def _ioport_permission(self, call: Call) -> Result:
        op = call.payload
        if not op.nr_ports or op.first_port + op.nr_ports > 0x10000:
            raise XenError(EINVAL)
        domain = self._domain(call)
        end = op.first_port + op.nr_ports
        self._change(self._ports, domain, op.first_port, end, allow=bool(op.allow_access))
        return call.reply(0)

    def _memory_mapping(self, call: Call) -> Result:
        """A device's registers in the domain's p2m (type MMIO), or out of it. A PV domain maps the frames by
        itself
        once it has the permission: nothing to do."""
        op = call.payload
        domain = self._domain(call)
        if not op.nr_mfns or op.first_gfn + op.nr_mfns > GFN_LIMIT or op.first_mfn + op.nr_mfns > GFN_LIMIT:
            raise XenError(EINVAL)
        if op.nr_mfns > MAX_MAPPING:
            raise XenError(E2BIG)
        if not self.may_reach(domain.domid, op.first_mfn, op.nr_mfns):
            raise XenError(EPERM)
        if domain.p2m is None:
            return call.reply(0)
        for step in range(op.nr_mfns):
            gfn, mfn = Gfn(op.first_gfn + step), Mfn(op.first_mfn + step)
            entry = domain.p2m.get(gfn)
            if op.add_mapping:
                if entry is not None and entry != (mfn, P2mType.MMIO):
                    raise XenError(EBUSY)
                domain.p2m.set(gfn, mfn, P2mType.MMIO)
            elif entry == (mfn, P2mType.MMIO):
                domain.p2m.clear(gfn)
        return call.reply(0)

    def gone(self, now: int, domain: Domain) -> None:
        self._memory.pop(domain.domid, None)
        self._ports.pop(domain.domid, None)
