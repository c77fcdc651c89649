"""A machine for the block drivers in one process: frames and grants, a disk with a volatile cache that reorders, crashes.

Everything that happens follows from the seed. `Trouble` is raised where a promise was broken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from drivers.block.backend import Backend
from drivers.block.frontend import Features, Frontend
from drivers.block.ledger import Ledger
from drivers.block.ports import Command, Op
from drivers.block.requests import Disk
from drivers.block.wire import X86_64, Abi
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import Page
from tests.support.granted_pages import GrantedPages

SECTOR = 512


class Trouble(AssertionError):
    """A promise was broken."""


class Crash(Exception):
    """The back end's process dies here."""


class Grants(GrantedPages):
    """The frontend's frames and grant table, and the back end's I/O page tables: both ends' ports."""

    def __init__(self, frames: int = 4096) -> None:
        super().__init__(frames)
        self.mapped: dict[int, tuple[int, int, bool]] = {}  # iova -> ref, frame, writable
        self.next_iova = 1 << 32
        self.maps = 0
        self.most = 0
        self.put_off: Callable[[], bool] = lambda: False
        """The hypervisor does not wait for the frontend's domain now."""

    # the frontend's
    def free(self, pages: Sequence[Page]) -> None:
        for page in pages:
            if any(frame == page.gfn for _, frame, _ in self.mapped.values()):
                raise Trouble("a frame is freed that the device can reach")
        super().free(pages)

    def end(self, refs: Sequence[int]) -> list[bool]:
        held = {ref for ref, _, _ in self.mapped.values()}
        super().end([ref for ref in refs if ref not in held])
        return [ref not in held for ref in refs]

    # the back end's
    def map_frames(self, items: Sequence[tuple[int, bool]]) -> list[int]:
        out = []
        self.maps += 1
        if self.put_off():
            return [-12] * len(items)
        for ref, writable in items:
            entry = self.table.get(ref)
            if entry is None or (writable and entry[1]):
                out.append(-3)
                continue
            self.mapped[self.next_iova] = (ref, entry[0], writable)
            out.append(self.next_iova)
            self.next_iova += 4096
        self.most = max(self.most, len(self.mapped))
        return out

    def unmap_frames(self, iovas: Sequence[int]) -> None:
        for iova in iovas:
            if self.mapped.pop(iova, None) is None:
                raise Trouble("unmapped what is not mapped")

    def read_frames(self, items: Sequence[tuple[int, int]]) -> list[bytes | int]:
        return [
            bytes(self.frames[self.table[ref][0]][:length]) if ref in self.table else -3
            for ref, length in items
        ]

    def dma(self, iova: int, length: int, data: bytes | None) -> bytes:
        entry = self.mapped.get(iova & ~4095)
        offset = iova & 4095
        if entry is None or offset + length > 4096 or (data is not None and not entry[2]):
            raise Trouble(f"DMA fault at {iova:#x}")
        frame = self.frames[entry[1]]
        if data is not None:
            frame[offset : offset + length] = data
        return bytes(frame[offset : offset + length])


class FakeDisk:
    """Stable sectors, a volatile cache, commands that are carried out one by one in any order."""

    block_size = 512

    def __init__(self, sectors: int, grants: Grants, rng: random.Random) -> None:
        self.sectors = sectors
        self.grants, self.rng = grants, rng
        self.stable: dict[int, bytes] = {}
        self.cache: dict[int, bytes] = {}
        self.queue: list[Command] = []
        self.commands = 0
        self.unsafe_shutdowns = 0
        self.fail: Callable[[Command], bool] = lambda command: False

    def submit(self, commands: Sequence[Command]) -> None:
        self.queue += commands
        self.commands += len(commands)

    def sector(self, number: int) -> bytes:
        return self.cache.get(number, self.stable.get(number, bytes(SECTOR)))

    def step(self) -> tuple[int, bool] | None:
        """Carry out one, whichever."""
        if not self.queue:
            return None
        command = self.queue.pop(self.rng.randrange(len(self.queue)))
        if self.fail(command):
            return command.token, False
        if command.op is Op.FLUSH:
            self.stable |= self.cache
            self.cache = {}
        elif command.op is Op.READ:
            data = b"".join(self.sector(command.sector + at) for at in range(command.sectors))
            self._move(command, data)
        elif command.op is Op.WRITE:
            data = self._move(command, None)
            for at in range(command.sectors):
                number, piece = command.sector + at, data[at * SECTOR : (at + 1) * SECTOR]
                if command.fua:
                    self.cache.pop(number, None)
                    self.stable[number] = piece
                else:
                    self.cache[number] = piece
        else:
            for at in range(command.sectors):
                self.cache[command.sector + at] = bytes(SECTOR)
        return command.token, True

    def _move(self, command: Command, data: bytes | None) -> bytes:
        at, out = 0, b""
        for iova, length in command.extents:
            out += self.grants.dma(iova, length, None if data is None else data[at : at + length])
            at += length
        if at != command.sectors * SECTOR:
            raise Trouble("segments do not add up")
        return out

    def power_cut(self) -> None:
        """Any part of the cache reached the medium."""
        self.unsafe_shutdowns += 1
        for number, data in self.cache.items():
            if self.rng.random() < 0.5:
                self.stable[number] = data
        self.cache, self.queue = {}, []


class Machine:
    """A frontend, a back end that may crash, and what the disk should hold."""

    def __init__(
        self,
        seed: int,
        *,
        sectors: int = 512,
        queues: int = 1,
        pages: int = 1,
        persistent: bool = False,
        max_indirect: int = 64,
        persistent_limit: int = 20,
        abi: Abi = X86_64,
        trust: bool = False,
        slow: float = 0.0,
    ) -> None:
        """`slow`: how often frames cannot be mapped for now."""
        self.rng = random.Random(seed)
        self.grants = Grants()
        if slow:
            self.grants.put_off = lambda: self.rng.random() < slow
        self.store = FakeDisk(sectors, self.grants, self.rng)
        self.queues, self.pages, self.abi = queues, pages, abi
        self.persistent, self.limit, self.trust = persistent, persistent_limit, trust
        self.disk = Disk(sectors, discard=True, max_indirect=max_indirect)
        self.features = Features(sectors, 512, False, True, True, True, False, max_indirect, persistent)
        self.front = Frontend(self.grants, abi=abi)
        self.memory = memoryview(bytearray(Ledger.bytes_needed(queues, 512)))
        self.fuse = -1
        self.crashes: list[str] = []
        self.seen: set[str] = set()
        self.back: Backend | None = None
        self.to_back = [False] * queues
        self.to_front = False
        self.race: Callable[[], None] | None = None
        # the model: what was written to each sector, in order, and from which entry on it is durable
        self.history: dict[int, list[bytes]] = {}
        self.durable: dict[int, int] = {}
        self.busy: set[int] = set()
        self.done = 0
        self.asked = 0
        self.connect()

    # ------------------------------------------------------------ the shell's part

    def hook(self, name: str) -> None:
        self.seen.add(name)
        if self.fuse >= 0:
            self.fuse -= 1
            if self.fuse < 0:
                self.crashes.append(name)
                raise Crash(name)

    def _backend(self) -> Backend:
        ledger = Ledger(self.memory)
        ledger.hook = self.hook
        return Backend(
            self.disk,
            self.store,
            self.grants,
            ledger,
            abi=self.abi,
            persistent=self.persistent,
            persistent_limit=self.limit,
            trust_event_index=self.trust,
            hook=self.hook,
        )

    def _rings(self) -> list[PagedRing]:
        machine = self

        class RacyRing(PagedRing):
            def ask_for_requests(self, req_cons: int, fence: Callable[[], None]) -> bool:
                race, machine.race = machine.race, None
                if race is not None:
                    race()  # the frontend publishes between the back end's last look and its asking
                return super().ask_for_requests(req_cons, fence)

        return [RacyRing(memory, self.abi.slot) for memory in self.ring_memory]

    def _notify(self) -> list[Callable[[], None]]:
        def call() -> None:
            self.to_front = True

        return [call] * self.queues

    def connect(self) -> None:
        self.ring_memory = [
            [memoryview(bytearray(4096)) for _ in range(self.pages)] for _ in range(self.queues)
        ]
        rings = [PagedRing(memory, self.abi.slot) for memory in self.ring_memory]
        for ring in rings:
            ring.init()
        self.back = self._backend()
        while not self.guarded(lambda back: back.connect(self._rings(), self._notify(), b"front 1")):
            if self.back is not None:
                break  # it crashed after the ledger had begun, and was resumed
            self.back = self._backend()

        def caller(number: int) -> Callable[[], None]:
            def call() -> None:
                self.to_back[number] = True

            return call

        self.to_front = True
        self.front.connect(rings, [caller(number) for number in range(self.queues)], self.features)

    def guarded(self, action: Callable[[Backend], object]) -> bool:
        """Do something in the back end's process; False if it died. A new one is up then, if there is something to do."""
        if self.back is None:
            return False
        try:
            action(self.back)
        except Crash:
            self.restart()
            return False
        return True

    def restart(self) -> None:
        """The process is dead. What its device did meanwhile counts; then the device is reset and the frames unmapped."""
        while True:
            for _ in range(self.rng.randrange(4)):
                self.store.step()
            self.store.queue = []
            self.grants.mapped.clear()
            if self.rng.random() < 0.7:
                self.fuse = -1
            else:
                self.fuse = self.rng.randrange(self.rng.choice((3, 20)))
            try:
                self.back = None
                back = self._backend()
                if back.ledger.reopen() is None:
                    return
                back.resume(self._rings(), self._notify())
                self.back = back
                return
            except Crash:
                continue

    # ------------------------------------------------------------ what happens

    def _free_range(self, longest: int) -> range | None:
        start = self.rng.randrange(self.disk.sectors)
        count = min(self.rng.randrange(1, longest + 1), self.disk.sectors - start)
        found = range(start, start + count)
        return None if self.busy.intersection(found) else found

    def write(self, longest: int = 200, *, barrier: bool = False) -> None:
        found = self._free_range(80 if barrier else longest)
        if found is None:
            return
        data = self.rng.randbytes(len(found) * SECTOR)
        self.busy.update(found)
        self.asked += 1
        covered = self._acknowledged() if barrier else {}
        for at, sector in enumerate(found):
            self.history.setdefault(sector, [bytes(SECTOR)]).append(data[at * SECTOR : (at + 1) * SECTOR])

        def finished(status: int, _: bytes) -> None:
            self.done += 1
            if status:
                raise Trouble(f"a write failed: {status}")
            self.busy.difference_update(found)
            if barrier:
                self._cover(covered | {sector: len(self.history[sector]) - 1 for sector in found})

        self.front.write(found.start, data, finished, barrier=barrier)

    def read(self) -> None:
        found = self._free_range(200)
        if found is None:
            return
        self.busy.update(found)
        self.asked += 1
        expected = b"".join(self.history.get(sector, [bytes(SECTOR)])[-1] for sector in found)

        def finished(status: int, data: bytes) -> None:
            self.done += 1
            if status or data != expected:
                raise Trouble(f"a read gave other data (status {status})")
            self.busy.difference_update(found)

        self.front.read(found.start, len(found), finished)

    def discard(self) -> None:
        found = self._free_range(40)
        if found is None:
            return
        self.busy.update(found)
        self.asked += 1
        for sector in found:
            self.history.setdefault(sector, [bytes(SECTOR)]).append(bytes(SECTOR))

        def finished(status: int, _: bytes) -> None:
            self.done += 1
            if status:
                raise Trouble("a discard failed")
            self.busy.difference_update(found)

        self.front.discard(found.start, len(found), finished)

    def _acknowledged(self) -> dict[int, int]:
        return {s: len(h) - 1 for s, h in self.history.items() if s not in self.busy}

    def _cover(self, covered: dict[int, int]) -> None:
        for sector, entry in covered.items():
            self.durable[sector] = max(entry, self.durable.get(sector, 0))

    def flush(self) -> None:
        covered = self._acknowledged()
        self.asked += 1

        def finished(status: int, _: bytes) -> None:
            self.done += 1
            if status:
                raise Trouble("a flush failed")
            self._cover(covered)

        self.front.flush(finished)

    def turn(self) -> bool:
        """Deliver one thing that is under way; False if there is none."""
        choices: list[Callable[[], object]] = []
        for number, wanted in enumerate(self.to_back):
            if wanted:
                choices.append(lambda number=number: self._poll_back(number))  # type: ignore[misc]  # bound now
        if self.to_front:
            choices.append(self._poll_front)
        if self.store.queue:
            choices.append(self._device)
        if self.back is not None and any(queue.put_off for queue in self.back.queues):
            choices.append(self._retry)
        if not choices:
            return False
        self.rng.choice(choices)()
        return True

    def _poll_back(self, number: int) -> None:
        self.to_back[number] = False
        self.guarded(lambda back: back.poll(number))

    def _poll_front(self) -> None:
        self.to_front = False
        self.front.poll()
        if self.front.error:
            raise Trouble(f"the frontend found: {self.front.error}")

    def _device(self) -> None:
        results = [r for _ in range(self.rng.randrange(1, 5)) if (r := self.store.step()) is not None]
        self.guarded(lambda back: back.complete(results))

    def _retry(self) -> None:
        self.guarded(lambda back: back.retry())

    def settle(self) -> None:
        """Until nothing moves: then everything must be answered."""
        while self.turn():
            pass
        if self.front.pending or self.done != self.asked:
            raise Trouble(f"{self.front.pending} requests wait for ever, {self.done} of {self.asked} done")
        if self.back is not None and self.back.error:
            raise Trouble(self.back.error)

    def close(self) -> None:
        """The back end lets go of everything, with requests under way."""
        for _ in range(1000):
            self.guarded(lambda back: back.close())
            if self.back is None or self.back.drained:
                break
            if self.store.queue:
                self._device()
            self._retry()
        else:
            raise Trouble("it does not drain")
        if self.grants.mapped:
            raise Trouble("grants are mapped after close")

    def suspend(self) -> None:
        """The frontend's domain was suspended and resumed: new rings."""
        self.close()
        self.front.disconnect()
        if self.front.leaked:
            raise Trouble("pages leaked")
        self.connect()

    def check_medium(self) -> None:
        """After a power cut: everything that a flush covered is there."""
        self.store.power_cut()
        for sector, history in self.history.items():
            if self.store.stable.get(sector, bytes(SECTOR)) not in history[self.durable.get(sector, 0) :]:
                raise Trouble(f"sector {sector} lost what a flush had covered")


def race(**options: Any) -> None:
    """A request is published after the back end's last look and before it asks to be notified."""
    machine = Machine(0, **options)
    machine.front.write(0, bytes(SECTOR), lambda status, data: None)
    machine.race = lambda: machine.front.write(8, bytes(SECTOR), lambda status, data: None)
    machine.to_back = [False] * machine.queues
    for number in range(machine.queues):
        machine.guarded(lambda back, number=number: back.poll(number))  # type: ignore[misc]  # bound now
    if len(machine.store.queue) != 2 and not any(machine.to_back):
        raise Trouble("a request was overlooked, and nobody will say so")


def scenario(
    seed: int,
    *,
    steps: int = 60,
    crash: float = 0.15,
    suspend: float = 0.02,
    setup: Callable[[Machine], None] = lambda machine: None,
    **options: Any,
) -> Machine:
    """A random life of a disk, checked. Raises Trouble."""
    machine = Machine(seed, **options)
    setup(machine)
    rng = machine.rng
    for _ in range(steps):
        if machine.fuse < 0 and rng.random() < crash:
            machine.fuse = rng.randrange(40)
        if rng.random() < suspend:
            machine.suspend()
        action = rng.random()
        if action < 0.45:
            machine.write()
        elif action < 0.6:
            machine.read()
        elif action < 0.72:
            machine.flush()
        elif action < 0.77:
            machine.write(barrier=True)
        elif action < 0.82:
            machine.discard()
        elif action < 0.86:
            machine.race = machine.write
        for _ in range(rng.randrange(4)):
            machine.turn()
    machine.race = None
    machine.fuse = -1
    if rng.random() < 0.5:
        machine.settle()
        machine.close()
        if machine.front.leaked:
            raise Trouble("pages leaked")
    machine.check_medium()
    return machine
