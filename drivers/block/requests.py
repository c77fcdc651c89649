"""Ring requests, checked: from the private copy of a slot to what a disk has to do.

`parse` depends on nothing but its arguments, so that a successor makes the same of a ledger's record. All that is
wrong with a request is answered to it (BLKIF_RSP_ERROR, or BLKIF_RSP_EOPNOTSUPP for what is not offered).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bus.abi.io.blkif import (
    BLKIF_DISCARD_SECURE,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    VDISK_CDROM,
    VDISK_READONLY,
    VDISK_REMOVABLE,
)
from drivers.block.ports import Op
from drivers.block.wire import SEGMENT, SEGMENTS_PER_PAGE, Abi, Segment, unpack_segments

MAX_INDIRECT_SEGMENTS: Final = 256
"""`feature-max-indirect-segments`: 1 MiB a request."""
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Disk:
    """What a frontend is told of a disk."""

    sectors: int
    """Capacity in units of 512 bytes."""
    sector_size: int = 512
    """Of the ring's sector numbers: 512, or 4096 for a frontend with feature-large-sector-size."""
    physical_sector_size: int = 512
    read_only: bool = False
    removable: bool = False
    cdrom: bool = False
    flush: bool = True
    barrier: bool = True
    discard: bool = False
    discard_granularity: int = 512
    discard_secure: bool = False
    max_indirect: int = MAX_INDIRECT_SEGMENTS

    def __post_init__(self) -> None:
        if self.sector_size not in (512, 4096) or self.sectors < 0 or self.sectors >= 1 << 55:
            raise ValueError(f"a disk of {self.sectors} sectors, {self.sector_size} bytes each")
        if self.sectors * 512 % self.sector_size:
            raise ValueError("a disk is a whole number of its sectors")
        if not 0 <= self.max_indirect <= MAX_INDIRECT_SEGMENTS:
            raise ValueError(f"at most {MAX_INDIRECT_SEGMENTS} indirect segments")

    @property
    def info(self) -> int:
        """VDISK_* of the `info` node."""
        return VDISK_CDROM * self.cdrom | VDISK_REMOVABLE * self.removable | VDISK_READONLY * self.read_only


class Held:
    """A persistent grant that is mapped (`drivers.block.grant_pool`)."""

    __slots__ = ("iova", "used", "users")

    def __init__(self, iova: int) -> None:
        self.iova = iova
        self.users = 0
        self.used = 0
        """The turn in which a request took it last."""


class Request:
    """A request that was taken."""

    __slots__ = (
        "barrier",
        "flush",
        "grants",
        "id",
        "index",
        "iovas",
        "kind",
        "mapped",
        "op",
        "sector",
        "sectors",
        "secure",
        "segments",
        "slot",
        "stamp",
        "status",
    )

    def __init__(self, ident: int, op: int) -> None:
        self.id = ident
        self.op = op
        """BLKIF_OP_* for the response; of an indirect request the operation inside."""
        self.index = 0
        self.slot = -1
        self.status: int | None = None
        """BLKIF_RSP_*, once it is known."""
        self.kind: Op | None = None
        """What is still to do, after the flush if there is one."""
        self.sector = 0
        self.sectors = 0
        """Both in units of 512 bytes."""
        self.segments: list[tuple[int, int, int]] = []
        """(ref, offset, length), in bytes."""
        self.flush = self.barrier = self.secure = False
        self.mapped: list[tuple[int, int]] | None = None
        self.iovas: list[int] = []
        self.grants: Sequence[Held] = ()
        """The persistent grants in use."""
        self.stamp = 0


def indirect_pages(raw: bytes, abi: Abi, disk: Disk) -> list[tuple[int, int]]:
    """The pages (ref, length) that must be read to know an indirect request's segments; none if it is in error."""
    _, operation, count, _, _ = abi.head.unpack_from(raw)
    if operation not in (BLKIF_OP_READ, BLKIF_OP_WRITE) or not 1 <= count <= disk.max_indirect:
        return []
    number = -(-count // SEGMENTS_PER_PAGE)
    refs = struct.unpack_from(f"<{number}I", raw, abi.indirect_grefs)
    return [
        (ref, SEGMENT.size * min(SEGMENTS_PER_PAGE, count - at * SEGMENTS_PER_PAGE))
        for at, ref in enumerate(refs)
    ]


def parse(raw: bytes, indirect: bytes, abi: Abi, disk: Disk) -> Request:
    """Check a slot (and the segments of an indirect request). If something is wrong `status` is set."""
    op, count, handle, ident, sector = abi.head.unpack_from(raw)
    if op == BLKIF_OP_DISCARD:
        return _discard(Request(ident, op), raw, count, sector, abi, disk)
    if op == BLKIF_OP_INDIRECT:
        op, count = count, handle  # the fields in their places
        request = Request(ident, op)
        if (
            op not in (BLKIF_OP_READ, BLKIF_OP_WRITE)
            or not 1 <= count <= disk.max_indirect
            or len(indirect) != count * SEGMENT.size
        ):
            request.status = BLKIF_RSP_ERROR
            return request
        return _transfer(request, unpack_segments(indirect, 0, count), sector, disk)
    request = Request(ident, op)
    if op == BLKIF_OP_WRITE_BARRIER:
        supported = disk.barrier
        request.barrier = request.flush = True
    elif op == BLKIF_OP_FLUSH_DISKCACHE:
        supported = disk.flush
        request.flush = True
    else:
        supported = op in (BLKIF_OP_READ, BLKIF_OP_WRITE)
    if not supported:
        request.status = BLKIF_RSP_EOPNOTSUPP
        return request
    if count > BLKIF_MAX_SEGMENTS_PER_REQUEST or (count == 0 and not request.flush):
        request.status = BLKIF_RSP_ERROR
        return request
    if count == 0:
        return request
    return _transfer(request, unpack_segments(raw, abi.segments, count), sector, disk)


def _transfer(request: Request, segments: list[Segment], sector: int, disk: Disk) -> Request:
    write = request.op != BLKIF_OP_READ
    size = disk.sector_size
    last_of_page = 4096 // size - 1
    total = 0
    whole = [(ref, 0, last_of_page) for ref, _, _ in segments]
    if segments == whole:  # nearly always of large requests
        request.segments = [(ref, 0, 4096) for ref, _, _ in segments]
        total = 4096 * len(segments)
    else:
        out = request.segments
        for ref, first, last in segments:
            if first > last or last > last_of_page:
                request.status = BLKIF_RSP_ERROR
                return request
            length = (last - first + 1) * size
            out.append((ref, first * size, length))
            total += length
    scale = size // 512
    request.sector, request.sectors = sector * scale, total // 512
    if request.sector + request.sectors > disk.sectors or (write and disk.read_only):
        request.status = BLKIF_RSP_ERROR
        return request
    request.kind = Op.WRITE if write else Op.READ
    return request


def _discard(request: Request, raw: bytes, flag: int, sector: int, abi: Abi, disk: Disk) -> Request:
    (sectors,) = _U64.unpack_from(raw, abi.segments)
    scale = disk.sector_size // 512
    request.sector, request.sectors = sector * scale, sectors * scale
    request.secure = bool(flag & BLKIF_DISCARD_SECURE) and disk.discard_secure  # else to be ignored: blkif.h
    if not disk.discard:
        request.status = BLKIF_RSP_EOPNOTSUPP
    elif disk.read_only or flag & ~BLKIF_DISCARD_SECURE or request.sector + request.sectors > disk.sectors:
        request.status = BLKIF_RSP_ERROR
    elif sectors == 0:
        request.status = BLKIF_RSP_OKAY
    else:
        request.kind = Op.DISCARD
    return request
