"""The disk: the product's NVMe model as a process of its own, and a medium with a volatile cache that a power cut empties."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Final

from bus.messages.device import Access, AccessDone, Attach, DeviceHello, Dma, DmaDone
from bus.messages.envelope import Message
from domains.devices.nvme.model import NvmeModel, kind, namespaces
from domains.devices.runtime import DeviceModel
from drivers.hw.nvme.media import MediaError
from drivers.hw.nvme.pages import Identity
from simulation.memory import SimStaging
from simulation.order import Turns

if TYPE_CHECKING:
    from simulation.machine import Machine

SECTOR: Final = 512


class SimMedia:
    """A disk. Implements `drivers.hw.nvme.media.Media`."""

    read_only = False

    def __init__(self, sectors: int, rng: random.Random) -> None:
        self.size = sectors * SECTOR
        self.stable = bytearray(self.size)
        """What a power cut leaves."""
        self.content = bytearray(self.size)
        self._dirty: dict[int, None] = {}
        self._rng = rng
        self.losses = 0
        """Power cuts so far."""
        self.fail = 0
        """So many of the next requests fail."""

    def seed(self, seed: int) -> None:
        """From here on chance is this seed's."""
        self._rng.seed(seed)

    def _check(self) -> None:
        if self.fail:
            self.fail -= 1
            raise MediaError("the plan says so")

    def read(self, offset: int, target: memoryview) -> None:
        self._check()
        target[:] = self.content[offset : offset + len(target)]

    def write(self, offset: int, data: memoryview | bytes, durable: bool) -> None:
        self._check()
        self.content[offset : offset + len(data)] = data
        sectors = range(offset // SECTOR, (offset + len(data)) // SECTOR)
        if durable:
            self.stable[offset : offset + len(data)] = data
            for sector in sectors:
                self._dirty.pop(sector, None)
        else:
            self._dirty.update(dict.fromkeys(sectors))

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        self.write(offset, bytes(length), durable)

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length), False)

    def flush(self) -> None:
        self._check()
        for sector in self._dirty:
            self.stable[sector * SECTOR : (sector + 1) * SECTOR] = self.content[
                sector * SECTOR : (sector + 1) * SECTOR
            ]
        self._dirty.clear()

    def used(self) -> int:
        return self.size

    def close(self) -> None:
        """Nothing is held."""

    def power_cut(self) -> list[int]:
        """Each dirty sector reached the medium, or did not; sectors of one write independently of each other (a torn write). Those that
        are not as they were."""
        self.losses += 1
        for sector in self._dirty:
            if self._rng.random() < 0.5:
                at = sector * SECTOR
                self.stable[at : at + SECTOR] = self.content[at : at + SECTOR]
        lost = []
        for sector in self._dirty:
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if self.content[part] != self.stable[part]:
                lost.append(sector)
        self._dirty.clear()
        self.content[:] = self.stable
        return lost


class Device:
    """One life of the device process (domains/devices/runtime.py, without sockets)."""

    def __init__(self, machine: Machine, bdf: int, media: SimMedia, staging: SimStaging) -> None:
        self.machine = machine
        self.bdf = bdf
        self.alive = True
        self.frozen_until = 0
        self.inbox: deque[tuple[int, Message]] = deque()
        self.turns = Turns(machine.overtaken)
        """To it."""
        self.turns_back = Turns(machine.overtaken)
        self.staging = staging
        identity = Identity("SIM1", mdts=5, vectors=4, queues=4, namespaces=namespaces({1: media}, {1: 9}))
        self.kind = kind(identity, {1: media}, power_losses=lambda: media.losses)
        self.model: DeviceModel | None = None
        self.epoch = 0
        self.words: memoryview | None = None
        self._due_in = 0
        self._due_out = 0
        self._timer = 0
        self._rung = False
        self._send(DeviceHello(pid=1, bars=self.kind.bars, vectors=self.kind.vectors))

    def _send(self, message: Message) -> None:
        scheduler = self.machine.scheduler
        self._due_out = max(self._due_out, scheduler.now + self.machine.latency())
        scheduler.at(self._due_out, lambda: self.machine.from_device(self, message))

    def post(self, message: Message) -> None:
        """The hypervisor sends."""
        self.machine.injector.link(self.turns, "device", message, lambda: self._post(message))

    def _post(self, message: Message) -> None:
        scheduler = self.machine.scheduler
        self._due_in = max(self._due_in, scheduler.now + self.machine.latency())
        self.inbox.append((self._due_in, message))
        scheduler.at(self._due_in, self.deliver)

    def deliver(self) -> None:
        """Take what is due."""
        if not self._awake(self.deliver):
            return
        now = self.machine.scheduler.now
        while self.inbox and self.inbox[0][0] <= now:
            self._message(self.inbox.popleft()[1])
        self.step()

    def _awake(self, again: object) -> bool:
        if not self.alive:
            return False
        scheduler = self.machine.scheduler
        if scheduler.now < self.frozen_until:
            scheduler.at(self.frozen_until, self.deliver)
            return False
        return True

    def ring(self) -> None:
        """A doorbell was rung."""
        if not self._rung:
            self._rung = True
            self.machine.scheduler.after(self.machine.latency(), self._look)

    def _look(self) -> None:
        self._rung = False
        if self._awake(self._look):
            self.step()

    def _message(self, message: Message) -> None:
        now = self.machine.scheduler.now
        if isinstance(message, DmaDone):
            if self.model is not None:
                self.model.dma_done(now, message.token, message.fault)
        elif isinstance(message, Access):
            value = (1 << 8 * message.size) - 1
            if self.model is not None:
                new = message.value if message.write else None
                value = self.model.access(now, message.space, message.offset, message.size, new)
            self._send(AccessDone.made(token=message.token, value=value))
        elif isinstance(message, Attach):
            if self.model is not None:
                self.model.detach()
            self.epoch = message.epoch
            self.words, _ = self.machine.device_pages[self.bdf]
            self.model = self.kind.make(memoryview(self.staging.view))
            assert isinstance(self.model, NvmeModel)

    def step(self) -> None:
        """Let the device work (DeviceProcess._step)."""
        model, now = self.model, self.machine.scheduler.now
        if model is None or self.words is None:
            return
        model.doorbells(now, 0, self.words)
        going = True
        while going:
            clears, batches = model.step(now)
            for _, offset, length in clears:
                self.words.cast("B")[offset : offset + length] = bytes(length)
            for batch in batches:
                items = self.machine.injector.dma(list(batch.items))
                self._send(Dma.made(token=batch.token, epoch=self.epoch, items=items, vectors=batch.vectors))
            going = model.unfinished
        deadline = model.next_deadline()
        if deadline is not None and deadline != self._timer:
            self._timer = deadline
            self.machine.scheduler.at(deadline, self._tick)

    def _tick(self) -> None:
        if self._awake(self._tick):
            self._timer = 0
            if self.model is not None:
                self.model.tick(self.machine.scheduler.now)
            self.step()
