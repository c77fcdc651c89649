"""HYPERVISOR_physdev_op: physical interrupts (PIRQs) for the domains that own devices.

A PIRQ is a number in one domain's own space, behind which is a message-signalled interrupt of a device of
the domain (its PCI address and MSI-X entry), or a line (GSI) that the control domain permitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EBUSY, EINVAL, ENODEV, ENOENT, ENOSPC, EPERM
from typing import Protocol

from bus.abi import physdev as abi
from bus.abi.xen import HYPERVISOR_physdev_op
from bus.addresses import Bdf, DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainTable, Kind
from hypervisor.core.errors import XenError
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result

FIRST_MSI_PIRQ = 16
"""PIRQs below are for lines; message-signalled interrupts get the highest free number."""


@dataclass(slots=True)
class _Pirqs:
    msi: dict[int, tuple[Bdf, int]] = field(default_factory=dict)
    """PIRQ -> (device, MSI-X entry)."""
    reserved: set[int] = field(default_factory=set)
    """Given out by PHYSDEVOP_get_free_pirq, not mapped yet."""


class MsiListener(Protocol):
    """Who makes a mapped interrupt work: the IOMMU's remapping table, and the device's MSI-X table entry."""

    def msi_mapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """The device's MSI-X entry now raises this PIRQ. XenError: it cannot, and is not mapped."""

    def msi_unmapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """It raises nothing any more."""


class PhysdevOps(DomainHooks):
    """Who owns a device is said by `device_owner`, which the IOMMU sets. An interrupt that comes in is
    passed on by
    `EventChannels.raise_pirq`."""

    def __init__(
        self, domains: DomainTable, events: EventChannels, config: MachineConfig, dispatcher: Dispatcher
    ) -> None:
        self._domains = domains
        self._events = events
        self._config = config
        self._pirqs: dict[DomId, _Pirqs] = {}
        self._by_source: dict[tuple[Bdf, int], tuple[DomId, int]] = {}
        self.device_owner: Callable[[Bdf], DomId | None] = lambda bdf: None
        self.device_exists: Callable[[Bdf], bool] = lambda bdf: False
        self.msi_listener: MsiListener | None = None
        for cmd, handler in (
            (abi.PHYSDEVOP_eoi, self._eoi),
            (abi.PHYSDEVOP_irq_status_query, self._irq_status_query),
            (abi.PHYSDEVOP_map_pirq, self._map_pirq),
            (abi.PHYSDEVOP_unmap_pirq, self._unmap_pirq),
            (abi.PHYSDEVOP_setup_gsi, self._setup_gsi),
            (abi.PHYSDEVOP_get_free_pirq, self._get_free_pirq),
            (abi.PHYSDEVOP_pci_mmcfg_reserved, self._pci_mmcfg_reserved),
            (abi.PHYSDEVOP_pci_device_add, self._pci_device_add),
            (abi.PHYSDEVOP_pci_device_remove, self._pci_device_remove),
        ):
            dispatcher.register(HYPERVISOR_physdev_op, cmd, handler)

    # -- what devices do
    # ------------------------------------------------------------------------------------------

    def release_device(self, bdf: Bdf) -> None:
        """The device leaves its owner: its interrupts are unmapped."""
        for source, (domid, pirq) in list(self._by_source.items()):
            if source[0] == bdf:
                self._unmap(domid, pirq)

    def mapped(self, domid: DomId) -> dict[int, tuple[Bdf, int]]:
        """PIRQ -> (device, entry) of a domain."""
        found = self._pirqs.get(domid)
        return dict(found.msi) if found is not None else {}

    # -- PIRQs
    # ----------------------------------------------------------------------------------------------------

    def _of(self, domid: DomId) -> _Pirqs:
        return self._pirqs.setdefault(domid, _Pirqs())

    def _free_pirq(self, domid: DomId) -> int:
        pirqs, permitted = self._of(domid), self._events.ports_of(domid).pirqs_permitted
        for pirq in range(self._config.max_pirqs - 1, FIRST_MSI_PIRQ - 1, -1):
            if pirq not in pirqs.msi and pirq not in pirqs.reserved and pirq not in permitted:
                return pirq
        raise XenError(ENOSPC)

    def _map_pirq(self, call: Call) -> Result:
        op: abi.physdev_map_pirq = call.item
        domain = self._domains.target(call.domain, op.domid)
        if op.type == abi.MAP_PIRQ_TYPE_GSI:
            pirq = self._map_gsi(domain, op)
        elif op.type in (abi.MAP_PIRQ_TYPE_MSI, abi.MAP_PIRQ_TYPE_MSI_SEG):
            pirq = self._map_msi(domain, op)
        else:  # several vectors for one MSI capability: no device here has other than MSI-X
            raise XenError(EINVAL)
        return call.reply(0, op._replace(pirq=pirq))

    def _map_gsi(self, domain: Domain, op: abi.physdev_map_pirq) -> int:
        if not 0 <= op.index_ < FIRST_MSI_PIRQ or op.pirq not in (-1, op.index_):
            raise XenError(EINVAL)
        if op.index_ not in self._events.ports_of(domain.domid).pirqs_permitted:
            raise XenError(EPERM)
        return op.index_

    def _map_msi(self, domain: Domain, op: abi.physdev_map_pirq) -> int:
        segment = op.bus >> 16 if op.type == abi.MAP_PIRQ_TYPE_MSI_SEG else 0
        if not 0 <= op.devfn <= 0xFF or not 0 <= op.entry_nr < 2048 or op.bus < 0 or segment > 0xFFFF:
            raise XenError(EINVAL)
        bdf = Bdf(segment << 16 | (op.bus & 0xFF) << 8 | op.devfn)
        if not self.device_exists(bdf):
            raise XenError(ENODEV)
        if self.device_owner(bdf) != domain.domid:
            raise XenError(EPERM)
        return self.map_msi(domain, bdf, op.entry_nr, op.pirq)

    def map_msi(self, domain: Domain, bdf: Bdf, entry: int, wanted: int = -1) -> int:
        """Give the domain the interrupt of an MSI-X entry of its own device as a PIRQ (`wanted`, or a free one for -1); the PIRQ.
        EBUSY, EINVAL, ENOSPC."""
        pirqs = self._of(domain.domid)
        if (bdf, entry) in self._by_source:
            raise XenError(EBUSY)
        if wanted < 0:
            pirq = self._free_pirq(domain.domid)
        elif wanted >= self._config.max_pirqs:
            raise XenError(EINVAL)
        else:
            pirq = wanted
            if pirq in pirqs.msi or pirq in self._events.ports_of(domain.domid).pirqs_permitted:
                raise XenError(EBUSY)
        if self.msi_listener is not None:
            self.msi_listener.msi_mapped(bdf, entry, domain.domid, pirq)
        pirqs.reserved.discard(pirq)
        pirqs.msi[pirq] = (bdf, entry)
        self._by_source[bdf, entry] = (domain.domid, pirq)
        self._events.permit_pirq(domain.domid, pirq, allowed=True)
        return pirq

    def unmap_msi(self, domid: DomId, bdf: Bdf, entry: int) -> None:
        """Take it away. ENOENT if the domain does not have it."""
        owner, pirq = self._by_source.get((bdf, entry), (None, -1))
        if owner != domid:
            raise XenError(ENOENT)
        self._unmap(domid, pirq)

    def _unmap(self, domid: DomId, pirq: int) -> None:
        source = self._of(domid).msi.pop(pirq)
        del self._by_source[source]
        if self.msi_listener is not None:
            self.msi_listener.msi_unmapped(*source, domid, pirq)
        self._events.permit_pirq(domid, pirq, allowed=False)

    def _unmap_pirq(self, call: Call) -> Result:
        domain = self._domains.target(call.domain, call.item.domid)
        if call.item.pirq not in self._of(domain.domid).msi:
            raise XenError(EINVAL)
        self._unmap(domain.domid, call.item.pirq)
        return call.reply(0)

    def _get_free_pirq(self, call: Call) -> Result:
        if call.item.type not in (abi.MAP_PIRQ_TYPE_MSI, abi.MAP_PIRQ_TYPE_GSI):
            raise XenError(EINVAL)
        pirq = self._free_pirq(call.domain.domid)
        self._of(call.domain.domid).reserved.add(pirq)
        return call.reply(0, call.item._replace(pirq=pirq))

    def _permitted(self, call: Call, pirq: int) -> None:
        if pirq not in self._events.ports_of(call.domain.domid).pirqs_permitted:
            raise XenError(EINVAL)

    def _eoi(self, call: Call) -> Result:
        """Message-signalled interrupts are edges: there is nothing to end. A line's device looks by
        itself."""
        self._permitted(call, call.item.irq)
        return call.reply(0)

    def _irq_status_query(self, call: Call) -> Result:
        """Lines need an EOI, messages do not; nothing is shared between domains. A PV domain is told of any interrupt."""
        if call.domain.kind is not Kind.PV:
            self._permitted(call, call.item.irq)
        elif call.item.irq >= self._config.max_pirqs:
            raise XenError(EINVAL)
        line = call.item.irq not in self._of(call.domain.domid).msi
        return call.reply(0, call.item._replace(flags=abi.XENIRQSTAT_needs_eoi if line else 0))

    def _setup_gsi(self, call: Call) -> Result:
        op = call.item
        if op.triggering > 1 or op.polarity > 1:
            raise XenError(EINVAL)
        self._permitted(call, op.gsi)
        return call.reply(0)

    # -- devices
    # --------------------------------------------------------------------------------------------------

    def _pci_mmcfg_reserved(self, call: Call) -> Result:
        """Configuration space is reached over the bus: there is no window for it in machine memory."""
        raise XenError(ENODEV)

    def _known(self, op: abi.physdev_pci_device_add | abi.physdev_pci_device) -> None:
        if not self.device_exists(Bdf(op.seg << 16 | op.bus << 8 | op.devfn)):
            raise XenError(ENODEV)

    def _pci_device_add(self, call: Call) -> Result:
        """The hypervisor knows its devices from their links; Dom0's report is only checked."""
        self._known(call.item)
        return call.reply(0)

    def _pci_device_remove(self, call: Call) -> Result:
        """As `_pci_device_add`: a device goes when its process goes."""
        if not call.domain.privileged:
            raise XenError(EPERM)
        self._known(call.item)
        raise XenError(EBUSY)

    def dying(self, now: int, domain: Domain) -> None:
        for pirq in list(self._of(domain.domid).msi):
            self._unmap(domain.domid, pirq)
        del self._pirqs[domain.domid]
