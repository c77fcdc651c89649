"""Proves: no bytes that a domain sends make the core raise or break an invariant, and no sequence of lives,
ports and
memory operations does."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.abi import domctl, memory, platform, sysctl
from bus.abi import event_channel as evtchn
from bus.abi.hypercalls import HYPERCALLS, Command, Direction, Where, encode
from bus.abi.hypercalls_model import Form, WireError
from bus.abi.layout import Layout, LayoutError
from bus.abi.xen import (
    DOMID_SELF,
    HYPERVISOR_domctl,
    HYPERVISOR_platform_op,
    HYPERVISOR_sched_op,
    HYPERVISOR_sysctl,
)
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.effects import Reply
from hypervisor.core.invariants import InvariantChecker
from tests.unit.hvcore.hvcore_machine import Machine

COMMANDS = [(h.number, c) for h in HYPERCALLS.values() for c in h.commands]
VERSIONS = {
    HYPERVISOR_domctl: domctl.XEN_DOMCTL_INTERFACE_VERSION,
    HYPERVISOR_sysctl: sysctl.XEN_SYSCTL_INTERFACE_VERSION,
    HYPERVISOR_platform_op: platform.XENPF_INTERFACE_VERSION,
}
FATAL = {("domctl", domctl.XEN_DOMCTL_destroydomain), ("sched_op", 2), ("vcpu_op", 2)}
"""Left out where a test wants its callers to live: destroydomain, SCHEDOP_shutdown, VCPUOP_down."""


SMALL = (0, 0, 0, 1, 1, 1, 2, 3, 4, 7, 16, 40)


def fill(layout: Layout[Any], raw: bytearray, base: int, random_: random.Random, domids: list[int]) -> None:
    """Small numbers, or now and then wild ones, in the fields of a structure at `base`."""
    for field in layout.fields:
        at, size = base + layout.offset(field), layout.field_size(field)
        if size > 16:
            continue
        value = random_.choice(SMALL)
        if field in ("domid", "dom", "domain", "remote_dom", "domain_id", "target"):
            value = random_.choice(domids)
        elif random_.random() < 0.1:
            value = random_.randrange(1 << 8 * size)
        raw[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def shape(nr: int, command: Command, random_: random.Random, domids: list[int]) -> bytes:
    """Bytes of the right form, where the form can be had."""
    if command.argument is None or command.form is Form.NONE:
        return b""
    raw = bytearray(command.argument.size)
    fill(command.argument, raw, 0, random_, domids)
    if command.payload is not None and "." not in command.payload_field:
        fill(command.payload, raw, command.argument.offset(command.payload_field), random_, domids)
    if nr in VERSIONS and random_.random() < 0.95:
        raw[0:4] = command.number.to_bytes(4, "little")
        raw[4:8] = VERSIONS[nr].to_bytes(4, "little")
    if command.form is Form.LIST:
        return bytes(raw) * random_.randrange(3)
    item = command.argument.unpack(raw)
    root = command.payload.unpack(getattr(item, "u", b"")) if command.payload and hasattr(item, "u") else item
    arrays: dict[str, bytes] = {}
    for array_ in command.arrays:
        if Direction.IN in array_.direction and not (array_.optional and not at_path(root, array_.handle)):
            count = array_.count if isinstance(array_.count, int) else at_path(root, array_.count)
            count = (count + 7) // 8 if array_.bits else count
            words = b"".join(
                random_.choice(SMALL).to_bytes(array_.size, "little") for _ in range(min(count, 64))
            )
            arrays[array_.handle] = words
    try:
        return encode(command, [item], arrays)
    except (WireError, LayoutError):
        return bytes(raw)


def at_path(value: Any, path: str) -> int:
    for name in path.split("."):
        value = getattr(value, name)
    return int(value)


@pytest.mark.parametrize("seed", range(6))
def test_every_command_answers_garbage_with_a_number(seed: int) -> None:
    random_ = random.Random(seed)
    machine = Machine()
    pv, hvm = machine.create(vcpus=2), machine.create(flags=domctl.XEN_DOMCTL_CDF_hvm)
    for domid in (pv, hvm):
        machine.start(domid)
    checker = InvariantChecker(machine.core)
    domids = [0, pv, hvm, hvm, DOMID_SELF, DOMID_SELF, 999, 0xFFFF]
    for domid in (pv, hvm):
        item = memory.xen_memory_reservation(0, 20, 0, 0, domid)
        extents = array("Q", range(20)).tobytes()
        assert machine.memory_op(0, memory.XENMEM_populate_physmap, item, extent_start=extents).rc == 20
        for vcpu in (0, 1):
            machine.event(domid, evtchn.EVTCHNOP_bind_ipi, evtchn.evtchn_bind_ipi(vcpu, 0))
    commands = COMMANDS * 4
    random_.shuffle(commands)
    for nr, command in commands:
        if (HYPERCALLS[nr].name, command.number) in FATAL:
            continue
        for caller in (0, pv, hvm):
            for data in (shape(nr, command, random_, domids), random_.randbytes(random_.randrange(200))):
                before = len(machine.effects)
                token = machine.raw(caller, nr, command.number, data, vcpu=random_.choice((0, 0, 1, 77)))
                assert len([e for e in machine.effects[before:] if isinstance(e, Reply)]) <= 1
                machine.advance(0)
                if token not in machine.replies:  # waits for a process: it gives up in time
                    machine.advance(30)
                assert machine.replies[token].rc > -4096
    checker.assert_holds()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 70), st.integers(0, 0xFFFFFFFF), st.binary(max_size=300))
def test_numbers_that_are_not_in_the_table_are_enosys_or_the_tables_word(
    nr: int, cmd: int, data: bytes
) -> None:
    machine = Machine()
    domid = machine.create()
    token = machine.raw(domid, nr, cmd, data)
    assert machine.replies[token].rc <= 0 or HYPERCALLS[nr].command(cmd) is not None


def test_nothing_that_the_table_leaves_to_domains_processes_is_served_here() -> None:
    machine = Machine()
    served = machine.core.dispatcher.registered()
    for nr, command in COMMANDS:
        if command.where is Where.LOCAL:
            assert (nr, command.number) not in served


def test_orders_that_nobody_gave_cannot_be_answered() -> None:
    machine = Machine()
    domid = machine.create()
    for order in (0, 1, 99, -1, 1 << 70):
        assert not machine.core.order_done(0, DomId(domid), order, 0, b"")
    machine.core.order_expired(0, 5)
    machine.core.process_ended(0, DomId(999), "never was")


class Lives(RuleBasedStateMachine):
    """Domains come and go; ports and frames are made and dropped between them at random."""

    @initialize()
    def begin(self) -> None:
        self.machine = Machine(MachineConfig(total_pages=1 << 10, xenheap_frames=8))
        self.checker = InvariantChecker(self.machine.core)
        self.domids: list[int] = []
        self.held: list[int] = []
        self.checker.add_references(lambda: list(self.held))

    def pick(self, index: int) -> int:
        return self.domids[index % len(self.domids)]

    def caller(self, index: int) -> int:
        """A domain that can make calls: its process lives; else Dom0."""
        domid = self.pick(index)
        domain = self.machine.core.domains.get(domid)
        return domid if domain is not None and domain.process_alive else 0

    @precondition(lambda self: len(self.domids) < 5)
    @rule(hvm=st.booleans(), vcpus=st.integers(1, 3))
    def create(self, hvm: bool, vcpus: int) -> None:
        flags = domctl.XEN_DOMCTL_CDF_hvm if hvm else 0
        self.domids.append(self.machine.create(flags=flags, vcpus=vcpus, pages=32))

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), pause=st.booleans())
    def pause_or_not(self, index: int, pause: bool) -> None:
        command = domctl.XEN_DOMCTL_pausedomain if pause else domctl.XEN_DOMCTL_unpausedomain
        data = self.machine.domctl_data(command, self.pick(index))
        token = self.machine.raw(0, HYPERVISOR_domctl, command, data)
        if token not in self.machine.replies:  # its process is silent
            self.machine.advance(2)
        assert token in self.machine.replies

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), how=st.sampled_from(["destroy", "kill", "silent", "shutdown"]))
    def end(self, index: int, how: str) -> None:
        domid = self.pick(index)
        if how == "kill":
            self.machine.core.process_ended(self.machine.now, DomId(domid), "signal 9")
            self.machine.run()
        elif how == "silent":
            self.machine.silent.add(domid)
        elif how == "shutdown":
            self.machine.raw(domid, HYPERVISOR_sched_op, 2, bytes(4))
        else:
            self.domids.remove(domid)
            assert self.machine.destroy(domid) == 0

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), other=st.integers(0, 9), port=st.integers(0, 12))
    def events(self, index: int, other: int, port: int) -> None:
        one, two = self.caller(index), self.caller(other)
        machine = self.machine
        machine.event(one, evtchn.EVTCHNOP_alloc_unbound, evtchn.evtchn_alloc_unbound(DOMID_SELF, two, 0))
        bind = evtchn.evtchn_bind_interdomain(one, port, 0)
        machine.event(two, evtchn.EVTCHNOP_bind_interdomain, bind)
        machine.event(one, evtchn.EVTCHNOP_send, evtchn.evtchn_send(port))
        machine.event(two, evtchn.EVTCHNOP_bind_virq, evtchn.evtchn_bind_virq(port, 0, 0))
        machine.event(one, evtchn.EVTCHNOP_bind_vcpu, evtchn.evtchn_bind_vcpu(port, 1))

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), port=st.integers(0, 12), reset=st.booleans())
    def close(self, index: int, port: int, reset: bool) -> None:
        domid = self.caller(index)
        if reset and port == 0:
            self.machine.event(domid, evtchn.EVTCHNOP_reset, evtchn.evtchn_reset(DOMID_SELF))
        else:
            self.machine.event(domid, evtchn.EVTCHNOP_close, evtchn.evtchn_close(port))

    @precondition(lambda self: self.domids)
    @rule(
        index=st.integers(0, 9),
        cmd=st.sampled_from((0, 1, 6)),
        extents=st.lists(st.integers(0, 40), max_size=6),
        order=st.integers(0, 2),
        base=st.booleans(),
    )
    def reservation(self, index: int, cmd: int, extents: list[int], order: int, base: bool) -> None:
        domid = self.caller(index)
        extent = self.machine.core.frames.extent_of(DomId(domid))
        if base and extent is not None:
            extents = [extent.base + e for e in extents]
        item = memory.xen_memory_reservation(0, len(extents), order, 0, DOMID_SELF)
        self.machine.memory_op(domid, cmd, item, extent_start=array("Q", extents).tobytes())

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), space=st.integers(0, 3), idx=st.integers(0, 20), gpfn=st.integers(0, 40))
    def physmap(self, index: int, space: int, idx: int, gpfn: int) -> None:
        item = memory.xen_add_to_physmap(DOMID_SELF, 2, space, idx, gpfn)
        self.machine.memory_op(self.caller(index), memory.XENMEM_add_to_physmap, item)

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), frame=st.integers(0, 40), vcpu=st.integers(0, 3))
    def fifo(self, index: int, frame: int, vcpu: int) -> None:
        domid = self.caller(index)
        extent = self.machine.core.frames.extent_of(DomId(domid))
        domain = self.machine.core.domains.get(domid)
        assert extent is not None
        assert domain is not None
        gfn = frame if domain.p2m is not None else extent.base + frame
        init = evtchn.evtchn_init_control(gfn, 0, vcpu, 0, bytes(7))
        self.machine.event(domid, evtchn.EVTCHNOP_init_control, init)
        self.machine.event(domid, evtchn.EVTCHNOP_expand_array, evtchn.evtchn_expand_array(gfn))

    @precondition(lambda self: self.domids)
    @rule(index=st.integers(0, 9), frame=st.integers(0, 31))
    def hold(self, index: int, frame: int) -> None:
        extent = self.machine.core.frames.extent_of(DomId(self.pick(index)))
        if extent is not None and self.machine.core.frames.owner(extent.base + frame) is not None:
            self.machine.core.frames.get_ref(extent.base + frame)  # type: ignore[arg-type]  # an Mfn
            self.held.append(extent.base + frame)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99))
    def let_go(self, index: int) -> None:
        self.machine.core.frames.put_ref(self.held.pop(index % len(self.held)))  # type: ignore[arg-type]

    @rule(seconds=st.sampled_from((0.1, 2, 30)))
    def time(self, seconds: float) -> None:
        self.machine.advance(seconds)

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "checker"):
            self.checker.assert_holds()

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for domid in self.domids:
            assert self.machine.destroy(domid) == 0
        for mfn in self.held:
            self.machine.core.frames.put_ref(mfn)  # type: ignore[arg-type]
        self.held.clear()
        self.checker.assert_holds()
        assert len(self.machine.core.domains) == 1, "nothing is left of them"
        assert len(self.machine.memory.extents) == 1


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
