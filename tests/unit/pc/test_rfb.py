"""drivers/pc/rfb: handshakes, formats, updates of what changed, keys and pointer, bad clients; and a real client library (vncdotool)."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import pytest

from drivers.pc.des import encrypt_block, vnc_response
from drivers.pc.rfb import KeyEvent, PointerEvent, RfbError, RfbServer
from drivers.pc.vga_render import Picture

RED, GREEN = b"\xff\0\0", b"\0\xff\0"


def picture(colour: bytes = RED, width: int = 4, height: int = 3) -> Picture:
    return Picture(width, height, colour * width * height)


def ready(minor: bytes = b"8") -> RfbServer:
    server = RfbServer("guest", 4, 3)
    assert server.output() == b"RFB 003.008\n"
    server.receive(b"RFB 003.00" + minor + b"\n")
    server.output()
    if minor != b"3":
        server.receive(b"\1")
    server.receive(b"\1")
    assert server.ready
    server.output()
    return server


def request(server: RfbServer, incremental: int = 0, y: int = 0, height: int = 3) -> None:
    server.receive(struct.pack(">BBHHHH", 3, incremental, 0, y, 4, height))


def rectangles(data: bytes, size: int = 4) -> list[tuple[int, int, int, int, int, bytes]]:
    kind, count = struct.unpack_from(">BxH", data)
    assert kind == 0
    at, found = 4, []
    for _ in range(count):
        x, y, width, height, encoding = struct.unpack_from(">HHHHi", data, at)
        at += 12
        length = width * height * size if encoding == 0 else 0
        found.append((x, y, width, height, encoding, data[at : at + length]))
        at += length
    assert at == len(data)
    return found


def test_handshake_38_byte_by_byte() -> None:
    server = RfbServer("guest", 640, 400)
    out = server.output()
    for byte in b"RFB 003.008\n\1\1":
        server.receive(bytes((byte,)))
        out += server.output()
    assert out[:12] == b"RFB 003.008\n"
    assert out[12:18] == b"\1\1\0\0\0\0"
    width, height, bits, depth, big, true = struct.unpack_from(">HHBBBB", out, 18)
    assert (width, height, bits, depth, big, true) == (640, 400, 32, 24, 0, 1)
    assert out[-9:] == b"\0\0\0\5guest"


@pytest.mark.parametrize(
    ("version", "answer"),
    [(b"RFB 003.003\n", b"\0\0\0\1"), (b"RFB 003.007\n", b"\1\1"), (b"RFB 004.001\n", b"\1\1")],
)
def test_other_versions(version: bytes, answer: bytes) -> None:
    server = RfbServer("guest", 4, 3)
    server.output()
    server.receive(version)
    assert server.output() == answer


def test_a_whole_picture_then_only_lines_that_changed() -> None:
    server = ready()
    assert not server.wants_update
    request(server)
    assert server.wants_update
    assert server.update(picture())
    assert rectangles(server.output()) == [(0, 0, 4, 3, 0, b"\0\0\xff\0" * 12)]
    request(server, 1)
    assert not server.update(picture())
    assert server.wants_update, "it waits for a change"
    changed = Picture(4, 3, RED * 4 + GREEN * 4 + RED * 4)
    assert server.update(changed)
    assert rectangles(server.output()) == [(0, 1, 4, 1, 0, b"\0\xff\0\0" * 4)]
    assert not server.update(picture()), "nobody asked"


def test_a_part() -> None:
    server = ready()
    request(server)
    server.update(picture())
    server.output()
    request(server, 0, 1, 1)
    server.update(picture(GREEN))
    assert rectangles(server.output())[0][1:4] == (1, 4, 1)
    request(server, 1)
    server.update(picture(GREEN))
    assert [r[1] for r in rectangles(server.output())] == [0, 2], "the part is known to be green"


@pytest.mark.parametrize(
    ("bits", "big", "maxima", "shifts", "red"),
    [
        (32, 1, (255, 255, 255), (16, 8, 0), b"\0\xff\0\0"),
        (32, 0, (255, 255, 255), (0, 8, 16), b"\xff\0\0\0"),
        (16, 0, (31, 63, 31), (11, 5, 0), b"\x00\xf8"),
        (16, 1, (31, 63, 31), (11, 5, 0), b"\xf8\x00"),
        (8, 0, (7, 7, 3), (0, 3, 6), b"\x07"),
    ],
)
def test_formats(bits: int, big: int, maxima: tuple[int, ...], shifts: tuple[int, ...], red: bytes) -> None:
    server = ready()
    server.receive(struct.pack(">B3xBBBBHHHBBB3x", 0, bits, 24, big, 1, *maxima, *shifts))
    request(server, 1)
    server.update(picture())
    assert rectangles(server.output(), bits // 8)[0][5] == red * 12


def test_a_new_size() -> None:
    server = ready()
    server.receive(struct.pack(">BxHiii", 2, 3, 0, 5, -223))
    request(server)
    server.update(picture(RED, 8, 2))
    assert rectangles(server.output()) == [(0, 0, 8, 2, -223, b"")]
    request(server, 1)
    server.update(picture(RED, 8, 2))
    assert rectangles(server.output())[0][:4] == (0, 0, 8, 2)


def test_a_client_that_cannot_be_resized_sees_a_part() -> None:
    server = ready()
    request(server)
    server.update(picture(RED, 2, 9))
    line = b"\0\0\xff\0" * 2 + bytes(8)
    assert rectangles(server.output())[0][5] == line * 3


def test_keys() -> None:
    server = ready()
    events = server.receive(
        b"".join(
            struct.pack(">BB2xI", 4, down, sym)
            for down, sym in ((1, 0xFFE1), (1, 0x41), (0, 0x41), (1, 0x1234567))
        )
    )
    assert events == [KeyEvent("shift", True), KeyEvent("a", True), KeyEvent("a", False)]
    assert server.close() == [KeyEvent("shift", False)]
    assert server.close() == []


def test_the_pointer() -> None:
    server = ready()
    move = lambda *what: server.receive(struct.pack(">BBHH", 5, *what))  # noqa: E731
    assert move(0, 100, 100) == []
    assert move(0, 103, 98) == [PointerEvent(3, 2, 0, 0)]
    assert move(4, 103, 98) == [PointerEvent(0, 0, 0, 2)]
    assert move(2 | 8, 103, 98) == [PointerEvent(0, 0, 1, 4)]
    assert move(2, 103, 98) == []
    assert server.close() == [PointerEvent(0, 0, 0, 0)]


def test_texts_are_passed_over() -> None:
    server = ready()
    assert server.receive(struct.pack(">B3xI", 6, 70_000) + bytes(30_000)) == []
    assert server.receive(bytes(40_000) + struct.pack(">BB2xI", 4, 1, 0x61)) == [KeyEvent("a", True)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x07" + bytes(20),
        struct.pack(">B3xI", 6, 1 << 30),
        struct.pack(">BxH", 2, 60_000),
        struct.pack(">B3xBBBBHHHBBB3x", 0, 24, 24, 0, 1, 255, 255, 255, 16, 8, 0),
        struct.pack(">B3xBBBBHHHBBB3x", 0, 8, 8, 0, 0, 7, 7, 3, 0, 3, 6),
        struct.pack(">B3xBBBBHHHBBB3x", 0, 8, 8, 0, 1, 255, 7, 3, 8, 3, 6),
        struct.pack(">B3xBBBBHHHBBB3x", 0, 32, 24, 0, 1, 200, 255, 255, 16, 8, 0),
    ],
)
def test_bad_clients(data: bytes) -> None:
    with pytest.raises(RfbError):
        ready().receive(data)


def test_no_client_at_all() -> None:
    with pytest.raises(RfbError, match="no RFB client"):
        RfbServer("x", 4, 3).receive(b"GET / HTTP/1.1\r\n")
    server = RfbServer("x", 4, 3)
    server.receive(b"RFB 003.008\n")
    with pytest.raises(RfbError, match="security type 2"):
        server.receive(b"\2")


def serve(listener: socket.socket, shown: Picture, events: list[object], stop: threading.Event) -> None:
    """One client, until it goes or `stop`."""
    connection, _ = listener.accept()
    connection.settimeout(0.05)
    server = RfbServer("guest", shown.width, shown.height)
    with connection:
        while not stop.is_set():
            if server.wants_update:
                server.update(shown)
            connection.sendall(server.output())
            try:
                data = connection.recv(4096)
            except TimeoutError:
                continue
            if not data:
                return
            events += server.receive(data)


def test_a_real_client(tmp_path: Path) -> None:
    """vncdotool takes a screen shot and types."""
    api = pytest.importorskip("vncdotool.api")
    image = pytest.importorskip("PIL.Image")
    shown = Picture(64, 48, (RED * 32 + GREEN * 32) * 48)
    listener = socket.create_server(("127.0.0.1", 0))
    events: list[object] = []
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(listener, shown, events, stop))
    thread.start()
    try:
        client = api.connect(f"127.0.0.1::{listener.getsockname()[1]}", timeout=20)
        client.captureScreen(str(tmp_path / "shot.png"))
        client.keyPress("a")
        client.keyPress("enter")
        client.keyPress("ctrl-c")
        client.refreshScreen()
        client.disconnect()
    finally:
        stop.set()
        thread.join(20)
        listener.close()
        api.shutdown()
    assert not thread.is_alive()
    with image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (64, 48)
        assert shot.convert("RGB").tobytes() == shown.rgb
    pressed = [event.key for event in events if isinstance(event, KeyEvent) and event.pressed]
    assert pressed == ["a", "ret", "ctrl", "c"]


def test_des_by_the_standards_example() -> None:
    """Known answers: a worked example of FIPS 46's text books, and the weak key of all zeros."""
    key, block = bytes.fromhex("133457799BBCDFF1"), bytes.fromhex("0123456789ABCDEF")
    assert encrypt_block(key, block).hex() == "85e813540f0ab405"
    assert encrypt_block(bytes(8), bytes(8)).hex() == "8ca64de9c1b123a7"
    assert encrypt_block(b"\xff" * 8, b"\xff" * 8).hex() == "7359b2163e4edc58"


CHALLENGE = bytes(range(16))


def secured(minor: int) -> RfbServer:
    """With a password, up to the challenge."""
    server = RfbServer("guest", 4, 3, password=b"secret", challenge=CHALLENGE)
    server.output()
    server.receive(b"RFB 003.00%d\n" % minor)
    if minor == 3:
        assert server.output() == b"\0\0\0\2" + CHALLENGE
    else:
        assert server.output() == b"\1\2"
        server.receive(b"\2")
        assert server.output() == CHALLENGE
    return server


@pytest.mark.parametrize("minor", [3, 7, 8])
def test_a_password_is_asked_for(minor: int) -> None:
    server = secured(minor)
    server.receive(vnc_response(b"secret", CHALLENGE))
    assert server.output() == b"\0\0\0\0"
    server.receive(b"\1")
    assert server.ready


@pytest.mark.parametrize("minor", [3, 7, 8])
def test_a_wrong_password_is_told_and_ends_the_connection(minor: int) -> None:
    server = secured(minor)
    with pytest.raises(RfbError, match="wrong password"):
        server.receive(vnc_response(b"Secret", CHALLENGE))
    assert server.output() == b"\0\0\0\1" + (b"\0\0\0\x0ewrong password" if minor == 8 else b"")
    assert not server.ready


def test_no_security_is_not_to_be_had_where_there_is_a_password() -> None:
    server = RfbServer("guest", 4, 3, password=b"secret", challenge=CHALLENGE)
    server.receive(b"RFB 003.008\n")
    with pytest.raises(RfbError, match="security type 1"):
        server.receive(b"\1")
    with pytest.raises(ValueError, match="16 bytes"):
        RfbServer("guest", 4, 3, password=b"secret")
