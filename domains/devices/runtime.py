"""The process around a device: its link to the hypervisor, doorbell pages, DMA. One thread.

The device itself is a `DeviceModel`: a state machine without I/O, made anew for each `Attach` (a function-level reset in a new epoch).
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bus import sealed
from bus.credentials import from_descriptor
from bus.dma_lane import DeviceEnd, LaneClosed, pack
from bus.doorbell import Doorbell
from bus.link import CALL_TIMEOUT_S, DeviceLink, HypervisorGone
from bus.log import Logger
from bus.messages.device import Access, AccessDone, Attach, Bar, DeviceHello, Dma, DmaDone
from bus.messages.domain import Refused
from bus.messages.envelope import Message
from bus.packets import close_all
from bus.process import Start
from domains.native.reactor import Reactor

LOG: Final = Logger("device")
MAX_STAGING: Final = 256 << 20


class Batch(Protocol):
    """A DMA batch, as `bus.messages.device.Dma` has it."""

    @property
    def token(self) -> int:
        """Comes back in the answer."""

    @property
    def items(self) -> list[tuple[int, int, bool, int]]:
        """(I/O virtual address, length, to memory?, staging position)."""

    @property
    def vectors(self) -> list[int]:
        """MSI-X entries."""


class DeviceModel(Protocol):
    """A device without I/O, in one epoch. Times are nanoseconds of a monotonic clock."""

    def access(self, now: int, space: int, offset: int, size: int, value: int | None) -> int:
        """A register is read (`value` None) or written."""

    def doorbells(self, now: int, bar: int, words: memoryview) -> None:
        """Look at a doorbell page (32-bit words) for what changed."""

    def dma_done(self, now: int, token: int, fault: int) -> None:
        """A batch is over."""

    def tick(self, now: int) -> None:
        """A deadline has come."""

    def next_deadline(self) -> int | None:
        """When `tick` is due."""

    def step(self, now: int) -> tuple[list[tuple[int, int, int]], Sequence[Batch]]:
        """Do some of what can be done now: (BAR, offset, length) of the doorbells to zero, and DMA to carry out."""

    @property
    def unfinished(self) -> bool:
        """There is more to do: call `step` again when that was sent."""

    def detach(self) -> None:
        """The end of its epoch: it gives the staging memory back."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a device says of itself, and how to make it: `make(staging)`. ValueError: staging memory that does not do."""

    bars: list[Bar]
    vectors: int
    make: Callable[[memoryview], DeviceModel]


class _Page:
    """A doorbell range that is shared with the domain that owns the device."""

    def __init__(self, bar: Bar, page: int, bell: int) -> None:
        self.bar = bar.index
        self.length = bar.doorbell_length
        self.bell = Doorbell(bell)
        try:
            sealed.check(page, self.length)
            self._mapping = mmap.mmap(page, self.length)
        finally:
            os.close(page)
        self.octets = memoryview(self._mapping)
        self.words = self.octets.cast("I")

    def close(self) -> None:
        self.words.release()
        self.octets.release()
        self._mapping.close()
        self.bell.close()


class DeviceProcess:
    """Serves one device until the hypervisor goes away."""

    def __init__(self, start: Start, kind: Kind, reactor: Reactor | None = None) -> None:
        """Connects and says hello."""
        self.reactor = reactor or Reactor()
        self.kind = kind
        self.link = DeviceLink(
            from_descriptor(start.fds["keys"]), socket.socket(fileno=start.fds["descriptors"])
        )
        self.link.on_message = self._message
        self.model: DeviceModel | None = None
        self.epoch = 0
        self._staging: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._pages: list[_Page] = []
        self._lane: DeviceEnd | None = None
        self._answers: list[AccessDone] = []
        self._timer = 0
        self.batches = 0
        self.reactor.reader(self.link.fileno(), self.poll)
        self.link.send(
            DeviceHello(
                pid=os.getpid(),
                bars=kind.bars,
                vectors=kind.vectors,
            )
        )
        self.reactor.soon(self.poll)

    def run(self) -> None:
        """Serve."""
        self.reactor.run()

    def poll(self) -> None:
        """Take what came on the link, and what follows from it, until there is nothing more: libzmq signals its descriptor only
        for what comes after a receive found nothing."""
        while True:
            count = self.link.dispatch()
            if not self._step() and not count and not (self.model is not None and self.model.unfinished):
                return

    def _now(self) -> int:
        return time.monotonic_ns()

    # -- messages -------------------------------------------------------------------------------------------------

    def _message(self, message: Message) -> None:
        if isinstance(message, DmaDone):
            if self.model is not None:
                self.model.dma_done(self._now(), message.token, message.fault)
        elif isinstance(message, Access):
            value = (1 << 8 * message.size) - 1
            if self.model is not None:
                new = message.value if message.write else None
                value = self.model.access(self._now(), message.space, message.offset, message.size, new)
            self._answers.append(AccessDone(token=message.token, value=value))
        elif isinstance(message, Attach):
            self._attach(message)
        elif isinstance(message, Refused):
            LOG.warning(f"the hypervisor refused a message: {message.why}")

    def _attach(self, attach: Attach) -> None:
        """A new epoch: a new device, with new doorbell pages."""
        fds = self.link.descriptors_of(attach)
        self._detach()
        try:
            if not fds or attach.staging > MAX_STAGING:
                raise HypervisorGone("attached without staging memory, or with too much")
            sealed.check(fds[0], attach.staging)
            self._staging = mmap.mmap(fds[0], attach.staging)
            os.close(fds.pop(0))
            if attach.lane and fds:
                self._lane = DeviceEnd(fds.pop())
            self._view = memoryview(self._staging)
            ranges = [bar for bar in self.kind.bars if bar.doorbell_length]
            while len(fds) >= 2 and ranges:
                page, bell = fds.pop(0), fds.pop(0)
                self._pages.append(_Page(ranges.pop(0), page, bell))
        finally:
            close_all(fds)
        for one in self._pages:
            self.reactor.reader(one.bell.fd, self._rung)
        if self._lane is not None:
            self.reactor.reader(self._lane.fileno(), self._lane_ready)
        self.epoch = attach.epoch
        self.model = self.kind.make(self._view)

    def _detach(self) -> None:
        for page in self._pages:
            self.reactor.forget(page.bell.fd)
            page.close()
        self._pages.clear()
        if self._lane is not None:
            self.reactor.forget(self._lane.fileno())
            self._lane.close()
            self._lane = None
        if self.model is not None:
            self.model.detach()
            self.model = None
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _rung(self) -> None:
        for page in self._pages:
            page.bell.take()
        self._look()
        self.poll()

    def _lane_ready(self) -> None:
        """Answers came by the lane. A hypervisor that closed it says on the link what is now; or it is gone."""
        lane = self._lane
        assert lane is not None
        assert self.model is not None
        try:
            now = self._now()
            for token, fault in lane.receive():
                self.model.dma_done(now, token, fault)
        except LaneClosed:
            self.reactor.forget(lane.fileno())
        self.poll()

    def _look(self) -> None:
        assert self.model is not None
        now = self._now()
        for page in self._pages:
            self.model.doorbells(now, page.bar, page.words)

    # -- what follows ---------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Let the device work; True if something was sent."""
        if self.model is None:
            sent = bool(self._answers)
            self._answer()
            return sent
        if self._pages:
            self._look()
        clears, batches = self.model.step(self._now())
        for bar, offset, length in clears:
            for page in self._pages:
                if page.bar == bar and offset + length <= page.length:
                    page.octets[offset : offset + length] = bytes(length)
        sent = bool(self._answers or batches)
        self._answer()
        for batch in batches:
            self._send(batch)
            self.batches += 1
        self._set_timer()
        return sent

    def _send(self, batch: Batch) -> None:
        if self._lane is None:
            # Made here and checked by the hypervisor: validating it here too would be for nothing.
            message = Dma.model_construct(
                token=batch.token, epoch=self.epoch, items=batch.items, vectors=batch.vectors
            )
            self.link.send(message)
            return
        try:
            self._lane.send(pack(batch.token, self.epoch, batch.items, batch.vectors), CALL_TIMEOUT_S)
        except LaneClosed as error:
            # A new epoch is on its way on the link, in which this batch means nothing; or there is no hypervisor any more.
            LOG.warning(str(error))

    def _answer(self) -> None:
        answers, self._answers = self._answers, []
        for answer in answers:
            self.link.send(answer)

    def _set_timer(self) -> None:
        deadline = self.model.next_deadline() if self.model is not None else None
        if deadline is not None and deadline != self._timer:
            self._timer = deadline
            self.reactor.after(max(0.0, (deadline - self._now()) / 1e9), self._tick)

    def _tick(self) -> None:
        self._timer = 0
        if self.model is not None:
            self.model.tick(self._now())
        self.poll()

    def close(self) -> None:
        """Give everything back."""
        self._detach()
        self.reactor.forget(self.link.fileno())
        self.link.close()
