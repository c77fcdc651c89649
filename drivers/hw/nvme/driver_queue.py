"""A queue pair as the host has it: submission entries, PRP lists, completions by phase (NVM Express 1.4, section 4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from bus.abi.io.ring import full_barrier
from drivers.hw.nvme.spec import CQE_SIZE, DSM_RANGE, FLAG_SGL, SQE_SIZE, STATUS_PHASE, DsmRange, status_of

PAGE: Final = 4096
MAX_PRP_PAGES: Final = PAGE // 8 + 1
"""Pages of one command: one PRP list page, and PRP1."""
_ENTRY: Final = struct.Struct("<BBHI16xQQIIIIII")
_COMPLETION: Final = struct.Struct("<IIHHHH")


class Buffer(NamedTuple):
    """Memory of the driver's own: bytes in a row, also for the device. Page-aligned."""

    view: memoryview
    iova: int


class DmaMemory(Protocol):
    """Pages of the driver's domain; a guest frame's I/O virtual address is gfn << 12."""

    def allocate(self, pages: int) -> Buffer:
        """Zeroed pages in a row. MemoryError if there are none."""

    def free(self, buffer: Buffer) -> None:
        """The device does not use it any more."""


class Entry(NamedTuple):
    """A command before it has a place: fields as in `spec.Command`."""

    opcode: int
    nsid: int
    pages: Sequence[int] = ()
    """I/O virtual addresses: the first with an offset perhaps, the others of whole pages."""
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    ranges: Sequence[DsmRange] = ()
    """Of dataset management: put into the command's list page."""
    run: int = 0
    """Bytes that lie in a row from the one address of `pages` on, for an SGL; 0: PRPs."""


class Finished(NamedTuple):
    """A completion."""

    cid: int
    status: int
    """SCT << 8 | SC."""
    result: int


class QueueFault(Exception):
    """The device completed what was not asked: it must be reset."""


class QueuePair:
    """At most depth - 1 commands are under way, so neither queue can overflow."""

    def __init__(self, memory: DmaMemory, qid: int, depth: int, *, lists: bool = True) -> None:
        """`depth`: entries of both queues. `lists`: a list page for each command (for transfers of three pages and more).
        MemoryError."""
        self.qid: Final = qid
        self.depth: Final = depth
        self._memory: Final = memory
        self.sq: Final = memory.allocate(-(-depth * SQE_SIZE // PAGE))
        self.cq: Final = memory.allocate(-(-depth * CQE_SIZE // PAGE))
        self._lists: Final = memory.allocate(depth) if lists else None
        self.sq.view[:] = bytes(len(self.sq.view))
        self.cq.view[:] = bytes(len(self.cq.view))
        self._free: Final = list(range(depth - 1))
        self._busy: Final[dict[int, None]] = {}
        self.tail = 0
        self.head = 0
        self._phase = STATUS_PHASE

    @property
    def room(self) -> int:
        """Commands that may still be put."""
        return len(self._free)

    @property
    def busy(self) -> int:
        """Commands under way."""
        return len(self._busy)

    def put(self, entry: Entry) -> int:
        """Write a submission entry: its command identifier. The caller rings the tail doorbell after the last one.
        There must be room."""
        cid = self._free.pop()
        self._busy[cid] = None
        pages = entry.pages
        first = pages[0] if pages else 0
        second = 0
        if len(pages) == 2:
            second = pages[1]
        elif len(pages) > 2:
            second = self._list(cid, struct.pack(f"<{len(pages) - 1}Q", *pages[1:]))
        elif entry.run:
            second = entry.run  # a data block descriptor: its type is 0
        elif entry.ranges:
            first = self._list(cid, b"".join(DSM_RANGE.pack(part) for part in entry.ranges))
        _ENTRY.pack_into(
            self.sq.view,
            self.tail * SQE_SIZE,
            entry.opcode,
            FLAG_SGL if entry.run else 0,
            cid,
            entry.nsid,
            first,
            second,
            entry.cdw10,
            entry.cdw11,
            entry.cdw12,
            0,
            0,
            0,
        )
        self.tail = (self.tail + 1) % self.depth
        return cid

    def list_of(self, cid: int) -> int:
        """I/O virtual address of a command's list page; 0 if there are none."""
        return self._lists.iova + cid * PAGE if self._lists is not None else 0

    def _list(self, cid: int, data: bytes) -> int:
        if self._lists is None or len(data) > PAGE:
            raise ValueError(f"{len(data)} bytes of list")
        at = cid * PAGE
        self._lists.view[at : at + len(data)] = data
        return self._lists.iova + at

    def take(self) -> list[Finished]:
        """Completions that have come. The caller rings the head doorbell if there are any. QueueFault for one that
        answers nothing."""
        found: list[Finished] = []
        view = self.cq.view
        while len(found) < self.depth:
            at = self.head * CQE_SIZE
            if view[at + 14] & STATUS_PHASE != self._phase:
                break
            full_barrier()  # the rest of the entry is read after its phase
            result, _, _, sqid, cid, field = _COMPLETION.unpack_from(view, at)
            if sqid != self.qid or cid not in self._busy:
                raise QueueFault(f"queue {self.qid}: a completion for command {cid} of queue {sqid}")
            del self._busy[cid]
            self._free.append(cid)
            found.append(Finished(cid, status_of(field), result))
            self.head += 1
            if self.head == self.depth:
                self.head, self._phase = 0, self._phase ^ STATUS_PHASE
        return found

    def release(self) -> None:
        """The device is reset: it does not use the memory any more."""
        for buffer in (self.sq, self.cq, self._lists):
            if buffer is not None:
                self._memory.free(buffer)
