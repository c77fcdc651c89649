"""Proves: memory is populated, given back, exchanged and mapped within a domain's limits and the machine's,
frames are
zero when they are got, and no domain gets at another's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from errno import EACCES, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSYS, EPERM
from typing import Any

import pytest

from bus.abi import memory as abi
from bus.abi.domctl import (
    XEN_DOMCTL_CDF_hvm,
    XEN_DOMCTL_max_mem,
    XEN_DOMCTL_set_target,
    xen_domctl_max_mem,
    xen_domctl_set_target,
)
from bus.abi.hypercalls_model import DOMID_ARG
from bus.abi.xen import DOMID_SELF
from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.effects import Order
from hypervisor.core.errors import XenError
from hypervisor.core.frames import FrameTable
from hypervisor.core.invariants import InvariantChecker
from hypervisor.core.p2m import P2m, P2mType
from tests.unit.hvcore.hvcore_machine import Answer, FakeMemory, Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


def reserve(
    machine: Machine, caller: int, cmd: int, extents: Sequence[int], *, domid: int = DOMID_SELF, order: int =
    0,
    flags: int = 0,
) -> Answer:  # fmt: skip
    item = abi.xen_memory_reservation(0x1000, len(extents), order, flags, domid)
    return machine.memory_op(caller, cmd, item, extent_start=array("Q", extents).tobytes())


def populate(machine: Machine, domid: int, extents: Sequence[int], **more: Any) -> list[int]:
    answer = reserve(machine, 0, abi.XENMEM_populate_physmap, extents, domid=domid, **more)
    assert answer.rc == len(extents)
    return list(array("Q", answer.arrays["extent_start"]))


def news(machine: Machine, domid: int) -> list[dict[str, object]]:
    return [
        e.body for e in machine.effects if isinstance(e, Order) and e.domain == domid and e.kind == "memory"
    ]


def test_populate_gives_contiguous_frames_and_tells_the_process_in_runs(machine: Machine) -> None:
    domid = machine.create(pages=64)
    mfns = populate(machine, domid, range(40))
    assert mfns == list(range(mfns[0], mfns[0] + 40))
    assert news(machine, domid) == [{"added": [[mfns[0], 40]]}, {"m2p": [[0, mfns[0], 40]]}]
    assert machine.info(domid).tot_pages == 40
    big = populate(machine, domid, [512], order=4)
    assert big[0] % 16 == 0


def test_a_domain_cannot_have_more_than_its_maximum(machine: Machine) -> None:
    domid = machine.create(pages=10)
    answer = reserve(machine, 0, abi.XENMEM_populate_physmap, range(12), domid=domid)
    assert answer.rc == 10
    limit = xen_domctl_max_mem(4 * 4)
    assert machine.domctl(XEN_DOMCTL_max_mem, domid, limit).rc == 0
    mfn = array("Q", answer.arrays["extent_start"])[0]
    assert reserve(machine, domid, abi.XENMEM_decrease_reservation, [mfn]).rc == 1
    assert reserve(machine, domid, abi.XENMEM_increase_reservation, [0]).rc == 0, (
        "still above the new maximum"
    )
    for cmd, want in ((abi.XENMEM_current_reservation, 9), (abi.XENMEM_maximum_reservation, 4)):
        assert machine.memory_op(domid, cmd, DOMID_ARG.record(DOMID_SELF)).rc == want


def test_the_machine_cannot_give_more_than_it_has() -> None:
    machine = Machine(MachineConfig(total_pages=64))
    domid = machine.create(pages=200)
    answer = reserve(machine, 0, abi.XENMEM_populate_physmap, range(100), domid=domid)
    assert 0 < answer.rc < 64
    assert machine.core.frames.free_pages == 0
    assert machine.destroy(domid) == 0
    InvariantChecker(machine.core).assert_holds()


def test_frames_that_were_given_back_come_zeroed(machine: Machine) -> None:
    domid = machine.create()
    (mfn,) = populate(machine, domid, [0])
    machine.memory.write(Mfn(mfn), 0, b"secret")
    assert reserve(machine, domid, abi.XENMEM_decrease_reservation, [mfn]).rc == 1
    assert populate(machine, domid, [0]) == [mfn]
    assert machine.memory.read(Mfn(mfn), 0, 6) == bytes(6)


def test_one_cannot_give_back_what_one_does_not_own(machine: Machine) -> None:
    one, other = machine.create(), machine.create()
    (mine,) = populate(machine, one, [0])
    (theirs,) = populate(machine, other, [0])
    shared_info = machine.core.domains.get(one).shared_info  # type: ignore[union-attr]  # it is there
    for frame in (theirs, int(shared_info or 0), 0, 1 << 63, mine + 1):
        assert reserve(machine, one, abi.XENMEM_decrease_reservation, [frame, mine]).rc == 0
    assert reserve(machine, one, abi.XENMEM_decrease_reservation, [mine, mine]).rc == 1, "not twice"
    assert reserve(machine, one, abi.XENMEM_decrease_reservation, [theirs], domid=other).rc == -EPERM


def test_large_orders_are_for_the_privileged(machine: Machine) -> None:
    domid = machine.create(pages=2048)
    assert reserve(machine, domid, abi.XENMEM_increase_reservation, [0], order=10).rc == 0
    assert reserve(machine, 0, abi.XENMEM_increase_reservation, [0], order=10, domid=domid).rc == 1
    assert reserve(machine, domid, abi.XENMEM_increase_reservation, [0], order=9).rc == 1
    assert reserve(machine, domid, abi.XENMEM_increase_reservation, [0], order=1 << 31).rc == 0


def test_exchange_gives_new_frames_for_old_ones_or_changes_nothing(machine: Machine) -> None:
    domid = machine.create(pages=32)
    old = populate(machine, domid, range(4))

    def exchange(given: Sequence[int], wanted: Sequence[int], order: int) -> Answer:
        item = abi.xen_memory_exchange(
            abi.xen_memory_reservation(1, len(given), 0, 0, DOMID_SELF),
            abi.xen_memory_reservation(1, len(wanted), order, 0, DOMID_SELF),
            0,
        )
        arrays = {
            "in_.extent_start": array("Q", given).tobytes(),
            "out.extent_start": array("Q", wanted).tobytes(),
        }
        return machine.memory_op(domid, abi.XENMEM_exchange, item, **arrays)

    assert exchange(old, [0], 1).rc == -EINVAL, "sizes differ"
    assert exchange([*old[:3], 1], [0], 2).rc == -EINVAL
    assert exchange([old[0]] * 4, [0], 2).rc == -EINVAL
    answer = exchange(old, [0], 2)
    assert (answer.rc, answer.item.nr_exchanged) == (0, 4)
    (new,) = array("Q", answer.arrays["out.extent_start"])
    assert new % 4 == 0
    assert new not in old
    assert machine.info(domid).tot_pages == 4
    InvariantChecker(machine.core).assert_holds()


def test_claims_hold_memory_back_from_others() -> None:
    machine = Machine(MachineConfig(total_pages=100))
    one, other = machine.create(pages=60), machine.create(pages=100)

    def claim(domid: int, pages: int, caller: int = 0) -> int:
        item = abi.xen_memory_reservation(0, pages, 0, 0, domid)
        return machine.memory_op(caller, abi.XENMEM_claim_pages, item).rc

    assert claim(one, 50, caller=one) == -EPERM
    assert claim(one, 61) == -EINVAL
    assert claim(other, 100) == -ENOMEM
    assert claim(one, 50) == 0
    assert claim(one, 55) == -EINVAL, "one claim at a time"
    got = reserve(machine, 0, abi.XENMEM_populate_physmap, range(100), domid=other).rc
    assert got < 50
    assert machine.info(one).outstanding_pages == 50
    populate(machine, one, range(50))
    assert machine.info(one).outstanding_pages == 0


# -- auto-translated
# ---------------------------------------------------------------------------------------------------


def physmap(machine: Machine, caller: int, space: int, idx: int, gpfn: int, size: int = 0) -> int:
    item = abi.xen_add_to_physmap(DOMID_SELF, size, space, idx, gpfn)
    return machine.memory_op(caller, abi.XENMEM_add_to_physmap, item).rc


def test_an_auto_translated_domain_sees_its_own_frame_numbers(machine: Machine) -> None:
    domid = machine.create(flags=XEN_DOMCTL_CDF_hvm)
    domain = machine.core.domains.get(domid)
    assert domain is not None
    assert domain.p2m is not None
    assert populate(machine, domid, [5, 6, 7]) == [5, 6, 7], "gfns, never machine frames"
    entry = domain.p2m.get(6)
    assert entry is not None
    assert {"p2m": [[5, entry.mfn - 1, 3, 1]]} in news(machine, domid)
    assert machine.memory_op(domid, abi.XENMEM_maximum_gpfn, DOMID_ARG.record(DOMID_SELF)).rc == 7
    assert reserve(machine, domid, abi.XENMEM_decrease_reservation, [6]).rc == 1
    assert domain.p2m.get(6) is None
    assert {"p2m": [[6, 0, 1, 0]]} in news(machine, domid)
    assert reserve(machine, domid, abi.XENMEM_decrease_reservation, [entry.mfn]).rc == 0
    assert reserve(machine, domid, abi.XENMEM_populate_physmap, [1 << 36]).rc == 0
    InvariantChecker(machine.core).assert_holds()


def test_add_to_physmap_moves_frames_and_frees_what_it_replaces(machine: Machine) -> None:
    domid, pv = machine.create(flags=XEN_DOMCTL_CDF_hvm), machine.create()
    domain = machine.core.domains.get(domid)
    assert domain is not None
    assert domain.p2m is not None
    populate(machine, domid, range(4))
    assert physmap(machine, pv, abi.XENMAPSPACE_shared_info, 0, 1) == -EACCES
    assert physmap(machine, domid, abi.XENMAPSPACE_shared_info, 1, 1) == -EINVAL
    assert physmap(machine, domid, abi.XENMAPSPACE_shared_info, 0, 1) == 0
    assert domain.p2m.get(1) == (domain.shared_info, P2mType.RAM)
    assert machine.info(domid).shared_info_frame == 1
    assert machine.info(domid).tot_pages == 3, "the page that was there is freed"
    assert physmap(machine, domid, abi.XENMAPSPACE_shared_info, 0, 9) == 0
    assert domain.p2m.get(1) is None, "it is in one place"
    assert physmap(machine, domid, abi.XENMAPSPACE_gmfn, 2, 20) == 0
    assert domain.p2m.get(2) is None
    assert physmap(machine, domid, abi.XENMAPSPACE_gmfn, 2, 21) == -EINVAL
    assert physmap(machine, domid, abi.XENMAPSPACE_gmfn_range, 20, 40, size=1) == 0
    assert physmap(machine, domid, abi.XENMAPSPACE_dev_mmio, 0, 1) == -ENOSYS
    assert physmap(machine, domid, abi.XENMAPSPACE_grant_table, 0, 1) == -EINVAL, "no grant tables here"
    assert physmap(machine, domid, abi.XENMAPSPACE_shared_info, 0, 1 << 40) == -EINVAL
    domain.p2m.set(Gfn(50), Mfn(0x1000), P2mType.GRANT_RW)
    assert physmap(machine, domid, abi.XENMAPSPACE_gmfn, 40, 50) == -EBUSY
    domain.p2m.clear(Gfn(50))
    InvariantChecker(machine.core).assert_holds()


def test_remove_from_physmap_unmaps_and_keeps_the_frame(machine: Machine) -> None:
    domid, pv = machine.create(flags=XEN_DOMCTL_CDF_hvm), machine.create()
    populate(machine, domid, [3])

    def remove(caller: int, gpfn: int) -> int:
        item = abi.xen_remove_from_physmap(DOMID_SELF, gpfn)
        return machine.memory_op(caller, abi.XENMEM_remove_from_physmap, item).rc

    assert remove(pv, 3) == -EACCES
    assert remove(domid, 3) == 0
    assert remove(domid, 3) == -ENOENT
    assert machine.info(domid).tot_pages == 1


def test_a_device_model_maps_its_guest_and_nobody_else(machine: Machine) -> None:
    guest, stranger = machine.create(flags=XEN_DOMCTL_CDF_hvm), machine.create()
    model = machine.create(ssidref=2)
    populate(machine, guest, range(3))
    mine = populate(machine, stranger, [0])[0]

    def map_foreign(foreign: int, frames: Sequence[int]) -> tuple[int, list[int]]:
        item = abi.xen_add_to_physmap_batch(
            DOMID_SELF, abi.XENMAPSPACE_gmfn_foreign, len(frames), foreign, 1, 1, 1
        )
        arrays = {
            "idxs": array("Q", frames).tobytes(),
            "gpfns": array("Q", range(100, 100 + len(frames))).tobytes(),
        }
        answer = machine.memory_op(model, abi.XENMEM_add_to_physmap_batch, item, **arrays)
        return answer.rc, list(array("i", answer.arrays.get("errs", b"")))

    assert map_foreign(guest, [0])[0] == -EPERM
    assert machine.domctl(XEN_DOMCTL_set_target, model, xen_domctl_set_target(guest)).rc == 0
    assert not any(
        isinstance(e, Order) and e.domain == model and e.kind == "build_extent" for e in machine.effects
    ), "a device model gets no descriptor of its guest's memory"
    assert machine.domctl(XEN_DOMCTL_set_target, model, xen_domctl_set_target(stranger)).rc == -EINVAL
    assert map_foreign(stranger, [mine])[0] == -EPERM
    assert map_foreign(guest, [1, 77]) == (0, [0, -EINVAL])
    InvariantChecker(machine.core).assert_holds()
    assert machine.destroy(guest) == 0
    assert machine.info(guest).tot_pages == 1, "the frame that is mapped stays"
    item = abi.xen_remove_from_physmap(DOMID_SELF, 100)
    assert machine.memory_op(model, abi.XENMEM_remove_from_physmap, item).rc == 0
    assert machine.info(guest) is None
    InvariantChecker(machine.core).assert_holds()


def test_the_death_of_the_mapper_lets_go_as_well(machine: Machine) -> None:
    guest, model = machine.create(flags=XEN_DOMCTL_CDF_hvm), machine.create(ssidref=2)
    populate(machine, guest, [0])
    core = machine.core
    a, b = core.domains.get(model), core.domains.get(guest)
    assert a is not None
    assert b is not None
    assert machine.domctl(XEN_DOMCTL_set_target, model, xen_domctl_set_target(guest)).rc == 0
    core.physmap.add_foreign(a, b, 0, 100)
    assert machine.destroy(guest) == 0
    assert machine.destroy(model) == 0
    assert machine.info(guest) is None
    InvariantChecker(core).assert_holds()


def test_the_memory_map_is_the_builders_and_can_be_read_back(machine: Machine) -> None:
    domid = machine.create()
    entry = bytes(range(20))

    def read(room: int) -> Answer:
        return machine.memory_op(domid, abi.XENMEM_memory_map, abi.xen_memory_map(room, 0x1000))

    assert read(4).rc == -ENOSYS
    item = abi.xen_foreign_memory_map(domid, abi.xen_memory_map(2, 0x1000))
    arrays = {"map.buffer": entry * 2}
    assert machine.memory_op(domid, abi.XENMEM_set_memory_map, item, **arrays).rc == -EPERM
    assert machine.memory_op(0, abi.XENMEM_set_memory_map, item, **arrays).rc == 0
    answer = read(4)
    assert (answer.item.nr_entries, answer.arrays["buffer"]) == (2, entry * 2)
    assert read(1).arrays["buffer"] == entry
    nothing = machine.memory_op(domid, abi.XENMEM_memory_map, abi.xen_memory_map(0, 0))
    assert (nothing.rc, nothing.item.nr_entries) == (0, 0)
    assert machine.memory_op(domid, abi.XENMEM_memory_map, abi.xen_memory_map(4, 0)).rc == -EFAULT


# -- the tables themselves
# ---------------------------------------------------------------------------------------------


def test_ranges_avoid_holes_and_each_other_and_are_reused_when_empty() -> None:
    memory = FakeMemory()
    config = MachineConfig(
        total_pages=1 << 20,
        first_mfn=0x10,
        mfn_limit=0x4000,
        mfn_holes=((0x1000, 0x2000),),
        xenheap_frames=16,
    )
    frames = FrameTable(memory, config)
    bases = [frames.create_extent(DomId(domid), 0x600).base for domid in range(1, 6)]
    with pytest.raises(XenError) as caught:
        frames.create_extent(DomId(6), 0x1000)
    assert caught.value.errno == ENOMEM
    assert all(base % 512 == 0 for base in bases)
    assert all(base + 0x610 <= 0x1000 or base >= 0x2000 for base in bases)
    assert len(set(bases)) == len(bases)
    assert frames.release_domain(DomId(2))
    assert frames.create_extent(DomId(99), 0x600).base == bases[1]


def test_a_frame_given_back_under_a_reference_is_freed_with_the_last_one() -> None:
    frames = FrameTable(FakeMemory(), MachineConfig())
    frames.create_extent(DomId(1), 8)
    mfn = frames.allocate_ram(DomId(1), 0)
    frames.get_ref(mfn)
    frames.get_ref(mfn)
    assert not frames.release(mfn)
    assert frames.owner(mfn) is None
    assert frames.ram_pages(DomId(1)) == 1
    assert frames.allocate_ram(DomId(1), 0) != mfn, "not given out while it is held"
    frames.put_ref(mfn)
    frames.put_ref(mfn)
    assert frames.ram_pages(DomId(1)) == 1
    with pytest.raises(AssertionError):
        frames.put_ref(mfn)
    with pytest.raises(AssertionError):
        frames.get_ref(mfn)


def test_p2m_listeners_see_each_change_and_runs_are_whole() -> None:
    p2m, changes = P2m(DomId(1)), list[Any]()
    p2m.subscribe(changes.append)
    for step in range(600):
        p2m.set(Gfn(400 + step), Mfn(9000 + step), P2mType.RAM)
    assert p2m.runs() == [[400, 9000, 600, 1]]
    p2m.set(Gfn(500), Mfn(7), P2mType.FOREIGN)
    assert p2m.runs() == [[400, 9000, 100, 1], [500, 7, 1, 4], [501, 9101, 499, 1]]
    assert p2m.gfn_of(9100) is None
    assert (p2m.max_gfn(), p2m.count) == (999, 600)
    assert len(changes) == 601
    assert changes[-1].old == (9100, P2mType.RAM)
    assert p2m.clear(Gfn(3)) is None
    with pytest.raises(XenError) as caught:
        p2m.set(Gfn(1 << 36), Mfn(1), P2mType.RAM)
    assert caught.value.errno == EINVAL


def test_a_guest_that_scatters_its_pages_costs_bounded_memory(machine: Machine) -> None:
    domid = machine.create(flags=XEN_DOMCTL_CDF_hvm, pages=500)
    domain = machine.core.domains.get(domid)
    assert domain is not None
    assert domain.p2m is not None
    far_apart = [512 * step for step in range(200)]
    done = reserve(machine, domid, abi.XENMEM_populate_physmap, far_apart).rc
    assert done == domain.p2m.max_chunks < 100
    assert physmap(machine, domid, abi.XENMAPSPACE_shared_info, 0, 512 * 199) == -ENOMEM
    assert reserve(machine, domid, abi.XENMEM_decrease_reservation, far_apart[:done]).rc == done
    assert reserve(machine, domid, abi.XENMEM_populate_physmap, [512 * 150]).rc == 1, "empty chunks are freed"
    InvariantChecker(machine.core).assert_holds()


def test_owners_of_a_run_of_frames() -> None:
    """In as few runs as there can be, over free and leaving frames, Xen's own, and two domains' ranges; frame by frame it is `owner`."""
    frames = FrameTable(FakeMemory(), MachineConfig())
    frames.create_extent(DomId(1), 16)
    frames.create_extent(DomId(2), 16)
    first = frames.allocate_ram(DomId(1), 3)
    frames.allocate_xenheap(DomId(1), 2)
    second = frames.allocate_ram(DomId(2), 2)
    frames.get_ref(Mfn(first + 2))
    assert not frames.release(Mfn(first + 2)), "a reference holds it: it is leaving"
    frames.release(Mfn(first + 5))
    assert list(frames.owners(first, 2)) == [(1, first, 2)]
    assert list(frames.owners(first, 8)) == [(1, first, 2), (1, first + 3, 2), (1, first + 6, 2)]
    begin, end = int(first) - 3, int(second) + 8
    runs = list(frames.owners(begin, end - begin))
    told = {mfn: domid for domid, start, count in runs for mfn in range(start, start + count)}
    assert told == {mfn: owner for mfn in range(begin, end) if (owner := frames.owner(mfn)) is not None}
    assert set(told.values()) == {1, 2}
