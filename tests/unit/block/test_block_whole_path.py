"""Frontend, back end, NVMe driver and the real NVMe controller in one process: data come back, DMA goes to granted frames,
and a controller that dies with commands under way costs nothing but time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from drivers.block.backend import Backend
from drivers.block.frontend import Features, Frontend
from drivers.block.ledger import Ledger
from drivers.block.requests import Disk
from drivers.hw.nvme import spec
from drivers.hw.nvme.controller import Controller
from drivers.hw.nvme.driver import NvmeDriver, State
from drivers.hw.nvme.driver_queue import Buffer
from drivers.hw.nvme.io import MediaOp, MediaResult
from drivers.hw.nvme.pages import Identity, Namespace
from drivers.xenbus.paged_ring import PagedRing
from tests.unit.block.block_machine import Grants

SECTORS = 2048


class World:
    def __init__(self, *, persistent: bool) -> None:
        self.grants = Grants()
        self.memory = bytearray(4096 * 4096)
        self.next = 1
        self.medium = bytearray(SECTORS * 512)
        self.staging = memoryview(bytearray(16 << 20))
        self.now = 1
        self.batches = 0
        self.new_controller()
        self.driver = NvmeDriver(
            self,
            self,
            on_complete=self._completed,
            on_ready=self._ready,
            on_lost=lambda reason: None,
            queues=2,
            depth=32,
        )
        self.back: Backend | None = None
        self.driver.start(self.now)
        self.move()
        assert self.driver.state is State.READY, self.driver.reason
        ring = [memoryview(bytearray(4096))]
        front_ring, back_ring = PagedRing(ring, 112), PagedRing(ring, 112)
        front_ring.init()
        ledger = Ledger(memoryview(bytearray(Ledger.bytes_needed(1, 32))))
        disk = Disk(self.driver.sectors, discard=True)
        self.back = Backend(disk, self.driver, self.grants, ledger, persistent=persistent)
        self.back.connect([back_ring], [lambda: None], b"")
        self.front = Frontend(self.grants)
        features = Features(SECTORS, 512, False, True, True, True, False, 256, persistent)
        self.front.connect([front_ring], [lambda: None], features)

    def new_controller(self) -> None:
        self.words = memoryview(bytearray(4096)).cast("I")
        identity = Identity("T1", mdts=5, namespaces={1: Namespace(1, SECTORS)})
        self.controller = Controller(identity, self.staging)

    # the driver's ports
    def config_read(self, offset: int, size: int) -> int:
        return self.controller.access(self.now, -1, offset, size, None)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.controller.access(self.now, -1, offset, size, value)

    def read(self, offset: int, size: int) -> int:
        return self.controller.access(self.now, 0, offset, size, None)

    def write(self, offset: int, size: int, value: int) -> None:
        self.controller.access(self.now, 0, offset, size, value)
        self.device()

    def doorbells(self, values: Sequence[tuple[int, int]], *, wake: bool = True) -> None:
        for offset, value in values:
            self.words[(offset - spec.DOORBELL_OFFSET) // 4] = value

    def allocate(self, pages: int) -> Buffer:
        start = self.next * 4096
        self.next += pages
        return Buffer(memoryview(self.memory)[start : start + pages * 4096], start)

    def free(self, buffer: Buffer) -> None:
        buffer.view[:] = b"\xee" * len(buffer.view)

    def _completed(self, results: list[tuple[int, bool]]) -> None:
        if self.back is not None:
            self.back.complete(results)

    def _ready(self) -> None:
        if self.back is not None:
            self.back.storage_reset()

    # the device's surroundings
    def device(self, *, data: bool = True) -> bool:
        worked = False
        for request in self.controller.take_media():
            worked = True
            at, end = request.offset, request.offset + request.length
            where = slice(request.position, request.position + request.length)
            if request.op is MediaOp.READ:
                self.staging[where] = self.medium[at:end]
            elif request.op is MediaOp.WRITE:
                self.medium[at:end] = self.staging[where]
            elif request.op in (MediaOp.ZERO, MediaOp.DISCARD):
                self.medium[at:end] = bytes(request.length)
            self.controller.media_done(self.now, request.token, MediaResult.OK)
        for offset, length in self.controller.take_clears():
            self.words[offset // 4 : (offset + length) // 4] = memoryview(bytes(length)).cast("I")
        for batch in self.controller.take_batches():
            worked = True
            self.batches += 1
            for iova, length, to_memory, position in batch.items:
                self._dma(iova, length, to_memory, position)
            self.controller.dma_done(self.now, batch.token, -1)
        return worked

    def _dma(self, iova: int, length: int, to_memory: bool, position: int) -> None:
        while length:
            step = min(length, 4096 - iova % 4096)
            data = bytes(self.staging[position : position + step])
            if iova >= 1 << 32:
                got = self.grants.dma(iova, step, data if to_memory else None)
            else:
                if to_memory:
                    self.memory[iova : iova + step] = data
                got = bytes(self.memory[iova : iova + step])
            if not to_memory:
                self.staging[position : position + step] = got
            iova, length, position = iova + step, length - step, position + step

    def move(self, rounds: int = 60) -> None:
        for _ in range(rounds):
            if self.back is not None:
                self.back.poll()
            self.controller.doorbells(self.now, self.words)
            while self.device():
                pass
            self.now += 1_000_000
            self.driver.poll(self.now)
            if self.back is not None:
                self.front.poll()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("die", [False, True])
def test_data_come_back(persistent: bool, die: bool) -> None:
    world = World(persistent=persistent)
    rng = random.Random(7)
    expected = bytearray(SECTORS * 512)
    answers: list[tuple[int, bytes]] = []

    def done(status: int, data: bytes) -> None:
        answers.append((status, data))

    for round_ in range(6):
        busy: set[int] = set()
        count = 0
        for _ in range(8):
            start = rng.randrange(SECTORS - 300)
            data = rng.randbytes(512 * rng.randrange(1, 300))
            wanted = set(range(start, start + len(data) // 512))
            if busy & wanted:
                continue
            busy |= wanted
            count += 1
            expected[start * 512 : start * 512 + len(data)] = data
            world.front.write(start, data, done, barrier=len(data) < 40000 and rng.random() < 0.3)
        if die and round_ in (2, 4):
            world.move(1)
            world.new_controller()  # the process died; another one, in a new epoch
            world.driver.lose("the device was started again")
        world.front.flush(done)
        world.move()
        assert [status for status, _ in answers] == [0] * (count + 1)
        answers.clear()
    world.front.read(0, SECTORS, done)
    world.front.discard(0, 8, done)
    world.move()
    assert sorted((status, len(data)) for status, data in answers) == [(0, 0), (0, len(expected))]
    assert max(answers, key=lambda answer: len(answer[1]))[1] == expected
    assert world.back is not None
    assert not world.front.pending
    world.back.close()
    assert world.back.drained
    assert not world.grants.mapped
