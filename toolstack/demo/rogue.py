"""The demo's NVMe process: honest, until SIGUSR1 makes it an attacker.

Then it asks the hypervisor for DMA that nobody allowed it: reads and writes at addresses spread over the machine's memory, and a
write to the interrupt controller's range. What the hypervisor answered goes into its log, one JSON object a line after `MARK`; then
it serves on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from typing import Final

from bus import privileges
from bus.messages.device import Dma, DmaDone
from bus.messages.envelope import Message
from bus.process import Start, begin
from domains.devices.nvme.disks import DiskError, open_disks
from domains.devices.nvme.model import kind, namespaces
from domains.devices.runtime import DeviceProcess, Kind
from drivers.hw.nvme.media import MediaError
from drivers.hw.nvme.pages import Identity

MARK: Final = "DEMO-ATTACK "
TOKEN: Final = 1 << 62
"""Tokens of the attack's batches start here: the controller's own are small."""
LENGTH: Final = 4096
STAGING: Final = (16 << 20) - LENGTH
"""Where in the staging memory the loot would go: its last page."""
FIRST: Final = 256 << 20
STRIDE: Final = 61 << 20
REACH: Final = 4096 << 20
"""Above what its driver domain has mapped for it (the driver's own 32 MiB and its grants' window), through all of the machine."""
INTERRUPTS: Final = 0xFEE0_0000


def targets() -> list[tuple[int, bool]]:
    """(I/O virtual address, write?) of the attack."""
    addresses = range(FIRST, REACH, STRIDE)
    return [(address, write) for address in addresses for write in (False, True)] + [(INTERRUPTS, True)]


class RogueProcess(DeviceProcess):
    """An NVMe process that can be told to turn."""

    def __init__(self, start: Start, device: Kind) -> None:
        super().__init__(start, device)
        wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._wake = wake
        self.reactor.reader(wake, self._attack)
        self._open: set[int] = set()
        self._allowed = 0
        self._refused: Counter[str] = Counter()

    def _attack(self) -> None:
        os.read(self._wake, 64)
        if self._open or self.model is None:
            return
        self._allowed = 0
        self._refused.clear()
        for number, (address, write) in enumerate(targets()):
            token = TOKEN + number
            self._open.add(token)
            # A batch each: the hypervisor ends a batch at its first fault.
            self.link.send(Dma(token=token, epoch=self.epoch, items=[(address, LENGTH, write, STAGING)]))
        self.poll()

    def _message(self, message: Message) -> None:
        if not isinstance(message, DmaDone) or message.token not in self._open:
            super()._message(message)
            return
        self._open.discard(message.token)
        if message.fault < 0:
            self._allowed += 1
        else:
            self._refused[message.reason] += 1
        if not self._open:
            said = {"asked": len(targets()), "allowed": self._allowed, "refused": dict(self._refused)}
            print(MARK + json.dumps(said), flush=True)


def main() -> None:
    """As `domains.devices.nvme`."""
    start = begin(privileges.Limits(open_files=256, processes=16))
    try:
        media, shifts = open_disks(start.fds, start.settings)
        identity = Identity(
            serial=str(start.settings.get("serial", start.name))[:20],
            model="Domicile NVMe controller (demo)",
            namespaces=namespaces(media, shifts),
        )
    except (DiskError, MediaError, ValueError) as error:
        sys.exit(f"nvme: {error}")
    RogueProcess(start, kind(identity, media)).run()


if __name__ == "__main__":
    main()
