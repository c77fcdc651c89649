"""Proves: console, sysctl, platform, HVM parameters, interrupts, I/O permissions, and CPU policy do
what the table
says, each for those who may."""

from __future__ import annotations

from collections.abc import Mapping
from errno import E2BIG, EACCES, EAGAIN, EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, ENOSYS, EPERM
from typing import Any

import pytest

from bus.abi import domctl, physdev, platform, sched, sysctl
from bus.abi import event_channel as ec
from bus.abi.hvm import hvm_op, params
from bus.abi.hypercalls import HYPERCALLS, encode
from bus.abi.hypercalls_model import CONSOLE_IO_ARG, VCPU_ARG
from bus.abi.vcpu import VCPUOP_down, VCPUOP_up
from bus.abi.xen import (
    DOMID_SELF,
    VIRQ_CON_RING,
    HYPERVISOR_console_io,
    HYPERVISOR_hvm_op,
    HYPERVISOR_physdev_op,
    HYPERVISOR_platform_op,
    HYPERVISOR_sched_op,
    HYPERVISOR_sysctl,
    HYPERVISOR_vcpu_op,
)
from bus.addresses import Bdf, DomId
from hypervisor.core.console import ConsoleRing
from hypervisor.core.effects import Order, Raise
from hypervisor.core.hypercalls import MAX_WAITING, Call, Result
from tests.unit.hvcore.hvcore_machine import Answer, Machine


@pytest.fixture
def machine() -> Machine:
    return Machine()


def write(machine: Machine, domid: int, text: bytes) -> None:
    item = CONSOLE_IO_ARG.record(len(text))
    assert machine.call(domid, HYPERVISOR_console_io, 0, item, {"buffer": text}).rc == 0


def do_sysctl(
    machine: Machine, cmd: int, payload: Any, arrays: Mapping[str, bytes] | None = None, *, caller: int = 0,
    version: int = sysctl.XEN_SYSCTL_INTERFACE_VERSION,
) -> Answer:  # fmt: skip
    command = HYPERCALLS[HYPERVISOR_sysctl].command(cmd)
    assert command is not None
    assert command.payload is not None
    item = sysctl.xen_sysctl(cmd, version, command.payload.pack(payload).ljust(128, b"\0"))
    token = machine.raw(caller, HYPERVISOR_sysctl, cmd, encode(command, [item], arrays))
    return Answer(command, machine.replies.pop(token))


def dmesg(machine: Machine, index: int | None = None, room: int = 16000) -> tuple[bytes, int]:
    op = sysctl.xen_sysctl_readconsole(0, int(index is not None), 0, 0, index or 0, 1, room)
    answer = do_sysctl(machine, sysctl.XEN_SYSCTL_readconsole, op)
    return answer.arrays["buffer"], answer.payload.index_


# -- console


def test_guests_lines_are_whole_and_say_whose_they_are(machine: Machine) -> None:
    one, two = machine.create(), machine.create()
    _, mark = dmesg(machine)
    write(machine, one, b"hal")
    write(machine, two, b"other\n")
    write(machine, one, b"f\x1b\x07\rline\n")
    data, mark = dmesg(machine, mark)
    assert data == b"(d%d) other\n(d%d) halfline\n" % (two, one)
    write(machine, one, b"x" * 2000)
    assert len(dmesg(machine, mark)[0].split(b"\n")[0]) < 1100, "a line without end is cut"


def test_a_guest_that_writes_empty_lines_is_cut_by_their_number(machine: Machine) -> None:
    """Each line gets a prefix, an entry in the log and an event for Dom0: it costs more of the guest's rate than its bytes."""
    port = machine.event(0, ec.EVTCHNOP_bind_virq, ec.evtchn_bind_virq(VIRQ_CON_RING, 0, 0)).item.port
    one = machine.create()
    machine.effects.clear()
    write(machine, one, b"\n" * 16_000)
    events = [effect for effect in machine.effects if isinstance(effect, Raise)]
    assert {effect.port for effect in events} == {port}
    assert 0 < len(events) < 4096
    machine.advance(2)
    write(machine, one, b"two\nlines\n")
    assert machine.core.console.ring.read(None, 1 << 20)[0].endswith(b"two\n(d%d) lines\n" % one)


def test_calls_that_wait_are_counted_and_have_a_limit(machine: Machine) -> None:
    """A process that makes calls and never waits for their answers does not make the hypervisor keep them all."""
    one, other = machine.create(), machine.create()
    dispatcher, key = machine.core.dispatcher, (HYPERVISOR_sched_op, sched.SCHEDOP_shutdown_code)
    waiting: list[Call] = []
    dispatcher._handlers[key] = waiting.append
    reason = sched.SCHED_SHUTDOWN.pack(sched.sched_shutdown(0))
    for _ in range(2 * MAX_WAITING):
        machine.raw(one, *key, reason)
    assert len(waiting) == MAX_WAITING
    assert {reply.rc for reply in machine.replies.values()} == {-EAGAIN}
    machine.raw(other, *key, reason)
    assert len(waiting) == MAX_WAITING + 1, "another domain's are not refused"
    for call in waiting:
        call.answer(Result(0))
    machine.run()
    waiting.clear()
    machine.raw(one, *key, reason)
    assert len(waiting) == 1


def test_a_guest_that_floods_the_console_is_cut_and_others_are_not(machine: Machine) -> None:
    one, two = machine.create(), machine.create()
    _, mark = dmesg(machine)
    for _ in range(20):
        write(machine, one, b"y" * 15999 + b"\n")
    write(machine, two, b"still here\n")
    assert machine.core.console.ring.end - mark < 90_000
    assert b"still here" in machine.core.console.ring.read(None, 1 << 20)[0]
    machine.advance(2)
    write(machine, one, b"again\n")
    assert b"dropped" in machine.core.console.ring.read(None, 1 << 20)[0]
    assert machine.core.console.ring.read(None, 1 << 20)[0].endswith(b"again\n")


def test_the_ring_keeps_the_newest_and_reads_on_where_one_stopped() -> None:
    ring = ConsoleRing(10)
    ring.append(b"abcdefgh")
    data, end = ring.read(None, 3)
    assert (data, end) == (b"abc", 3)
    ring.append(b"ijklm")
    assert ring.read(end, 100) == (b"defghijklm", 13)
    assert ring.read(1, 2) == (b"de", 5), "what is too old starts at the oldest"
    assert ring.read(13, 5) == (b"", 13)
    ring.clear()
    assert ring.read(None, 5) == (b"", 13)


# -- sysctl and platform


def test_interface_versions_are_checked_before_privilege(machine: Machine) -> None:
    domid = machine.create()
    op = sysctl.xen_sysctl_sched_id(0)
    assert do_sysctl(machine, sysctl.XEN_SYSCTL_sched_id, op, caller=domid).rc == -EPERM
    assert do_sysctl(machine, sysctl.XEN_SYSCTL_sched_id, op, caller=domid, version=1).rc == -EACCES
    assert do_sysctl(machine, sysctl.XEN_SYSCTL_sched_id, op).payload.sched_id == 6


def test_the_machine_describes_itself(machine: Machine) -> None:
    info = do_sysctl(machine, sysctl.XEN_SYSCTL_physinfo, sysctl.XEN_SYSCTL_PHYSINFO.zero()).payload
    assert (info.nr_cpus, info.total_pages) == (2, 1 << 14)
    domid = machine.create(pages=10)
    after = do_sysctl(machine, sysctl.XEN_SYSCTL_physinfo, sysctl.XEN_SYSCTL_PHYSINFO.zero()).payload
    assert after.free_pages == info.free_pages - 1, "the shared info page"
    op = sysctl.xen_sysctl_getdomaininfolist(0, 10, 1, 0)
    answer = do_sysctl(machine, sysctl.XEN_SYSCTL_getdomaininfolist, op)
    assert answer.payload.num_domains == 2
    entries = domctl.XEN_DOMCTL_GETDOMAININFO.unpack_array(answer.arrays["buffer"], 2)
    assert [e.domain for e in entries] == [0, domid]
    assert entries[1].max_pages == 10
    assert entries[1].flags & domctl.XEN_DOMINF_paused
    one = do_sysctl(machine, sysctl.XEN_SYSCTL_getdomaininfolist, op._replace(first_domain=1, max_domains=1))
    assert one.payload.num_domains == 1


def do_platform(machine: Machine, cmd: int, payload: Any, caller: int = 0) -> Answer:
    command = HYPERCALLS[HYPERVISOR_platform_op].command(cmd)
    assert command is not None
    assert command.payload is not None
    raw = command.payload.pack(payload).ljust(128, b"\0")
    item = platform.xen_platform_op(cmd, platform.XENPF_INTERFACE_VERSION, raw)
    return machine.call(caller, HYPERVISOR_platform_op, cmd, item)


def test_the_wall_clock_that_dom0_sets_reaches_old_and_new_domains(machine: Machine) -> None:
    old = machine.create()
    op = platform.xenpf_settime64(1000, 5, 0, 105)
    assert do_platform(machine, platform.XENPF_settime64, op, caller=old).rc == -EPERM
    assert do_platform(machine, platform.XENPF_settime64, op._replace(mbz=1)).rc == -EINVAL
    assert do_platform(machine, platform.XENPF_settime64, op).rc == 0
    new = machine.create()
    told = {e.domain: e.body for e in machine.effects if isinstance(e, Order) and e.kind == "wallclock"}
    assert told[DomId(old)] == told[DomId(new)] == {"ns_at_system_time_0": 1000 * 10**9 - 100}
    cpu = platform.xenpf_pcpuinfo(1, 0, 0, 0, 0)
    assert do_platform(machine, platform.XENPF_get_cpuinfo, cpu).payload.max_present == 1
    assert do_platform(machine, platform.XENPF_get_cpuinfo, cpu._replace(xen_cpuid=2)).rc == -EINVAL


# -- HVM parameters


def test_hvm_parameters_are_the_toolstacks_or_the_guests(machine: Machine) -> None:
    hvm, pv = machine.create(flags=domctl.XEN_DOMCTL_CDF_hvm), machine.create()

    def param(caller: int, domid: int, index: int, value: int | None = None) -> Answer:
        item = hvm_op.xen_hvm_param(domid, 0, index, value or 0)
        command = hvm_op.HVMOP_get_param if value is None else hvm_op.HVMOP_set_param
        return machine.call(caller, HYPERVISOR_hvm_op, command, item)

    assert param(0, hvm, params.HVM_PARAM_STORE_PFN, 77).rc == 0
    assert {"index": params.HVM_PARAM_STORE_PFN, "value": 77} in [
        e.body for e in machine.effects if isinstance(e, Order) and e.domain == hvm
    ]
    assert param(hvm, DOMID_SELF, params.HVM_PARAM_STORE_PFN).item.value == 77
    assert param(hvm, DOMID_SELF, params.HVM_PARAM_STORE_PFN, 1).rc == -EPERM
    assert param(hvm, DOMID_SELF, params.HVM_PARAM_IOREQ_SERVER_PFN).rc == -EPERM
    assert param(hvm, DOMID_SELF, params.HVM_PARAM_CALLBACK_IRQ, 2 << 56 | 0xF3).rc == 0
    assert param(pv, hvm, params.HVM_PARAM_STORE_PFN).rc == -EPERM
    assert param(0, pv, params.HVM_PARAM_STORE_PFN).rc == -EINVAL
    assert param(0, hvm, params.HVM_NR_PARAMS).rc == -EINVAL
    assert param(0, hvm, params.HVM_PARAM_NESTEDHVM, 1).rc == -EINVAL
    assert param(0, hvm, params.HVM_PARAM_TIMER_MODE, 4).rc == -EINVAL
    assert param(0, hvm, params.HVM_PARAM_IOREQ_SERVER_PFN, 5).rc == 0
    assert param(0, hvm, params.HVM_PARAM_IOREQ_SERVER_PFN, 5).rc == 0
    assert param(0, hvm, params.HVM_PARAM_IOREQ_SERVER_PFN, 6).rc == -EEXIST


# -- vCPUs


def test_the_last_vcpu_that_goes_down_powers_the_domain_off(machine: Machine) -> None:
    domid = machine.create(vcpus=2)
    machine.start(domid)

    def vcpu(cmd: int, number: int) -> int:
        return machine.call(domid, HYPERVISOR_vcpu_op, cmd, VCPU_ARG.record(number)).rc

    assert vcpu(VCPUOP_up, 2) == -ENOENT
    assert [vcpu(VCPUOP_up, n) for n in (0, 1)] == [0, 0]
    assert machine.info(domid).nr_online_vcpus == 2
    assert vcpu(VCPUOP_down, 0) == 0
    assert not machine.info(domid).flags & domctl.XEN_DOMINF_shutdown
    assert vcpu(VCPUOP_down, 1) == 0
    assert machine.info(domid).flags & domctl.XEN_DOMINF_shutdown
    assert machine.info(domid).flags >> 16 & 255 == 0


# -- interrupts of devices


class Remapping:
    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], tuple[int, int]] = {}

    def msi_mapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        self.entries[bdf, entry] = (domain, pirq)

    def msi_unmapped(self, bdf: Bdf, entry: int, domain: DomId, pirq: int) -> None:
        assert self.entries.pop((bdf, entry)) == (domain, pirq)


def test_interrupts_are_mapped_for_the_owner_of_the_device_only(machine: Machine) -> None:
    owner, other = machine.create(), machine.create()
    core, remapping = machine.core, Remapping()
    core.physdev.msi_listener = remapping
    core.physdev.device_exists = lambda bdf: bdf == 0x0108
    core.physdev.device_owner = lambda bdf: DomId(owner) if bdf == 0x0108 else None

    def map_pirq(caller: int, bus: int, devfn: int, entry: int, pirq: int = -1) -> Answer:
        kind = physdev.MAP_PIRQ_TYPE_MSI_SEG
        item = physdev.physdev_map_pirq(DOMID_SELF, kind, -1, pirq, bus, devfn, entry, 0)
        return machine.call(caller, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq, item)

    assert map_pirq(owner, 1, 8, 0).rc == -EPERM, "the dispatcher does not know of its device"
    core.dispatcher.has_device = lambda domain: True
    assert map_pirq(other, 1, 8, 0).rc == -EPERM
    assert map_pirq(owner, 1, 16, 0).rc == -ENODEV
    assert map_pirq(owner, 1, 8, 5000).rc == -EINVAL
    answer = map_pirq(owner, 1, 8, 3)
    pirq = answer.item.pirq
    assert remapping.entries == {(0x0108, 3): (owner, pirq)}
    assert map_pirq(owner, 1, 8, 3).rc == -EBUSY
    assert map_pirq(owner, 1, 8, 4, pirq).rc == -EBUSY
    domain = core.domains.get(owner)
    assert domain is not None
    port = core.events.bind_pirq(domain, pirq)
    assert core.events.raise_pirq(DomId(owner), pirq)
    machine.run()
    assert any(isinstance(e, Raise) and e.port == port for e in machine.effects)
    query = physdev.physdev_irq_status_query(pirq, 9)
    call = (HYPERVISOR_physdev_op, physdev.PHYSDEVOP_irq_status_query, query)
    assert machine.call(owner, *call).item.flags == 0
    assert machine.call(other, *call).item.flags == physdev.XENIRQSTAT_needs_eoi
    beyond = physdev.physdev_irq_status_query(core.config.max_pirqs, 0)
    assert (
        machine.call(other, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_irq_status_query, beyond).rc == -EINVAL
    )
    machine.destroy(owner)
    assert remapping.entries == {}


def test_unmapping_and_taking_the_device_away(machine: Machine) -> None:
    owner = machine.create()
    core, remapping = machine.core, Remapping()
    core.physdev.msi_listener = remapping
    core.dispatcher.has_device = lambda domain: True
    core.physdev.device_exists = lambda bdf: True
    core.physdev.device_owner = lambda bdf: DomId(owner)
    item = physdev.physdev_map_pirq(DOMID_SELF, physdev.MAP_PIRQ_TYPE_MSI_SEG, -1, -1, 0, 8, 0, 0)
    pirq = machine.call(owner, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq, item).item.pirq
    gone = physdev.physdev_unmap_pirq(DOMID_SELF, pirq)
    assert machine.call(owner, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_unmap_pirq, gone).rc == 0
    assert machine.call(owner, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_unmap_pirq, gone).rc == -EINVAL
    machine.call(owner, HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq, item)
    assert len(core.physdev.mapped(DomId(owner))) == 1
    core.physdev.release_device(Bdf(8))
    assert core.physdev.mapped(DomId(owner)) == {}
    assert remapping.entries == {}


def test_physdev_op_of_a_domain_without_a_device(machine: Machine) -> None:
    """A PV domain may ask for numbers and their state; another has no such hypercall."""
    pv, hvm = machine.create(), machine.create(flags=domctl.XEN_DOMCTL_CDF_hvm)
    for cmd, item, rc in (
        (physdev.PHYSDEVOP_eoi, physdev.physdev_eoi(1), -EINVAL),
        (physdev.PHYSDEVOP_irq_status_query, physdev.physdev_irq_status_query(1, 0), 0),
        (physdev.PHYSDEVOP_get_free_pirq, physdev.physdev_get_free_pirq(physdev.MAP_PIRQ_TYPE_GSI, 0), 0),
        (physdev.PHYSDEVOP_setup_gsi, physdev.physdev_setup_gsi(1, 0, 0), -EPERM),
    ):
        assert machine.call(pv, HYPERVISOR_physdev_op, cmd, item).rc == rc
        assert machine.call(hvm, HYPERVISOR_physdev_op, cmd, item).rc == -ENOSYS


# -- I/O memory and ports


def test_device_registers_are_mapped_with_permission_and_vanish_with_it(machine: Machine) -> None:
    hvm = machine.create(flags=domctl.XEN_DOMCTL_CDF_hvm)
    domain = machine.core.domains.get(hvm)
    assert domain is not None
    assert domain.p2m is not None

    def permit(first: int, count: int, allow: int) -> int:
        op = domctl.xen_domctl_iomem_permission(first, count, allow)
        return machine.domctl(domctl.XEN_DOMCTL_iomem_permission, hvm, op).rc

    def mapping(gfn: int, mfn: int, count: int, add: int) -> int:
        op = domctl.xen_domctl_memory_mapping(gfn, mfn, count, add, 0)
        return machine.domctl(domctl.XEN_DOMCTL_memory_mapping, hvm, op).rc

    ram = machine.core.frames.extent_of(DomId(0)).base  # type: ignore[union-attr]  # Dom0 has one
    assert permit(ram, 1, 1) == -EINVAL, "RAM is not I/O memory"
    assert mapping(0xF0000, 0xF0000, 4, 1) == -EPERM
    assert permit(0xF0000, 4, 1) == 0
    assert mapping(0xF0000, 0xF0000, 4, 1) == 0
    assert mapping(0xF0000, 0xF0000, 5, 1) == -EPERM
    assert mapping(0xF0000, 0xF0000, 65, 1) == -E2BIG
    assert domain.p2m.get(0xF0003) is not None
    assert permit(0xF0002, 1, 0) == 0
    assert domain.p2m.get(0xF0002) is None
    assert machine.core.io_permissions.may_reach(DomId(hvm), 0xF0003)
    assert not machine.core.io_permissions.may_reach(DomId(hvm), 0xF0001, 2)
    assert mapping(0xF0000, 0xF0000, 1, 0) == 0
    assert domain.p2m.get(0xF0000) is None


def test_io_ports_are_kept(machine: Machine) -> None:
    domid = machine.create()
    for first, count, allow in ((0x3F8, 8, 1), (0x2F8, 8, 1), (0x3FA, 2, 0)):
        op = domctl.xen_domctl_ioport_permission(first, count, allow)
        assert machine.domctl(domctl.XEN_DOMCTL_ioport_permission, domid, op).rc == 0
    ports = machine.core.io_permissions.ports(DomId(domid))
    assert [list(one) for one in ports] == [[0x2F8, 0x300], [0x3F8, 0x3FA], [0x3FC, 0x400]]
    bad = domctl.xen_domctl_ioport_permission(0xFFFF, 2, 1)
    assert machine.domctl(domctl.XEN_DOMCTL_ioport_permission, domid, bad).rc == -EINVAL


# -- CPU policy, counters


def test_calls_are_counted_by_domain_and_forgotten_with_it(machine: Machine) -> None:
    domid = machine.create()
    write(machine, domid, b"x\n")
    assert machine.core.dispatcher.counts[DomId(domid)] == {HYPERVISOR_console_io: 1}
    machine.destroy(domid)
    assert DomId(domid) not in machine.core.dispatcher.counts
