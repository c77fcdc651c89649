"""domains/dm/vnc: where it listens, clients that come and go, and what a bad one can do to this process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from domains.dm import vnc
from domains.dm.vnc import VncError, VncServer, VncSettings, listen
from domains.native.reactor import Reactor
from drivers.pc.des import vnc_response
from drivers.pc.rfb import Attempts, Event, KeyEvent
from drivers.pc.vga_render import Picture

BOUND_S = 20.0
DISPLAY = 20_000 + os.getpid() % 20_000
REQUEST = struct.pack(">BBHHHH", 3, 0, 0, 0, 64, 48)
MORE = struct.pack(">BBHHHH", 3, 1, 0, 0, 64, 48)


class Rig:
    """A server with its loop, and sockets of clients."""

    def __init__(self, password: str = "") -> None:
        self.reactor = Reactor()
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.screen = Picture(64, 48, bytes(64 * 48 * 3))
        settings = VncSettings(display=DISPLAY, password=password)
        self.server = VncServer(
            self.reactor, "pc", settings, lambda: self.screen, self.events.append, self.lines.append
        )
        self._sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        """A connection, before its first byte."""
        client = socket.create_connection(self.server.address, timeout=BOUND_S)
        self._sockets.append(client)
        client.setblocking(False)
        return client

    def until(self, done: Callable[[], bool]) -> None:
        """Serve until it is so."""
        deadline = time.monotonic() + BOUND_S
        while not done():
            assert time.monotonic() < deadline
            self.reactor.once(0.05)

    def read(self, client: socket.socket, size: int) -> bytes:
        """So many bytes of the server's."""
        data = bytearray()

        def more() -> bool:
            with contextlib.suppress(BlockingIOError):
                data.extend(client.recv(size - len(data)))
            return len(data) >= size

        self.until(more)
        return bytes(data)

    def ended(self, client: socket.socket) -> bool:
        """The server closed that connection."""
        try:
            return client.recv(1 << 16) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def viewer(self) -> socket.socket:
        """A connection after the handshake."""
        client = self.connect()
        client.sendall(b"RFB 003.008\n\1\1")
        self.read(client, 12 + 2 + 4 + 24 + 2)
        return client

    def close(self) -> None:
        """All of it."""
        for client in self._sockets:
            client.close()
        self.server.close()
        self.reactor.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.close()


def test_clients_that_come_and_go_cost_neither_pictures_nor_memory(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would have a picture made, and be kept until its handshake is late."""
    monkeypatch.setattr(vnc, "PERIOD_S", 3600.0)
    for _ in range(50):
        client = rig.connect()
        rig.until(lambda: rig.server.clients == 1)
        client.close()
        rig.until(lambda: rig.server.clients == 0)
    assert rig.server.pictures == 1
    assert len(rig.reactor._timers) == 1


def test_a_late_handshake_is_seen_after_an_earlier_one_that_was_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vnc, "HANDSHAKE_S", 0.2)
    viewer = rig.viewer()
    late = rig.connect()
    rig.until(lambda: rig.ended(late))
    assert rig.server.clients == 1
    assert not rig.ended(viewer)


def test_the_first_free_display_is_taken_where_that_is_wanted() -> None:
    first = listen(VncSettings(display=DISPLAY))
    second = listen(VncSettings(display=DISPLAY))
    try:
        used = first.getsockname()[1] - vnc.FIRST_PORT
        assert second.getsockname()[1] > first.getsockname()[1]
        with pytest.raises(VncError, match=f"127.0.0.1 display {used}: Address already in use"):
            listen(VncSettings(display=used, unused=False))
    finally:
        first.close()
        second.close()
    with pytest.raises(VncError, match="no such port"):
        listen(VncSettings(display=70000))
    assert VncSettings.from_start(None) is None
    with pytest.raises(ValueError, match="does not appear"):
        VncSettings.from_start({"listen": "nowhere", "display": 0, "unused": True, "password": ""})


def test_pictures_are_sent_when_something_changed_and_keys_come_in(rig: Rig) -> None:
    client = rig.viewer()
    client.sendall(REQUEST)
    first = rig.read(client, 4 + 12 + 64 * 48 * 4)
    assert not any(first[16:])
    client.sendall(MORE + struct.pack(">BB2xI", 4, 1, ord("a")) + struct.pack(">BBHH", 5, 1, 5, 5))
    rig.until(lambda: len(rig.events) == 2)
    assert rig.events[0] == KeyEvent("a", True)
    pictures = rig.server.pictures
    rig.until(lambda: rig.server.pictures > pictures + 3)
    with pytest.raises(BlockingIOError):
        client.recv(1)  # nothing changed, nothing is sent
    rig.screen = Picture(64, 48, bytes(64 * 47 * 3) + b"\xff" * 64 * 3)
    last = rig.read(client, 4 + 12 + 64 * 4)
    assert struct.unpack_from(">HHHH", last, 4) == (0, 47, 64, 1)
    client.close()
    rig.until(lambda: len(rig.events) == 4)
    assert rig.events[2] == KeyEvent("a", False), "what it held goes up with it"


def test_a_password() -> None:
    other = Rig("geheim")
    try:
        right, wrong = other.connect(), other.connect()
        for client, password in ((right, b"geheim"), (wrong, b"geheiM")):
            client.sendall(b"RFB 003.008\n\2")
            challenge = other.read(client, 12 + 2 + 16)[-16:]
            client.sendall(vnc_response(password, challenge) + b"\1")
        assert other.read(right, 4) == bytes(4)
        assert other.read(wrong, 22) == b"\0\0\0\1\0\0\0\x0ewrong password"
        other.until(lambda: other.ended(wrong))
        assert other.server.clients == 1
        assert "wrong password" in other.lines[0]
    finally:
        other.close()


def test_passwords_that_are_guessed_are_looked_at_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """By eight connections at a time, whose challenges are all under way; the right one is not looked at either, until it may be."""
    now = [1000.0]
    monkeypatch.setattr(vnc, "Attempts", lambda clock: Attempts(lambda: now[0]))
    other = Rig("geheim")
    try:

        def guess(passwords: list[bytes]) -> list[bytes]:
            clients = [other.connect() for _ in passwords]
            challenges: list[bytes] = []
            for client in clients:
                client.sendall(b"RFB 003.008\n\2")
                challenges.append(other.read(client, 12 + 2 + 16)[-16:])
            found: list[bytes] = []
            for client, challenge, password in zip(clients, challenges, passwords, strict=True):
                client.sendall(vnc_response(password, challenge))
                result, reason = other.read(client, 4), b""
                if result != bytes(4):
                    reason = other.read(client, int.from_bytes(other.read(client, 4), "big"))
                    other.until(lambda client=client: other.ended(client))  # type: ignore[misc]
                found.append(reason)
                client.close()
            other.until(lambda: other.server.clients == 0)
            return found

        later = b"too many wrong passwords: try again in 1 s"
        first = guess([b"falsch"] * 7 + [b"geheim"])
        assert first[:4] == [b"wrong password"] * 4
        assert first[4] == b"wrong password, the 5th in a row: for 1 s none is looked at"
        assert first[5:] == [later] * 3
        assert len(other.lines) == 5, "and not a line for each that was not looked at"
        looked, began = 0, now[0]
        while now[0] < began + 3600:
            looked += any(reason.startswith(b"wrong") for reason in guess([b"falsch"]))
            now[0] += 0.5 if now[0] < began + 200 else 30.0
        assert 60 <= looked <= 70, "in an hour"
        now[0] += 60.0
        assert guess([b"geheim"]) == [b""]
        assert guess([b"falsch"] * 4) == [b"wrong password"] * 4
    finally:
        other.close()


def test_bad_clients_are_sent_away_and_others_are_served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonsense, a handshake that does not end, one that takes nothing, more of them than there is room for."""
    monkeypatch.setattr(vnc, "HANDSHAKE_S", 0.3)
    good = rig.viewer()
    nonsense, mute = rig.connect(), rig.connect()
    nonsense.sendall(b"GET / HTTP/1.1\r\n\r\n")
    rig.until(lambda: rig.ended(nonsense))
    greedy = rig.viewer()
    greedy.sendall(REQUEST * 200)  # and never reads
    flood = rig.viewer()
    key = struct.pack(">BB2xI", 4, 1, ord("x"))
    rig.screen = Picture(1024, 768, bytes(1024 * 768 * 3))
    for _ in range(50):
        try:
            flood.send(key * 500)
            greedy.send(REQUEST * 200)
        except BlockingIOError:
            pass
        rig.reactor.once(0)
    rig.until(lambda: rig.ended(mute))
    waits = sum(len(client.out) for client in rig.server._clients.values())
    assert waits < 8 << 20
    assert rig.server.clients == 3
    crowd = [rig.connect() for _ in range(vnc.MAX_CLIENTS)]
    rig.until(lambda: sum(rig.ended(client) for client in crowd) >= 3)
    assert rig.server.clients <= vnc.MAX_CLIENTS
    good.sendall(struct.pack(">BB2xI", 4, 1, ord("q")))
    rig.until(lambda: KeyEvent("q", True) in rig.events)


def test_pictures_take_a_share_of_the_time_at_most(rig: Rig) -> None:
    """The guest is served by the same thread."""
    busy = 0.0

    def slow() -> Picture:
        nonlocal busy
        began = time.monotonic()
        while time.monotonic() - began < 0.05:
            pass
        busy += time.monotonic() - began
        return rig.screen

    rig.server._picture = slow  # type: ignore[misc]
    client = rig.viewer()
    client.sendall(REQUEST + MORE)
    busy, began = 0.0, time.monotonic()
    rig.until(lambda: time.monotonic() - began > 1.5)
    assert 0 < busy < 0.4 * (time.monotonic() - began)
