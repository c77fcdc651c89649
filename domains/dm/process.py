"""The process around a device model's board: its links to the hypervisor, to Dom0 and to its guest. One thread."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from bus import sealed
from bus.messages.domain import Order, Report
from bus.messages.envelope import Message
from bus.messages.model import (
    TO_MODEL,
    ModelDone,
    ModelFailed,
    ModelFlush,
    ModelGo,
    ModelInput,
    ModelKeys,
    ModelOutput,
    ModelPicture,
    ModelReady,
    ModelScreen,
    ModelUnplugged,
)
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all
from bus.process import Start
from domains.dm.board import Board, Settings
from domains.dm.guest import Guest
from domains.dm.outbox import Outbox
from domains.dm.server import IoreqServer, Spaces
from domains.dm.vnc import VncError, VncServer
from domains.native.domain import NativeDomain
from domains.native.reactor import Reactor
from drivers.pc.rfb import Event
from drivers.pc.vga_render import Picture

OUTPUT_CHUNK: Final = 4096
OUTPUT_DELAY_S: Final = 0.01
"""Serial output is sent when so much of it has come together, or after so long."""


class ModelProcess:
    """See the module."""

    def __init__(self, start: Start, reactor: Reactor) -> None:
        """Connects and says hello to the hypervisor; Dom0's `model_go` starts the rest."""
        self.reactor: Final = reactor
        self._settings: Final = Settings.from_start(start)
        self._dom0: Final = PacketLink(socket.socket(fileno=start.fds["control"]), TO_MODEL)
        self._outbox: Final = Outbox(self._dom0, reactor)
        self._tell: Final = self._outbox.tell
        self._host: Final = NativeDomain(start, reactor)
        self._host.on_order["ioreq_area"] = self._area
        self._host.on_order["ping"] = lambda order, fds: b""
        self._descriptors: list[int] = []
        self._output = bytearray()
        self._output_due = False
        self._guest: Guest | None = None
        self._server: IoreqServer | None = None
        self.board: Board | None = None
        self._vnc: VncServer | None = None
        self._timer: int | None = None
        self._handlers: Final[dict[type[Message], Callable[[Any], None]]] = {
            ModelGo: self._go,
            ModelInput: self._input,
            ModelKeys: self._keys,
            ModelScreen: self._screen,
            ModelFlush: self._finish,
        }
        reactor.reader(self._dom0.fileno(), self._from_dom0)

    def run(self) -> None:
        """Serve until the hypervisor or Dom0 goes away."""
        self.reactor.run()

    def failed(self, error: BaseException) -> None:
        """Last words."""
        try:
            self._dom0.send(ModelFailed(why=repr(error)[:400]))
        except (LinkClosed, LinkFull):
            return

    # --- Dom0

    def _from_dom0(self) -> None:
        while (packet := self._dom0.receive()) is not None:
            message, fds = packet
            close_all(fds)
            self._handlers.get(type(message), lambda message: None)(message)
        self._follow()

    def _go(self, go: ModelGo) -> None:
        server = self._server = IoreqServer(self._host, go.guest)
        server.create()
        if not self._descriptors:
            raise RuntimeError("an ioreq server without its memory")
        spaces = Spaces()
        guest = self._guest = Guest(self._descriptors, spaces.ports, spaces.mmio, server.vcpus())
        guest.alive = self._alive
        self.board = Board(
            self._settings, spaces, guest, time.monotonic_ns, self._transmit, self._shutdown, self._log
        )
        self.board.unplugged = self._unplugged
        try:
            self._listen(self.board)
        except VncError as error:
            self._tell(ModelFailed(why=str(error)[:400]))
            return
        spaces.announce(server)
        server.enable()
        self.reactor.reader(guest.request.fd, self._serve)
        host, port = self._vnc.address if self._vnc is not None else ("", 0)
        self._tell(ModelReady(vnc_listen=host, vnc_port=port))

    def _listen(self, board: Board) -> None:
        """Pictures for viewers, and what they type. VncError."""
        wanted = self._settings.vnc
        if wanted is None or board.vga is None:
            return

        def picture() -> Picture:
            found = board.picture(time.monotonic_ns())
            assert found is not None  # it has a VGA
            return found

        def deliver(event: Event) -> None:
            board.by_viewer(event)
            self._follow()

        self._vnc = VncServer(self.reactor, self._settings.name, wanted, picture, deliver, self._log)

    def _alive(self) -> None:
        """While a note waits: the hypervisor's link is looked at, so that its end is seen."""
        self._host.poll()

    def _area(self, order: Order, fds: list[int]) -> bytes:
        close_all(self._descriptors)
        self._descriptors = fds
        return b""

    def _input(self, message: ModelInput) -> None:
        if self.board is not None:
            self.board.serial_input(message.data)

    def _keys(self, message: ModelKeys) -> None:
        error = "it does not run yet" if self.board is None else self.board.send_keys(message.keys)
        self._tell(ModelDone(token=message.token, error=error))

    def _finish(self, message: ModelFlush) -> None:
        if self._guest is not None and self._guest.serve():
            self.reactor.soon(self._serve)
        self._flush()
        self._tell(ModelDone(token=message.token))

    def _screen(self, message: ModelScreen) -> None:
        picture = self.board.picture(time.monotonic_ns()) if self.board is not None else None
        if picture is None:
            self._tell(ModelDone(token=message.token, error="this domain has no screen (vga = none)"))
            return
        fd = sealed.create("domicile-picture", len(picture.rgb))
        try:
            os.pwrite(fd, picture.rgb, 0)
            answer = ModelPicture(token=message.token, width=picture.width, height=picture.height)
            self._tell(answer, (fd,))
        finally:
            os.close(fd)

    def _unplugged(self, slots: list[str]) -> None:
        self._tell(ModelUnplugged(slots=slots))

    def _shutdown(self, reason: int) -> None:
        """The guest asked for a reset, or to be powered off."""
        if self._server is not None:
            self._server.shutdown(reason)

    def _log(self, text: str) -> None:
        self._host.link.send(Report(what="log", body={"text": text[:400]}))

    # --- the guest

    def _serve(self) -> None:
        assert self._guest is not None
        if self._guest.serve():
            self.reactor.soon(self._serve)
        self._follow()

    def _transmit(self, byte: int) -> None:
        self._output.append(byte)
        if len(self._output) >= OUTPUT_CHUNK:
            self._flush()
        elif not self._output_due:
            self._output_due = True
            self.reactor.after(OUTPUT_DELAY_S, self._output_timer)

    def _output_timer(self) -> None:
        self._output_due = False
        self._flush()

    def _flush(self) -> None:
        """At most a chunk has come together."""
        if self._output:
            self._tell(ModelOutput(data=bytes(self._output)))
            self._output.clear()

    # --- time

    def _follow(self) -> None:
        """Timers of the devices may have changed."""
        deadline = self.board.next_deadline() if self.board is not None else None
        if deadline is not None and deadline != self._timer:
            self._timer = deadline
            self.reactor.after(max(0.0, (deadline - time.monotonic_ns()) / 1e9), self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.board is not None:
            self.board.expire(time.monotonic_ns())
        self._follow()
