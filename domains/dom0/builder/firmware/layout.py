"""Everything that an HVM guest's memory holds when its vCPU starts at SeaBIOS' reset vector, in the place of hvmloader's work.

Use: `image = build_firmware(config, bios)`; populate the guest's RAM, and besides it `image.special_pages()` (guest frames from
0xFC000000 on, RAM that the e820 calls reserved); write each of `image.pieces` (address, bytes); run `drivers.pc.pci_setup.set_up_pci` on
the device model's ports; start vCPU 0 in real mode at F000:FFF0 (hvmloader jumps there; the reset vector below 4 GiB is not used).

| address | what |
| --- | --- |
| 0x1000 | struct seabios_info, "XenHVMSeaBIOS": where the following are; SeaBIOS panics if its sum is wrong |
| 0x1020 | addresses of tables: RSDP, SMBIOS entry point, MP floating pointer, PCI interrupt routing table |
| 0x1040 | e820 |
| 0x1200 to 0x1FFF | RSDP, SMBIOS entry point, PCI interrupt routing table: SeaBIOS copies them into the F segment |
| 0x9F800 | struct hvm_info_table (SeaBIOS does not look at it, and its data area overwrites it) |
| 1 MiB - size | the BIOS image (256 KiB: from 0xC0000) |
| 0xFC000000 | ACPI tables; behind them SMBIOS structures and MP table |

SeaBIOS takes the video BIOS from the VGA's expansion ROM. Sources: SeaBIOS, src/fw/xen.c; Xen, tools/firmware/hvmloader/seabios.c,
e820.c, pir.c; public/hvm/hvm_info_table.h, e820.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from bus.abi.hvm.hvm_info_table import HVM_INFO_PADDR, HVM_INFO_TABLE, HVM_MAX_VCPUS, hvm_info_table
from bus.addresses import PAGE_SHIFT
from domains.dom0.builder.firmware.acpi import INFO, AcpiConfig, build_acpi, checksummed
from domains.dom0.builder.firmware.mptable import build_mp
from domains.dom0.builder.firmware.smbios import build_smbios

SEABIOS_INFO: Final = 0x1000
SIGNATURE: Final = b"XenHVMSeaBIOS\0"
_INFO: Final = struct.Struct("<14sBBIIII")
_POINTERS, _E820, _TABLES = 0x1020, 0x1040, 0x1200
RAM, RESERVED = 1, 2
BIOS_END: Final = 1 << 20
MAX_BIOS: Final = 256 << 10
RESERVED_START: Final = 0xFC00_0000
MIN_MEMORY: Final = 2 << 20
LINES: Final = (5, 10, 11, 5)
PCI_IRQS: Final = 1 << 5 | 1 << 10 | 1 << 11


@dataclass(frozen=True, slots=True)
class FirmwareConfig:
    """A guest, as its firmware must be told of it."""

    low_memory: int
    """End of RAM below 4 GiB, bytes, whole pages; at most 0xF0000000."""
    high_memory: int
    """End of RAM above 4 GiB, an address; 0: there is none."""
    vcpus: int
    uuid: UUID
    online: int = 0
    """vCPUs that are there at the start; 0: all."""
    xen_version: tuple[int, int, str] = (4, 17, ".0")
    cpu_vendor: str = "Intel"
    com1: bool = True
    com2: bool = False
    hpet: bool = True


@dataclass(frozen=True, slots=True)
class FirmwareImage:
    """`pieces`: guest-physical address and content, without overlaps."""

    pieces: tuple[tuple[int, bytes], ...]

    def special_pages(self) -> range:
        """Guest frames from 0xFC000000 on that must be populated."""
        end = max(address + len(data) for address, data in self.pieces if address >= RESERVED_START)
        return range(RESERVED_START >> PAGE_SHIFT, (end - 1 >> PAGE_SHIFT) + 1)


def build_e820(config: FirmwareConfig, bios_start: int) -> list[tuple[int, int, int]]:
    """(address, size, type) of the ranges, ascending."""
    table = [
        (0, 0xA0000, RAM),
        (bios_start, BIOS_END - bios_start, RESERVED),
        (BIOS_END, config.low_memory - BIOS_END, RAM),
        (RESERVED_START, (1 << 32) - RESERVED_START, RESERVED),
    ]
    if config.high_memory:
        table.append((1 << 32, config.high_memory - (1 << 32), RAM))
    return table


def build_hvm_info(config: FirmwareConfig) -> bytes:
    """The structure for HVM_INFO_PADDR."""
    online = (1 << (config.online or config.vcpus)) - 1
    raw = HVM_INFO_TABLE.pack(
        hvm_info_table(
            signature=b"HVM INFO",
            length=HVM_INFO_TABLE.size,
            checksum=0,
            apic_mode=1,
            nr_vcpus=config.vcpus,
            low_mem_pgend=config.low_memory >> PAGE_SHIFT,
            reserved_mem_pgstart=RESERVED_START >> PAGE_SHIFT,
            high_mem_pgend=config.high_memory >> PAGE_SHIFT,
            vcpu_online=online.to_bytes(HVM_MAX_VCPUS // 8, "little"),
        )
    )
    return checksummed(raw, 12)


def build_pir() -> bytes:
    """PCI interrupt routing table: the links of each device's pins (Microsoft PCI IRQ Routing Table Specification 1.0)."""
    entries = b""
    for device in range(1, 32):
        pins = b"".join(struct.pack("<BH", 0x60 + (device + pin & 3), PCI_IRQS) for pin in range(4))
        entries += struct.pack("<BB", 0, device << 3) + pins + struct.pack("<BB", 0, 0)
    head = struct.pack("<4sHHBBHII11xB", b"$PIR", 0x100, 32 + len(entries), 0, 8, PCI_IRQS, 0x7000_8086, 0, 0)
    return checksummed(head + entries, 31)


def build_firmware(config: FirmwareConfig, bios: bytes) -> FirmwareImage:
    """All of it. `bios`: SeaBIOS' image. ValueError names what cannot be."""
    if not bios or len(bios) > MAX_BIOS or len(bios) % 0x1000:
        raise ValueError(f"a BIOS image of {len(bios)} bytes: whole pages, at most {MAX_BIOS}")
    if not MIN_MEMORY <= config.low_memory <= 0xF000_0000 or config.low_memory % 0x1000:
        raise ValueError(
            f"memory of an HVM guest up to {config.low_memory:#x}: 2 MiB to 0xf0000000, whole pages"
        )
    if config.high_memory and (config.high_memory <= 1 << 32 or config.high_memory % 0x1000):
        raise ValueError(f"memory above 4 GiB up to {config.high_memory:#x}")
    acpi, rsdp = build_acpi(
        AcpiConfig(config.vcpus, config.online or config.vcpus, config.com1, config.com2, config.hpet)
    )
    behind = INFO + len(acpi) + 15 & ~15
    memory = config.low_memory + max(config.high_memory - (1 << 32), 0)
    entry, structures = build_smbios(
        vcpus=config.vcpus,
        memory_mb=-(-memory >> 20),
        uuid=config.uuid,
        xen_version=config.xen_version,
        cpu_vendor=config.cpu_vendor,
        address=behind,
    )
    mp_at = behind + len(structures) + 15 & ~15
    bios_start = BIOS_END - len(bios)
    e820 = build_e820(config, bios_start)
    low: list[tuple[int, bytes]] = []
    at = _TABLES
    for table in (rsdp, entry, build_pir()):
        low.append((at, table))
        at = at + len(table) + 15 & ~15
    pointers = [low[0][0], low[1][0], mp_at, low[2][0]]
    info = _INFO.pack(SIGNATURE, _INFO.size, 0, _POINTERS, len(pointers), _E820, len(e820))
    pieces = [
        (SEABIOS_INFO, checksummed(info, 15)),
        (_POINTERS, struct.pack(f"<{len(pointers)}I", *pointers)),
        (_E820, b"".join(struct.pack("<QQI", *one) for one in e820)),
        *low,
        (HVM_INFO_PADDR, build_hvm_info(config)),
        (bios_start, bios),
        (INFO, acpi),
        (behind, structures),
        (mp_at, build_mp(config.vcpus, mp_at)),
    ]
    return FirmwareImage(tuple(pieces))
