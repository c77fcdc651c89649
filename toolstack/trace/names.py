"""Names of what trace records have numbers for."""

from __future__ import annotations

from typing import Final

from bus.abi.hypercalls import HYPERCALLS
from bus.abi.io import blkif

OPERATIONS: Final = {
    blkif.BLKIF_OP_READ: "READ",
    blkif.BLKIF_OP_WRITE: "WRITE",
    blkif.BLKIF_OP_WRITE_BARRIER: "BARRIER",
    blkif.BLKIF_OP_FLUSH_DISKCACHE: "FLUSH",
    blkif.BLKIF_OP_DISCARD: "DISCARD",
    blkif.BLKIF_OP_INDIRECT: "INDIRECT",
}
STATUSES: Final = {
    blkif.BLKIF_RSP_OKAY & 0xFFFF: "OKAY",
    blkif.BLKIF_RSP_ERROR & 0xFFFF: "ERROR",
    blkif.BLKIF_RSP_EOPNOTSUPP & 0xFFFF: "EOPNOTSUPP",
}
FAULTS: Final = {
    0x02: "the device belongs to no domain, or the request is of before a reset",
    0x04: "the address is beyond 48 bits",
    0x05: "no right to write there",
    0x06: "no right to read there",
    0x0C: "a reserved bit is set in the tables",
    0x25: "an address of interrupts",
    0x100: "the request is malformed",
}
"""Reasons of the IOMMU (VT-d, 7.2)."""


def disk_name(number: int) -> str:
    """`xvda1` for 51713 (docs/misc/vbd-interface); the number where it has no such name."""
    if number >> 28 == 1:
        return _letters("xvd", number >> 8 & 0xFFFFF, number & 0xFF)
    major, minor = number >> 8, number & 0xFF
    if major == 202:
        return _letters("xvd", minor >> 4, minor & 15)
    if major == 8:
        return _letters("sd", minor >> 4, minor & 15)
    if major in (3, 22):
        return _letters("hd", (minor >> 6 & 1) + (2 if major == 22 else 0), minor & 63)
    return str(number)


def _letters(prefix: str, disk: int, partition: int) -> str:
    word, number = "", disk + 1
    while number:
        number, letter = divmod(number - 1, 26)
        word = chr(ord("a") + letter) + word
    return f"{prefix}{word}{partition or ''}"


def device_name(bdf: int) -> str:
    """0000:00:01.0"""
    return f"{bdf >> 16 & 0xFFFF:04x}:{bdf >> 8 & 0xFF:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"


def hypercall_name(number: int, command: int | None = None) -> str:
    """`GNTTABOP_map_grant_ref`, or `iret`; numbers where there is no name."""
    entry = HYPERCALLS.get(number)
    if entry is None:
        return f"hypercall {number}"
    found = entry.command(command) if command is not None and len(entry.commands) > 1 else None
    return found.name if found is not None else entry.name
