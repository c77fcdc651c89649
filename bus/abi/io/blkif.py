"""Block devices: ring requests and responses (io/blkif.h).

A ring slot is the union of request and response: 112 bytes on x86-64. `BLKIF_REQUEST_DISCARD` and
`BLKIF_REQUEST_INDIRECT` are other readings of the same slot, chosen by `operation`.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Layout, i16, u8, u16, u32, u64

BLKIF_OP_READ: Final = 0
BLKIF_OP_WRITE: Final = 1
BLKIF_OP_WRITE_BARRIER: Final = 2
BLKIF_OP_FLUSH_DISKCACHE: Final = 3
BLKIF_OP_RESERVED_1: Final = 4
BLKIF_OP_DISCARD: Final = 5
BLKIF_OP_INDIRECT: Final = 6
BLKIF_MAX_SEGMENTS_PER_REQUEST: Final = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST: Final = 8
BLKIF_DISCARD_SECURE: Final = 1 << 0
BLKIF_RSP_EOPNOTSUPP: Final = -2
BLKIF_RSP_ERROR: Final = -1
BLKIF_RSP_OKAY: Final = 0

VDISK_CDROM: Final = 0x1
VDISK_REMOVABLE: Final = 0x2
VDISK_READONLY: Final = 0x4


class blkif_request_segment(NamedTuple):
    """Sectors first_sect to last_sect (0 to 7, of 512 bytes, both included) of the granted page."""

    gref: u32
    first_sect: u8
    last_sect: u8


BLKIF_REQUEST_SEGMENT: Final = Layout(blkif_request_segment)


class blkif_request(NamedTuple):
    """nr_segments is at most BLKIF_MAX_SEGMENTS_PER_REQUEST; sector_number in sectors of 512 bytes; id is
    echoed."""

    operation: u8
    nr_segments: u8
    handle: u16
    id: u64
    sector_number: u64
    seg: Annotated[tuple[blkif_request_segment, ...], Array(blkif_request_segment, 11)]


BLKIF_REQUEST: Final = Layout(blkif_request)


class blkif_request_discard(NamedTuple):
    """For BLKIF_OP_DISCARD. flag: BLKIF_DISCARD_SECURE."""

    operation: u8
    flag: u8
    handle: u16
    id: u64
    sector_number: u64
    nr_sectors: u64


BLKIF_REQUEST_DISCARD: Final = Layout(blkif_request_discard)


class blkif_request_indirect(NamedTuple):
    """For BLKIF_OP_INDIRECT. indirect_op is the operation; the granted pages hold 512 segments of 8 bytes
    each."""

    operation: u8
    indirect_op: u8
    nr_segments: u16
    id: u64
    sector_number: u64
    handle: u16
    indirect_grefs: Annotated[tuple[int, ...], Array(u32, 8)]


BLKIF_REQUEST_INDIRECT: Final = Layout(blkif_request_indirect)


class blkif_response(NamedTuple):
    """status: BLKIF_RSP_*."""

    id: u64
    operation: u8
    status: i16


BLKIF_RESPONSE: Final = Layout(blkif_response)
