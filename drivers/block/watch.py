"""What a disk's back end tells of itself: trace records of each request's life, and counters as blkback has them."""

from __future__ import annotations

from typing import Final

from bus.abi.io.blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
)
from bus.trace import Kind, Trace, off
from drivers.block.requests import Request

# Places of the counters: blkback's oo_req, rd_req, wr_req, f_req, ds_req, rd_sect, wr_sect (sectors of 512 bytes).
OUT_OF_REQUESTS, READS, WRITES, FLUSHES, DISCARDS, READ_SECTORS, WRITTEN_SECTORS = range(7)
_OPERATIONS: Final = {
    BLKIF_OP_READ: (READS, READ_SECTORS),
    BLKIF_OP_WRITE: (WRITES, WRITTEN_SECTORS),
    BLKIF_OP_WRITE_BARRIER: (WRITES, WRITTEN_SECTORS),
    BLKIF_OP_FLUSH_DISKCACHE: (FLUSHES, -1),
    BLKIF_OP_DISCARD: (DISCARDS, -1),
}


def counter_key(domain: int, disk: int) -> int:
    """The key of a disk's slot in the counters page: the frontend's domain, and the disk's number."""
    return 1 << 63 | domain << 32 | disk


def counter_disk(key: int) -> tuple[int, int] | None:
    """(domain, disk) of a key; None: it is of something else."""
    return (key >> 32 & 0x7FFF_FFFF, key & 0xFFFF_FFFF) if key >> 63 else None


class DiskTrace:
    """One disk's."""

    def __init__(
        self,
        trace: Trace | None = None,
        counters: memoryview | None = None,
        *,
        domain: int = 0,
        disk: int = 0,
        device: int = 0,
    ) -> None:
        """`counters`: its slot, or None: nobody counts."""
        self.trace: Final = trace or off()
        self._counters: Final = counters if counters is not None else memoryview(bytearray(56)).cast("Q")
        self._domain: Final = domain
        self._disk: Final = disk
        self._device: Final = device

    def count(self, request: Request) -> None:
        """A request is answered."""
        places = _OPERATIONS.get(request.op)
        if places is not None:
            number, sectors = places
            self._counters[number] += 1
            if sectors >= 0:
                self._counters[sectors] += request.sectors

    def starved(self, count: int) -> None:
        """So many requests have to wait because the device takes no more (VBD_OO)."""
        self._counters[OUT_OF_REQUESTS] += count

    def taken(self, ring: int, request: Request) -> None:
        """It was copied from the ring, and is in the ledger."""
        what = (request.id, request.op, request.sector, request.sectors)
        self.trace.add(Kind.TAKEN, ring, self._domain, self._disk, request.index, *what)

    def command(self, ring: int, request: Request, token: int) -> None:
        """It goes to storage, its frames mapped for the device."""
        trace, domain, disk, index = self.trace, self._domain, self._disk, request.index
        trace.add(Kind.COMMAND, ring, domain, disk, index, token, self._device, request.op)
        mapped = request.mapped or ()
        for number, ((ref, _, _), (iova, length)) in enumerate(zip(request.segments, mapped, strict=False)):
            trace.add(Kind.SEGMENT, ring, domain, disk, index, number, ref, iova, length)

    def answered(self, ring: int, request: Request) -> None:
        """Its response is in the ring."""
        status = request.status or 0
        self.trace.add(Kind.ANSWERED, ring, self._domain, self._disk, request.index, status & 0xFFFF)

    def kicked(self, ring: int, remote: int, local: int, *, outgoing: bool) -> None:
        """The frontend notified us, or we it."""
        self.trace.add(Kind.KICKED, ring, self._domain, self._disk, remote, local, outgoing)
