"""A device answers to its owner alone: registers, interrupts, assignment (hypervisor.core.devices)."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENODEV, ENOENT, EPERM
from typing import Any

import pytest

from bus.abi import domctl, memory, physdev, sched
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.xen import DOMID_SELF, HYPERVISOR_physdev_op, HYPERVISOR_sched_op
from bus.addresses import Bdf, DomId, Mfn
from bus.messages.device import Access, AccessDone, DeviceAccess, DeviceHello, DeviceVector
from hypervisor.core.devices import ACCESS_TIMEOUT_NS, DeviceService
from hypervisor.core.domains import DRIVER_GUEST
from hypervisor.core.effects import KillProcess, Order, Reply, ToDevice
from hypervisor.core.errors import XenError
from hypervisor.core.grants import GrantTables
from hypervisor.core.iommu import DmaFault, Iommu
from hypervisor.core.iommu_dma import DmaService
from hypervisor.core.pool import XenPool
from tests.unit.hvcore.hvcore_machine import Machine

BDF = Bdf(8)
SECRET = 0x1B36_0010


class World(Machine):
    """A core with an IOMMU and one plugged device, whose process answers each register with SECRET."""

    def __init__(self) -> None:
        super().__init__()
        core = self.core
        limit = core.config.mfn_limit
        iommu = Iommu(self.memory, XenPool(self.memory, Mfn(limit), 256))
        grants = GrantTables(core.frames, core.views, self.memory, core.outbox, iommu)
        dma = DmaService(iommu, grants, lambda mfn, count: None, lambda now, entry: None)
        self.devices = DeviceService(
            iommu,
            dma,
            core.physdev,
            core.domains,
            core.events,
            core.outbox,
            core.dispatcher,
            core.frames,
            core.news,
        )
        core.attach_hooks(self.devices)
        self.devices.plug(BDF, Staging())
        self.devices.receive(0, BDF, DeviceHello(pid=1, bars=[], vectors=4))
        self.accesses: list[Access] = []
        self.run()

    def run(self) -> list[Any]:
        """The device's process answers at once."""
        seen = super().run()
        for effect in seen:
            if isinstance(effect, ToDevice) and isinstance(effect.message, Access):
                self.accesses.append(effect.message)
                self.devices.receive(self.now, BDF, AccessDone(token=effect.message.token, value=SECRET))
        return seen + super().run() if seen else seen

    def register(self, domid: int, *, write: bool = False) -> int:
        """The domain reads or writes a register of BDF; the value."""
        self._token += 1
        access = DeviceAccess(token=self._token, bdf=BDF, space=-1, offset=0, size=4, write=write, value=7)
        self.devices.domain_access(self.now, DomId(domid), access)
        self.run()
        reply: Reply = self.replies.pop(self._token)
        return int.from_bytes(reply.data, "little")

    def vector(self, domid: int, entry: int = 0, *, on: bool = True) -> int:
        """The domain's process takes a vector of BDF, or gives it back."""
        self._token += 1
        request = DeviceVector(token=self._token, bdf=BDF, entry=entry, on=on)
        self.devices.domain_vector(self.now, DomId(domid), request)
        self.run()
        return self.replies.pop(self._token).rc

    def raised(self, entry: int = 0) -> list[dict[str, Any]]:
        """The device raises an entry; the `msi` orders that come of it. DmaFault."""
        iommu = self.devices.iommu
        found = iommu.raise_vector(self.now, BDF, iommu.device(BDF).epoch, entry)
        self.devices.interrupt(self.now, found)
        return [{"to": e.domain, **e.body} for e in self.run() if isinstance(e, Order) and e.kind == "msi"]

    def assign(self, cmd: int, domid: int) -> int:
        """XEN_DOMCTL_*assign_device of BDF."""
        pci = domctl.XEN_DOMCTL_ASSIGN_DEVICE_PCI.pack(domctl.xen_domctl_assign_device_pci(BDF))
        payload = domctl.xen_domctl_assign_device(
            0, 0, pci.ljust(domctl.XEN_DOMCTL_ASSIGN_DEVICE.field_size("u"), b"\0")
        )
        return self.domctl(cmd, domid, payload).rc

    def map_msi(self, domid: int) -> int:
        """PHYSDEVOP_map_pirq of its first vector."""
        item = physdev.physdev_map_pirq(DOMID_SELF, physdev.MAP_PIRQ_TYPE_MSI_SEG, -1, -1, 0, BDF, 0, 0)
        assert HYPERCALLS[HYPERVISOR_physdev_op] is not None
        return self.call(domid, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq, item).rc


class Staging:
    """No DMA here."""

    size = 4096

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        raise AssertionError

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        raise AssertionError


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def pair(world: World) -> tuple[int, int]:
    """The owner, and another domain of the same kind that owns nothing."""
    owner, other = (
        world.create(flags=domctl.XEN_DOMCTL_CDF_hvm | domctl.XEN_DOMCTL_CDF_hap) for _ in range(2)
    )
    for domid in (owner, other):
        world.start(domid)
    assert world.assign(domctl.XEN_DOMCTL_assign_device, owner) == 0
    return owner, other


def test_registers_of_anothers_device_read_as_ones_and_the_device_hears_nothing(
    world: World, pair: tuple[int, int]
) -> None:
    owner, other = pair
    assert world.register(owner) == SECRET
    heard = len(world.accesses)
    for domid in (other, 0, 999):
        assert world.register(domid) == 0xFFFFFFFF
        assert world.register(domid, write=True) == 0xFFFFFFFF
    assert len(world.accesses) == heard


def test_a_device_is_taken_only_in_its_owners_name(world: World, pair: tuple[int, int]) -> None:
    owner, other = pair
    assert world.assign(domctl.XEN_DOMCTL_deassign_device, other) == -ENODEV
    assert world.assign(domctl.XEN_DOMCTL_assign_device, other) == -EBUSY
    assert world.register(owner) == SECRET
    assert world.assign(domctl.XEN_DOMCTL_deassign_device, owner) == 0
    assert world.register(owner) == 0xFFFFFFFF
    assert world.assign(domctl.XEN_DOMCTL_assign_device, other) == 0
    assert (world.register(owner), world.register(other)) == (0xFFFFFFFF, SECRET)


def test_interrupts_of_anothers_device_are_not_to_be_had(world: World, pair: tuple[int, int]) -> None:
    """Neither to a PV domain nor to Dom0, whose vectors they are not."""
    pv = world.create()
    world.start(pv)
    assert world.map_msi(pv) == -EPERM
    assert world.map_msi(0) == -EPERM
    assert world.devices.iommu.interrupts.of(BDF) == {}


def test_a_destroyed_owners_device_is_nobodys(world: World, pair: tuple[int, int]) -> None:
    owner, other = pair
    assert world.destroy(owner) == 0
    world.advance(5)
    assert world.devices.owner(BDF) is None
    assert world.register(owner) == world.register(other) == 0xFFFFFFFF


def test_an_hvm_guests_process_hears_of_the_vectors_that_it_took(world: World, pair: tuple[int, int]) -> None:
    owner, _ = pair
    with pytest.raises(DmaFault):
        world.raised(1)
    assert world.vector(owner, 1) == 0
    assert world.raised(1) == [{"to": owner, "bdf": BDF, "entry": 1}]
    assert world.vector(owner, 1) == -EBUSY
    assert world.vector(owner, 1, on=False) == 0
    assert world.vector(owner, 1, on=False) == -ENOENT
    with pytest.raises(DmaFault):
        world.raised(1)
    assert world.vector(owner, 1) == 0


def test_vectors_of_anothers_device_or_that_it_does_not_have_are_refused(
    world: World, pair: tuple[int, int]
) -> None:
    owner, other = pair
    pv = world.create()
    world.start(pv)
    assert world.vector(other) == -EPERM
    assert world.vector(owner, 4) == -EINVAL, "it has four"
    assert world.vector(pv) == world.vector(0) == world.vector(999) == -EINVAL


def test_vectors_go_with_the_device_and_come_back_with_its_process(
    world: World, pair: tuple[int, int]
) -> None:
    owner, other = pair
    assert world.vector(owner, 2) == 0
    world.devices.unplug(BDF)
    with pytest.raises(DmaFault):
        world.raised(2)
    world.devices.plug(BDF, Staging())
    world.devices.receive(world.now, BDF, DeviceHello(pid=2, bars=[], vectors=4))
    world.run()
    assert world.raised(2) == [{"to": owner, "bdf": BDF, "entry": 2}]
    assert world.assign(domctl.XEN_DOMCTL_deassign_device, owner) == 0
    assert world.assign(domctl.XEN_DOMCTL_assign_device, other) == 0
    with pytest.raises(DmaFault):
        world.raised(2)
    assert world.vector(other, 2) == 0
    assert world.raised(2) == [{"to": other, "bdf": BDF, "entry": 2}]


@pytest.mark.parametrize("how", ["answered", "late", "unplugged"])
def test_a_register_that_a_dead_process_asked_for_is_not_answered_to_its_successor(
    world: World, how: str
) -> None:
    """Tokens are a process's own: the next process of a driver domain waits under the same one for another register. However the dead
    one's access comes to its end."""
    domio = DomId(world.create(ssidref=1))
    world.start(domio)
    assert world.assign(domctl.XEN_DOMCTL_assign_device, domio) == 0
    asked: list[int] = []

    def effects() -> list[Any]:
        """What the core did; the device's process says nothing yet."""
        seen = Machine.run(world)
        asked.extend(
            e.message.token for e in seen if isinstance(e, ToDevice) and isinstance(e.message, Access)
        )
        return [int.from_bytes(e.data, "little") for e in seen if isinstance(e, Reply) and e.token == 7]

    def ask(offset: int) -> None:
        access = DeviceAccess(token=7, bdf=BDF, space=-1, offset=offset, size=4, write=False, value=0)
        world.devices.domain_access(world.now, domio, access)
        assert effects() == []

    ask(0)
    world.core.process_ended(world.now, domio, "signal 9")
    effects()
    assert world.domctl(domctl.XEN_DOMCTL_resumedomain, domio).rc == 0
    if how == "answered":
        ask(4)
        world.devices.receive(world.now, BDF, AccessDone(token=asked[0], value=0xDEAD))
        assert effects() == [], "the answer is a dead process's"
        world.devices.receive(world.now, BDF, AccessDone(token=asked[1], value=SECRET))
        assert effects() == [SECRET]
        return
    if how == "late":
        world.now += ACCESS_TIMEOUT_NS + 1
        ask(4)
        world.devices.tick(world.now)
        assert effects() == []
        world.devices.receive(world.now, BDF, AccessDone(token=asked[1], value=SECRET))
        assert effects() == [SECRET]
        return
    world.devices.unplug(BDF)
    assert effects() == []


def populate(world: World, domid: int, count: int) -> list[int]:
    """Machine frames that a PV domain got."""
    item = memory.xen_memory_reservation(0, count, 0, 0, domid)
    wanted = b"".join(pfn.to_bytes(8, "little") for pfn in range(count))
    answer = world.memory_op(0, memory.XENMEM_populate_physmap, item, extent_start=wanted)
    assert answer.rc == count
    raw = answer.arrays["extent_start"]
    return [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]


def test_an_ordinary_pv_guest_gets_no_device(world: World) -> None:
    assert world.assign(domctl.XEN_DOMCTL_assign_device, world.create()) == -EINVAL


def test_a_driver_domain_that_is_a_guest_reaches_what_it_owns_one_to_one(world: World) -> None:
    """Frames are in its I/O page tables at their own numbers: those it has when it gets the device, and as it gets and loses others."""
    domid = world.create(ssidref=DRIVER_GUEST)
    first = populate(world, domid, 5)
    world.start(domid)
    assert world.assign(domctl.XEN_DOMCTL_assign_device, domid) == 0
    iommu = world.devices.iommu

    def reached() -> set[int]:
        return {mfn for mfn in range(min(first) - 2, max(first) + 20) if iommu.lookup(DomId(domid), mfn)}

    assert reached() == set(first)
    assert all(iommu.lookup(DomId(domid), mfn) == (mfn, True) for mfn in first)
    more = populate(world, domid, 3)
    assert reached() == {*first, *more}
    item = memory.xen_memory_reservation(0, 2, 0, 0, DOMID_SELF)
    gone = first[1:3]
    given = b"".join(mfn.to_bytes(8, "little") for mfn in gone)
    assert world.memory_op(domid, memory.XENMEM_decrease_reservation, item, extent_start=given).rc == 2
    assert reached() == {*first, *more} - set(gone)
    assert world.destroy(domid) == 0
    world.core.process_ended(world.now, DomId(domid), "killed")
    world.run()
    assert not iommu.has_context(DomId(domid))


def test_a_driver_domain_that_is_a_guest_starts_anew_in_place(world: World) -> None:
    """Its process goes with its shutdown, and it cannot be resumed before that has ended; then its device is in a new epoch, without
    vectors, and its process is told what the domain has, as its builder numbers it."""
    domid = world.create(ssidref=DRIVER_GUEST)
    frames = populate(world, domid, 4)
    world.start(domid)
    assert world.assign(domctl.XEN_DOMCTL_assign_device, domid) == 0
    assert world.map_msi(domid) == 0
    epoch = world.devices.iommu.device(BDF).epoch
    before = len(world.effects)
    request = sched.SCHED_SHUTDOWN.pack(sched.sched_shutdown(sched.SHUTDOWN_crash))
    domain = world.core.domains.get(domid)
    assert domain is not None
    world.core.call(world.now, DomId(domid), 0, 77, HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, request)
    with pytest.raises(XenError) as refused:
        world.core.lifecycle.resume(world.now, domain)
    assert refused.value.errno == EBUSY
    world.run()  # the shell ends it
    assert any(isinstance(e, KillProcess) and e.domain == domid for e in world.effects[before:])
    assert world.domctl(domctl.XEN_DOMCTL_pausedomain, domid).rc == 0
    before = len(world.effects)
    assert world.domctl(domctl.XEN_DOMCTL_resumedomain, domid).rc == 0
    told = [e for e in world.effects[before:] if isinstance(e, Order) and e.domain == domid]
    assert told[0].body["driver"] is True
    news = [e.body for e in told if e.kind == "memory"]
    assert news == [{"added": [[frames[0], 4]]}, {"m2p": [[0, frames[0], 4]]}]
    device = world.devices.iommu.device(BDF)
    assert device.domain == domid
    assert device.epoch > epoch
    assert not device.vectors
    assert world.map_msi(domid) == 0
    assert [e.body for e in told if e.kind == "pause"] == [{"paused": True}]
    assert world.domctl(domctl.XEN_DOMCTL_unpausedomain, domid).rc == 0
