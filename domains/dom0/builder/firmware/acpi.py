"""ACPI tables of an HVM guest, as libacpi makes them for it: RSDP, RSDT, XSDT, FADT, FACS, MADT, HPET, DSDT.

Not there: processor objects and hotplug (vCPUs are found by the MADT), S3, S4, SRAT, WAET, TPM. The power button is a fixed one
(FADT flag PWR_BUTTON clear), so that the device model's press of it reaches Linux. Sources: ACPI 5.0, chapter 5; Xen, tools/libacpi.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from bus.abi.hvm.ioreq import (
    ACPI_GPE0_BLK_ADDRESS_V1,
    ACPI_GPE0_BLK_LEN_V1,
    ACPI_PM1A_CNT_BLK_ADDRESS_V1,
    ACPI_PM1A_EVT_BLK_ADDRESS_V1,
    ACPI_PM_TMR_BLK_ADDRESS_V1,
)
from domains.dom0.builder.firmware.dsdt_aml import DSDT

INFO: Final = 0xFC00_0000
"""Where dsdt.asl has its field INFO."""
INFO_SIZE: Final = 64
LAPIC: Final = 0xFEE0_0000
IOAPIC: Final = 0xFEC0_0000
HPET: Final = 0xFED0_0000
IOAPIC_ID: Final = 1
SCI: Final = 9
PCI_LINES: Final = (5, 10, 11)
"""ISA lines that PCI links use: level triggered, active low."""
RSDP_SIZE: Final = 36
_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_FADT: Final = 268
_FLAGS: Final = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
"""WBINVD, C1, no sleep button, no fixed RTC wake, 32-bit timer, reset register."""


@dataclass(frozen=True, slots=True)
class AcpiConfig:
    """What the tables depend on."""

    vcpus: int
    online: int
    """The first so many are there at the start."""
    com1: bool = True
    com2: bool = False
    hpet: bool = True
    pci_start: int = 0xF000_0000
    pci_end: int = 0xFC00_0000
    """Addresses for PCI's BARs."""


def checksummed(table: bytes | bytearray, at: int, length: int | None = None) -> bytes:
    """With the byte at `at` such that the first `length` bytes (all) sum to 0."""
    out = bytearray(table)
    out[at] = 0
    out[at] = -sum(out[:length]) & 0xFF
    return bytes(out)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = _HEADER.pack(
        signature, _HEADER.size + len(body), revision, 0, b"Xen\0\0\0", b"HVM\0\0\0\0\0", 0, b"HVML", 0
    )
    return checksummed(header + body, 9)


def _gas(address: int, bits: int) -> bytes:
    """Generic address structure of an I/O port."""
    return struct.pack("<BBBBQ", 1, bits, 0, 0, address)


def _fadt(dsdt: int, facs: int) -> bytes:
    out = bytearray(_FADT)
    struct.pack_into("<IIBBH", out, 36, facs, dsdt, 0, 0, SCI)
    struct.pack_into("<II", out, 56, ACPI_PM1A_EVT_BLK_ADDRESS_V1, 0)
    struct.pack_into("<I", out, 64, ACPI_PM1A_CNT_BLK_ADDRESS_V1)
    struct.pack_into("<II", out, 76, ACPI_PM_TMR_BLK_ADDRESS_V1, ACPI_GPE0_BLK_ADDRESS_V1)
    struct.pack_into("<BBBBB", out, 88, 4, 2, 0, 4, ACPI_GPE0_BLK_LEN_V1)
    struct.pack_into("<HH", out, 96, 0x0FFF, 0x0FFF)  # no C2, no C3
    struct.pack_into("<BBB", out, 106, 0, 0, 0x32)  # the century is in CMOS 0x32
    struct.pack_into("<H", out, 109, 3)  # ISA devices, 8042
    struct.pack_into("<I", out, 112, _FLAGS)
    out[116:128] = _gas(0xCF9, 8)
    out[128] = 6
    struct.pack_into("<QQ", out, 132, facs, dsdt)
    out[148:160] = _gas(ACPI_PM1A_EVT_BLK_ADDRESS_V1, 32)
    out[172:184] = _gas(ACPI_PM1A_CNT_BLK_ADDRESS_V1, 16)
    out[208:220] = _gas(ACPI_PM_TMR_BLK_ADDRESS_V1, 32)
    out[220:232] = _gas(ACPI_GPE0_BLK_ADDRESS_V1, 8 * ACPI_GPE0_BLK_LEN_V1)
    return _table(b"FACP", 5, bytes(out[_HEADER.size :]))


def _madt(config: AcpiConfig) -> bytes:
    body = struct.pack("<II", LAPIC, 1)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # the timer's line 0 is input 2
    for line in PCI_LINES:
        body += struct.pack("<BBBBIH", 2, 10, 0, line, line, 0xF)
    body += struct.pack("<BBBBII", 1, 12, IOAPIC_ID, 0, IOAPIC, 0)
    for number in range(config.vcpus):
        body += struct.pack("<BBBBI", 0, 8, number, 2 * number, int(number < config.online))
    return _table(b"APIC", 3, body)


def _hpet() -> bytes:
    return _table(b"HPET", 1, struct.pack("<IBBBBQBHB", 0x8086_A201, 0, 0, 0, 0, HPET, 0, 0, 0))


def build_acpi(config: AcpiConfig) -> tuple[bytes, bytes]:
    """(what goes to INFO, the RSDP, which may lie anywhere that firmware finds it). ValueError: a vCPU number too large."""
    if not 0 < config.online <= config.vcpus <= 127:
        raise ValueError(f"{config.online} of {config.vcpus} vCPUs: 1 to 127 have an xAPIC ID each")
    flags = config.com1 | config.com2 << 1 | config.hpet << 2
    out = bytearray(struct.pack("<III", flags, config.pci_start, config.pci_end - 1).ljust(INFO_SIZE, b"\0"))

    def put(table: bytes) -> int:
        out.extend(bytes(-len(out) % 64))  # the FACS wants that, and the others do not mind
        at = INFO + len(out)
        out.extend(table)
        return at

    facs = put(struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2))
    dsdt = put(DSDT)
    tables = [put(_fadt(dsdt, facs)), put(_madt(config))]
    if config.hpet:
        tables.append(put(_hpet()))
    rsdt = put(_table(b"RSDT", 1, struct.pack(f"<{len(tables)}I", *tables)))
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"Xen\0\0\0", 2, rsdt, RSDP_SIZE, xsdt, 0)
    return bytes(out), checksummed(checksummed(rsdp, 8, 20), 32)
