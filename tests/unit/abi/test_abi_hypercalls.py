"""The table of hypercalls is complete, agrees with the headers, and its wire codec takes apart what it put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi import (
    domctl,
    errno,
    event_channel,
    grant_table,
    memory,
    physdev,
    platform,
    sched,
    sysctl,
    vcpu,
    xen,
)
from bus.abi import reference as reference_module
from bus.abi.domctl import XEN_DOMCTL, XEN_DOMCTL_VCPUCONTEXT
from bus.abi.grant_table import GNTTAB_COPY, GNTTAB_SETUP_TABLE
from bus.abi.hvm import dm_op, hvm_op
from bus.abi.hypercalls import (
    HYPERCALLS,
    Caller,
    Command,
    Direction,
    Form,
    Guests,
    Privilege,
    State,
    Where,
    WireError,
    decode,
    encode,
    lookup,
    verdict,
)
from bus.abi.hypercalls_model import MAX_WIRE
from bus.abi.layout import LayoutError, Union
from bus.abi.memory import XEN_MEMORY_RESERVATION
from bus.abi.sysctl import XEN_SYSCTL, XEN_SYSCTL_GETDOMAININFOLIST

COMMANDS = [(h, c) for h in HYPERCALLS.values() for c in h.commands]
REMOTE = [c for _, c in COMMANDS if c.form is not Form.NONE]
GUEST = Caller(Guests.PV, is_control=False)
DOM0 = Caller(Guests.PV, is_control=True)


def command(number: int, sub: int) -> Command:
    found = lookup(number, sub)
    assert found is not None
    return found


def test_all_64_numbers_are_there_and_every_named_one_has_its_name() -> None:
    assert list(HYPERCALLS) == list(range(64))
    by_name = {n.removeprefix("HYPERVISOR_"): v for n, v in vars(xen).items() if n.startswith("HYPERVISOR_")}
    aliases = {"arch_0": "mca", "arch_1": "paging_domctl_cont"}
    for name, number in by_name.items():
        assert HYPERCALLS[number].name == aliases.get(name, name)


@pytest.mark.parametrize(
    ("number", "module", "prefix", "leave_out"),
    [
        (xen.HYPERVISOR_event_channel_op, event_channel, "EVTCHNOP_", ()),
        (xen.HYPERVISOR_grant_table_op, grant_table, "GNTTABOP_", ()),
        (xen.HYPERVISOR_sched_op, sched, "SCHEDOP_", ()),
        (xen.HYPERVISOR_vcpu_op, vcpu, "VCPUOP_", ()),
        (xen.HYPERVISOR_mmuext_op, xen, "MMUEXT_", ()),
        (xen.HYPERVISOR_physdev_op, physdev, "PHYSDEVOP_", ("DBGP_", "pirq_eoi_gmfn")),
        (xen.HYPERVISOR_platform_op, platform, "XENPF_", ("INTERFACE", "ACPI_SLEEP")),
        (xen.HYPERVISOR_dm_op, dm_op, "XEN_DMOP_", ("no_gfns", "IO", "EVENT_", "MEM_", "DELETE")),
        (xen.HYPERVISOR_hvm_op, hvm_op, "HVMOP_", ("altp2m_", "ALTP2M")),
    ],
)
def test_every_command_of_the_header_is_in_the_table(
    number: int, module: Any, prefix: str, leave_out: tuple[str, ...]
) -> None:
    have = {c.number for c in HYPERCALLS[number].commands}
    for name, value in vars(module).items():
        rest = name.removeprefix(prefix)
        if isinstance(value, int) and rest != name and not rest.startswith(leave_out or "\0"):
            assert value in have, f"{name} is missing"


@pytest.mark.parametrize(("number", "module", "prefix"), [
    (xen.HYPERVISOR_domctl, domctl, "XEN_DOMCTL_"),
    (xen.HYPERVISOR_sysctl, sysctl, "XEN_SYSCTL_"),
    (xen.HYPERVISOR_memory_op, memory, "XENMEM_"),
])  # fmt: skip
def test_commands_carry_the_number_of_their_name(number: int, module: Any, prefix: str) -> None:
    for entry in HYPERCALLS[number].commands:
        assert getattr(module, entry.name) == entry.number
        assert entry.name.startswith(prefix)


def test_every_domctl_and_sysctl_of_the_header_is_in_the_table() -> None:
    """Their commands are the lower-case names that are not options of another."""
    have = {c.name for _, c in COMMANDS}
    options = ("CDF_", "cpu_featureset_", "cpu_policy_", "shadow_op_", "pm_op_")
    for module, prefix in ((domctl, "XEN_DOMCTL_"), (sysctl, "XEN_SYSCTL_")):
        for name in vars(module):
            rest = name.removeprefix(prefix)
            if rest != name and rest[0].islower() and not rest.startswith(options):
                assert name in have


def test_numbers_of_commands_are_unique_in_a_hypercall() -> None:
    for hypercall in HYPERCALLS.values():
        numbers = [c.number for c in hypercall.commands]
        assert len(numbers) == len(set(numbers)), hypercall.name


@pytest.mark.parametrize("entry", [c for _, c in COMMANDS], ids=lambda c: c.name)
def test_entries_are_consistent(entry: Command) -> None:
    assert (entry.state is State.REFUSED) == bool(entry.refusal)
    if entry.state is State.PARTLY:
        assert entry.note, "partly: say what is missing"
    assert all(e.errno in errno.NAMES and e.cause for e in entry.errors)
    if entry.where is Where.LOCAL:
        assert entry.form is Form.NONE
        assert not entry.arrays
    if entry.form is not Form.NONE:
        assert entry.argument is not None
    if entry.payload is not None and entry.argument is not None:
        name = entry.payload_field.rpartition(".")[2]
        envelope = dm_op.XEN_DM_OP if name != entry.payload_field else entry.argument
        assert isinstance(envelope.union(name), dict)
        assert entry.payload.record in [m for m in envelope.union(name).values() if isinstance(m, type)]


@pytest.mark.parametrize("entry", REMOTE, ids=lambda c: c.name)
def test_zeroes_go_through_the_codec(entry: Command) -> None:
    """The paths of handles and counts exist; a structure of zero bytes crosses in both directions unchanged."""
    assert entry.argument is not None
    item = entry.argument.zero()
    for reply in (False, True):
        fixed = {
            a.handle: bytes(a.size * a.count)
            for a in entry.arrays
            if isinstance(a.count, int) and (Direction.OUT if reply else Direction.IN) in a.direction
        }
        data = encode(entry, [item], fixed, reply=reply)
        assert decode(entry, data, reply=reply).items == (item,)


@pytest.mark.parametrize("entry", REMOTE, ids=lambda c: c.name)
def test_the_longest_message_that_the_table_allows_fits_the_bus(entry: Command) -> None:
    assert entry.argument is not None
    for reply in (Direction.IN, Direction.OUT):
        longest = sum(
            (a.limit + 7) // 8 if a.bits else a.limit * a.size for a in entry.arrays if reply in a.direction
        )
        assert entry.argument.size + longest <= MAX_WIRE


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.binary(max_size=20))
def test_a_reservation_is_its_structure_and_then_its_frames(mfns: list[int], junk: bytes) -> None:
    entry = command(xen.HYPERVISOR_memory_op, memory.XENMEM_populate_physmap)
    item = XEN_MEMORY_RESERVATION.zero()._replace(nr_extents=len(mfns), extent_start=0xFFFF8000_00001000)
    frames = b"".join(m.to_bytes(8, "little") for m in mfns)
    data = encode(entry, [item], {"extent_start": frames})
    assert data == XEN_MEMORY_RESERVATION.pack(item) + frames
    assert decode(entry, data).arrays["extent_start"] == frames
    if junk:
        with pytest.raises(WireError):
            decode(entry, data + junk)


@given(st.binary(max_size=400), st.integers(0, len(REMOTE) - 1), st.booleans())
def test_no_data_raises_anything_but_a_wire_error(data: bytes, which: int, reply: bool) -> None:
    try:
        message = decode(REMOTE[which], data, reply=reply)
    except WireError:
        return
    again = encode(REMOTE[which], message.items, message.arrays, reply=reply)
    assert decode(REMOTE[which], again, reply=reply) == message


def test_grants_travel_as_a_list() -> None:
    entry = command(xen.HYPERVISOR_grant_table_op, grant_table.GNTTABOP_copy)
    items = [GNTTAB_COPY.zero()._replace(len=n) for n in range(5)]
    data = encode(entry, items)
    assert len(data) == 5 * GNTTAB_COPY.size
    assert decode(entry, data).items == tuple(items)
    with pytest.raises(WireError):
        decode(entry, data[:-1])


def test_setup_table_has_its_frames_in_the_reply_only() -> None:
    entry = command(xen.HYPERVISOR_grant_table_op, grant_table.GNTTABOP_setup_table)
    item = GNTTAB_SETUP_TABLE.zero()._replace(nr_frames=2, frame_list=0x1000)
    assert len(encode(entry, [item])) == GNTTAB_SETUP_TABLE.size
    with pytest.raises(WireError):
        encode(entry, [item], reply=True)
    assert len(encode(entry, [item], {"frame_list": bytes(16)}, reply=True)) == GNTTAB_SETUP_TABLE.size + 16


def test_counts_over_the_limit_are_refused_before_anything_is_sized_by_them() -> None:
    entry = command(xen.HYPERVISOR_memory_op, memory.XENMEM_populate_physmap)
    item = XEN_MEMORY_RESERVATION.zero()._replace(nr_extents=2**63)
    with pytest.raises(WireError, match="at most 4096"):
        decode(entry, XEN_MEMORY_RESERVATION.pack(item))


def test_a_domctl_carries_the_member_of_its_command_and_its_array() -> None:
    entry = command(xen.HYPERVISOR_domctl, domctl.XEN_DOMCTL_setvcpucontext)
    payload = XEN_DOMCTL_VCPUCONTEXT.pack(XEN_DOMCTL_VCPUCONTEXT.zero()._replace(vcpu=1, ctxt=0x4000))
    item = XEN_DOMCTL.zero()._replace(cmd=entry.number, domain=3, u=payload)
    message = decode(entry, encode(entry, [item], {"ctxt": bytes(entry.arrays[0].size)}))
    assert message.payload.vcpu == 1
    assert message.items[0].domain == 3
    assert len(message.arrays["ctxt"]) == entry.arrays[0].size


def test_getdomaininfolist_returns_as_many_as_the_reply_says() -> None:
    entry = command(xen.HYPERVISOR_sysctl, sysctl.XEN_SYSCTL_getdomaininfolist)
    payload = XEN_SYSCTL_GETDOMAININFOLIST.zero()._replace(max_domains=100, num_domains=2)
    item = XEN_SYSCTL.zero()._replace(u=XEN_SYSCTL_GETDOMAININFOLIST.pack(payload))
    assert len(encode(entry, [item])) == XEN_SYSCTL.size
    size = entry.arrays[0].size
    assert len(encode(entry, [item], {"buffer": bytes(2 * size)}, reply=True)) == XEN_SYSCTL.size + 2 * size


def test_the_control_domain_may_and_others_may_not() -> None:
    create = (xen.HYPERVISOR_domctl, domctl.XEN_DOMCTL_createdomain)
    assert verdict(GUEST, *create) == -errno.XEN_EPERM
    assert verdict(DOM0, *create) == 0
    for entry in (c for _, c in COMMANDS if c.privilege is Privilege.CONTROL):
        hypercall = next(h for h in HYPERCALLS.values() if entry in h.commands)
        assert verdict(GUEST, hypercall.number, entry.number) == -errno.XEN_EPERM
        assert verdict(DOM0, hypercall.number, entry.number) == -entry.refusal


def test_what_a_kind_of_guest_does_not_have_is_enosys() -> None:
    hvm = Caller(Guests.HVM, is_control=False)
    assert verdict(hvm, xen.HYPERVISOR_set_trap_table, 0) == -errno.XEN_ENOSYS
    assert verdict(hvm, xen.HYPERVISOR_event_channel_op, event_channel.EVTCHNOP_send) == 0
    assert verdict(GUEST, 62, 0) == -errno.XEN_ENOSYS
    assert verdict(GUEST, 9999, 0) == -errno.XEN_ENOSYS
    assert verdict(GUEST, xen.HYPERVISOR_sched_op, 77) == -errno.XEN_ENOSYS


def test_memory_op_ignores_the_continuation_in_its_command() -> None:
    assert lookup(xen.HYPERVISOR_memory_op, 5 << 6 | memory.XENMEM_populate_physmap) is lookup(
        xen.HYPERVISOR_memory_op, memory.XENMEM_populate_physmap
    )


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "abi.md"
    assert page.read_text() == reference_module.render(), "run: python -m bus.abi.reference > docs/abi.md"


def test_unions_are_known_by_their_members() -> None:
    assert "vcpucontext" in XEN_DOMCTL.union("u")
    with pytest.raises(TypeError):
        XEN_DOMCTL.union("cmd")
    assert Union(a=int).members == {"a": int}
    with pytest.raises(LayoutError):
        XEN_DOMCTL.pack(XEN_DOMCTL.zero()._replace(u=bytes(129)))
