"""How much work one call of a domain makes for the hypervisor: bounded, however much memory it is about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from bus.abi import memory as mem
from bus.abi.hypercalls_model import MAX_FRAMES
from bus.abi.xen import DOMID_SELF, HYPERVISOR_memory_op
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.domains import Domain, DomainSpec, Kind
from hypervisor.core.effects import Order, Reply
from hypervisor.shell.memory import MemfdMemory

PAGES = 1 << 14
ORDER = 9


@dataclass
class Machine:
    """A core on real memfds, and a domain of 64 MiB."""

    core: HypervisorCore
    memory: MemfdMemory
    domain: Domain

    @property
    def base(self) -> int:
        extent = self.core.frames.extent_of(self.domain.domid)
        assert extent is not None
        return extent.base

    def reservation(self, cmd: int, starts: list[int], order: int = ORDER) -> tuple[int, list[Order]]:
        """One call: how many extents were done, and the orders that came with it."""
        item = mem.xen_memory_reservation(0, len(starts), order, 0, DOMID_SELF)
        request = mem.XEN_MEMORY_RESERVATION.pack(item) + b"".join(s.to_bytes(8, "little") for s in starts)
        self.core.call(0, self.domain.domid, 0, 1, HYPERVISOR_memory_op, cmd, request)
        effects = self.core.take_effects()
        (reply,) = [effect for effect in effects if isinstance(effect, Reply)]
        return reply.rc, [effect for effect in effects if isinstance(effect, Order)]

    def populate(self) -> None:
        done = 0
        while done < PAGES >> ORDER:
            starts = list(range(done << ORDER, PAGES, 1 << ORDER))
            rc, _ = self.reservation(mem.XENMEM_populate_physmap, starts)
            assert rc > 0
            done += rc

    def used(self) -> int:
        """Bytes of host memory behind the extent."""
        return os.fstat(self.memory.extent_descriptor(self.base)).st_blocks * 512


@pytest.fixture(params=[Kind.PV, Kind.HVM])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    memory = MemfdMemory()
    core = HypervisorCore(memory, MachineConfig(total_pages=1 << 16))
    dom0 = core.create_dom0(0, max_pages=256)
    domain = core.lifecycle.create(0, dom0, DomainSpec(request.param))
    core.lifecycle.set_max_mem(0, domain, PAGES)
    core.lifecycle.set_max_vcpus(0, domain, 1)
    core.take_effects()
    it = Machine(core, memory, domain)
    it.populate()
    yield it
    memory.close()


def test_a_call_works_on_so_many_frames_and_no_more(machine: Machine) -> None:
    """Like a continuation of Xen's: the reply says how far it came, and the caller goes on from there."""
    first = 0 if machine.domain.p2m is not None else machine.base
    starts = [first + offset for offset in range(0, PAGES, 1 << ORDER)]
    done = 0
    while starts:
        rc, _ = machine.reservation(mem.XENMEM_decrease_reservation, starts)
        assert 0 < rc << ORDER <= MAX_FRAMES
        starts, done = starts[rc:], done + rc
    assert done == PAGES >> ORDER
    assert machine.core.frames.ram_pages(machine.domain.domid) == 0


def test_giving_back_scattered_frames_takes_few_orders(machine: Machine) -> None:
    """Every second frame: no two belong together. A process that is told of each by two orders would fall behind and be lost."""
    first = 0 if machine.domain.p2m is not None else machine.base
    rc, orders = machine.reservation(
        mem.XENMEM_decrease_reservation, [first + 2 * i for i in range(MAX_FRAMES)], 0
    )
    assert rc == MAX_FRAMES
    assert len(orders) <= 8, len(orders)
    told = [run for order in orders for run in order.body.get("removed", ())]  # type: ignore[attr-defined]  # a list
    assert len(told) == MAX_FRAMES


def test_destroying_a_domain_touches_no_memory_that_it_never_used(machine: Machine) -> None:
    """Also while one of its frames is held, and others' frames are in windows: nothing is written only to be given back."""
    core, memory, domain = machine.core, machine.memory, machine.domain
    memory.create_window(1, 1)
    extent = core.frames.extent_of(domain.domid)
    assert extent is not None
    held = extent.base + 100
    memory.place(held, 1, 0)  # type: ignore[arg-type]  # an Mfn
    memory.write(extent.base + 7, 0, b"x" * 4096)  # type: ignore[arg-type]  # an Mfn
    core.frames.get_ref(held)  # type: ignore[arg-type]  # an Mfn
    calls: list[int] = []
    clear = memory.clear
    memory.clear = lambda mfn, count=1: (calls.append(count), clear(mfn, count))[1]  # counted
    fd = os.dup(memory.extent_descriptor(extent.base))
    core.frames.release_domain(domain.domid)
    assert len(calls) <= 3
    assert os.fstat(fd).st_blocks == 0
    assert core.frames.ram_pages(domain.domid) == 1
    core.frames.put_ref(held)  # type: ignore[arg-type]  # an Mfn
    assert core.frames.extent_of(domain.domid) is None
    os.close(fd)
