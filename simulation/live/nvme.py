"""An NVMe process of a machine with a fault plan (a program, in place of `domains.devices.nvme`): its media fail and lose power.

A power cut undoes writes since the last flush: what was in those sectors before is kept until then (at most UNDO_LIMIT sectors; a
larger cache counts as flushed, as a disk writes back when its cache is full)."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from typing import Any, Final

import domains.devices.nvme.__main__ as product
import domains.devices.nvme.disks as disks
from bus.trace import Trace
from domains.devices.nvme.model import kind as made
from domains.devices.runtime import Kind
from drivers.hw.nvme.media import Media, MediaError
from drivers.hw.nvme.pages import Identity
from simulation.live.edge import Edge
from simulation.live.plan import Fault, What

EDGE: Final = Edge("nvme")
SECTOR: Final = 512
UNDO_LIMIT: Final = 1 << 16
OPENED: list[FaultyMedia] = []


class FaultyMedia:
    """Media with a volatile cache that a power cut empties. Implements Media."""

    def __init__(self, base: Media) -> None:
        self.base = base
        self.size = base.size
        self.read_only = base.read_only
        self._before: dict[int, bytes] = {}
        OPENED.append(self)

    def _happen(self, event: str) -> None:
        for fault in EDGE.happen(event):
            if fault.what is What.POWER_CUT:
                cut(fault)
        if EDGE.board.fail:
            EDGE.board.fail -= 1
            raise MediaError("the fault plan says so")

    def _remember(self, offset: int, length: int) -> None:
        if len(self._before) + length // SECTOR > UNDO_LIMIT:
            self._before.clear()
        for at in range(offset, offset + length, SECTOR):
            if at not in self._before:
                old = bytearray(SECTOR)
                self.base.read(at, memoryview(old))
                self._before[at] = bytes(old)

    def _durable(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, SECTOR):
            self._before.pop(at, None)

    def read(self, offset: int, target: memoryview) -> None:
        """See Media."""
        self._happen("media:read")
        self.base.read(offset, target)

    def write(self, offset: int, data: memoryview, durable: bool) -> None:
        """See Media."""
        self._happen("media:write")
        self._remember(offset, len(data))
        self.base.write(offset, data, durable)
        if durable:
            self._durable(offset, len(data))

    def zero(self, offset: int, length: int, deallocate_it: bool, durable: bool) -> None:
        """See Media."""
        self._remember(offset, length)
        self.base.zero(offset, length, deallocate_it, durable)
        if durable:
            self._durable(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See Media: not remembered (a discarded sector promises nothing)."""
        self._durable(offset, length)
        self.base.discard(offset, length)

    def flush(self) -> None:
        """See Media."""
        self._happen("media:flush")
        self.base.flush()
        self._before.clear()

    def used(self) -> int:
        """See Media."""
        return self.base.used()

    def close(self) -> None:
        """See Media."""
        self.base.close()

    def lose(self, keep: str, rng: random.Random) -> None:
        """Of what was written since the last flush, all is kept or lost, or each sector by chance."""
        for at, old in self._before.items():
            if keep == "lost" or (keep == "torn" and rng.random() < 0.5):
                self.base.write(at, memoryview(old), True)
        self._before.clear()


def cut(fault: Fault) -> None:
    """Power is gone: this process as well."""
    rng = random.Random(fault.seed)
    EDGE.board.losses += 1
    for media in OPENED:
        media.lose(fault.keep, rng)
    os.kill(os.getpid(), signal.SIGKILL)


def by_signal(_number: int, _frame: object) -> None:
    """The controller tells: the newest struck power cut of the plan is meant."""
    plan = EDGE.board.read_plan()
    struck = [f for at, f in enumerate(plan) if f.what is What.POWER_CUT and EDGE.board.counts(at)[1]]
    if struck:
        cut(struck[-1])


def opened(fds: Mapping[str, int], settings: Mapping[str, Any]) -> tuple[dict[int, Media], dict[int, int]]:
    """As always, with a cache each."""
    media, shifts = disks.open_disks(fds, settings)
    return {nsid: FaultyMedia(one) for nsid, one in media.items()}, shifts


def counted(identity: Identity, media: dict[int, Media], trace: Trace | None = None) -> Kind:
    """As always, with the count of power losses."""
    return made(identity, media, trace, power_losses=lambda: EDGE.board.losses)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, by_signal)
    vars(product).update(open_disks=opened, kind=counted)
    product.main()
