"""An NVMe controller in an attacker's hands (a program, started in place of `domains.devices.nvme`): it serves honestly, and does
beside that whatever DMA the plan asks for.

Each goes by the DMA lane, too, if the device has one: just before the message. The plan (DOMICILE_HOSTILE_PLAN, JSON): {"serial": N, "device": name, "dma": [[address, length, write], ...], "epoch": relative,
"vectors": [...], "position": staging position}. A new serial starts a round: each item goes in a message of its own, then each vector.
Told on standard output: `HOSTILE {"serial", "results": [[fault, reason], ...], "lane": whether}`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from bus.dma_lane import pack
from bus.messages.device import Dma, DmaDone
from bus.messages.envelope import Message
from domains.devices import runtime
from domains.devices.nvme import __main__ as honest

TOKENS = 1 << 40
"""Tokens of hostile batches are from here on."""
POLL_S = 0.05
WINDOW = 16
"""Hostile batches that are under way at once."""
PLAN = os.open(os.environ["DOMICILE_HOSTILE_PLAN"], os.O_RDONLY)


class HostileDevice(runtime.DeviceProcess):
    """Honest, and more."""

    def __init__(self, start: Any, *more: Any) -> None:
        self.name = start.name
        self.serial = 0
        self.todo: list[Dma] = []
        self.results: list[tuple[int, str]] = []
        self.wanted = self.sent = 0
        super().__init__(start, *more)
        self.reactor.after(POLL_S, self.look)

    def look(self) -> None:
        """Is there a new round?"""
        self.reactor.after(POLL_S, self.look)
        plan = json.loads(os.pread(PLAN, 1 << 20, 0))
        if plan.get("device") != self.name or plan["serial"] == self.serial or self.todo:
            return
        self.serial, self.results, self.sent = plan["serial"], [], 0
        epoch = self.epoch + plan.get("epoch", 0)
        for address, length, write in plan.get("dma", []):
            item = (address, length, write, plan.get("position", 0))
            self.todo.append(Dma(token=TOKENS + len(self.todo), epoch=epoch, items=[item]))
        for vector in plan.get("vectors", []):
            self.todo.append(Dma(token=TOKENS + len(self.todo), epoch=epoch, items=[], vectors=[vector]))
        self.wanted = len(self.todo)
        self.more()
        self.poll()  # a send takes the socket's signal away: what came meanwhile is to be looked for

    def more(self) -> None:
        """Keep some under way."""
        while self.todo and self.sent - len(self.results) < WINDOW:
            batch = self.todo.pop(0)
            if self._lane is not None:  # the same by the lane, which is obeyed first
                token = batch.token + TOKENS
                self._lane.send(pack(token, batch.epoch, batch.items, batch.vectors), 10.0)
            self.link.send(batch)
            self.sent += 1
        if len(self.results) == self.wanted:
            told = {"serial": self.serial, "results": self.results, "lane": self._lane is not None}
            print("HOSTILE " + json.dumps(told), flush=True)
            self.wanted = -1

    def _message(self, message: Message) -> None:
        if isinstance(message, DmaDone) and message.token >= TOKENS:
            self.results.append((message.fault, message.reason))
            self.more()
        else:
            super()._message(message)


if __name__ == "__main__":
    vars(honest)["DeviceProcess"] = HostileDevice
    honest.main()
