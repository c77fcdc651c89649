"""The memory that a guest's process shares with its device model: one sealed memfd for an ioreq server.

| at | what | written by |
| --- | --- | --- |
| 0 | one `struct ioreq` (hvm/ioreq.h) a vCPU: the accesses under way | both, in turn by its state |
| PRODUCED, CONSUMED | indexes of the ring of notes, free running | device model; guest's process |
| NOTES | the ring: what the device model has done or wants done, in order | device model; `status` by the guest's process |
| POSTED, TAKEN | indexes of the ring of posted writes, free running | guest's process; device model |
| POSTS | the ring: writes that need no answer, in order; they come before any access that is made ready later | guest's process |
| BLOCK | data of REP INS and REP OUTS, one page a vCPU | both, with the ioreq |
| STAGING | bytes on their way to or from the guest's memory | both |
| VRAM | the frame buffer, which the guest's process maps into the guest | guest and device model |

Beside it go four doorbells: `request` (an ioreq is ready), `response` (it is answered), `note` (look at the ring), `done` (the note
that waits for it was carried out). Neither side believes what the other writes: all is read once into a copy and checked.

Interrupt lines and DMA are notes and not hypercalls, so that their order against each other and against the answer of an ioreq is
the order of the ring: translations of the pages that DMA wrote are dropped before its interrupt is seen.
"""

from __future__ import annotations

import mmap
import os
import threading
from struct import Struct
from typing import Final, NamedTuple

from bus import sealed
from bus.abi.hvm.ioreq import (
    IOREQ,
    STATE_IOREQ_INPROCESS,
    STATE_IOREQ_NONE,
    STATE_IOREQ_READY,
    STATE_IORESP_READY,
)
from bus.doorbell import Doorbell

MAX_VCPUS: Final = 128
PRODUCED: Final = 0x1000
CONSUMED: Final = 0x1040
POSTED: Final = 0x1080
TAKEN: Final = 0x10C0
NOTES: Final = 0x2000
NOTE_SIZE: Final = 32
RING: Final = 256
"""Notes that may wait."""
POSTS: Final = 0x10000
POST_SIZE: Final = 16
POST_RING: Final = 4096
"""Writes that may wait."""
BLOCK: Final = 0x80000
BLOCK_SIZE: Final = 0x1000
STAGING: Final = 0x100000
STAGING_SIZE: Final = 0x100000
VRAM: Final = 0x200000
VRAM_SIZE: Final = 16 << 20
SIZE: Final = VRAM + VRAM_SIZE
BELLS: Final = ("request", "response", "note", "done")
RUNG_BY_GUEST: Final = ("request", "done")
"""The others are the device model's to ring."""

ISA_IRQ, PCI_INTX, MSI, READ, WRITE, MAP, UNMAP, LINK, A20 = range(1, 10)
"""Notes: a line of an ISA interrupt (a: line, b: level); of a PCI device (a: device << 2 | pin, b: level); an interrupt message
(address, a: data); bytes from the guest's memory to the staging area (address, length, place), which waits for `done`; bytes to
the guest's memory; the frame buffer at a guest-physical address (address, length, place in it; whole pages); no longer; the ISA interrupt of a PCI link (a: link, b: line,
0 for none); address line 20 as the keyboard controller has it (a: level)."""
PENDING, CARRIED_OUT, REFUSED = range(3)
"""Status of a note."""
_NOTE: Final = Struct("<IIIIQII")
_POST: Final = Struct("<QIBB2x")
_IOREQ: Final = Struct("<QQIIIHBB")
_STATE_AT: Final = 30
"""Of the byte with the state in a struct ioreq."""
assert _IOREQ.size == IOREQ.size == 32


class Note(NamedTuple):
    """One entry of the ring."""

    kind: int
    a: int = 0
    b: int = 0
    address: int = 0
    length: int = 0
    place: int = 0


class Access(NamedTuple):
    """What a `struct ioreq` says. `steps` > 1 with `block`: so many accesses, whose data is in the vCPU's block."""

    address: int
    data: int
    steps: int
    size: int
    kind: int
    """IOREQ_TYPE_*."""
    read: bool
    block: bool


class IoreqArea:
    """A mapping of the memory."""

    def __init__(self, fd: int) -> None:
        """Maps it; the descriptor stays the caller's. ValueError if it is no such memfd."""
        sealed.check(fd, SIZE)
        self._mapping: Final = mmap.mmap(fd, SIZE)
        self.octets: Final = memoryview(self._mapping)
        # Indexes are loaded and stored whole: `struct` with a byte order goes byte by byte, and the other side would see halves.
        self._words: Final = self.octets.cast("I")

    # --- accesses

    def put_access(self, vcpu: int, access: Access) -> None:
        """Fill in a vCPU's request and make it ready."""
        at = vcpu * _IOREQ.size
        flags = STATE_IOREQ_NONE | int(access.block) << 4 | int(access.read) << 5
        _IOREQ.pack_into(
            self.octets, at, access.address, access.data, access.steps, access.size, 0, 0, flags, access.kind
        )
        self.octets[at + _STATE_AT] = flags | STATE_IOREQ_READY

    def ready(self, vcpu: int) -> bool:
        """A vCPU's request waits for the device model."""
        return self.octets[vcpu * _IOREQ.size + _STATE_AT] & 0xF == STATE_IOREQ_READY

    def take_access(self, vcpu: int) -> Access:
        """A vCPU's request as it is now, unchecked; it is in process from now on."""
        at = vcpu * _IOREQ.size
        address, data, count, size, _, _, flags, kind = _IOREQ.unpack_from(self.octets, at)
        self.octets[at + _STATE_AT] = flags & 0xF0 | STATE_IOREQ_INPROCESS
        return Access(address, data, count, size, kind, bool(flags & 0x20), bool(flags & 0x10))

    def answer(self, vcpu: int, data: int) -> None:
        """The value that was read (or 0)."""
        at = vcpu * _IOREQ.size
        self.octets[at + 8 : at + 16] = data.to_bytes(8, "little")
        self.octets[at + _STATE_AT] = self.octets[at + _STATE_AT] & 0xF0 | STATE_IORESP_READY

    def answered(self, vcpu: int) -> bool:
        """A vCPU's request is answered."""
        return self.octets[vcpu * 32 + _STATE_AT] & 0xF == STATE_IORESP_READY

    def take_answer(self, vcpu: int) -> int | None:
        """The value, if the request is answered; the slot is free then."""
        at = vcpu * _IOREQ.size
        if self.octets[at + _STATE_AT] & 0xF != STATE_IORESP_READY:
            return None
        data = int.from_bytes(self.octets[at + 8 : at + 16], "little")
        self.octets[at + _STATE_AT] = STATE_IOREQ_NONE
        return data

    def block(self, vcpu: int) -> memoryview:
        """The page for data of string instructions of a vCPU."""
        start = BLOCK + vcpu * BLOCK_SIZE
        return self.octets[start : start + BLOCK_SIZE]

    # --- posted writes

    def put_post(self, index: int, access: Access) -> None:
        """A write of at most four bytes, at a free-running index; `POSTED` is the caller's business."""
        at = POSTS + index % POST_RING * POST_SIZE
        _POST.pack_into(self.octets, at, access.address, access.data & 0xFFFFFFFF, access.size, access.kind)

    def get_post(self, index: int) -> Access:
        """A copy of it, unchecked."""
        address, data, size, kind = _POST.unpack_from(self.octets, POSTS + index % POST_RING * POST_SIZE)
        return Access(address, data, 1, size, kind, False, False)

    # --- notes

    def word(self, at: int) -> int:
        """A 32-bit word."""
        return self._words[at >> 2]

    def set_word(self, at: int, value: int) -> None:
        """Store a 32-bit word."""
        self._words[at >> 2] = value & 0xFFFFFFFF

    def put_note(self, index: int, note: Note) -> None:
        """Write the note of a free-running index; `PRODUCED` is the caller's business."""
        at = NOTES + index % RING * NOTE_SIZE
        _NOTE.pack_into(
            self.octets, at, note.kind, note.a, note.b, PENDING, note.address, note.length, note.place
        )

    def get_note(self, index: int) -> Note:
        """A copy of the note of a free-running index."""
        kind, a, b, _, address, length, place = _NOTE.unpack_from(
            self.octets, NOTES + index % RING * NOTE_SIZE
        )
        return Note(kind, a, b, address, length, place)

    def set_status(self, index: int, status: int) -> None:
        """The guest's process says what became of a note."""
        self.set_word(NOTES + index % RING * NOTE_SIZE + 12, status)

    def status(self, index: int) -> int:
        """What became of a note."""
        return self.word(NOTES + index % RING * NOTE_SIZE + 12)

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self.octets.release()
        self._mapping.close()


_lock: Final = threading.Lock()


def fence() -> None:
    """What this thread stored is seen by others before it loads anything further: a lock's atomic instruction does that on x86."""
    with _lock:
        pass


def create() -> int:
    """The descriptor of new memory. OSError if it is short."""
    return sealed.create("domicile-ioreq", SIZE)


def bells() -> tuple[list[Doorbell], list[Doorbell]]:
    """The ends of new doorbells, in the order of BELLS: the guest's process's, the device model's. OSError if descriptors are short."""
    guest: list[Doorbell] = []
    model: list[Doorbell] = []
    try:
        for name in BELLS:
            ringer, listener = Doorbell.pair()
            by_guest = name in RUNG_BY_GUEST
            guest.append(ringer if by_guest else listener)
            model.append(listener if by_guest else ringer)
    except OSError:
        for bell in (*guest, *model):
            bell.close()
        raise
    return guest, model


def map_area(fd: int) -> IoreqArea:
    """Map the memory and close the descriptor."""
    try:
        return IoreqArea(fd)
    finally:
        os.close(fd)
