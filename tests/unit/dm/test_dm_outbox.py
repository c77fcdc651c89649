"""domains/dm/process, domains/dm/outbox: what a device model tells a Dom0 that does not read comes to it later, whole and in order, and
what is kept for it is bounded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from bus import sealed
from bus.messages.envelope import Message
from bus.messages.model import (
    FROM_MODEL,
    ModelDone,
    ModelFlush,
    ModelOutput,
    ModelPicture,
    ModelScreen,
    ModelUnplugged,
)
from bus.packets import LinkFull, PacketLink, pair
from bus.process import Start
from domains.dm import outbox, process
from domains.dm.process import ModelProcess
from domains.native.reactor import Reactor
from drivers.pc.vga_render import Picture


class Rig:
    """A device model's process without a hypervisor, and Dom0's end of its link."""

    def __init__(self) -> None:
        ours, theirs = pair()
        self.dom0 = PacketLink(ours, FROM_MODEL)
        self.reactor = Reactor()
        start = Start("dm", "d1", 1, {"control": theirs.detach()}, {}, self.dom0, False)
        self.process = ModelProcess(start, self.reactor)
        self.got: list[tuple[Message, list[int]]] = []

    def fill(self) -> int:
        """Until the link takes no more; how much went in."""
        for count in range(10_000):
            try:
                self.process._dom0.send(ModelOutput(data=b"full"))
            except LinkFull:
                return count
        raise AssertionError("it takes everything")

    def read(self, done: Callable[[], bool]) -> None:
        """Dom0 reads again, until it is so."""
        deadline = time.monotonic() + 20.0
        while not done():
            assert time.monotonic() < deadline
            while (packet := self.dom0.receive()) is not None:
                self.got.append(packet)
            self.reactor.once(0.02)

    def close(self) -> None:
        for _, fds in self.got:
            for fd in fds:
                os.close(fd)
        self.dom0.close()
        self.process._dom0.close()
        self.reactor.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(process, "NativeDomain", lambda start, reactor: SimpleNamespace(on_order={}))
    it = Rig()
    yield it
    it.close()


def test_an_unplug_and_serial_output_come_to_a_dom0_that_was_busy(rig: Rig) -> None:
    """And the answer to its request for the last output comes behind that output."""
    filled, it = rig.fill(), rig.process
    for byte in b"last words":
        it._transmit(byte)
    it._unplugged(["hda", "hdb"])
    for byte in b", and more":
        it._transmit(byte)
    it._finish(ModelFlush(token=7))
    rig.read(lambda: bool(rig.got) and isinstance(rig.got[-1][0], ModelDone))
    assert [message for message, _ in rig.got[filled:]] == [
        ModelUnplugged(slots=["hda", "hdb"]),
        ModelOutput(data=b"last words, and more"),
        ModelDone(token=7),
    ]
    assert not rig.reactor._writers, "nothing waits for room any more"
    it._unplugged(["hdc"])
    assert rig.dom0.receive() == (ModelUnplugged(slots=["hdc"]), [])


def test_a_picture_waits_with_its_descriptor(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rig.fill()
    it = rig.process
    picture = Picture(2, 2, bytes(range(12)))
    it.board = SimpleNamespace(picture=lambda now: picture)  # type: ignore[assignment]
    it._screen(ModelScreen(token=3))
    it.board = None
    rig.read(lambda: isinstance(rig.got[-1][0], ModelPicture) if rig.got else False)
    (fd,) = rig.got[-1][1]
    sealed.check(fd, 12)
    assert os.pread(fd, 12, 0) == picture.rgb
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_what_is_kept_is_bounded(rig: Rig) -> None:
    """A guest that writes on its serial line all the time, and Dom0's requests: a mebibyte, and so many messages. Then the line's output is
    lost, and nothing else is."""
    rig.fill()
    it, kept = rig.process, rig.process._outbox
    for _ in range(3 * outbox.MAX_OUTPUT):
        it._transmit(0x55)
    assert kept._output == outbox.MAX_OUTPUT
    assert kept.lost == 2 * outbox.MAX_OUTPUT
    it._unplugged(["hda"])
    for token in range(1000):
        it._tell(ModelDone(token=token))
    assert len(kept._kept) == outbox.MAX_OUTPUT // process.OUTPUT_CHUNK + outbox.MAX_KEPT
    rig.read(lambda: not kept._kept)
    rig.read(lambda: ModelDone(token=62) in [message for message, _ in rig.got[-4:]])
    assert sum(isinstance(message, ModelUnplugged) for message, _ in rig.got) == 1
    assert (kept._output, kept._others) == (0, 0)
