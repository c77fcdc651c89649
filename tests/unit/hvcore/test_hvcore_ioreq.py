"""Proves: ioreq servers and interrupts are a device model's for its own guest alone; a device model that goes takes no neighbour along."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOENT, ENOSPC, EPERM, ESRCH
from typing import Any

import pytest

from bus.abi.domctl import XEN_DOMCTL_CDF_hvm, XEN_DOMCTL_set_target, xen_domctl_set_target
from bus.abi.hvm import dm_op as abi
from bus.abi.hypercalls_model import dm_op_arg
from bus.abi.layout import Layout
from bus.abi.sched import SHUTDOWN_poweroff
from bus.abi.xen import HYPERVISOR_dm_op
from bus.addresses import DomId
from hypervisor.core.effects import JoinModel, KillProcess, Order
from hypervisor.core.ioreq import MAX_CREATED
from tests.unit.hvcore.hvcore_machine import Answer, Machine


class Rig:
    """A guest with its device model, and a stranger."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.guest = self.machine.create(flags=XEN_DOMCTL_CDF_hvm, vcpus=2)
        self.stranger = self.machine.create(flags=XEN_DOMCTL_CDF_hvm)
        self.pv = self.machine.create()
        self.model = self.machine.create(ssidref=2)
        target = xen_domctl_set_target(self.guest)
        assert self.machine.domctl(XEN_DOMCTL_set_target, self.model, target).rc == 0

    def op(self, caller: int, domid: int, op: int, value: Any) -> Answer:
        layouts: dict[int, Layout[Any]] = {
            abi.XEN_DMOP_create_ioreq_server: abi.XEN_DM_OP_CREATE_IOREQ_SERVER,
            abi.XEN_DMOP_get_ioreq_server_info: abi.XEN_DM_OP_GET_IOREQ_SERVER_INFO,
            abi.XEN_DMOP_map_io_range_to_ioreq_server: abi.XEN_DM_OP_IOREQ_SERVER_RANGE,
            abi.XEN_DMOP_unmap_io_range_from_ioreq_server: abi.XEN_DM_OP_IOREQ_SERVER_RANGE,
            abi.XEN_DMOP_set_ioreq_server_state: abi.XEN_DM_OP_SET_IOREQ_SERVER_STATE,
            abi.XEN_DMOP_destroy_ioreq_server: abi.XEN_DM_OP_DESTROY_IOREQ_SERVER,
            abi.XEN_DMOP_set_pci_intx_level: abi.XEN_DM_OP_SET_PCI_INTX_LEVEL,
            abi.XEN_DMOP_set_isa_irq_level: abi.XEN_DM_OP_SET_ISA_IRQ_LEVEL,
            abi.XEN_DMOP_set_pci_link_route: abi.XEN_DM_OP_SET_PCI_LINK_ROUTE,
            abi.XEN_DMOP_inject_msi: abi.XEN_DM_OP_INJECT_MSI,
            abi.XEN_DMOP_inject_event: abi.XEN_DM_OP_INJECT_EVENT,
            abi.XEN_DMOP_remote_shutdown: abi.XEN_DM_OP_REMOTE_SHUTDOWN,
            abi.XEN_DMOP_nr_vcpus: abi.XEN_DM_OP_NR_VCPUS,
        }
        member = layouts[op].pack(value).ljust(abi.XEN_DM_OP.field_size("u"), b"\0")
        return self.machine.call(caller, HYPERVISOR_dm_op, op, dm_op_arg(domid, abi.xen_dm_op(op, 0, member)))

    def create(self) -> int:
        answer = self.op(
            self.model,
            self.guest,
            abi.XEN_DMOP_create_ioreq_server,
            abi.xen_dm_op_create_ioreq_server(0, bytes(3), 0),
        )
        assert answer.rc == 0
        number: int = answer.payload.id
        return number

    def range(self, server: int, first: int, last: int, *, op: int = 0, kind: int = 0) -> int:
        value = abi.xen_dm_op_ioreq_server_range(server, 0, kind, first, last)
        return self.op(self.model, self.guest, op or abi.XEN_DMOP_map_io_range_to_ioreq_server, value).rc

    def orders(self, domid: int, kind: str) -> list[dict[str, object]]:
        return [
            e.body
            for e in self.machine.effects
            if isinstance(e, Order) and e.domain == domid and e.kind == kind
        ]


@pytest.fixture
def rig() -> Rig:
    return Rig()


OPS = (
    (abi.XEN_DMOP_create_ioreq_server, abi.xen_dm_op_create_ioreq_server(0, bytes(3), 0)),
    (abi.XEN_DMOP_set_isa_irq_level, abi.xen_dm_op_set_isa_irq_level(4, 1)),
    (abi.XEN_DMOP_set_pci_intx_level, abi.xen_dm_op_set_pci_intx_level(0, 0, 3, 0, 1)),
    (abi.XEN_DMOP_set_pci_link_route, abi.xen_dm_op_set_pci_link_route(0, 5)),
    (abi.XEN_DMOP_inject_msi, abi.xen_dm_op_inject_msi(0x30, 0, 0xFEE00000)),
    (abi.XEN_DMOP_inject_event, abi.xen_dm_op_inject_event(0, 2, abi.XEN_DMOP_EVENT_nmi, 0, 0, 0, 0, 0)),
    (abi.XEN_DMOP_remote_shutdown, abi.xen_dm_op_remote_shutdown(SHUTDOWN_poweroff)),
    (abi.XEN_DMOP_nr_vcpus, abi.xen_dm_op_nr_vcpus(0)),
)


@pytest.mark.parametrize(("op", "value"), OPS)
def test_each_operation_is_for_its_own_guest_only(rig: Rig, op: int, value: Any) -> None:
    before = len(rig.machine.effects)
    assert rig.op(rig.model, rig.stranger, op, value).rc == -EPERM
    assert rig.op(rig.stranger, rig.guest, op, value).rc == -EPERM
    assert rig.op(rig.pv, rig.guest, op, value).rc == -EPERM
    assert rig.op(rig.guest, rig.guest, op, value).rc == -EINVAL, "not even of itself"
    assert rig.op(rig.model, 0, op, value).rc == -EPERM
    assert rig.op(rig.model, 77, op, value).rc == -ESRCH
    assert rig.op(0, rig.pv, op, value).rc == -EINVAL, "a PV domain has none"
    assert len(rig.machine.effects) == before + 7, "seven replies, and nothing else"
    assert rig.op(rig.model, rig.guest, op, value).rc == 0


def test_a_server_joins_the_two_processes_and_its_ranges_are_told_to_the_guests(rig: Rig) -> None:
    server = rig.create()
    assert JoinModel(DomId(rig.guest), DomId(rig.model), server) in rig.machine.effects
    assert rig.range(server, 0x3F8, 0x3FF) == 0
    assert rig.range(server, 0x3FF, 0x400) == -EEXIST
    assert rig.range(server, 0x3F8, 0x3FF, kind=1) == 0, "memory is another space"
    assert rig.range(server, 5, 4) == -EINVAL
    assert rig.range(server, 0, 0x10000) == -EINVAL
    assert rig.range(server, 0, 0, kind=3) == -EINVAL
    assert rig.range(server + 1, 0, 0) == -ENOENT
    unmap = abi.XEN_DMOP_unmap_io_range_from_ioreq_server
    assert rig.range(server, 0x3F8, 0x3FE, op=unmap) == -ENOENT
    assert rig.range(server, 0x3F8, 0x3FF, op=unmap) == 0
    told = rig.orders(rig.guest, "ioreq_server")
    assert [list(body)[1] for body in told] == ["add", "add", "remove"]
    assert rig.orders(rig.stranger, "ioreq_server") == []


def test_servers_and_ranges_are_bounded(rig: Rig) -> None:
    servers = [rig.create() for _ in range(8)]
    value = abi.xen_dm_op_create_ioreq_server(0, bytes(3), 0)
    assert rig.op(rig.model, rig.guest, abi.XEN_DMOP_create_ioreq_server, value).rc == -ENOSPC
    results = [rig.range(servers[0], port, port) for port in range(300)]
    assert results == [0] * 256 + [-ENOSPC] * 44
    assert (
        rig.op(
            rig.model,
            rig.guest,
            abi.XEN_DMOP_destroy_ioreq_server,
            abi.xen_dm_op_destroy_ioreq_server(servers[3], 0),
        ).rc
        == 0
    )
    assert rig.create() == servers[3]


def test_servers_that_are_made_and_destroyed_are_bounded_in_a_guests_life(rig: Rig) -> None:
    """Each costs the host memory that a hostile device model can keep. Another guest's are its own."""
    for _ in range(MAX_CREATED):
        destroy = abi.xen_dm_op_destroy_ioreq_server(rig.create(), 0)
        assert rig.op(rig.model, rig.guest, abi.XEN_DMOP_destroy_ioreq_server, destroy).rc == 0
    value = abi.xen_dm_op_create_ioreq_server(0, bytes(3), 0)
    before = len(rig.machine.effects)
    assert rig.op(rig.model, rig.guest, abi.XEN_DMOP_create_ioreq_server, value).rc == -ENOSPC
    assert len(rig.machine.effects) == before + 1, "the reply, and no memory"
    assert rig.op(0, rig.stranger, abi.XEN_DMOP_create_ioreq_server, value).rc == 0


def test_another_device_model_has_no_say_over_a_server(rig: Rig) -> None:
    server = rig.create()
    state = abi.xen_dm_op_set_ioreq_server_state(server, 1, 0)
    assert rig.op(0, rig.guest, abi.XEN_DMOP_set_ioreq_server_state, state).rc == -EPERM
    assert rig.op(rig.model, rig.guest, abi.XEN_DMOP_set_ioreq_server_state, state).rc == 0


def test_a_range_is_in_effect_when_the_call_returns(rig: Rig) -> None:
    """The guest's process is silent: no reply before its answer, or its time is over."""
    server = rig.create()
    rig.machine.silent.add(rig.guest)
    value = abi.xen_dm_op_ioreq_server_range(server, 0, 0, 0x60, 0x60)
    with pytest.raises(AssertionError, match="no reply yet"):
        rig.op(rig.model, rig.guest, abi.XEN_DMOP_map_io_range_to_ioreq_server, value)
    rig.machine.advance(20)
    assert [reply.rc for reply in rig.machine.replies.values()] == [-EINVAL]


def test_a_range_that_the_guests_process_refuses_is_not_kept(rig: Rig) -> None:
    """One that its interrupt controllers have, or that was not answered in time: it can be asked for again."""
    server = rig.create()
    rig.machine.answer_rc[rig.guest] = -EINVAL
    assert rig.range(server, 0x20, 0x21) == -EINVAL
    del rig.machine.answer_rc[rig.guest]
    assert rig.range(server, 0x20, 0x21) == 0
    rig.machine.silent.add(rig.guest)
    with pytest.raises(AssertionError, match="no reply yet"):
        rig.range(server, 0x60, 0x60)
    rig.machine.advance(20)
    assert sorted(rig.machine.core.ioreq.servers(DomId(rig.guest))[0].ranges) == [(0, 0x20, 0x21)]
    assert rig.orders(rig.guest, "ioreq_server")[-1] == {"id": server, "remove": (0, 0x60, 0x60)}


def test_the_guest_of_a_device_model_that_dies_crashes_with_a_reason_and_no_other(rig: Rig) -> None:
    rig.create()
    machine = rig.machine
    for domid in (rig.guest, rig.stranger):
        machine.start(domid)
    machine.core.process_ended(machine.now, DomId(rig.model), "signal 9")
    machine.run()
    assert any(isinstance(e, KillProcess) and e.domain == rig.guest for e in machine.effects)
    guest = machine.core.domains.get(rig.guest)
    assert guest is not None
    assert "device model is gone" in guest.crash_reason
    assert "signal 9" in guest.crash_reason
    other = machine.core.domains.get(rig.stranger)
    assert other is not None
    assert other.runnable


def test_a_guest_that_ends_first_takes_its_servers_along(rig: Rig) -> None:
    rig.create()
    assert rig.machine.destroy(rig.guest) == 0
    assert rig.machine.core.ioreq.servers(DomId(rig.guest)) == []
    rig.machine.core.process_ended(rig.machine.now, DomId(rig.model), "signal 9")
    rig.machine.run()


def test_power_off_by_the_device_model(rig: Rig) -> None:
    rig.machine.start(rig.guest)
    value = abi.xen_dm_op_remote_shutdown(SHUTDOWN_poweroff)
    assert rig.op(rig.model, rig.guest, abi.XEN_DMOP_remote_shutdown, value).rc == 0
    guest = rig.machine.core.domains.get(rig.guest)
    assert guest is not None
    assert guest.shut_down
    assert guest.shutdown_code == SHUTDOWN_poweroff
