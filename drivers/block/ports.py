"""What the block back end needs from outside: storage, grants, a way to notify. The shell provides them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol


class Op(IntEnum):
    """What storage is asked to do."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    """Not asked by blkif; for the driver's other users."""


class Extent(NamedTuple):
    """Bytes of one granted frame, as the device sees them. Never crosses a page."""

    iova: int
    length: int


class Command(NamedTuple):
    """One command. `sector` and `sectors` are in units of 512 bytes."""

    token: int
    op: Op
    sector: int
    sectors: int
    extents: Sequence[tuple[int, int]] = ()
    """`Extent`s (plain tuples, for speed): their lengths add up to the sectors of a read or write."""
    fua: bool = False
    secure: bool = False
    """Of a discard: what was there must be unrecoverable."""


class Storage(Protocol):
    """A disk. Each submitted command is answered exactly once by `Backend.complete` (unless `Backend.storage_reset`
    says that all are lost), in any order, and not before a FLUSH has put every write completed earlier on
    stable storage."""

    @property
    def sectors(self) -> int:
        """Capacity in units of 512 bytes."""

    @property
    def block_size(self) -> int:
        """Smallest unit that it can write: 512 or 4096 bytes."""

    @property
    def unsafe_shutdowns(self) -> int:
        """How often it lost power, and with it perhaps every write that no FLUSH covers (modulo 2^32)."""

    def submit(self, commands: Sequence[Command]) -> None:
        """Carry them out. Must not complete them before it returns; must queue what the device cannot take yet."""


class GrantMapper(Protocol):
    """The frontend's granted frames: one hypercall for each call here, however many frames."""

    def map_frames(self, items: Sequence[tuple[int, bool]]) -> list[int]:
        """GNTMAP_device_map each (ref, writable): the I/O virtual address of the page, or a negative GNTST_*."""

    def unmap_frames(self, iovas: Sequence[int]) -> None:
        """Undo `map_frames`: afterwards the device cannot reach the frames, and the granter may end the grants."""

    def read_frames(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        """A private copy of the first bytes of each (ref, length), as GNTTABOP_copy makes it, or a GNTST_*."""
