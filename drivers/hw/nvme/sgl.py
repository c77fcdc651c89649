"""Scatter gather lists (NVMe 1.4, section 4.4): data block, segment and last segment descriptors with addresses; nothing else is offered.

A command's data pointer is one descriptor: of the data itself, where that is in a row, or of a segment, a list of descriptors in memory. Every
segment but the last ends with the descriptor of the next one. A host can make that a circle: how many descriptors a command may have is bounded.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from drivers.hw.nvme.prp import PAGE, PrpError
from drivers.hw.nvme.spec import Status

SIZE: Final = 16
"""Bytes of a descriptor: address, length, 3 reserved, identifier (type and sub type)."""
DATA_BLOCK: Final = 0x00
SEGMENT: Final = 0x20
LAST_SEGMENT: Final = 0x30
MAX_DESCRIPTORS: Final = 640
"""Of one command, all segments together: what is in memory in pieces of a sector each still has room for segments."""
_DESCRIPTOR: Final = struct.Struct("<QI3xB")


class SglError(PrpError):
    """The SGL is not as it must be."""


class SegmentStep(NamedTuple):
    """A piece of a segment that has to be read: so many `descriptors` at `address`, `more` of the same segment behind them; `last`: of
    the last segment; `left`: bytes of data that are not described yet; `budget`: descriptors that may still come."""

    address: int
    descriptors: int
    more: int
    last: bool
    left: int
    budget: int


def begin(address: int, word: int, length: int) -> tuple[list[tuple[int, int]], SegmentStep | None]:
    """What a command's own descriptor says (its two 64-bit words) of `length` bytes of data: the run, or the segment to read. SglError."""
    size, kind = word & 0xFFFF_FFFF, word >> 56
    if kind == DATA_BLOCK:
        if size != length:
            raise SglError(Status.SGL_DATA_LENGTH)
        return [(address, length)], None
    if kind in (SEGMENT, LAST_SEGMENT):
        return [], _segment(address, size, kind == LAST_SEGMENT, length, MAX_DESCRIPTORS)
    raise SglError(Status.SGL_TYPE)


def _segment(address: int, size: int, last: bool, left: int, budget: int) -> SegmentStep:
    """How to begin with a segment. SglError: it is empty, or no whole number of descriptors, or too long."""
    if not size or size % SIZE:
        raise SglError(Status.SGL_SEGMENT)
    if size // SIZE > budget:
        raise SglError(Status.SGL_COUNT)
    return _piece(address, size // SIZE, last, left, budget)


def _piece(address: int, count: int, last: bool, left: int, budget: int) -> SegmentStep:
    now = min(count, PAGE // SIZE)
    return SegmentStep(address, now, count - now, last, left, budget - now)


def go_on(current: SegmentStep, data: memoryview) -> tuple[list[tuple[int, int]], SegmentStep | None]:
    """The runs of a piece that was read, and the next piece. SglError."""
    runs: list[tuple[int, int]] = []
    left = current.left
    end = (
        current.descriptors - 1 if not current.more else -1
    )  # place of the segment's last descriptor, if it is here
    for place, (address, size, kind) in enumerate(
        _DESCRIPTOR.iter_unpack(data[: current.descriptors * SIZE])
    ):
        if kind == DATA_BLOCK:
            if size > left:
                raise SglError(Status.SGL_DATA_LENGTH)
            if size:
                runs.append((address, size))
                left -= size
        elif kind not in (SEGMENT, LAST_SEGMENT):
            raise SglError(Status.SGL_TYPE)
        elif place != end or current.last:
            raise SglError(Status.SGL_COUNT)
        else:
            return runs, _segment(address, size, kind == LAST_SEGMENT, left, current.budget)
    if current.more:
        at = current.address + current.descriptors * SIZE
        return runs, _piece(at, current.more, current.last, left, current.budget)
    if not current.last:  # another descriptor than that of a segment ends it
        raise SglError(Status.SGL_SEGMENT)
    if left:
        raise SglError(Status.SGL_DATA_LENGTH)
    return runs, None
