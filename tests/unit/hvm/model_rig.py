"""A guest's process and a device model, joined by the ioreq area as on a machine: the one in this thread, the other in another."""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable
from typing import Any

from bus import ioreq_area as area
from domains.dm.guest import Guest
from domains.hvm.model import Model
from drivers.pc.bus import MmioSpace, PortSpace, Range
from tests.unit.hvm.hvm_rig import Rig

PORT, MMIO = 0x1F0, 0xE0000000
HLT = "f4"


def out8(port: int, value: int) -> str:
    """mov dx, port; mov al, value; out dx, al."""
    return f"66ba{struct.pack('<H', port).hex()}b0{value:02x}ee"


def in8(port: int) -> str:
    """mov dx, port; in al, dx."""
    return f"66ba{struct.pack('<H', port).hex()}ec"


class Pair:
    """`device` is called on the device model's thread with (offset, size, value or None)."""

    def __init__(self, code: str, device: Callable[[int, int, int | None], int], **more: Any) -> None:
        self.rig = Rig(code, board=True, **more)
        memory = area.create()
        guest, model = area.bells()
        self.held = False
        self.idle = 0
        domain = self.rig.domain
        self.model: Model = domain.join_model(
            0, [os.dup(memory), *(os.dup(bell.fd) for bell in guest)], self._idle
        )
        self.ports, self.mmio = PortSpace(), MmioSpace()

        def read(offset: int, size: int) -> int:
            return device(offset, size, None)

        def write(offset: int, size: int, value: int) -> None:
            device(offset, size, value)

        self.ports.add(Range("test", PORT, 8, read, write, 4))
        self.mmio.add(Range("test", MMIO, 0x1000, read, write, 8))
        self.guest = Guest([memory, *(os.dup(bell.fd) for bell in model)], self.ports, self.mmio, 1)
        for bell in (*guest, *model):
            bell.close()
        for kind, first, last in ((0, PORT, PORT + 7), (1, MMIO, MMIO + 0xFFF)):
            assert domain.model_changed({"id": 0, "add": [kind, first, last]})
        assert domain.model_changed({"id": 0, "enabled": True})
        self.stop = False
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.serving = True

    def _idle(self) -> None:
        self.idle += 1

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self.guest.request.fd, select.POLLIN)
        while not self.stop:
            if poller.poll(20):
                while self.guest.serve():
                    pass

    def run(self, slices: int = 50) -> Rig:
        if self.serving:
            self.thread.start()
        self.rig.run(slices)
        return self.rig

    def close(self) -> None:
        self.stop = True
        if self.serving:
            self.thread.join(5)
        self.guest.close()
        self.rig.domain.retire_model("the test is over")
        self.rig.domain.run_slice()
