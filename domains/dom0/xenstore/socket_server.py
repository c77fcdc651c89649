"""xenstored's Unix socket: clients such as Debian's xenstore-utils.

Their libxenstore looks for the socket at $XENSTORED_PATH, else at $XENSTORED_RUNDIR/socket, else at
/var/run/xenstored/socket.

`SocketServer` lives in somebody's event loop: when its `fileno()` is readable call `on_readable`, and once a
turn `turn`.
Effects that are not about its own connections go to `handle`. `serve` is a loop of its own.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import Close, ConnId, Effect, Output

CLIENTS_MAX: Final = 256
"""Open connections; more are closed at once."""
CLIENTS_A_TURN: Final = 16
"""Connections accepted in one turn."""
READ_SIZE: Final = 8192
SOCKET_CONN_BASE: Final = 1 << 20
"""Connection numbers of sockets start here; smaller ones are for rings."""

_CREDENTIALS: Final = struct.Struct("3i")


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected, as the kernel recorded it (SO_PEERCRED)."""
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid, uid, gid


def own_user_is_domain0(uid: int) -> int | None:
    """The usual policy: root, and the user whom the daemon runs as, act for domain 0; nobody else may
    connect.
    """
    return 0 if uid in (0, os.getuid()) else None


class SocketServer:
    """Serves clients of one listening socket."""

    def __init__(
        self,
        core: Core,
        listener: socket.socket,
        *,
        admit: Callable[[int], int | None] = own_user_is_domain0,
        handle: Callable[[Effect], None] | None = None,
    ) -> None:
        """`listener` is a listening AF_UNIX stream socket. `admit` gives the domain that a peer of this
        uid acts for, or None to refuse it. `handle` gets effects of others' connections, rings, and logs.
        """
        listener.setblocking(False)
        self._core: Final = core
        self._listener: Final = listener
        self._admit: Final = admit
        self._handle: Final = handle
        self._clients: dict[int, tuple[socket.socket, ConnId]] = {}
        self._by_conn: dict[ConnId, int] = {}
        self._next = max([SOCKET_CONN_BASE, *(conn + 1 for conn in core.connections)])
        self._selector: Final = selectors.EpollSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self.refused = 0
        """Connections that were closed at once: not admitted, or too many."""

    def adopt(self, sock: socket.socket, conn: ConnId) -> None:
        """Serve a socket whose connection the core knows: one that outlived a restart of xenstored (`Core.load`)."""
        sock.setblocking(False)
        self._clients[sock.fileno()] = (sock, conn)
        self._by_conn[conn] = sock.fileno()
        self._selector.register(sock.fileno(), selectors.EVENT_READ)

    def release(self) -> dict[ConnId, socket.socket]:
        """Give up serving without closing: the clients' sockets, for the process that goes on. The listener is closed."""
        clients = {conn: sock for sock, conn in self._clients.values()}
        self._clients.clear()
        self._by_conn.clear()
        self.close()
        return clients

    def fileno(self) -> int:
        """A descriptor that is readable when one of the server's own is ready (an epoll within the
        caller's)."""
        return self._selector.fileno()

    def on_readable(self) -> None:
        """Accept, receive and send what can be without waiting: each ready descriptor once."""
        for key, ready in self._selector.select(0):
            if key.fd == self._listener.fileno():
                self._accept()
                continue
            conn = self._clients[key.fd][1] if key.fd in self._clients else None
            if ready & key.events & selectors.EVENT_WRITE:
                self._send(key.fd)
            # Not if that send closed it: the number may be another client's by now.
            if ready & key.events & selectors.EVENT_READ and conn in self._by_conn:
                self._receive(key.fd)

    def turn(self, now_ns: int) -> float | None:
        """Once a turn of the loop, after the descriptors: serve what had to wait. Returns in how many
        seconds the next turn is due at the latest; None: whenever a descriptor is ready.
        """
        self._core.tick(now_ns)
        if self._core.busy:
            self.carry_out(self._core.run())
        self._watch_all()
        if self._core.busy:
            return 0.0
        deadline = self._core.next_deadline()
        return None if deadline is None else max(0.0, (deadline - now_ns) / 1e9)

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core wants of this server's connections; hand the rest on."""
        for effect in effects:
            if isinstance(effect, (Output, Close)) and effect.conn in self._by_conn:
                fd = self._by_conn[effect.conn]
                if isinstance(effect, Output):
                    self._send(fd)
                else:
                    self._close(fd)
            elif self._handle is not None:
                self._handle(effect)

    def close(self) -> None:
        """Close every client and the listener."""
        for fd in list(self._clients):
            self._close(fd)
        self._selector.close()
        self._listener.close()

    def _receive(self, fd: int) -> None:
        sock, conn = self._clients[fd]
        room = min(READ_SIZE, self._core.input_room(conn))
        if not room:
            return
        try:
            data = sock.recv(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.carry_out(self._core.receive(conn, data))
        else:
            self._close(fd)

    def _send(self, fd: int) -> None:
        sock, conn = self._clients[fd]
        data = self._core.peek_output(conn)
        if not data:
            return
        try:
            sent = sock.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._close(fd)
            return
        self._core.output_taken(conn, sent)

    def _watch_all(self) -> None:
        """Wait for what each client can do now: one that must wait is not read."""
        registered = self._selector.get_map()
        for fd, (_, conn) in self._clients.items():
            wanted = selectors.EVENT_READ if self._core.input_room(conn) else 0
            if self._core.peek_output(conn, 1):
                wanted |= selectors.EVENT_WRITE
            before = registered[fd].events if fd in registered else 0
            if wanted == before:
                continue
            if not wanted:
                self._selector.unregister(fd)
            elif before:
                self._selector.modify(fd, wanted)
            else:
                self._selector.register(fd, wanted)

    def _accept(self) -> None:
        for _ in range(CLIENTS_A_TURN):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            _, uid, _ = credentials(sock)
            domid = self._admit(uid)
            if domid is None or len(self._clients) >= CLIENTS_MAX:
                self.refused += 1
                sock.close()
                continue
            conn = ConnId(self._next)
            self._next += 1
            self._core.connect(conn, domid)
            self.adopt(sock, conn)

    def _close(self, fd: int) -> None:
        client = self._clients.pop(fd, None)
        if client is not None:
            sock, conn = client
            del self._by_conn[conn]
            with suppress(KeyError):  # not registered while it had to wait
                self._selector.unregister(fd)
            self._core.disconnect(conn)
            sock.close()


def listen(path: Path) -> socket.socket:
    """A listening socket at this path, mode 0600. A socket that nobody listens on any more is replaced.
    OSError if the path is something else, in use, or cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(ConnectionRefusedError):
                probe.connect(str(path))
                raise OSError(f"{path}: another xenstored listens here")
            path.unlink()
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(64)
    except BaseException:
        sock.close()
        raise
    return sock


def serve(server: SocketServer, stopped: Callable[[], bool], wake: float = 0.1) -> None:
    """Run a loop of its own until `stopped()`, asked at least every `wake` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while not stopped():
            due = server.turn(time.monotonic_ns())
            if selector.select(wake if due is None else min(wake, due)):
                server.on_readable()
