"""A ZMTP 3.1 client with CURVE that can be made to misbehave: what libzmq would never send (RFC 37, RFC 26)."""

from __future__ import annotations

import socket
import struct

import zmq.utils.z85 as z85
from nacl import bindings as nacl

from bus.credentials import ClientCredentials

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
TIMEOUT_S = 3.0


def connect(endpoint: str, timeout: float = TIMEOUT_S) -> socket.socket:
    """A socket to an ipc:// endpoint. OSError."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    sock.connect(endpoint.removeprefix("ipc://"))
    return sock


def frame(body: bytes, flags: int = 0) -> bytes:
    """One ZMTP frame."""
    if len(body) > 255:
        return struct.pack(">BQ", flags | 2, len(body)) + body
    return bytes((flags, len(body))) + body


class RawClient:
    """One connection, up to READY."""

    def __init__(self, keys: ClientCredentials) -> None:
        """Connects and shakes hands. ConnectionError or TimeoutError if the server does not want to."""
        self.socket = connect(keys.endpoint)
        server = z85.decode(keys.server_public)
        public, secret = z85.decode(keys.public), z85.decode(keys.secret)
        short_public, short_secret = nacl.crypto_box_keypair()
        self._take(64)
        nonce = struct.pack(">Q", 1)
        box = nacl.crypto_box(bytes(64), b"CurveZMQHELLO---" + nonce, server, short_secret)
        hello = b"\x05HELLO\x01\x00" + bytes(72) + short_public + nonce + box
        self.socket.sendall(GREETING + frame(hello, 4))
        welcome = self._command()
        plain = nacl.crypto_box_open(welcome[24:], b"WELCOME-" + welcome[8:24], server, short_secret)
        server_short, cookie = plain[:32], plain[32:]
        vouch_nonce = nacl.randombytes(16)
        vouch = nacl.crypto_box(short_public + server, b"VOUCH---" + vouch_nonce, server_short, secret)
        nonce = struct.pack(">Q", 2)
        metadata = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        box = nacl.crypto_box(
            public + vouch_nonce + vouch + metadata, b"CurveZMQINITIATE" + nonce, server_short, short_secret
        )
        self.initiate = frame(b"\x08INITIATE" + cookie + nonce + box, 4)
        self.hello = GREETING + frame(hello, 4)
        self.socket.sendall(self.initiate)
        self._command()
        self._shared = nacl.crypto_box_beforenm(server_short, short_secret)
        self._nonce = 2

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("closed by the server")
            data += more
        return data

    def _command(self) -> bytes:
        flags, size = self._take(2)
        if flags & 2:
            size = int.from_bytes(bytes((size,)) + self._take(7), "big")
        return self._take(size)

    def message(self, payload: bytes, *, more: bool = False) -> bytes:
        """The bytes of a message (or of a part of one)."""
        self._nonce += 1
        nonce = struct.pack(">Q", self._nonce)
        plain = bytes((int(more),)) + payload
        box = nacl.crypto_box_easy_afternm(plain, b"CurveZMQMESSAGEC" + nonce, self._shared)
        return frame(b"\x07MESSAGE" + nonce + box)

    def closed(self) -> bool:
        """Whether the server closes the connection (waits for that)."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close."""
        self.socket.close()
