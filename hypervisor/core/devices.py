"""Devices: who owns each, what a domain may do with its registers, and what a device may do to memory.

A device process is a peer that is not trusted: what it asks (DMA, interrupts) goes through the IOMMU; what it does not answer in
time reads as all ones, as a missing device does. See docs/decisions/0004-devices.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from errno import EINVAL, ENODEV, EPERM
from typing import Final

from bus.abi import domctl as abi
from bus.abi.xen import HYPERVISOR_domctl
from bus.addresses import Bdf, DomId, Mfn
from bus.messages.device import (
    Access,
    AccessDone,
    Attach,
    DeviceAccess,
    DeviceHello,
    DeviceVector,
    Dma,
    DmaDone,
    DmaRequest,
)
from bus.messages.envelope import Message
from hypervisor.core.domains import Domain, DomainTable, Dying, Kind
from hypervisor.core.effects import DmaAnswer, Order, Reply, ToDevice
from hypervisor.core.errors import XenError
from hypervisor.core.event_channels import EventChannels
from hypervisor.core.frames import FrameTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import DmaBatch, DmaResult, DmaService, Staging
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.memory_news import MemoryNews
from hypervisor.core.outbox import Outbox
from hypervisor.core.p2m import P2mType
from hypervisor.core.physdev import PhysdevOps

ACCESS_TIMEOUT_NS: Final = 1_000_000_000
MAX_ACCESSES: Final = 64
"""Accesses to one device that may be under way; more read as all ones."""


@dataclass(slots=True)
class _Pending:
    deadline: int
    done: Callable[[int], None]
    size: int


@dataclass(slots=True)
class _Plugged:
    """A device process and what it said of itself."""

    bdf: Bdf
    staging: Staging
    hello: DeviceHello | None = None
    accesses: dict[int, _Pending] = field(default_factory=dict)


class DeviceService(DomainHooks):
    """All devices of a machine. `iommu` knows who owns them; here is what goes to and fro."""

    def __init__(
        self,
        iommu: Iommu,
        dma: DmaService,
        physdev: PhysdevOps,
        domains: DomainTable,
        events: EventChannels,
        outbox: Outbox,
        dispatcher: Dispatcher,
        frames: FrameTable,
        news: MemoryNews,
    ) -> None:
        self.iommu = iommu
        self._frames = frames
        news.on_owned = self._owned_changed
        self._dma = dma
        self._physdev = physdev
        self._domains = domains
        self._events = events
        self._outbox = outbox
        self._tokens = itertools.count(1)
        self._plugged: dict[Bdf, _Plugged] = {}
        self._delivered: dict[tuple[DomId, int], tuple[Bdf, int]] = {}
        """Vectors that an HVM domain's process delivers, by the PIRQ that stands for each."""
        physdev.device_owner = self._owner
        physdev.device_exists = lambda bdf: bdf in {device.bdf for device in iommu.devices()}
        physdev.msi_listener = self
        dispatcher.has_device = lambda domain: any(
            device.domain == domain.domid for device in iommu.devices()
        )
        for cmd, handler in (
            (abi.XEN_DOMCTL_assign_device, self._assign),
            (abi.XEN_DOMCTL_deassign_device, self._deassign),
            (abi.XEN_DOMCTL_test_assign_device, self._test_assign),
        ):
            dispatcher.register(HYPERVISOR_domctl, cmd, handler)

    def _owner(self, bdf: Bdf) -> DomId | None:
        try:
            return self.iommu.device(bdf).domain
        except XenError:
            return None

    def _send(self, bdf: Bdf, message: Message) -> None:
        self._outbox.emit(ToDevice(bdf, message))

    # -- device processes -----------------------------------------------------------------------------------------

    def plug(self, bdf: Bdf, staging: Staging) -> None:
        """A device process is about to connect as this device; a new one after an old one keeps the owner, in a new epoch."""
        try:
            self.iommu.add_device(bdf)
        except XenError:
            self.unplug(bdf)
            self.iommu.reset(bdf)
        self._plugged[bdf] = _Plugged(bdf, staging)

    def unplug(self, bdf: Bdf) -> None:
        """Its process is gone: what waits for it reads as all ones; late requests are of an old epoch."""
        plugged = self._plugged.pop(bdf, None)
        if plugged is None:
            return
        self.iommu.reset(bdf)
        for pending in plugged.accesses.values():
            pending.done((1 << 8 * pending.size) - 1)

    def remove(self, bdf: Bdf) -> None:
        """It will not come back. ENODEV."""
        self.unplug(bdf)
        self._physdev.release_device(bdf)
        self.iommu.remove_device(bdf)

    def hello_of(self, bdf: Bdf) -> DeviceHello | None:
        """What the device process said of itself; None while there is none."""
        plugged = self._plugged.get(bdf)
        return plugged.hello if plugged is not None else None

    def owner(self, bdf: Bdf) -> DomId | None:
        """The domain to which the device is assigned."""
        return self._owner(bdf)

    def receive(self, now: int, bdf: Bdf, message: Message) -> None:
        """What a device process says."""
        plugged = self._plugged.get(bdf)
        if plugged is None:
            return
        if isinstance(message, DeviceHello):
            if plugged.hello is None:
                plugged.hello = message
                self._restore_vectors(plugged)
                self._attach(plugged, self.iommu.device(bdf).epoch)
        elif isinstance(message, AccessDone):
            pending = plugged.accesses.pop(message.token, None)
            if pending is not None:
                pending.done(message.value & ((1 << 8 * pending.size) - 1))
        elif isinstance(message, Dma):
            self._dma_batch(now, plugged, message)

    # -- DMA ------------------------------------------------------------------------------------------------------

    def _dma_batch(self, now: int, plugged: _Plugged, message: Dma) -> None:
        """Hand a batch to the DMA service; it answers now or when frames that move have arrived."""
        bdf = plugged.bdf

        def done(result: DmaResult) -> None:
            if self._plugged.get(bdf) is plugged:
                reason = result.reason.name if result.reason is not None else ""
                self._send(bdf, DmaDone.made(token=message.token, fault=result.fault, reason=reason))

        self._submit(now, plugged, message, done)

    def receive_dma(self, now: int, bdf: Bdf, request: DmaRequest) -> None:
        """A batch that came by the device's lane. Its answer is of the same epoch, or it is lost with the lane."""
        plugged = self._plugged.get(bdf)
        if plugged is None:
            return

        def done(result: DmaResult) -> None:
            if self._plugged.get(bdf) is plugged and self.iommu.device(bdf).epoch == request.epoch:
                self._outbox.emit(DmaAnswer(bdf, request.token, result.fault))

        self._submit(now, plugged, request, done)

    def receive_late(self, now: int, bdf: Bdf, requests: Iterable[Message | DmaRequest]) -> None:
        """What still lay in the lane when its epoch ended: each is refused, and in the fault log."""
        for request in requests:
            if isinstance(request, DmaRequest):
                self.receive_dma(now, bdf, request)

    def _submit(
        self, now: int, plugged: _Plugged, batch: Dma | DmaRequest, done: Callable[[DmaResult], None]
    ) -> None:
        vectors = list(batch.vectors)
        self._dma.submit(
            now, DmaBatch(plugged.bdf, batch.epoch, batch.items, vectors, batch.token), plugged.staging, done
        )

    # -- registers ------------------------------------------------------------------------------------------------

    def domain_access(self, now: int, domid: DomId, access: DeviceAccess) -> None:
        """A domain reads or writes a register. Anything but its own devices reads as all ones, as nothing there does."""

        caller = self._domains.get(domid)
        life = caller.life if caller is not None else 0

        def done(value: int) -> None:
            if caller is None or caller.life == life:  # else the process that asked is gone
                self._outbox.emit(Reply(domid, access.token, 0, value.to_bytes(8, "little")))

        bdf = Bdf(access.bdf)
        if self._owner(bdf) != domid:
            done((1 << 8 * access.size) - 1)
            return
        self.access(
            now, bdf, access.space, access.offset, access.size, access.value if access.write else None, done
        )

    def access(
        self,
        now: int,
        bdf: Bdf,
        space: int,
        offset: int,
        size: int,
        value: int | None,
        done: Callable[[int], None],
    ) -> None:
        """Read (`value` None) or write a register of a device; `done` gets the value read."""
        plugged = self._plugged.get(bdf)
        if plugged is None or plugged.hello is None or len(plugged.accesses) >= MAX_ACCESSES:
            done((1 << 8 * size) - 1)
            return
        token = next(self._tokens)
        plugged.accesses[token] = _Pending(now + ACCESS_TIMEOUT_NS, done, size)
        write = value is not None
        self._send(
            bdf,
            Access.made(
                token=token,
                space=space,
                offset=offset,
                size=size,
                write=write,
                value=value or 0,
            ),
        )

    def tick(self, now: int) -> None:
        """Registers that were not answered in time read as all ones."""
        for plugged in self._plugged.values():
            for token in [t for t, pending in plugged.accesses.items() if pending.deadline <= now]:
                pending = plugged.accesses.pop(token)
                self._outbox.log("warning", f"device {plugged.bdf:#x} did not answer a register access")
                pending.done((1 << 8 * pending.size) - 1)

    def next_deadline(self) -> int | None:
        """When `tick` has something to do."""
        first: int | None = None
        for plugged in self._plugged.values():
            for pending in plugged.accesses.values():
                if first is None or pending.deadline < first:
                    first = pending.deadline
        return first

    def _restore_vectors(self, plugged: _Plugged) -> None:
        """A device process that was started anew may raise what its owner had mapped."""
        owner = self._owner(plugged.bdf)
        if owner is not None:
            for pirq, (bdf, entry) in self._physdev.mapped(owner).items():
                if bdf == plugged.bdf:
                    self.iommu.msi_mapped(bdf, entry, owner, pirq)

    # -- vectors of HVM domains -----------------------------------------------------------------------------------

    def domain_vector(self, now: int, domid: DomId, request: DeviceVector) -> None:
        """The process of an HVM domain takes or gives back a vector of its guest's device."""
        rc = 0
        try:
            self._vector(domid, Bdf(request.bdf), request.entry, on=request.on)
        except XenError as error:
            rc = -error.errno
        self._outbox.emit(Reply(domid, request.token, rc, b""))

    def _vector(self, domid: DomId, bdf: Bdf, entry: int, *, on: bool) -> None:
        domain = self._domains.get(domid)
        if domain is None or domain.kind is not Kind.HVM:
            raise XenError(EINVAL)
        if self._owner(bdf) != domid:
            raise XenError(EPERM)
        if not on:
            self._physdev.unmap_msi(domid, bdf, entry)
            return
        self._delivered[domid, self._physdev.map_msi(domain, bdf, entry)] = (bdf, entry)

    def interrupt(self, now: int, entry: InterruptEntry) -> None:
        """A device's interrupt for a domain: by event channel, or by its process where that delivers it."""
        source = self._delivered.get((entry.domain, entry.pirq))
        if source is None:
            self._events.raise_pirq(entry.domain, entry.pirq)
            return
        self._outbox.emit(Order(entry.domain, 0, "msi", {"bdf": source[0], "entry": source[1]}))

    # -- assignment -----------------------------------------------------------------------------------------------

    @staticmethod
    def _address(call: Call) -> Bdf:
        if call.payload.dev != 0:  # XEN_DOMCTL_DEV_PCI
            raise XenError(ENODEV)
        return Bdf(abi.XEN_DOMCTL_ASSIGN_DEVICE_PCI.unpack(call.payload.u).machine_sbdf)

    def _target(self, call: Call) -> Domain:
        domain = self._domains.get(DomId(call.item.domain))
        if domain is None or domain.dying is not Dying.ALIVE:
            raise XenError(EINVAL)
        return domain

    def _assign(self, call: Call) -> Result:
        domain, bdf = self._target(call), self._address(call)
        self.assign(call.now, bdf, domain)
        return call.reply(0)

    def assign(self, now: int, bdf: Bdf, domain: Domain) -> None:
        """Give a device to a domain. ENODEV, EBUSY, ENOMEM; EINVAL for an ordinary PV guest, which has no PCI bus here."""
        if domain.p2m is None and not domain.restartable:
            raise XenError(EINVAL)
        if not self.iommu.has_context(domain.domid):
            self.iommu.create_context(domain.domid)
            if domain.p2m is None:
                for mfn, count in self._frames.ram_runs(domain.domid):
                    self.iommu.owned_changed(domain.domid, mfn, count, True)
            else:
                for gfn, mfn, count, kind in domain.p2m.runs():
                    if kind == P2mType.RAM:
                        self._map_run(domain.domid, gfn, Mfn(mfn), count)
                domain.p2m.subscribe(self.iommu.p2m_changed)
        self._reset(bdf, self.iommu.assign(bdf, domain.domid))

    def _owned_changed(self, domid: DomId, mfn: int, count: int, owned: bool) -> None:
        """I/O page tables of a PV domain follow what it owns; those of others follow their p2m."""
        domain = self._domains.get(domid)
        if domain is not None and domain.p2m is None:
            self.iommu.owned_changed(domid, mfn, count, owned)

    def _map_run(self, domain: DomId, gfn: int, mfn: Mfn, count: int) -> None:
        """The domain's own memory in its I/O page tables. Page by page where the run as a whole cannot be (it crosses the interrupt
        range, or tables run short): what there is no room for is not reachable by DMA."""
        try:
            self.iommu.map_range(domain, gfn, mfn, count, writable=True)
        except (XenError, ValueError):
            for step in range(count):
                self.iommu.map_page(domain, gfn + step, Mfn(mfn + step), True)

    def _reset(self, bdf: Bdf, epoch: int) -> None:
        plugged = self._plugged.get(bdf)
        if plugged is not None and plugged.hello is not None:
            self._attach(plugged, epoch)

    def _attach(self, plugged: _Plugged, epoch: int) -> None:
        """Tell the device its epoch: it forgets all but its media. The shell adds the descriptors, and gives the owner its."""
        assert plugged.hello is not None
        self._send(plugged.bdf, Attach(bdf=plugged.bdf, epoch=epoch, staging=plugged.staging.size))

    def _deassign(self, call: Call) -> Result:
        domain, bdf = self._target(call), self._address(call)
        if self._owner(bdf) != domain.domid:
            raise XenError(ENODEV)
        self._physdev.release_device(bdf)
        self._reset(bdf, self.iommu.deassign(bdf))
        return call.reply(0)

    def _test_assign(self, call: Call) -> Result:
        bdf = self._address(call)
        if self.iommu.device(bdf).domain is not None:
            raise XenError(EINVAL)
        return call.reply(0)

    def restarted(self, now: int, domain: Domain) -> None:
        """The domain's process starts anew: its devices are reset, in a new epoch; nothing of the old life is under way."""
        for device in self.iommu.devices():
            if device.domain == domain.domid:
                self._physdev.release_device(device.bdf)
                self._reset(device.bdf, self.iommu.reset(device.bdf))

    # -- interrupts (physdev's MsiListener) -----------------------------------------------------------------------

    def msi_mapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """The device must be there and have that vector; the rest is the remapping table's."""
        plugged = self._plugged.get(bdf)
        if plugged is None or plugged.hello is None or entry >= plugged.hello.vectors:
            raise XenError(EINVAL)
        self.iommu.msi_mapped(bdf, entry, domain, pirq)

    def msi_unmapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        """The reverse."""
        self._delivered.pop((domain, pirq), None)
        self.iommu.msi_unmapped(bdf, entry, domain, pirq)

    # -- lives of domains -----------------------------------------------------------------------------------------

    def dying(self, now: int, domain: Domain) -> None:
        for device in self.iommu.devices():
            if device.domain == domain.domid:
                self._physdev.release_device(device.bdf)
                self._reset(device.bdf, self.iommu.deassign(device.bdf))

    def gone(self, now: int, domain: Domain) -> None:
        self.iommu.destroy_context(domain.domid)
