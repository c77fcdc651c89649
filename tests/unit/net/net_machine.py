"""Both ends of network rings in one process: pages and a grant table, rings, a back end and a frontend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from drivers.net.backend import Backend, Queue
from drivers.net.frames import Frame
from drivers.net.frontend import Frontend, FrontQueue
from drivers.net.journal import Journal
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.receive import Abilities
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.xenbus.paged_ring import PagedRing
from tests.support.granted_pages import GrantedPages

MAC = bytes.fromhex("00163e000001")
OTHER = bytes.fromhex("00163e000002")


class Memory(GrantedPages):
    """The frontend's pages and grants; the back end's grant copies. `PageSource` and `GrantCopier`."""

    def __init__(self, pages: int = 1024) -> None:
        super().__init__(pages)
        self.copies = 0
        self.calls = 0

    def fetch(self, items: Sequence[tuple[int, int, int]]) -> list[bytes | int]:
        self.calls += 1
        self.copies += len(items)
        out: list[bytes | int] = []
        for ref, offset, length in items:
            assert offset + length <= 4096
            assert length > 0
            entry = self.table.get(ref)
            out.append(bytes(self.frames[entry[0]][offset : offset + length]) if entry else -3)
        return out

    def store(self, items: Sequence[tuple[int, bytes]]) -> list[int]:
        self.calls += 1
        out = []
        for ref, data in items:
            assert 0 < len(data) <= 4096
            entry = self.table.get(ref)
            if entry is None or entry[1]:
                out.append(-3)
                continue
            self.frames[entry[0]][: len(data)] = data
            out.append(0)
        return out


class Wire:
    """The network behind the back end."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def sent(self, frames: Sequence[Frame]) -> None:
        self.frames += frames


class Pair:
    """A back end, and a frontend that is well-behaved (or a test's own writes into the rings)."""

    def __init__(
        self, abilities: Abilities | None = None, queues: int = 1, pages: int = 1024, **options: Any
    ) -> None:
        self.memory, self.wire = Memory(pages), Wire()
        self.got: list[Frame] = []
        self.kicks = 0
        self.rings = [self._rings() for _ in range(queues)]
        self.front = Frontend(self.memory, self.got.append)
        self.abilities = abilities or Abilities(scatter=True, gso_v4=True, gso_v6=True, blank_v6=True)
        self.options = options
        self.journals = [
            (Journal(memoryview(bytearray(4096))), Journal(memoryview(bytearray(4096)))) for _ in self.rings
        ]
        self.back = self._backend()
        self.front.connect(
            [
                FrontQueue(tx, rx, partial(self._notified, n), partial(self._notified, n))
                for n, (tx, rx) in enumerate(self.rings)
            ]
        )
        self.attach()

    def _rings(self) -> tuple[PagedRing, PagedRing]:
        tx = PagedRing([memoryview(bytearray(4096))], TX_SLOT)
        rx = PagedRing([memoryview(bytearray(4096))], RX_SLOT)
        tx.init()
        rx.init()
        return tx, rx

    def _backend(self) -> Backend:
        return Backend(self.abilities, self.memory, self.wire, mac=MAC, **self.options)

    def attach(self) -> None:
        self.back.connect(
            [
                Queue(tx, rx, self._answered, self._answered, journals)
                for (tx, rx), journals in zip(self.rings, self.journals, strict=True)
            ]
        )

    def restart(self) -> None:
        """The back end's process dies, and another one finds the rings."""
        self.back = self._backend()
        self.attach()

    def _notified(self, number: int) -> None:
        """A test may put something else in place of `_kick` at any time."""
        self._kick(number)

    def _kick(self, number: int) -> None:
        self.kicks += 1
        if self.back.queues:
            self.back.poll_tx(number)
            self.back.poll_rx(number)

    def _answered(self) -> None:
        self.front.poll()

    def turn(self) -> None:
        for number in range(len(self.back.queues)):
            self.back.poll_tx(number)
            self.back.poll_rx(number)
        self.front.poll()
