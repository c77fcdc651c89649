"""DMA itself: bytes move between a device's staging memory and frames, in the step in which they were translated.

Two copies a byte: the device process to or from staging memory that it shares with the hypervisor, and the hypervisor
between that and the frame. A request is all or nothing: all its addresses are translated before the first byte moves.
If a frame is on its way into a grant window or home, the request waits for it and is translated anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from bus.addresses import Bdf, DomId, Mfn
from hypervisor.core.iommu import DmaFault, Iommu, Piece, Segment
from hypervisor.core.iommu_faults import FaultReason

MAX_WAITS: Final = 8
"""How often one request waits for frames on the move before it is refused."""
MAX_WAITING: Final = 256
"""Requests of one device that may wait at the same time."""


class Staging(Protocol):
    """A device's staging memory, as the hypervisor has it mapped. The shell copies straight between the mappings."""

    size: int
    """Bytes; fixed when it was made (sealed)."""

    def to_frame(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        """Copy from the staging memory into a frame."""

    def from_frame(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        """Copy from a frame into the staging memory."""


class StillFrames(Protocol):
    """What DMA needs of the grant tables (`GrantTables`)."""

    def moving(self, mfn: Mfn) -> bool:
        """Nobody may touch the frame just now."""

    def when_still(self, now: int, mfns: set[Mfn], domain: DomId, run: Callable[[bool], None]) -> None:
        """Call `run` when that is over; with False if it will not be."""


class DmaRequest(NamedTuple):
    """What a device asks: its segments in turn, with the staging memory from `position` on."""

    bdf: Bdf
    epoch: int
    segments: list[Segment]
    position: int


@dataclass(frozen=True, slots=True)
class DmaResult:
    """The answer to the device. `fault` None: all bytes moved; else none did."""

    moved: int
    fault: FaultReason | None = None
    iova: int = 0


class DmaService:
    """Carries out DMA requests. `written` is told of each frame that was written (translated code of it is stale)."""

    def __init__(self, iommu: Iommu, frames: StillFrames, written: Callable[[Mfn], None]) -> None:
        self._iommu = iommu
        self._frames = frames
        self._written = written
        self._waiting: dict[Bdf, int] = {}

    def submit(
        self, now: int, request: DmaRequest, staging: Staging, done: Callable[[DmaResult], None]
    ) -> None:
        """Carry the request out and call `done`, at once unless a frame must be waited for."""
        self._try(now, request, staging, done, MAX_WAITS)

    def _try(
        self, now: int, request: DmaRequest, staging: Staging, done: Callable[[DmaResult], None], left: int
    ) -> None:
        iommu = self._iommu
        try:
            pieces = iommu.translate(now, request.bdf, request.epoch, request.segments)
            total = sum(segment.length for segment in request.segments)
            if request.position < 0 or request.position + total > staging.size:
                first = request.segments[0]
                raise iommu.refuse(now, request.bdf, first.iova, first.write, FaultReason.MALFORMED)
        except DmaFault as fault:
            done(DmaResult(0, fault.reason, fault.iova))
            return
        moving = {p.mfn for run in pieces for p in run if self._frames.moving(p.mfn)}
        if not moving:
            self._move(request, pieces, staging)
            done(DmaResult(total))
            return
        self._wait(now, request, staging, done, left, moving)

    def _wait(
        self, now: int, request: DmaRequest, staging: Staging, done: Callable[[DmaResult], None], left: int,
        moving: set[Mfn],
    ) -> None:  # fmt: skip
        waiting = self._waiting.get(request.bdf, 0)
        domain = self._iommu.device(request.bdf).domain
        first = request.segments[0]
        reason = FaultReason.NO_WRITE_PERMISSION if first.write else FaultReason.NO_READ_PERMISSION

        def refuse() -> None:
            fault = self._iommu.refuse(now, request.bdf, first.iova, first.write, reason)
            done(DmaResult(0, fault.reason, fault.iova))

        if not left or waiting >= MAX_WAITING or domain is None:
            refuse()
            return
        self._waiting[request.bdf] = waiting + 1

        def go_on(still: bool) -> None:
            self._waiting[request.bdf] -= 1
            if not self._waiting[request.bdf]:
                del self._waiting[request.bdf]
            if still:
                self._try(now, request, staging, done, left - 1)
            else:
                refuse()

        self._frames.when_still(now, moving, domain, go_on)

    def _move(self, request: DmaRequest, pieces: list[list[Piece]], staging: Staging) -> None:
        device = self._iommu.device(request.bdf)
        device.requests += 1
        position = request.position
        for segment, run in zip(request.segments, pieces, strict=True):
            if segment.write:
                for mfn, offset, length in run:
                    staging.to_frame(position, mfn, offset, length)
                    position += length
                    self._written(mfn)
                device.bytes_written += segment.length
            else:
                for mfn, offset, length in run:
                    staging.from_frame(mfn, offset, position, length)
                    position += length
                device.bytes_read += segment.length
