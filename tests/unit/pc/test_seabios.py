"""SeaBIOS of Debian on these devices and the project's vCPU: POST, a boot sector that uses the BIOS's disk, screen and keyboard.

Needs Debian's package seabios (`DOMICILE_SEABIOS` names another folder). Without Xen: SeaBIOS sets PCI up itself.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from drivers.pc.vga_render import render
from tests.unit.pc.pc_machine import Machine

SEABIOS = Path(os.environ.get("DOMICILE_SEABIOS", "/usr/share/seabios"))
BIOS, VGABIOS = SEABIOS / "bios-256k.bin", SEABIOS / "vgabios-stdvga.bin"
pytestmark = pytest.mark.skipif(
    not VGABIOS.exists(), reason="Debian's seabios is not here (DOMICILE_SEABIOS names another place)"
)


def boot_sector() -> bytes:
    """Prints what it is, reads sector 1 by LBA (INT 13h, 42h) and prints it, echoes a key, powers nothing off."""
    org = 0x7C00
    code = bytes.fromhex("31c08ed88ec0fc")  # xor ax,ax; mov ds,ax; mov es,ax; cld
    show, read = len(code), len(code) + 6
    dap, text, put = 0x60, 0x70, 0x50
    code += b"\xbe" + struct.pack("<H", org + text) + b"\xe8" + struct.pack("<h", put - (show + 6))
    code += b"\xb4\x42\xbe" + struct.pack("<H", org + dap) + b"\xcd\x13\x72\x17"  # jc end
    code += b"\xbe\x00\x7e\xe8" + struct.pack("<h", put - (read + 15))
    code += bytes.fromhex("b400cd16b40ecd10f4ebfd")
    code = code.ljust(put, b"\x90") + bytes.fromhex("ac08c07406b40ecd10ebf5c3")
    code = code.ljust(dap, b"\x90") + struct.pack("<BBHHHQ", 16, 0, 1, 0x7E00, 0, 1)
    code = code.ljust(text, b"\0") + b"Sector zero runs. \0"
    return code.ljust(510, b"\0") + b"\x55\xaa" + b"Sector one was read.\r\n\0".ljust(512, b"\0")


def test_post_finds_nothing_to_boot() -> None:
    machine = Machine(BIOS, VGABIOS)
    assert machine.run(60, lambda: b"No bootable device" in machine.log), machine.log[-500:].decode("latin-1")
    log = machine.log.decode("latin-1")
    assert "PS2 keyboard initialized" in log
    assert "Found 1 serial ports" in log
    assert "No bootable device" in machine.text()  # the log is ahead of the screen
    assert machine.vga.plain_ranges()[0].gpa == 0xB8000
    picture = render(machine.vga)
    assert (picture.width, picture.height) == (720, 400)
    assert picture.rgb.count(b"\xaa\xaa\xaa") > 500, "letters are drawn with the BIOS's font"


@pytest.mark.parametrize("place", ["disk", "cdrom"])
def test_a_boot_sector_runs(tmp_path: Path, place: str) -> None:
    image = tmp_path / "image"
    if place == "disk":
        image.write_bytes(boot_sector() + bytes(63 * 16 * 512 * 4))
        machine = Machine(BIOS, VGABIOS, disk=image, boot="c")
    else:
        image.write_bytes(el_torito(boot_sector()))
        machine = Machine(BIOS, VGABIOS, cdrom=image, boot="d")
    want = "Sector one was read." if place == "disk" else "Sector zero runs."
    assert machine.run(60, lambda: want in machine.text()), machine.text()
    assert "Sector zero runs." in machine.text()
    if place == "disk":
        machine.type("k")
        assert machine.run(30, lambda: machine.text().rstrip().endswith("k")), machine.text()


def el_torito(sector: bytes) -> bytes:
    """A disc whose boot record names an image without emulation at block 20 (El Torito 1.0)."""
    disc = bytearray(2048 * 24)
    disc[16 * 2048 : 16 * 2048 + 7] = b"\x01CD001\x01"
    record = b"\x00CD001\x01EL TORITO SPECIFICATION".ljust(71, b"\0") + struct.pack("<I", 19)
    disc[17 * 2048 : 17 * 2048 + len(record)] = record
    disc[18 * 2048 : 18 * 2048 + 7] = b"\xffCD001\x01"
    validation = bytearray(struct.pack("<BBH24xH2s", 1, 0, 0, 0, b"\x55\xaa"))
    struct.pack_into("<H", validation, 28, -sum(struct.unpack("<16H", validation)) & 0xFFFF)
    entry = struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 20)
    disc[19 * 2048 : 19 * 2048 + 44] = bytes(validation) + entry
    disc[20 * 2048 : 20 * 2048 + len(sector)] = sector
    return bytes(disc)


def test_under_xen_it_takes_what_hvmloader_leaves(tmp_path: Path) -> None:
    """SeaBIOS finds Xen by CPUID, takes e820 and tables from 0x1000, sets no PCI up, and boots a disk."""
    image = tmp_path / "image"
    image.write_bytes(boot_sector() + bytes(63 * 16 * 512 * 4))
    machine = Machine(BIOS, VGABIOS, disk=image, boot="c", xen=True)
    # hvmloader enters the BIOS at F000:FFF0 below 1 MiB; the vector below 4 GiB holds the same far jump.
    assert machine.run(60, lambda: "Sector one was read." in machine.text()), machine.log[-1500:].decode(
        "latin-1"
    )
    log = machine.log.decode("latin-1")
    for line in (
        "Found Xen hypervisor signature",
        "xen: copy e820",
        "Detected Xen v4.17",
        "xen: copy BIOS tables",
    ):
        assert line in log
    for table in ("Copying ACPI RSDP", "Copying SMBIOS", "Copying MPTABLE", "Copying PIR"):
        assert table in log, table
    assert "PCI: init bdf" not in log
    assert "Using pmtimer, ioport 0xb008" in log
    assert machine.hypercalls == [17]
