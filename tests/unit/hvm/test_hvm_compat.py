"""Hypercalls of 32-bit code whose structures differ from the 64-bit ones (domains.hvm.compat)."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import physdev, sched, vcpu, version, xen
from bus.abi.errno import XEN_E2BIG, XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS
from domains.hvm import compat
from tests.unit.abi.abi_compiler import HEADERS, compiler
from tests.unit.hvm.hvm_rig import DATA, Rig
from tests.unit.hvm.test_hvm_guest import arguments, result

pytestmark = pytest.mark.usefixtures("paging")

MEMORY, VCPU, GRANT = xen.HYPERVISOR_memory_op, xen.HYPERVISOR_vcpu_op, xen.HYPERVISOR_grant_table_op
LIST, OUT = DATA + 256, DATA + 512
STRUCTURES = {
    (MEMORY, mem.XENMEM_add_to_physmap): ("xen_add_to_physmap", "domid size space idx gpfn"),
    (MEMORY, mem.XENMEM_add_to_physmap_batch): (
        "xen_add_to_physmap_batch",
        "domid space size u.foreign_domid idxs gpfns errs",
    ),
    (MEMORY, mem.XENMEM_remove_from_physmap): ("xen_remove_from_physmap", "domid gpfn"),
    (MEMORY, mem.XENMEM_memory_map): ("xen_memory_map", "nr_entries buffer"),
    (MEMORY, mem.XENMEM_set_memory_map): ("xen_foreign_memory_map", "domid map.nr_entries map.buffer"),
    (MEMORY, mem.XENMEM_acquire_resource): (
        "xen_mem_acquire_resource",
        "domid type id nr_frames pad frame frame_list",
    ),
    (MEMORY, mem.XENMEM_populate_physmap): (
        "xen_memory_reservation",
        "extent_start nr_extents extent_order mem_flags domid",
    ),
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_poll): ("sched_poll", "ports nr_ports timeout"),
    (VCPU, vcpu.VCPUOP_set_singleshot_timer): ("vcpu_set_singleshot_timer", "timeout_abs_ns flags"),
    (VCPU, vcpu.VCPUOP_get_runstate_info): (
        "vcpu_runstate_info",
        "state state_entry_time time[0] time[1] time[2] time[3]",
    ),
    (xen.HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq): (
        "physdev_map_pirq",
        "domid type index pirq bus devfn entry_nr table_base",
    ),
    (GRANT, gt.GNTTABOP_setup_table): ("gnttab_setup_table", "dom nr_frames status frame_list"),
    (GRANT, gt.GNTTABOP_get_status_frames): ("gnttab_get_status_frames", "nr_frames dom status frame_list"),
    (GRANT, gt.GNTTABOP_copy): (
        "gnttab_copy",
        "source.u.gmfn source.domid source.offset dest.u.gmfn dest.domid dest.offset len flags status",
    ),
}


def values_at(layout: struct.Struct) -> Iterator[int]:
    """The offset of each value."""
    at = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        for _ in range(int(count or 1)):
            if code != "x":
                yield at
            at += struct.calcsize("<" + code)


@pytest.mark.parametrize("bits", [32, 64])
def test_the_layouts_are_the_headers(bits: int, tmp_path: Path) -> None:
    """Size of each structure and place of each field, by a compiler of that width."""
    lines = ["#define __XEN_TOOLS__ 1", "#include <stddef.h>", "#include <stdint.h>"]
    lines += [
        f"#include <xen/{name}.h>"
        for name in ("xen", "memory", "sched", "vcpu", "physdev", "grant_table", "hvm/dm_op")
    ]
    structures = [
        (name, fields.split(), compat._TRANSLATED[key]) for key, (name, fields) in STRUCTURES.items()
    ]
    structures.append(("xen_dm_op_buf", ["h", "size"], compat.DM_BUFFER))
    for name, fields, how in structures:
        layout = how.compat if bits == 32 else how.native
        places = list(values_at(layout))
        assert len(places) == len(fields), name
        lines.append(f'_Static_assert(sizeof(struct {name}) == {layout.size}, "size of {name}");')
        lines += [
            f'_Static_assert(offsetof(struct {name}, {field}) == {at}, "{name}.{field}");'
            for field, at in zip(fields, places, strict=True)
        ]
    lines.append(f'_Static_assert(sizeof(multicall_entry_t) == {32 if bits == 32 else 64}, "multicall");')
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "xen").symlink_to(HEADERS)
    (tmp_path / "c.c").write_text("\n".join(lines) + "\n")
    command = [
        *compiler(),
        f"-m{bits}",
        "-ffreestanding",
        "-fsyntax-only",
        "-w",
        "-I",
        str(tmp_path / "include"),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "c.c")], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr[:4000]
    missing = compat._TRANSLATED.keys() - STRUCTURES.keys()
    assert {compat._TRANSLATED[key] for key in missing} == {compat.RESERVATION, compat.AREA}


def asked(
    number: int,
    *values: int,
    data: bytes,
    answer: tuple[int, bytes] | None = None,
    more: dict[int, bytes] | None = None,
) -> tuple[int, Rig]:
    """A 32-bit hypercall with a structure at DATA, the hypervisor's answer given."""
    rig = Rig(arguments(32, number, *values) + "0f01c1ebfe", bits=32)
    rig.write(DATA, data)
    for at, content in (more or {}).items():
        rig.write(at, content)
    if answer is not None:
        rig.upstream.answers[number, values[0]] = answer
    rig.run(1)
    return (rig.regs.rax & 0xFFFFFFFF ^ 1 << 31) - (1 << 31), rig


def test_run_state_areas_have_the_32_bit_layout() -> None:
    """44 bytes, of which the upper half of the request's union says nothing."""
    rig = Rig(arguments(32, VCPU, vcpu.VCPUOP_register_runstate_memory_area, 0, DATA) + "0f01c1ebfe", bits=32)
    rig.domain.cpu.compat = True
    rig.write(DATA, struct.pack("<II", OUT, 0xDEADBEEF))
    rig.write(OUT, b"\xee" * 64)
    rig.run(1)
    assert rig.regs.rax & 0xFFFFFFFF == 0
    state, entered, *times = struct.unpack_from("<I5Q", rig.buffer, OUT)
    assert state == vcpu.RUNSTATE_running
    assert 0 < entered < 1 << 62
    assert all(one < 1 << 62 for one in times)
    assert rig.buffer[OUT + 44 : OUT + 48] == b"\xee" * 4
    rc, rig = result(32, VCPU, vcpu.VCPUOP_get_runstate_info, 0, DATA, data=b"\xee" * 64)
    assert rc == 0
    assert struct.unpack_from("<I", rig.buffer, DATA)[0] == vcpu.RUNSTATE_running
    assert rig.buffer[DATA + 44 : DATA + 48] == b"\xee" * 4


def test_lists_of_frames_are_widened_and_written_back() -> None:
    """GNTTABOP_setup_table: the frames come into 32-bit words; the structure's own handle stays the guest's."""
    request = struct.pack("<HxxIhxxI", xen.DOMID_SELF, 2, 7, LIST)
    native = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(xen.DOMID_SELF, 2, 0, 1 << 62))
    reply = native + struct.pack("<2Q", 0x1234, 0x5678)
    rc, rig = asked(GRANT, gt.GNTTABOP_setup_table, DATA, 1, data=request, answer=(0, reply))
    assert rc == 0
    assert rig.buffer[DATA : DATA + 16] == struct.pack("<HxxIhxxI", xen.DOMID_SELF, 2, 0, LIST)
    assert struct.unpack_from("<2I", rig.buffer, LIST) == (0x1234, 0x5678)


def test_a_list_of_copies_is_translated_each_way() -> None:
    """Each structure's status comes back to its own place."""
    item = struct.Struct("<IHHIHHHHhxx")
    sent = [item.pack(5, 1, 0, 0x99, xen.DOMID_SELF, 8, 100 + n, 1, 77) for n in range(3)]

    def answer(data: bytes) -> tuple[int, bytes]:
        items = [gt.GNTTAB_COPY.unpack(data, at) for at in range(0, len(data), gt.GNTTAB_COPY.size)]
        assert [(one.source.domid, one.dest.offset, one.len) for one in items] == [
            (1, 8, 100 + n) for n in range(3)
        ]
        return 0, b"".join(gt.GNTTAB_COPY.pack(one._replace(status=-n)) for n, one in enumerate(items))

    rig = Rig(arguments(32, GRANT, gt.GNTTABOP_copy, DATA, 3) + "0f01c1ebfe", bits=32)
    rig.write(DATA, b"".join(sent))
    rig.upstream.answers[GRANT, gt.GNTTABOP_copy] = answer
    rig.run(1)
    assert rig.regs.rax & 0xFFFFFFFF == 0
    assert [item.unpack_from(rig.buffer, DATA + item.size * n)[-1] for n in range(3)] == [0, -1, -2]


def test_a_batch_of_frames_for_the_physmap() -> None:
    """Indices and frame numbers are widened; errors are 32-bit for both."""
    request = struct.pack("<HHHHIII", xen.DOMID_SELF, 1, 2, 0, LIST, LIST + 8, OUT)
    lists = {LIST: struct.pack("<4I", 0, 1, 0x70, 0x71)}
    number = mem.XENMEM_add_to_physmap_batch
    rc, rig = asked(MEMORY, number, DATA, data=request, more=lists, answer=(0, b""))
    assert rc == 0
    ((_, _, data),) = [call for call in rig.upstream.calls if call[1] == number]
    assert struct.pack("<2Q", 0, 1) in data
    assert struct.pack("<2Q", 0x70, 0x71) in data


def test_a_multicall_of_32_bit_entries() -> None:
    """Results in their places; inside another it is refused, and what an entry may not do is its own failure."""
    entries = [
        (xen.HYPERVISOR_xen_version, 0, version.XENVER_version, 0, 0, 0, 0, 0),
        (xen.HYPERVISOR_multicall, 0, DATA, 1, 0, 0, 0, 0),
        (63, 0, 0, 0, 0, 0, 0, 0),
        (xen.HYPERVISOR_xen_version, 0, version.XENVER_get_features, 0x7000_0000, 0, 0, 0, 0),
    ] * 20
    data = b"".join(compat.ENTRY.pack(*entry) for entry in entries)
    rc, rig = asked(xen.HYPERVISOR_multicall, DATA, len(entries), data=data)
    assert rc == 0
    results = [compat.ENTRY.unpack_from(rig.buffer, DATA + 32 * n)[1] for n in range(len(entries))]
    wanted = [0x40011, -XEN_EINVAL, -XEN_ENOSYS, -XEN_EFAULT]
    assert results == [value & 0xFFFFFFFF for value in wanted * 20]
    assert asked(xen.HYPERVISOR_multicall, 0x7000_0000, 1, data=b"")[0] == -XEN_EFAULT
    assert asked(xen.HYPERVISOR_multicall, DATA, (1 << 20) + 1, data=b"")[0] == -XEN_EINVAL


def test_platform_parameters_have_four_bytes() -> None:
    rc, rig = result(
        32, xen.HYPERVISOR_xen_version, version.XENVER_platform_parameters, DATA, data=b"\xee" * 8
    )
    assert rc == 0
    assert rig.buffer[DATA : DATA + 8] == bytes(4) + b"\xee" * 4


@pytest.mark.parametrize("bits", [32, 64])
def test_assists_of_a_translated_guest(bits: int) -> None:
    """Only the one about run-state areas."""
    number, flag = xen.HYPERVISOR_vm_assist, xen.VMASST_TYPE_runstate_update_flag
    assert result(bits, number, xen.VMASST_CMD_enable, flag)[0] == 0
    assert result(bits, number, xen.VMASST_CMD_disable, flag)[0] == 0
    assert result(bits, number, 9, flag)[0] == -XEN_ENOSYS
    for kind in (0, xen.VMASST_TYPE_writable_pagetables, 77, 0xFFFFFFFF):
        assert result(bits, number, xen.VMASST_CMD_enable, kind)[0] == -XEN_EINVAL


def test_what_leads_nowhere_or_is_too_long_is_refused() -> None:
    """And the hypervisor does not hear of it."""
    batch = struct.pack("<HHHHIII", xen.DOMID_SELF, 1, 2, 0, 0x7000_0000, LIST, OUT)
    rc, rig = asked(MEMORY, mem.XENMEM_add_to_physmap_batch, DATA, data=batch)
    assert (rc, rig.upstream.calls) == (-XEN_EFAULT, [])
    resource = struct.pack("<HHIIIQI", xen.DOMID_SELF, 1, 0, 0xFFFFFFFF, 0, 0, LIST)
    rc, rig = asked(MEMORY, mem.XENMEM_acquire_resource, DATA, data=resource)
    assert (rc, rig.upstream.calls) == (-XEN_E2BIG, [])
    rc, rig = asked(GRANT, gt.GNTTABOP_copy, DATA, 0x7FFFFFFF, data=b"")
    assert (rc, rig.upstream.calls) == (-XEN_EINVAL, [])


def test_the_translation_area_is_nobodys_to_name() -> None:
    """A 64-bit guest that names it finds nothing there."""
    assert result(64, xen.HYPERVISOR_xen_version, version.XENVER_get_features, 0)[0] == 0
    code = "48bf" + (version.XENVER_get_features).to_bytes(8, "little").hex()
    code += "48be" + (1 << 62).to_bytes(8, "little").hex()
    code += "b8" + xen.HYPERVISOR_xen_version.to_bytes(4, "little").hex() + "0f01c1ebfe"
    rig = Rig(code, bits=64)
    rig.run(1)
    assert rig.regs.rax == -XEN_EFAULT & (1 << 64) - 1
