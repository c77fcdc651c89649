"""Physical region pages (NVMe 1.4, section 4.3), for a memory page size of 4 KiB (CC.MPS = 0)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from drivers.hw.nvme.spec import Status

PAGE: Final = 4096
ENTRY: Final = 8


class PrpError(Exception):
    """The PRPs are not as they must be; `status` is the command's."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class ListStep(NamedTuple):
    """A piece of a PRP list that has to be read: `entries` of 8 bytes at `address`; `chained`: the last of them is the address of
    the next piece; `left`: bytes of data that this piece and later ones describe."""

    address: int
    entries: int
    chained: bool
    left: int


def begin(prp1: int, prp2: int, length: int) -> tuple[list[tuple[int, int]], ListStep | None]:
    """The runs (address, bytes) that PRP1 and PRP2 name themselves, and the list to read if there is one. PrpError."""
    if prp1 & 3:
        raise PrpError(Status.INVALID_PRP_OFFSET)
    first = min(length, PAGE - (prp1 & PAGE - 1))
    left = length - first
    if not left:
        return [(prp1, first)], None
    if left <= PAGE:
        if prp2 & PAGE - 1:
            raise PrpError(Status.INVALID_PRP_OFFSET)
        return [(prp1, first), (prp2, left)], None
    return [(prp1, first)], step(prp2, left)


def step(address: int, left: int) -> ListStep:
    """How to read the list at `address` for `left` bytes of data. PrpError: not aligned to 8 bytes."""
    if address & ENTRY - 1:
        raise PrpError(Status.INVALID_PRP_OFFSET)
    need = (left + PAGE - 1) // PAGE
    fit = (PAGE - (address & PAGE - 1)) // ENTRY
    return ListStep(address, min(need, fit), need > fit, left)


def go_on(current: ListStep, data: memoryview) -> tuple[list[tuple[int, int]], ListStep | None]:
    """The runs of a piece that was read, and the next piece. PrpError: an entry has an offset in its page.

    Progress: only the first piece can be one entry long, because a chained piece must begin a page."""
    entries = struct.unpack_from(f"<{current.entries}Q", data)
    runs: list[tuple[int, int]] = []
    left = current.left
    for entry in entries[:-1] if current.chained else entries:
        if entry & PAGE - 1:
            raise PrpError(Status.INVALID_PRP_OFFSET)
        size = min(PAGE, left)
        runs.append((entry, size))
        left -= size
    if not current.chained:
        return runs, None
    if entries[-1] & PAGE - 1:
        raise PrpError(Status.INVALID_PRP_OFFSET)
    return runs, step(entries[-1], left)
