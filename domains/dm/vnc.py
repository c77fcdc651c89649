"""The VNC server of a device model: sockets and time around `drivers.pc.rfb`.

Everything a client can make this process do is bounded: connections, bytes that wait for it, the time until its handshake is over, and
how often a picture is made, for the guest's own accesses are served by the same thread.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from domains.native.reactor import Reactor
from drivers.pc.rfb import CHALLENGE, Attempts, Event, NotNow, RfbError, RfbServer
from drivers.pc.vga_render import Picture

FIRST_PORT: Final = 5900
"""Of display 0 (RFC 6143, 3)."""
TRIES: Final = 100
"""Displays that `unused` looks at."""
MAX_CLIENTS: Final = 8
HANDSHAKE_S: Final = 10.0
CHUNK: Final = 4096
"""Bytes that are taken from one client before others have their turn."""
PERIOD_S: Final = 0.04
SHARE: Final = 4
"""Pictures take at most one part in so many of this process's time."""


class VncError(Exception):
    """It cannot listen there; in one line."""


@dataclass(frozen=True, slots=True)
class VncSettings:
    """xl.cfg's: `listen` is an IP address, `display` a number, `unused`: the first free one from there on."""

    listen: str = "127.0.0.1"
    display: int = 0
    unused: bool = True
    password: str = ""

    @classmethod
    def from_start(cls, given: Any) -> VncSettings | None:
        """From the settings that Dom0 deposited; None: no server is wanted. ValueError."""
        if not isinstance(given, dict):
            return None
        ipaddress.ip_address(given["listen"])
        return cls(str(given["listen"]), int(given["display"]), bool(given["unused"]), str(given["password"]))


def listen(settings: VncSettings) -> socket.socket:
    """A socket that takes connections. VncError."""
    version = ipaddress.ip_address(settings.listen).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    displays = range(settings.display, settings.display + (TRIES if settings.unused else 1))
    problem: OSError | None = None
    for display in displays:
        if FIRST_PORT + display > 65535:
            break
        server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((settings.listen, FIRST_PORT + display))
            server.listen(MAX_CLIENTS)
        except OSError as error:
            server.close()
            problem = error
            continue
        return server
    why = "no such port" if problem is None else os.strerror(problem.errno or 0)
    raise VncError(f"vnc: {settings.listen} display {settings.display}: {why}")


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket, rfb: RfbServer) -> None:
        self.socket: Final = connection
        self.rfb: Final = rfb
        self.out = bytearray()
        self.deadline = time.monotonic() + HANDSHAKE_S


class VncServer:
    """See the module. `picture` makes one of the screen; `deliver` takes keys and moves of the pointer; `log` takes a line."""

    def __init__(
        self,
        reactor: Reactor,
        name: str,
        settings: VncSettings,
        picture: Callable[[], Picture],
        deliver: Callable[[Event], None],
        log: Callable[[str], None],
    ) -> None:
        """Listens. VncError."""
        self._reactor: Final = reactor
        self._name: Final = name
        self._password: Final = settings.password.encode("utf-8")
        self._attempts: Final = Attempts(time.monotonic)
        self._picture: Final = picture
        self._deliver: Final = deliver
        self._log: Final = log
        self._server: Final = listen(settings)
        self._clients: dict[int, _Client] = {}
        self._looking = self._watching = False
        self._pause = PERIOD_S
        self._size = 0, 0
        self._not_before = 0.0  # the next picture for somebody who connects
        self.pictures = 0
        reactor.reader(self._server.fileno(), self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: IP address and port."""
        name = self._server.getsockname()
        return str(name[0]), int(name[1])

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    # --- connections

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return  # it went away before it was looked at, or descriptors are short
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        if time.monotonic() >= self._not_before:
            self._make()  # else the size of the last one will do: clients may come in any number
        rfb = RfbServer(
            self._name,
            *self._size,
            password=self._password,
            challenge=os.urandom(CHALLENGE) if self._password else b"",
            attempts=self._attempts,
        )
        client = _Client(connection, rfb)
        self._clients[connection.fileno()] = client
        self._reactor.reader(connection.fileno(), lambda: self._readable(client))
        self._send(client)
        self._watch()

    def _watch(self) -> None:
        """One timer for all handshakes: one each would keep clients that are gone already."""
        deadlines = [client.deadline for client in self._clients.values() if not client.rfb.ready]
        if deadlines and not self._watching:
            self._watching = True
            self._reactor.after(max(0.0, min(deadlines) - time.monotonic()), self._late)

    def _late(self) -> None:
        self._watching = False
        now = time.monotonic()
        for client in list(self._clients.values()):
            if not client.rfb.ready and now >= client.deadline:
                self._drop(client)
        self._watch()

    def _drop(self, client: _Client) -> None:
        fd = client.socket.fileno()
        if fd < 0 or self._clients.pop(fd, None) is None:
            return
        self._reactor.forget(fd)
        client.socket.close()
        for event in client.rfb.close():
            self._deliver(event)

    def _readable(self, client: _Client) -> None:
        try:
            data = client.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        try:
            events = client.rfb.receive(data)
        except RfbError as error:
            if not isinstance(error, NotNow):  # these come as fast as somebody likes; the log has why already
                self._log(f"vnc: {error}: the client is sent away")
            self._send(client)  # why, where the protocol has a place for it
            self._drop(client)
            return
        for event in events:
            self._deliver(event)
        self._send(client)
        self._follow()

    def _send(self, client: _Client) -> None:
        """What waits, as far as the connection takes it; a client that takes nothing gets no more pictures."""
        if client.socket.fileno() < 0:
            return
        client.out += client.rfb.output()
        try:
            while client.out:
                del client.out[: client.socket.send(client.out)]
        except BlockingIOError:
            self._reactor.writer(client.socket.fileno(), lambda: self._writable(client))
            return
        except OSError:
            self._drop(client)
            return
        self._reactor.writer(client.socket.fileno(), None)

    def _writable(self, client: _Client) -> None:
        self._send(client)
        self._follow()

    # --- pictures

    def _waiting(self) -> list[_Client]:
        return [client for client in self._clients.values() if not client.out and client.rfb.wants_update]

    def _follow(self) -> None:
        """Somebody may wait for a picture."""
        if not self._looking and self._waiting():
            self._looking = True
            self._reactor.after(self._pause, self._look)

    def _look(self) -> None:
        self._looking = False
        waiting = self._waiting()
        if not waiting:
            return
        began = time.monotonic()
        picture = self._make()
        for client in waiting:
            if client.rfb.update(picture):
                self._send(client)
        self._pause = max(PERIOD_S, (SHARE - 1) * (time.monotonic() - began))
        self._follow()

    def _make(self) -> Picture:
        began = time.monotonic()
        picture = self._picture()
        now = time.monotonic()
        self.pictures += 1
        self._size = picture.width, picture.height
        self._not_before = now + max(PERIOD_S, (SHARE - 1) * (now - began))
        return picture

    def close(self) -> None:
        """Send everybody away."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._reactor.forget(self._server.fileno())
        self._server.close()
