"""The hypervisor's ZMTP server: libzmq is content with it, and a hostile peer gets nothing and costs bounded memory."""

from __future__ import annotations

import socket
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.utils.z85 as z85
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_box_keypair

from bus.zmtp import MAX_HANDSHAKE_FRAME, ProtocolError, ServerConnection

LIMIT = 4096


class Server:
    """A connection under test, behind a Unix socket that libzmq connects to."""

    def __init__(self, path: Path) -> None:
        self.public, self.secret = crypto_box_keypair()
        self.client_public, self.client_secret = crypto_box_keypair()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(5)
        self.context = zmq.Context()
        self.endpoint = f"ipc://{path}"

    def client(
        self, secret: bytes | None = None, public: bytes | None = None, kind: int = zmq.DEALER
    ) -> zmq.Socket[bytes]:
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, 5000)
        sock.setsockopt(zmq.CURVE_SERVERKEY, z85.encode(self.public))
        sock.setsockopt(zmq.CURVE_PUBLICKEY, z85.encode(public or self.client_public))
        sock.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(secret or self.client_secret))
        sock.connect(self.endpoint)
        return sock

    def accept(self) -> tuple[socket.socket, ServerConnection]:
        sock, _ = self.listener.accept()
        sock.settimeout(5)
        connection = ServerConnection(self.secret, self.client_public, LIMIT)
        sock.sendall(connection.output)
        connection.output.clear()
        return sock, connection

    def messages(self, sock: socket.socket, connection: ServerConnection, count: int) -> list[bytes]:
        out: list[bytes] = []
        while len(out) < count:
            data = sock.recv(65536)
            if not data:
                raise ProtocolError("closed")
            out += connection.receive(data)
            if connection.output:
                sock.sendall(connection.output)
                connection.output.clear()
        return out

    def close(self) -> None:
        self.listener.close()
        self.context.destroy(linger=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    it = Server(tmp_path / "s")
    yield it
    it.close()


def test_libzmq_talks_to_it_both_ways(server: Server) -> None:
    """Messages short and long arrive whole in both directions, in order."""
    client = server.client()
    for body in (b"", b"a", b"b" * 200, b"c" * LIMIT):
        client.send(body)
    sock, connection = server.accept()
    assert server.messages(sock, connection, 4) == [b"", b"a", b"b" * 200, b"c" * LIMIT]
    for body in (b"r", b"s" * 300, b"t" * 60000):
        sock.sendall(connection.encode(body))
        assert client.recv() == body
    sock.close()


def test_other_client_key_is_not_let_in(server: Server) -> None:
    """Knowing the endpoint and the server's key is not enough."""
    public, secret = crypto_box_keypair()
    client = server.client(secret, public)
    client.send(b"let me in")
    sock, connection = server.accept()
    with pytest.raises(ProtocolError, match="key"):
        server.messages(sock, connection, 1)
    assert not connection.ready
    sock.close()


def test_stolen_public_key_is_not_let_in(server: Server) -> None:
    """The client's public key without its secret opens nothing."""
    _, secret = crypto_box_keypair()
    client = server.client(secret, server.client_public)
    client.send(b"let me in")
    sock, connection = server.accept()
    with pytest.raises(ProtocolError):
        server.messages(sock, connection, 1)
    sock.close()


def test_multipart_message_is_dropped_and_counted(server: Server) -> None:
    """Of a message in several frames nothing arrives; the next single one does."""
    client = server.client()
    client.send_multipart([b"one", b"two", b"three"])
    client.send(b"single")
    sock, connection = server.accept()
    assert server.messages(sock, connection, 1) == [b"single"]
    assert connection.dropped == 1
    sock.close()


def test_message_without_end_costs_bounded_memory(server: Server) -> None:
    """Parts without end: what the connection holds never exceeds one frame and one read, by its buffer and by what Python allocated
    meanwhile (8 MB came in)."""
    client = server.client()
    client.setsockopt(zmq.SNDHWM, 0)
    client.setsockopt(zmq.SNDTIMEO, 5000)
    client.send(b"first")
    sock, connection = server.accept()
    server.messages(sock, connection, 1)
    most = 0
    for _ in range(2000):
        client.send(b"x" * LIMIT, zmq.SNDMORE)
    client.send(b"end")
    client.send(b"after")
    tracemalloc.start()
    try:
        while True:
            got = connection.receive(sock.recv(65536))
            most = max(most, len(connection._buffer))
            if got:
                break
        _, allocated = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert got == [b"after"]
    assert most <= LIMIT + 100
    assert allocated < 1 << 20
    sock.close()


def test_frame_over_the_limit_ends_the_connection(server: Server) -> None:
    """A frame's announced size is checked before a byte of it is kept."""
    client = server.client()
    client.send(b"x" * (LIMIT + 100))
    sock, connection = server.accept()
    with pytest.raises(ProtocolError, match="frame of"):
        server.messages(sock, connection, 1)
    sock.close()


def test_replayed_message_is_refused(server: Server) -> None:
    """A recorded frame cannot be sent a second time (nonces only go up)."""
    client = server.client()
    sock, connection = server.accept()
    client.send(b"hello")
    frames = b""
    while not frames:
        data = sock.recv(65536)
        was_ready = connection.ready
        if connection.receive(data):
            assert was_ready
            frames = data
        if connection.output:
            sock.sendall(connection.output)
            connection.output.clear()
    with pytest.raises(ProtocolError, match="nonce"):
        connection.receive(frames)
    sock.close()


@given(st.lists(st.binary(max_size=300), max_size=8), st.booleans())
@settings(max_examples=200)
def test_garbage_never_gets_further_than_protocol_error(chunks: list[bytes], greeting: bool) -> None:
    """Any bytes: no message comes out, no other exception, and little is held."""
    _, secret = crypto_box_keypair()
    connection = ServerConnection(secret, bytes(32), LIMIT)
    if greeting:
        head = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
        chunks = [head, *chunks]
    try:
        for chunk in chunks:
            assert connection.receive(chunk) == []
            assert len(connection._buffer) <= MAX_HANDSHAKE_FRAME + 300
    except ProtocolError:
        pass
    assert not connection.ready


def test_other_mechanism_and_version_are_refused() -> None:
    """NULL, PLAIN, and ZMTP 2 do not get in."""
    for version, mechanism in ((3, b"NULL"), (3, b"PLAIN"), (1, b"CURVE")):
        connection = ServerConnection(bytes(32), bytes(32), LIMIT)
        head = (
            b"\xff"
            + bytes(8)
            + b"\x7f"
            + struct.pack("BB", version, 0)
            + mechanism.ljust(20, b"\0")
            + bytes(32)
        )
        with pytest.raises(ProtocolError):
            connection.receive(head)
