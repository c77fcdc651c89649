"""ACPI tables of a PVH guest: what hardware-reduced ACPI needs and nothing else, as libacpi makes them for PVH.

RSDP, XSDT, FADT, MADT (a local APIC for each vCPU; no I/O APIC), and a DSDT: without objects, or with a PCI root for a guest that was
given devices. Source: ACPI specification 5.0, chapter 5.
"""

from __future__ import annotations

import struct
from typing import Final

ADDRESS: Final = 0xFC000000
"""Guest-physical address of the tables."""
LAPIC_ADDRESS: Final = 0xFEE00000
_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_FADT_LENGTH: Final = 268
_HW_REDUCED: Final = 1 << 20
_NO_VGA, _NO_RTC = 1 << 2, 1 << 5
_X2APIC_FROM: Final = 255
_PCI_ROOT: Final = bytes.fromhex(
    "1047065f53425f5b824f0550434930085f4849440c41d00a03085f55494400085f41445200085f42424e00085f435253"
    "11370a34880d00020c00000000000000000001004701f80cf80c0108871700000c0100000000000000f0fffffffb0000"
    "00000000000c7900"
)
"""asl/pvh_pci.asl, compiled by iasl, without its header."""


def _checked(table: bytearray, at: int, length: int) -> None:
    table[at] = 0
    table[at] = -sum(table[:length]) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, b"Xen\0\0\0", b"HVM\0\0\0\0\0", 0, b"HVML", 0)
    out = bytearray(header + body)
    _checked(out, 9, length)
    return bytes(out)


def _fadt(dsdt: int) -> bytes:
    fadt = bytearray(_FADT_LENGTH)
    struct.pack_into("<I", fadt, 40, dsdt)
    struct.pack_into("<H", fadt, 109, _NO_VGA | _NO_RTC)
    struct.pack_into("<I", fadt, 112, _HW_REDUCED)
    struct.pack_into("<Q", fadt, 140, dsdt)
    return _table(b"FACP", 5, bytes(fadt[_HEADER.size :]))


def _madt(vcpus: int, online: int) -> bytes:
    body = struct.pack("<II", LAPIC_ADDRESS, 0)
    for number in range(vcpus):
        apic_id, enabled = 2 * number, int(number < online)
        if apic_id < _X2APIC_FROM:
            body += struct.pack("<BBBBI", 0, 8, number, apic_id, enabled)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, enabled, number)
    return _table(b"APIC", 3, body)


def build_acpi(vcpus: int, online: int, *, pci: bool = False) -> bytes:
    """The tables for ADDRESS; the RSDP comes first. `pci`: with a PCI root (bus 0, memory between RAM and the tables, no interrupt lines)."""
    rsdp_size = 36
    places: list[tuple[int, bytes]] = []
    position = ADDRESS + 64

    def put(table: bytes) -> int:
        nonlocal position
        at = position
        places.append((at, table))
        position = at + len(table) + 15 & ~15
        return at

    dsdt = put(_table(b"DSDT", 2, _PCI_ROOT if pci else b""))
    tables = [put(_fadt(dsdt)), put(_madt(vcpus, online))]
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"Xen\0\0\0", 2, 0, rsdp_size, xsdt, 0))
    _checked(rsdp, 8, 20)
    _checked(rsdp, 32, rsdp_size)
    out = bytearray(position - ADDRESS)
    out[:rsdp_size] = rsdp
    for at, table in places:
        out[at - ADDRESS : at - ADDRESS + len(table)] = table
    return bytes(out)
