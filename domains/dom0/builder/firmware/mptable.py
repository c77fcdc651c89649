"""The MultiProcessor table of an HVM guest (MultiProcessor Specification 1.4, chapter 4; Xen, tools/firmware/hvmloader/mp_tables.c)."""

from __future__ import annotations

import struct
from typing import Final

from domains.dom0.builder.firmware.acpi import IOAPIC, IOAPIC_ID, LAPIC, PCI_LINES, checksummed

ISA_BUS: Final = 0
SIGNATURE: Final = 0x600
FEATURES: Final = 0x201
INT, EXTINT = 0, 3
LEVEL_LOW: Final = 0xF


def build_mp(vcpus: int, address: int) -> bytes:
    """Floating pointer and, behind it, the table, for that address."""
    entries = [
        struct.pack("<BBBBII8x", 0, 2 * number, 0x11, 1 | (2 if number == 0 else 0), SIGNATURE, FEATURES)
        for number in range(vcpus)
    ]
    entries.append(struct.pack("<BB6s", 1, ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, IOAPIC_ID, 0x11, 1, IOAPIC))
    entries.append(struct.pack("<BBHBBBB", 3, EXTINT, 0, ISA_BUS, 0, IOAPIC_ID, 0))
    entries += [
        struct.pack(
            "<BBHBBBB", 3, INT, LEVEL_LOW if line in PCI_LINES else 0, ISA_BUS, line, IOAPIC_ID, line or 2
        )
        for line in range(16)
        if line != 2
    ]
    body = b"".join(entries)
    head = struct.pack(
        "<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), 4, 0, b"_HVMCPU_", b"XEN".ljust(12), 0, 0, len(entries), LAPIC, 0, 0, 0
    )  # fmt: skip
    pointer = struct.pack("<4sIBBB5x", b"_MP_", address + 16, 1, 4, 0)
    return checksummed(pointer, 10) + checksummed(head + body, 7)
