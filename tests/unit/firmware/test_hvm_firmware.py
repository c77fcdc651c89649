"""domains/dom0/builder/firmware: layout and sums of what SeaBIOS and guests read; ACPI's own tools read it where they are installed."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from bus.abi.hvm.hvm_info_table import HVM_INFO_PADDR, HVM_INFO_TABLE
from domains.dom0.builder.firmware.acpi import INFO, AcpiConfig, build_acpi
from domains.dom0.builder.firmware.compile_dsdt import compile_dsdt
from domains.dom0.builder.firmware.dsdt_aml import DSDT
from domains.dom0.builder.firmware.layout import FirmwareConfig, FirmwareImage, build_firmware
from drivers.pc.fabric import gsi_of, link_of

UUID_ = UUID("01234567-89ab-cdef-0123-456789abcdef")
CONFIG = FirmwareConfig(256 << 20, 0, 2, UUID_)


class Guest:
    """Memory as the pieces leave it."""

    def __init__(self, image: FirmwareImage) -> None:
        self.pieces = image.pieces

    def read(self, address: int, length: int) -> bytes:
        for start, data in self.pieces:
            if start <= address and address + length <= start + len(data):
                return data[address - start : address - start + length]
        raise AssertionError(f"nothing at {address:#x}")

    def table(self, address: int) -> bytes:
        """An ACPI table, its sum checked."""
        size = struct.unpack("<I", self.read(address + 4, 4))[0]
        data = self.read(address, size)
        assert sum(data) & 0xFF == 0, data[:4]
        return data


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest(build_firmware(CONFIG, bytes(256 << 10)))


def pointers(guest: Guest) -> tuple[int, ...]:
    return struct.unpack("<4I", guest.read(0x1020, 16))


def tables(guest: Guest) -> dict[bytes, bytes]:
    """All ACPI tables by signature, found as an operating system finds them."""
    rsdp = guest.read(pointers(guest)[0], 36)
    rsdt, xsdt = struct.unpack_from("<I", rsdp, 16)[0], struct.unpack_from("<Q", rsdp, 24)[0]
    wide = guest.table(xsdt)
    addresses = struct.unpack(f"<{(len(wide) - 36) // 8}Q", wide[36:])
    narrow = guest.table(rsdt)
    assert struct.unpack(f"<{(len(narrow) - 36) // 4}I", narrow[36:]) == addresses
    found = {guest.read(at, 4): guest.table(at) for at in addresses}
    fadt = found[b"FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (facs, dsdt)
    found[b"DSDT"] = guest.table(dsdt)
    assert facs % 64 == 0
    found[b"FACS"] = guest.read(facs, 64)
    return found


def test_seabios_info(guest: Guest) -> None:
    raw = guest.read(0x1000, 32)
    assert raw[:14] == b"XenHVMSeaBIOS\0"
    assert raw[14] == 32
    assert sum(raw) & 0xFF == 0
    assert struct.unpack("<4I", raw[16:]) == (0x1020, 4, 0x1040, 4)


def test_e820() -> None:
    config = FirmwareConfig(0xF000_0000, (1 << 32) + (512 << 20), 1, UUID_)
    guest = Guest(build_firmware(config, bytes(128 << 10)))
    count = struct.unpack("<I", guest.read(0x101C, 4))[0]
    entries = list(struct.iter_unpack("<QQI", guest.read(0x1040, 20 * count)))
    assert entries == [
        (0, 0xA0000, 1),
        (0xE0000, 0x20000, 2),
        (0x10_0000, 0xEFF0_0000, 1),
        (0xFC00_0000, 0x400_0000, 2),
        (1 << 32, 512 << 20, 1),
    ]


def test_pieces_do_not_overlap_and_special_pages_hold_them() -> None:
    image = build_firmware(FirmwareConfig(256 << 20, 0, 127, UUID_), bytes(256 << 10))
    ends = sorted((address, address + len(data)) for address, data in image.pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert ends[0][0] >= 0x1000
    assert [a for a, _ in ends if 0x2000 <= a < 0x9F000] == []
    pages = image.special_pages()
    assert pages.start == 0xFC000
    assert ends[-1][1] <= pages.stop << 12
    assert len(pages) < 16


def test_hvm_info_table(guest: Guest) -> None:
    raw = guest.read(HVM_INFO_PADDR, HVM_INFO_TABLE.size)
    assert sum(raw) & 0xFF == 0
    info = HVM_INFO_TABLE.unpack(raw)
    assert (info.signature, info.nr_vcpus, info.low_mem_pgend, info.vcpu_online[0]) == (
        b"HVM INFO",
        2,
        0x10000,
        3,
    )


def test_rsdp(guest: Guest) -> None:
    rsdp = guest.read(pointers(guest)[0], 36)
    assert rsdp[:8] == b"RSD PTR "
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF, rsdp[15]) == (0, 0, 2)


def test_fadt(guest: Guest) -> None:
    fadt = tables(guest)[b"FACP"]
    assert struct.unpack_from("<HI", fadt, 46) == (9, 0)
    assert [struct.unpack_from("<I", fadt, at)[0] for at in (56, 64, 76, 80)] == [
        0xB000,
        0xB004,
        0xB008,
        0xAFE0,
    ]
    assert tuple(fadt[88:93]) == (4, 2, 0, 4, 4)
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert not flags & 1 << 4, "the power button is a fixed one"
    assert flags & 1 << 8
    assert (fadt[116], struct.unpack_from("<Q", fadt, 120)[0], fadt[128]) == (1, 0xCF9, 6)


def test_madt(guest: Guest) -> None:
    madt = tables(guest)[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    at, found = 44, []
    while at < len(madt):
        found.append(bytes(madt[at : at + madt[at + 1]]))
        at += madt[at + 1]
    assert [e[3:4] + e[4:8] for e in found if e[0] == 2] == [
        bytes((line,)) + struct.pack("<I", gsi) for line, gsi in ((0, 2), (5, 5), (10, 10), (11, 11))
    ]
    assert [struct.unpack("<II", e[4:]) for e in found if e[0] == 1] == [(0xFEC0_0000, 0)]
    assert [(e[2], e[3], e[4]) for e in found if e[0] == 0] == [(0, 0, 1), (1, 2, 1)]


def test_what_is_configured() -> None:
    small = Guest(
        build_firmware(FirmwareConfig(64 << 20, 0, 4, UUID_, online=1, hpet=False, com1=False), bytes(4096))
    )
    found = tables(small)
    assert b"HPET" not in found
    assert [found[b"APIC"][-8 * n + 4] for n in (4, 3, 2, 1)] == [1, 0, 0, 0]
    assert small.read(INFO, 12) == struct.pack("<III", 0, 0xF000_0000, 0xFBFF_FFFF)


def test_mp_table(guest: Guest) -> None:
    at = pointers(guest)[2]
    pointer = guest.read(at, 16)
    assert pointer[:4] == b"_MP_"
    assert sum(pointer) & 0xFF == 0
    table = struct.unpack_from("<I", pointer, 4)[0]
    size = struct.unpack("<H", guest.read(table + 4, 2))[0]
    data = guest.read(table, size)
    assert data[:4] == b"PCMP"
    assert sum(data) & 0xFF == 0
    sizes = {0: 20, 1: 8, 2: 8, 3: 8}
    place, kinds = 44, []
    while place < size:
        kinds.append(data[place])
        place += sizes[data[place]]
    assert len(kinds) == struct.unpack_from("<H", data, 34)[0]
    assert [kinds.count(kind) for kind in range(4)] == [2, 1, 1, 16]


def test_pci_routing_table(guest: Guest) -> None:
    at = pointers(guest)[3]
    size = struct.unpack("<H", guest.read(at + 6, 2))[0]
    data = guest.read(at, size)
    assert data[:4] == b"$PIR"
    assert sum(data) & 0xFF == 0
    assert size == 32 + 31 * 16
    for device in (1, 5, 31):
        entry = data[32 + 16 * (device - 1) :][:16]
        assert entry[1] == device << 3
        assert [entry[2 + 3 * pin] - 0x60 for pin in range(4)] == [link_of(device, pin) for pin in range(4)]


def test_smbios(guest: Guest) -> None:
    entry = guest.read(pointers(guest)[1], 31)
    assert (entry[:4], entry[16:21]) == (b"_SM_", b"_DMI_")
    assert sum(entry) & 0xFF == 0
    assert sum(entry[16:]) & 0xFF == 0
    length, address, count = struct.unpack_from("<HIH", entry, 22)
    data = guest.read(address, length)
    at = 0
    found: dict[int, list[tuple[bytes, list[bytes]]]] = {}
    for _ in range(count):
        end = data.index(b"\0\0", at + data[at + 1])
        found.setdefault(data[at], []).append(
            (data[at : at + data[at + 1]], data[at + data[at + 1] : end].split(b"\0"))
        )
        assert end + 2 - at <= struct.unpack_from("<H", entry, 8)[0]
        at = end + 2
    assert at == length
    assert {0, 1, 3, 4, 16, 17, 19, 20, 32, 127} == set(found)
    system, strings = found[1][0]
    assert system[8:24] == UUID_.bytes
    assert strings == [b"Xen", b"HVM domU", b"4.17.0", str(UUID_).encode()]
    assert len(found[4]) == 2
    assert struct.unpack_from("<H", found[17][0][0], 12)[0] == 256
    lengths = {0: 24, 1: 27, 3: 13, 4: 32, 16: 15, 17: 21, 19: 15, 20: 19, 32: 11, 127: 4}
    for kind, size in lengths.items():
        assert found[kind][0][0][1] == size, kind


@pytest.mark.parametrize(
    ("config", "bios", "text"),
    [
        (CONFIG, b"", "BIOS image"),
        (CONFIG, bytes(512 << 10), "BIOS image"),
        (FirmwareConfig(1 << 20, 0, 1, UUID_), bytes(4096), "memory of an HVM guest"),
        (FirmwareConfig(0xF800_0000, 0, 1, UUID_), bytes(4096), "memory of an HVM guest"),
        (FirmwareConfig(64 << 20, 5, 1, UUID_), bytes(4096), "above 4 GiB"),
        (FirmwareConfig(64 << 20, 0, 200, UUID_), bytes(4096), "200 vCPUs"),
    ],
)
def test_what_cannot_be(config: FirmwareConfig, bios: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build_firmware(config, bios)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (Debian: acpica-tools) is not here")
def test_the_compiled_dsdt_is_its_sources() -> None:
    assert compile_dsdt() == DSDT


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (Debian: acpica-tools) is not here")
def test_iasl_reads_every_table(tmp_path: Path, guest: Guest) -> None:
    for signature, data in tables(guest).items():
        if signature == b"FACS":
            continue
        path = tmp_path / f"{signature.decode()}.dat"
        path.write_bytes(data)
        done = subprocess.run(["iasl", "-d", str(path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        text = path.with_suffix(".dsl").read_text(errors="replace")
        assert "Invalid" not in text, text
        assert "Incorrect checksum" not in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("acpiexec") is None, reason="acpiexec (Debian: acpica-tools) is not here")
def test_acpica_runs_the_methods(tmp_path: Path) -> None:
    """ACPICA, which is also Linux's and FreeBSD's, evaluates routing, links and resources."""
    path = tmp_path / "dsdt.dat"
    path.write_bytes(DSDT)
    commands = "evaluate \\_PIC 1;evaluate \\_SB.PCI0._CRS;evaluate \\_S5;evaluate \\_SB.PCI0.LNKB._SRS (23 20 00 18 79 00);"
    commands += (
        "evaluate \\_SB.PCI0.LNKB._CRS;evaluate \\_SB.PCI0.LNKB._STA;evaluate \\_SB.PCI0.ISA.UAR1._STA"
    )
    done = subprocess.run(
        ["acpiexec", "-di", "-b", commands, str(path)], capture_output=True, text=True, timeout=60
    )
    assert "AE_" not in done.stdout.replace("AE_OK", ""), done.stdout[-2000:]
    assert done.stdout.count("Evaluation of") >= 5, done.stdout
    assert "23 20 00 18 79 00" in done.stdout, "the link is where it was put"


def test_the_routing_of_pins_is_the_fabrics() -> None:
    """dsdt.asl against what the interrupt fabric does; another test holds the compiled table to it."""
    text = (Path(__file__).parents[3] / "domains/dom0/builder/firmware/dsdt.asl").read_text()
    links = re.findall(r"\{0x(\w{4})FFFF, (\d), LNK(\w), 0\}", text)
    inputs = re.findall(r"\{0x(\w{4})FFFF, (\d), 0, (\d+)\}", text)
    places = [(device, pin) for device in range(1, 32) for pin in range(4)]
    assert [(int(d, 16), int(p), "ABCD".index(n)) for d, p, n in links] == [
        (*at, link_of(*at)) for at in places
    ]
    assert [(int(d, 16), int(p), int(n)) for d, p, n in inputs] == [(*at, gsi_of(*at)) for at in places]


def test_acpi_limits() -> None:
    assert build_acpi(AcpiConfig(127, 1))[0]
    with pytest.raises(ValueError, match="0 of 1"):
        build_acpi(AcpiConfig(1, 0))
