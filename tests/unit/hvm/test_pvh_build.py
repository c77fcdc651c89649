"""What the toolstack makes of a PVH domain besides the kernel: ACPI tables, the first CPU state, placement by guest frame."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from domains.dom0.toolstack import acpi
from domains.dom0.toolstack.pvh import GuestFrames, first_context
from domains.hvm.context import first_cpu


def table(data: bytes, address: int) -> bytes:
    at = address - acpi.ADDRESS
    (length,) = struct.unpack_from("<I", data, at + 4)
    return data[at : at + length]


@pytest.mark.parametrize(("vcpus", "online"), [(1, 1), (2, 1), (128, 128)])
def test_acpi_tables_are_found_from_the_rsdp_and_sum_to_zero(vcpus: int, online: int) -> None:
    data = acpi.build_acpi(vcpus, online)
    assert data[:8] == b"RSD PTR "
    assert sum(data[:20]) & 0xFF == 0
    assert sum(data[:36]) & 0xFF == 0
    xsdt = table(data, struct.unpack_from("<Q", data, 24)[0])
    assert xsdt[:4] == b"XSDT"
    found = {}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[table(data, address)[:4]] = table(data, address)
    assert set(found) == {b"FACP", b"APIC"}
    dsdt = table(data, struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    assert dsdt[:4] == b"DSDT"
    assert struct.unpack_from("<I", found[b"FACP"], 112)[0] >> 20 & 1  # hardware-reduced
    for each in (xsdt, dsdt, *found.values()):
        assert sum(each) & 0xFF == 0
    entries, position, madt = [], 44, found[b"APIC"]
    while position < len(madt):
        entries.append(madt[position : position + madt[position + 1]])
        position += madt[position + 1]
    assert len(entries) == vcpus
    enabled = [entry[4] if entry[0] == 0 else entry[8] for entry in entries]
    assert enabled == [1] * online + [0] * (vcpus - online)


def test_a_guest_with_devices_has_a_pci_root() -> None:
    """The compiled DSDT is its source's, where the compiler is there; all checksums hold."""
    data = acpi.build_acpi(1, 1, pci=True)
    at = data.index(b"DSDT")
    dsdt = data[at : at + struct.unpack_from("<I", data, at + 4)[0]]
    assert sum(dsdt) & 0xFF == 0
    assert b"PCI0" in dsdt
    compiler = shutil.which("iasl")
    if compiler is None:
        pytest.skip("iasl (Debian's acpica-tools) compiles the source")
    source = Path(acpi.__file__).parent / "asl" / "pvh_pci.asl"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [compiler, "-p", f"{directory}/out", str(source)], check=True, capture_output=True, timeout=60
        )
        assert Path(directory, "out.aml").read_bytes()[36:] == dsdt[36:]


def test_the_first_state_is_the_pvh_entry() -> None:
    cpu = first_cpu(first_context(0x1000850, 0x4B00000))
    assert (cpu.rip, cpu.rbx, cpu.cr0, cpu.rflags) == (0x1000850, 0x4B00000, 0x11, 2)
    assert (cpu.cs_base, cpu.cs_limit, cpu.cs_arbytes) == (0, 0xFFFFFFFF, 0xC9B)
    assert cpu.tr_arbytes == 0x8B


class Memory:
    def __init__(self) -> None:
        self.view = memoryview(bytearray(8 << 12))


def test_bytes_go_to_the_frame_in_order_of_population() -> None:
    memory = Memory()
    frames = GuestFrames(memory, [(0, 4), (0x100000, 2), (0xFC000, 1)])  # type: ignore[arg-type]  # only its view is used
    frames.write(0x100001, 5, b"abc")
    frames.write(0xFC000, 0, b"xyz")
    frames.write(2, 4090, b"0123456789")
    assert bytes(memory.view[5 << 12 | 5 : (5 << 12) + 8]) == b"abc"
    assert bytes(memory.view[6 << 12 : (6 << 12) + 3]) == b"xyz"
    assert bytes(memory.view[(2 << 12) + 4090 : (2 << 12) + 4100]) == b"0123456789"
    for gfn, size in ((4, 1), (3, 4097), (0x100002, 1)):
        with pytest.raises(ValueError, match="guest frame"):
            frames.write(gfn, 0, bytes(size))
