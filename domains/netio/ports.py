"""Ports of bridges for programs outside (a test, a capture): one socket each, one frame a packet. And the link to Dom0 that brings them.

What comes from such a socket is a program's of the user's; it is no more trusted than a guest. Frames for one that does not read are
dropped, as a network drops them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Final

from bus.log import Logger
from bus.messages.envelope import BadMessage
from bus.messages.net import MAX_FRAME, MAX_PORTS, NetHello, NetHost, NetLink, NetPort, NetPortGone
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all
from domains.native.reactor import Reactor
from domains.netio.bridges import Bridges
from drivers.net.frames import ETH_HLEN, Frame, finished
from drivers.net.helper import HelperHost
from drivers.net.switch import Link

LOG: Final = Logger("netio")
BURST: Final = 64
"""Frames taken from one socket at a time."""
SEND_BUFFER: Final = 4 << 20


class OutsidePort:
    """One program's. `drivers.net.switch.Receiver`."""

    def __init__(
        self, reactor: Reactor, bridges: Bridges, message: NetPort, fd: int, gone: Callable[[], None]
    ) -> None:
        """Takes the descriptor over. ValueError if it is no such socket."""
        self._socket: Final = socket.socket(fileno=fd)
        if (self._socket.family, self._socket.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            self._socket.close()
            raise ValueError("no SOCK_SEQPACKET socket")
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._reactor: Final = reactor
        self._bridges: Final = bridges
        self._gone: Final = gone
        self.dropped = 0
        self._port: Final = bridges.join(message.bridge, f"port{message.port}", self, mirror=message.mirror)
        reactor.reader(self._socket.fileno(), self._receive)

    def deliver(self, frames: Sequence[Frame]) -> None:
        """See Receiver: with all checksums, and cut into segments."""
        for frame in frames:
            for data in finished(frame):
                try:
                    self._socket.send(data)
                except OSError:  # full, or closed: the reader finds out
                    self.dropped += 1

    def _receive(self) -> None:
        frames: list[Frame] = []
        ended = False
        for _ in range(BURST):
            try:
                data = self._socket.recv(MAX_FRAME + 1)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                ended = True
                break
            if ETH_HLEN <= len(data) < MAX_FRAME:
                frames.append(Frame(data))
        if frames:
            self._bridges.forward(self._port, frames)
        if ended:
            self.close()
            self._gone()

    def close(self) -> None:
        """Leave the bridge."""
        self._reactor.forget(self._socket.fileno())
        self._bridges.leave(self._port)
        self._socket.close()


class HostPort:
    """A helper host at a port. `drivers.net.switch.Receiver`."""

    def __init__(self, bridges: Bridges, bridge: str, host: HelperHost) -> None:
        self._bridges: Final = bridges
        self._host: Final = host
        self._port: Final = bridges.join(bridge, "host", self)

    def deliver(self, frames: Sequence[Frame]) -> None:
        """See Receiver."""
        answers: list[Frame] = []
        for frame in frames:
            for data in finished(frame):
                answers += [Frame(answer, validated=True) for answer in self._host.receive(data)]
        if answers:
            self._bridges.forward(self._port, answers)

    def close(self) -> None:
        """Leave the bridge."""
        self._bridges.leave(self._port)


class Outside:
    """The link to Dom0, and the ports that it brought."""

    def __init__(self, reactor: Reactor, bridges: Bridges, link: PacketLink) -> None:
        """Says hello."""
        self._reactor: Final = reactor
        self._bridges: Final = bridges
        self._link: Final = link
        self._ports: Final[dict[int, OutsidePort]] = {}
        self._hosts: Final[dict[str, HostPort]] = {}
        reactor.reader(link.fileno(), self._receive)
        self._send(NetHello())

    def _send(self, message: NetHello | NetPortGone) -> None:
        try:
            self._link.send(message)
        except (LinkClosed, LinkFull) as error:
            LOG.warning(f"Dom0 does not hear: {error}")

    def _receive(self) -> None:
        def refused(error: BadMessage) -> None:
            LOG.warning(f"refused: {error}")

        def closed() -> None:
            self._reactor.forget(self._link.fileno())

        for message, fds in self._link.burst(BURST, refused, closed):
            if isinstance(message, NetPort) and len(fds) == 1:
                self._open(message, fds[0])
            else:
                close_all(fds)
                if isinstance(message, NetLink):
                    self._set_link(message)
                elif isinstance(message, NetHost):
                    self._set_host(message)

    def _open(self, message: NetPort, fd: int) -> None:
        number = message.port
        old = self._ports.pop(number, None)
        if old is not None:
            old.close()

        def gone() -> None:
            self._ports.pop(number, None)
            self._send(NetPortGone(port=number))

        if len(self._ports) >= MAX_PORTS:
            close_all([fd])
            return
        try:
            self._ports[number] = OutsidePort(self._reactor, self._bridges, message, fd, gone)
        except ValueError as error:
            LOG.warning(f"port {number}: {error}")

    def _set_host(self, message: NetHost) -> None:
        old = self._hosts.pop(message.bridge, None)
        if old is not None:
            old.close()
        if message.address:
            try:
                host = HelperHost(message.address, dhcp=message.dhcp)
                self._hosts[message.bridge] = HostPort(self._bridges, message.bridge, host)
            except ValueError as error:
                LOG.warning(f"host of {message.bridge}: {error}")

    def _set_link(self, message: NetLink) -> None:
        link = Link(
            loss=message.loss,
            duplicate=message.duplicate,
            reorder=message.reorder,
            corrupt=message.corrupt,
            delay_ms=message.delay_ms,
            jitter_ms=message.jitter_ms,
            up=message.up,
        )
        self._bridges.set_link(message.bridge, message.port, link, message.seed)
