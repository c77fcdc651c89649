"""SMBIOS 2.4 tables of an HVM guest, with Xen's strings (System Management BIOS Reference 2.4; Xen, tools/firmware/hvmloader/smbios.c)."""

from __future__ import annotations

import struct
from typing import Final
from uuid import UUID

from domains.dom0.builder.firmware.acpi import checksummed

ENTRY_SIZE: Final = 31
DEVICE_MB: Final = 0x4000
"""A memory device is at most that large (16 GiB)."""
RELEASED: Final = "04/01/2014"


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    texts = b"".join(text.encode("ascii", "replace") + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


def build_smbios(
    *,
    vcpus: int,
    memory_mb: int,
    uuid: UUID,
    xen_version: tuple[int, int, str],
    cpu_vendor: str = "Intel",
    address: int,
) -> tuple[bytes, bytes]:
    """(entry point, structures for `address`). `xen_version`: major, minor, extra as XENVER_extraversion."""
    major, minor, extra = xen_version
    version = f"{major}.{minor}{extra}"
    found = [
        _structure(
            0, 0, struct.pack("<BBHBBQBBBBBB", 1, 2, 0xE800, 3, 0, 0x0008_0080, 0, 4, major, minor, 0xFF, 0xFF),
            "Xen", version, RELEASED,
        ),
        # Xen copies the handle's bytes as they are, and so does `dmidecode` of version 2.4 read them: big-endian.
        _structure(
            1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 3, 4, uuid.bytes, 6, 0, 0), "Xen", "HVM domU", version, str(uuid)
        ),
        _structure(3, 0x300, struct.pack("<BBBBBBBBB", 1, 1, 0, 2, 0, 3, 3, 3, 2), "Xen", str(uuid)),
    ]  # fmt: skip
    found += [
        _structure(
            4, 0x400 + number, struct.pack("<BBBBQBBHHHBBHHH", 1, 3, 1, 2, 0, 0, 0, 0, 2000, 2000, 0x41, 1, 0xFFFF, 0xFFFF, 0xFFFF),
            f"CPU {number}", cpu_vendor,
        )
        for number in range(1, vcpus + 1)
    ]  # fmt: skip
    devices = max(1, -(-memory_mb // DEVICE_MB))
    found.append(_structure(16, 0x1000, struct.pack("<BBBIHH", 1, 3, 6, memory_mb << 10, 0xFFFE, devices)))
    start = 0
    for number in range(devices):
        size = min(DEVICE_MB, memory_mb - number * DEVICE_MB)
        found.append(
            _structure(
                17, 0x1100 + number,
                struct.pack("<HHHHHBBBBBH", 0x1000, 0xFFFE, 64, 64, size if size < 0x7FFF else 0x7FFF, 9, 0, 1, 0, 7, 0),
                f"DIMM {number}",
            )
        )  # fmt: skip
        end = start + size * 1024
        found.append(_structure(19, 0x1300 + number, struct.pack("<IIHB", start, end - 1, 0x1000, 1)))
        mapped = struct.pack("<IIHHBBB", start, end - 1, 0x1100 + number, 0x1300 + number, 1, 0, 0)
        found.append(_structure(20, 0x1400 + number, mapped))
        start = end
    found.append(_structure(32, 0x2000, struct.pack("<6xB", 0)))
    found.append(_structure(127, 0x7F00, b""))
    table = b"".join(found)
    middle = checksummed(struct.pack("<5sBHIHB", b"_DMI_", 0, len(table), address, len(found), 0x24), 5)
    front = struct.pack("<4sBBBBHB5x", b"_SM_", 0, ENTRY_SIZE, 2, 4, max(map(len, found)), 0)
    return checksummed(front, 4) + middle, table
