"""The socket server in one thread, turn by turn: bounds, credentials, clients that come, go and stall."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore import dump, socket_server
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import Effect, Log
from domains.dom0.xenstore.socket_server import SocketServer, credentials, listen
from drivers.xenbus import wire


class Bench:
    """A server and its clients."""

    def __init__(self, path: Path, admit: Callable[[int], int | None]) -> None:
        self.path = path
        self.core = Core()
        self.effects: list[Effect] = []
        self.server = SocketServer(self.core, listen(path), admit=admit, handle=self.effects.append)
        self.clients: list[socket.socket] = []
        self.now = 0

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.path))
        client.settimeout(5)
        self.clients.append(client)
        self.spin()
        return client

    def spin(self, turns: int = 6) -> None:
        for _ in range(turns):
            self.now += 1
            self.server.turn(self.now)
            self.server.on_readable()

    def ask(self, client: socket.socket, kind: int, payload: bytes) -> bytes:
        client.sendall(wire.encode(kind, 1, 0, payload))
        self.spin()
        framer = wire.Framer(client.recv(8192))
        message = framer.take()
        assert message is not None
        return message.payload

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(admit: Callable[[int], int | None] = socket_server.own_user_is_domain0) -> Bench:
        made.append(Bench(tmp_path / f"socket{len(made)}", admit))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_a_request_is_answered(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.ask(bench.connect(), xs.XS_DIRECTORY, b"/\0") == b"tool\0"


def test_the_peers_uid_decides_who_it_is(make: Callable[..., Bench]) -> None:
    seen: list[int] = []

    def as_guest(uid: int) -> int:
        seen.append(uid)
        return 7

    bench = make(as_guest)
    assert bench.ask(bench.connect(), xs.XS_CONTROL, b"help\0") == b"EACCES\0"
    assert seen == [os.getuid()]


def test_who_is_not_admitted_is_closed_at_once(make: Callable[..., Bench]) -> None:
    bench = make(lambda uid: None)
    assert bench.connect().recv(10) == b""
    assert bench.server.refused == 1
    assert bench.core.connections == {}


def test_the_default_admits_root_and_its_own_user_only() -> None:
    assert socket_server.own_user_is_domain0(0) == 0
    assert socket_server.own_user_is_domain0(os.getuid()) == 0
    assert socket_server.own_user_is_domain0(os.getuid() + 12345) is None


def test_credentials_are_the_kernels() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert credentials(left) == (os.getpid(), os.getuid(), os.getgid())


def test_connections_are_bounded(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_server, "CLIENTS_MAX", 3)
    bench = make()
    clients = [bench.connect() for _ in range(5)]
    assert len(bench.core.connections) == 3
    assert clients[4].recv(1) == b""
    clients[0].close()
    bench.spin()
    assert bench.ask(bench.connect(), xs.XS_DIRECTORY, b"/\0") == b"tool\0"


def test_descriptor_numbers_that_come_back_serve_the_new_client(make: Callable[..., Bench]) -> None:
    """Closing and accepting in the same turn gives the new client the old one's descriptor."""
    bench = make()
    for _ in range(20):
        old = bench.connect()
        old.close()
        new = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new.connect(str(bench.path))
        new.settimeout(5)
        bench.clients.append(new)
        assert bench.ask(new, xs.XS_DIRECTORY, b"/\0") == b"tool\0"


def test_a_client_that_dies_mid_message_leaves_nothing(make: Callable[..., Bench]) -> None:
    bench = make()
    client = bench.connect()
    bench.ask(client, xs.XS_TRANSACTION_START, b"\0")
    client.sendall(wire.encode(xs.XS_WRITE, 1, 0, b"/a\0")[:9])
    bench.spin()
    client.close()
    bench.spin()
    assert bench.core.connections == {}
    assert bench.core.open_transactions == 0


def test_a_protocol_violation_closes_the_socket(make: Callable[..., Bench]) -> None:
    bench = make()
    client = bench.connect()
    client.sendall(wire.HEADER.pack(xs.XS_READ, 1, 0, 4097))
    bench.spin()
    assert client.recv(10) == b""
    assert bench.core.connections == {}


def test_a_client_that_never_reads_is_bounded_and_others_are_served(make: Callable[..., Bench]) -> None:
    bench = make()
    stalled, other = bench.connect(), bench.connect()
    bench.ask(other, xs.XS_WRITE, b"/big\0" + b"x" * 4000)
    stalled.setblocking(False)
    request = wire.encode(xs.XS_READ, 1, 0, b"/big\0")
    for _ in range(200):
        with suppress(BlockingIOError):
            stalled.send(request * 40)
        bench.spin(2)
    waiting = max(connection.output for connection in bench.core.connections.values())
    assert waiting <= bench.core.quota.privileged_output + 5000
    assert bench.ask(other, xs.XS_DIRECTORY, b"/tool\0") == b"xenstored\0"


def test_effects_for_others_are_handed_on(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.ask(bench.connect(), xs.XS_CONTROL, b"print\0hello\0")
    assert Log("hello") in bench.effects


def test_clients_outlive_a_restart_with_their_watches_and_half_messages(make: Callable[..., Bench]) -> None:
    bench = make()
    client, gone = bench.connect(), bench.connect()
    bench.ask(client, xs.XS_WATCH, b"/w\0tok\0")
    request = wire.encode(xs.XS_READ, 2, 0, b"/\0")
    client.sendall(request[:10])
    bench.spin()
    state, sockets = dump.dump(bench.core), bench.server.release()
    gone.close()
    bench.core = dump.load(state)
    bench.server = SocketServer(bench.core, listen(bench.path), admit=socket_server.own_user_is_domain0)
    for conn, sock in sockets.items():
        bench.server.adopt(sock, conn)
    client.sendall(request[10:])
    bench.spin()
    bench.ask(bench.connect(), xs.XS_WRITE, b"/w\0x")
    reply, event = (framer := wire.Framer(client.recv(8192))).take(), framer.take()
    assert reply is not None
    assert event is not None
    assert (reply.req_id, event.payload) == (2, b"/w\0tok\0")
    assert len(bench.core.connections) == 2, "who hung up meanwhile is noticed"


def test_listen_replaces_a_dead_socket_only(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="another xenstored"):
        listen(path)
    first.close()
    listen(path).close()
    plain = tmp_path / "file"
    plain.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        listen(plain)
    assert plain.read_text() == "precious"
