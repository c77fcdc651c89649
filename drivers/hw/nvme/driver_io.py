"""From what a disk is asked to NVMe commands: splitting by PRP rules and limits (NVM Express 1.4, 4.3 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from errno import EINVAL, EIO, ENODATA, ENOLINK, ENOSPC, EOPNOTSUPP, EROFS, ETIMEDOUT
from typing import Final

from drivers.block.ports import Command, Op
from drivers.hw.nvme.driver_queue import MAX_PRP_PAGES, PAGE, Entry
from drivers.hw.nvme.spec import (
    DSM_DEALLOCATE,
    DSM_MAX_RANGES,
    IO_DEAC,
    IO_FUA,
    DsmRange,
    IoOpcode,
    Status,
)

MAX_BLOCKS: Final = 1 << 16
"""NLB has 16 bits and is one less."""

_ERRNO: Final = {
    Status.SUCCESS: 0,
    Status.INVALID_OPCODE: EOPNOTSUPP,
    Status.INVALID_FIELD: EINVAL,
    Status.INVALID_PRP_OFFSET: EINVAL,
    Status.SGL_SEGMENT: EINVAL,
    Status.SGL_COUNT: EINVAL,
    Status.SGL_DATA_LENGTH: EINVAL,
    Status.SGL_TYPE: EINVAL,
    Status.INVALID_NAMESPACE: ENOLINK,
    Status.ABORT_REQUESTED: ETIMEDOUT,
    Status.LBA_OUT_OF_RANGE: EINVAL,
    Status.CAPACITY_EXCEEDED: ENOSPC,
    Status.NAMESPACE_WRITE_PROTECTED: EROFS,
    Status.READ_ONLY_RANGE: EROFS,
    Status.UNRECOVERED_READ: ENODATA,
}


def errno_of(status: int) -> int:
    """The errno (0: none) for SCT << 8 | SC; EIO for what has no better one."""
    return _ERRNO.get(Status(status), EIO) if status in Status._value2member_map_ else EIO


@dataclass(frozen=True, slots=True)
class Namespace:
    """What `identify` told."""

    nsid: int
    blocks: int
    shift: int
    """log2 of the block size in bytes."""
    read_only: bool
    max_pages: int
    """Of one transfer (MDTS, and one PRP list page)."""
    can_discard: bool
    can_zero: bool
    volatile_cache: bool
    sgl: bool = False
    """Data in a row may be named by an SGL descriptor."""


def _split(extents: Sequence[tuple[int, int]], limit: int) -> list[tuple[list[int], int]]:
    """Cut a scatter list into runs of (page addresses, bytes) that PRPs can say: only the first page may begin, and
    only the last may end, inside a page."""
    runs: list[tuple[list[int], int]] = []
    pages: list[int] = []
    length = 0
    end = 1  # no page ends here
    for iova, size in extents:
        if pages and not end % PAGE and not iova % PAGE and len(pages) < limit:
            pages.append(iova)
            length += size
        else:
            if pages:
                runs.append((pages, length))
            pages, length = [iova], size
        end = iova + size
    if pages:
        runs.append((pages, length))
    return runs


def entries(command: Command, namespace: Namespace) -> list[Entry] | int:
    """The NVMe commands that carry it out (in any order), or an errno for one that cannot be."""
    shift = namespace.shift
    scale = shift - 9
    mask = (1 << scale) - 1
    op, sector, sectors = command.op, command.sector, command.sectors
    if op is Op.FLUSH:
        return [Entry(IoOpcode.FLUSH, namespace.nsid)] if namespace.volatile_cache else []
    if sector & mask or sectors & mask or (sector + sectors) >> scale > namespace.blocks or sectors < 1:
        return EINVAL
    if namespace.read_only and op is not Op.READ:
        return EROFS
    lba, blocks = sector >> scale, sectors >> scale
    if op is Op.DISCARD:
        return _discard(command, lba, blocks, namespace)
    if op is Op.WRITE_ZEROES:
        if not namespace.can_zero:
            return EOPNOTSUPP
        flags = IO_DEAC if namespace.can_discard else 0
        flags |= IO_FUA if command.fua else 0
        starts = range(lba, lba + blocks, MAX_BLOCKS)
        if len(starts) > 1024:
            return EINVAL
        return [
            _transfer(
                IoOpcode.WRITE_ZEROES, namespace.nsid, (), at, min(MAX_BLOCKS, lba + blocks - at), flags
            )
            for at in starts
        ]
    opcode = IoOpcode.READ if op is Op.READ else IoOpcode.WRITE
    flags = IO_FUA if command.fua else 0
    limit = min(namespace.max_pages, MAX_PRP_PAGES)
    if namespace.sgl and 2 < len(command.extents) <= limit and blocks << shift == len(command.extents) * PAGE:
        # Whole pages in a row, as persistent grants of a large request mostly are: no list of them.
        first = command.extents[0][0]
        if [*command.extents] == [(at, PAGE) for at in range(first, first + (blocks << shift), PAGE)]:
            made = _transfer(opcode, namespace.nsid, (first,), lba, blocks, flags)
            return [made._replace(run=blocks << shift)]
    out: list[Entry] = []
    for pages, length in _split(command.extents, limit):
        if length & ((1 << shift) - 1) or pages[0] & 3:
            return EINVAL
        count = length >> shift
        out.append(_transfer(opcode, namespace.nsid, pages, lba, count, flags))
        lba += count
        blocks -= count
    return out if blocks == 0 else EINVAL


def _transfer(opcode: int, nsid: int, pages: Sequence[int], lba: int, blocks: int, flags: int) -> Entry:
    return Entry(opcode, nsid, pages, lba & 0xFFFFFFFF, lba >> 32, (blocks - 1) | flags)


def _discard(command: Command, lba: int, blocks: int, namespace: Namespace) -> list[Entry] | int:
    if command.secure or not namespace.can_discard:
        return EOPNOTSUPP
    step = 0xFFFFFFFF
    ranges = [DsmRange(0, min(step, lba + blocks - at), at) for at in range(lba, lba + blocks, step)]
    if len(ranges) > DSM_MAX_RANGES:
        return EINVAL
    opcode = IoOpcode.DATASET_MANAGEMENT
    return [Entry(opcode, namespace.nsid, (), len(ranges) - 1, DSM_DEALLOCATE, 0, ranges)]
