"""The NVMe controller and its media, as a `DeviceModel`. Media I/O is done in line: it is a copy from or to the page cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from bus.log import Logger
from bus.messages.device import Bar
from bus.trace import Kind, Trace, off
from domains.devices.runtime import Batch
from domains.devices.runtime import Kind as DeviceKind
from drivers.hw.nvme import spec
from drivers.hw.nvme.controller import Controller
from drivers.hw.nvme.dma import DmaBatch
from drivers.hw.nvme.io import MediaOp, MediaRequest, MediaResult
from drivers.hw.nvme.media import Media, MediaError
from drivers.hw.nvme.pages import Counters, Identity, Namespace

LOG: Final = Logger("nvme")
OPERATIONS = list(MediaOp)
"""Their places are what a trace record says."""
BURST: Final = 16
BURST_BYTES: Final = 1 << 20
"""Requests and bytes that the media do before what is done goes out: others work on that while the media do the rest."""
MAX_REPORTS = 20
"""Media errors that go to the log, a device's life long."""


class Disks:
    """Carries out media requests on the namespaces' media."""

    def __init__(self, media: dict[int, Media]) -> None:
        self.media = media
        self._reports = 0

    def perform(self, request: MediaRequest, staging: memoryview) -> MediaResult:
        """Do it."""
        media = self.media[request.nsid]
        view = staging[request.position : request.position + request.length]
        try:
            if request.op is MediaOp.READ:
                media.read(request.offset, view)
            elif request.op is MediaOp.WRITE:
                media.write(request.offset, view, request.durable)
            elif request.op is MediaOp.FLUSH:
                media.flush()
            elif request.op is MediaOp.ZERO:
                media.zero(request.offset, request.length, request.deallocate, request.durable)
            elif request.op is MediaOp.DISCARD:
                media.discard(request.offset, request.length)
            else:
                data = memoryview(bytearray(request.length))
                media.read(request.offset, data)
                if data != view:
                    return MediaResult.MISCOMPARE
        except MediaError as error:
            if self._reports < MAX_REPORTS:
                self._reports += 1
                LOG.warning(str(error), namespace=request.nsid)
            return MediaResult.FULL if error.full else MediaResult.FAILED
        return MediaResult.OK

    def used_blocks(self, nsid: int, shift: int) -> int:
        """For IDENTIFY."""
        try:
            return self.media[nsid].used() >> shift
        except (MediaError, OSError):
            return 0


class NvmeModel:
    """One epoch of the device. Implements DeviceModel."""

    def __init__(
        self,
        identity: Identity,
        disks: Disks,
        counters: Counters,
        staging: memoryview,
        trace: Trace | None = None,
    ) -> None:
        self._trace = trace or off()
        self.controller = Controller(identity, staging, counters, self._trace)
        self._disks = disks
        self._staging = staging
        for space in identity.namespaces.values():
            self.controller.used_blocks[space.nsid] = disks.used_blocks(space.nsid, space.shift)
        self.access = self.controller.access
        self.dma_done = self.controller.dma_done
        self.tick = self.controller.tick
        self.next_deadline = self.controller.next_deadline

    def doorbells(self, now: int, bar: int, words: memoryview) -> None:
        """See DeviceModel."""
        self.controller.doorbells(now, words)

    def step(self, now: int) -> tuple[list[tuple[int, int, int]], Sequence[Batch]]:
        """See DeviceModel."""
        controller = self.controller
        count, size = BURST, BURST_BYTES
        while count > 0 and size > 0 and (requests := controller.take_media(count, size)):
            for request in requests:
                count -= 1
                size -= request.length
                watched = self._trace.on[0]
                began = self._trace.now() if watched else 0
                result = self._disks.perform(request, self._staging)
                if watched:
                    spent = self._trace.now() - began
                    op = OPERATIONS.index(request.op)
                    extent = (request.offset, request.length)
                    self._trace.add(Kind.MEDIUM, request.nsid, 0, op, *extent, spent, time=began)
                controller.media_done(now, request.token, result)
        clears = [(spec.BAR, offset, length) for offset, length in controller.take_clears()]
        batches: list[DmaBatch] = controller.take_batches()
        return clears, batches

    @property
    def unfinished(self) -> bool:
        """See DeviceModel."""
        return self.controller.media_left

    def detach(self) -> None:
        """See DeviceModel."""
        self.controller.release()


def kind(
    identity: Identity,
    media: dict[int, Media],
    trace: Trace | None = None,
    power_losses: Callable[[], int] = lambda: 0,
) -> DeviceKind:
    """How the runtime makes this device. Counters live as long as the process, but for `power_losses`: how often the media lost what
    they had not flushed (files of the host never do: the host's end is everybody's)."""
    disks = Disks(media)
    counters = Counters()

    def make(staging: memoryview) -> NvmeModel:
        counters.unsafe_shutdowns = power_losses()
        return NvmeModel(identity, disks, counters, staging, trace)

    bar = Bar(
        index=spec.BAR,
        size=spec.BAR_SIZE,
        doorbell_offset=spec.DOORBELL_OFFSET,
        doorbell_length=spec.DOORBELL_LENGTH,
    )
    return DeviceKind(
        bars=[bar],
        vectors=identity.vectors,
        make=make,
    )


def namespaces(media: dict[int, Media], shifts: dict[int, int]) -> dict[int, Namespace]:
    """Namespaces as large as their media. ValueError: a size that is no multiple of the block size."""
    spaces: dict[int, Namespace] = {}
    for nsid, one in media.items():
        shift = shifts.get(nsid, 9)
        if one.size & (1 << shift) - 1:
            raise ValueError(f"namespace {nsid}: {one.size} bytes are not whole blocks of {1 << shift}")
        spaces[nsid] = Namespace(nsid, one.size >> shift, shift, one.read_only)
    return spaces
