"""Ring slots of block devices as bytes, in the two ABIs that a frontend can name in its `protocol` node.

The layouts of x86_64-abi are those of `bus.abi.io.blkif`; in x86_32-abi 64-bit fields are aligned to 4 bytes
(the i386 rule), which moves everything behind the first four bytes. A response is the same 12 bytes in both.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

from bus.abi.io.blkif import BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_DISCARD, BLKIF_OP_INDIRECT
from bus.abi.io.protocols import XEN_IO_PROTO_ABI_X86_32, XEN_IO_PROTO_ABI_X86_64

Segment = tuple[int, int, int]
"""(grant reference, first sector, last sector) of `blkif_request_segment`; both sectors included."""

SEGMENT: Final = struct.Struct("<IBBxx")
SEGMENTS_PER_PAGE: Final = 4096 // SEGMENT.size
RESPONSE: Final = struct.Struct("<QBxh")
"""id, operation, status: BLKIF_RSP_*."""


class _Segments(dict[int, struct.Struct]):
    """So many segments as one structure, made when first used: to make all 513 takes longer than all the rest of this package."""

    def __missing__(self, count: int) -> struct.Struct:
        if not 0 <= count <= SEGMENTS_PER_PAGE:
            raise struct.error(f"{count} segments")
        made = self[count] = struct.Struct("<" + "IBBxx" * count)
        return made


_SEGMENTS: Final = _Segments()


class Abi(NamedTuple):
    """How one ABI lays a slot out."""

    protocol: str
    slot: int
    """Bytes of a slot."""
    head: struct.Struct
    """operation, nr_segments or flag or indirect_op, handle or nr_segments, id, sector_number."""
    segments: int
    """Offset of the segments; nr_sectors of a discard is there as well."""
    indirect_grefs: int
    handle: int
    """Offset of an indirect request's handle."""


X86_64: Final = Abi(XEN_IO_PROTO_ABI_X86_64, 112, struct.Struct("<BBH4xQQ"), 24, 28, 24)
X86_32: Final = Abi(XEN_IO_PROTO_ABI_X86_32, 108, struct.Struct("<BBHQQ"), 20, 24, 20)
ABIS: Final = {abi.protocol: abi for abi in (X86_64, X86_32)}


def unpack_segments(data: bytes, offset: int, count: int) -> list[Segment]:
    """`count` (at most 512) segments at `offset`. struct.error if they are not all there."""
    flat = _SEGMENTS[count].unpack_from(data, offset)
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def pack_segments(segments: Sequence[Segment]) -> bytes:
    """The segments' bytes, 8 each; at most 512."""
    return _SEGMENTS[len(segments)].pack(*chain.from_iterable(segments))


def pack_request(
    abi: Abi, operation: int, ident: int, sector: int, segments: Sequence[Segment] = (), handle: int = 0
) -> bytes:
    """A read, write, flush or barrier. ValueError for more than 11 segments."""
    if len(segments) > BLKIF_MAX_SEGMENTS_PER_REQUEST:
        raise ValueError(f"{len(segments)} segments do not fit a slot")
    return abi.head.pack(operation, len(segments), handle, ident, sector) + pack_segments(segments)


def pack_discard(abi: Abi, flag: int, ident: int, sector: int, sectors: int, handle: int = 0) -> bytes:
    """A BLKIF_OP_DISCARD."""
    return abi.head.pack(BLKIF_OP_DISCARD, flag, handle, ident, sector) + struct.pack("<Q", sectors)


def pack_indirect(
    abi: Abi, operation: int, ident: int, sector: int, count: int, pages: Sequence[int], handle: int = 0
) -> bytes:
    """A BLKIF_OP_INDIRECT with `count` segments in the granted `pages`."""
    head = abi.head.pack(BLKIF_OP_INDIRECT, operation, count, ident, sector)
    head = head.ljust(abi.handle, b"\0") + struct.pack("<H", handle)
    return head.ljust(abi.indirect_grefs, b"\0") + struct.pack(f"<{len(pages)}I", *pages)
