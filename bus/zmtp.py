"""The server end of a ZeroMQ connection (ZMTP 3.1, RFC 37, with CURVE, RFC 26) without I/O and with hard bounds.

The hypervisor's peers are hostile, and libzmq does not bound what a hostile peer makes it hold: a multipart message without an
end grows without limit, whatever MAXMSGSIZE and RCVHWM say. So the hypervisor's end of each link is this decoder. The domain's end is
libzmq (pyzmq), unchanged: to it this is a ROUTER with CURVE. See docs/decisions/0003-zmtp-at-the-hypervisor.md.

A connection holds at most one incomplete frame, plus what one `receive` was given. Messages of several frames are dropped and
counted as they come, without being kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from nacl import bindings as nacl
from nacl.exceptions import CryptoError

from bus.box import Box

FLAG_MORE: Final = 1
FLAG_LONG: Final = 2
FLAG_COMMAND: Final = 4
INNER_MORE: Final = 1
INNER_COMMAND: Final = 2
MAX_HANDSHAKE_FRAME: Final = 1024
"""The longest handshake command, INITIATE with metadata, takes some 300 bytes."""
_GREETING: Final = (
    b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\x01" + bytes(31)
)
_MESSAGE: Final = b"\x07MESSAGE"
_OVERHEAD: Final = len(_MESSAGE) + 8 + 16 + 1


class ProtocolError(ConnectionError):
    """The peer does not speak the protocol, or does not hold the key: close the connection."""


class ServerConnection:
    """One accepted connection."""

    def __init__(self, secret: bytes, client_public: bytes, max_message: int) -> None:
        """`secret`: this server's long-term secret key; `client_public`: the only key let in (32 bytes each)."""
        self._secret = secret
        self._client_public = client_public
        self._max_frame = max_message + _OVERHEAD
        self._buffer = bytearray()
        self._step: Callable[[bytes], None] = self._greeting
        self._client_short = b""
        self._short_secret = b""
        self._cookie_key = nacl.randombytes(32)
        self._box: Box
        """Once `ready`."""
        self._their_nonce = 0
        self._our_nonce = 0
        self._in_multipart = False
        self.output = bytearray(_GREETING)
        """Handshake bytes to send; the caller empties it."""
        self.ready = False
        """The handshake is over: the peer holds the key."""
        self.dropped = 0
        """Multipart messages that were dropped."""

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes from the peer; the whole single-frame messages that they complete. ProtocolError."""
        buffer = self._buffer
        buffer += data
        messages: list[bytes] = []
        if self._step == self._greeting:
            if len(buffer) < 64:
                self._check_signature(buffer)
                return messages
            self._greeting(bytes(buffer[:64]))
            del buffer[:64]
        position = 0
        available = len(buffer)
        while available - position >= 2:
            flags = buffer[position]
            if flags & FLAG_LONG:
                if available - position < 9:
                    break
                size = int.from_bytes(buffer[position + 1 : position + 9], "big")
                start = position + 9
            else:
                size = buffer[position + 1]
                start = position + 2
            if size > (self._max_frame if self.ready else MAX_HANDSHAKE_FRAME):
                raise ProtocolError(f"frame of {size} bytes")
            if available - start < size:
                break
            body = bytes(buffer[start : start + size])
            position = start + size
            if self.ready:
                message = self._message(flags, body)
                if message is not None:
                    messages.append(message)
            else:
                self._step(body)
        if position:
            del buffer[:position]
        return messages

    def encode(self, payload: bytes) -> bytes:
        """The bytes that carry one single-frame message to the peer. Only when `ready`."""
        self._our_nonce += 1
        nonce = struct.pack(">Q", self._our_nonce)
        box = self._box.seal(b"\0" + payload, b"CurveZMQMESSAGES" + nonce)
        size = len(_MESSAGE) + 8 + len(box)
        if size > 255:
            return b"".join((struct.pack(">BQ", FLAG_LONG, size), _MESSAGE, nonce, box))
        return b"".join((bytes((0, size)), _MESSAGE, nonce, box))

    # ------------------------------------------------------------------ greeting and handshake

    @staticmethod
    def _check_signature(start: bytes | bytearray) -> None:
        if start[:1] not in (b"", b"\xff") or (len(start) >= 10 and start[9] != 0x7F):
            raise ProtocolError("no ZMTP signature")

    def _greeting(self, greeting: bytes) -> None:
        self._check_signature(greeting)
        if greeting[10] < 3:
            raise ProtocolError(f"ZMTP version {greeting[10]}")
        if greeting[12:32] != b"CURVE".ljust(20, b"\0"):
            raise ProtocolError("mechanism is not CURVE")
        if greeting[32] != 0:
            raise ProtocolError("peer claims to be the server")
        self._step = self._hello

    def _hello(self, body: bytes) -> None:
        if len(body) != 200 or body[:6] != b"\x05HELLO" or body[6] != 1:
            raise ProtocolError("bad HELLO")
        self._client_short = body[80:112]
        self._open(body[120:200], b"CurveZMQHELLO---" + body[112:120], self._client_short, self._secret)
        short_public, self._short_secret = nacl.crypto_box_keypair()
        cookie_nonce = nacl.randombytes(16)
        cookie = cookie_nonce + nacl.crypto_secretbox(
            self._client_short + self._short_secret, b"COOKIE--" + cookie_nonce, self._cookie_key
        )
        self._cookie = cookie
        nonce = nacl.randombytes(16)
        box = nacl.crypto_box(short_public + cookie, b"WELCOME-" + nonce, self._client_short, self._secret)
        self._command(b"\x07WELCOME" + nonce + box)
        self._step = self._initiate

    def _initiate(self, body: bytes) -> None:
        if len(body) < 257 or body[:9] != b"\x08INITIATE" or body[9:105] != self._cookie:
            raise ProtocolError("bad INITIATE")
        plain = self._open(
            body[113:], b"CurveZMQINITIATE" + body[105:113], self._client_short, self._short_secret
        )
        if len(plain) < 128:
            raise ProtocolError("bad INITIATE")
        client, vouch_nonce, vouch_box = plain[:32], plain[32:48], plain[48:128]
        if client != self._client_public:
            raise ProtocolError("not the key of this endpoint")
        vouch = self._open(vouch_box, b"VOUCH---" + vouch_nonce, client, self._short_secret)
        if vouch[:32] != self._client_short or vouch[32:] != nacl.crypto_scalarmult_base(self._secret):
            raise ProtocolError("bad vouch")
        self._their_nonce = int.from_bytes(body[105:113], "big")
        shared = nacl.crypto_box_beforenm(self._client_short, self._short_secret)
        self._box = Box(shared, self._max_frame)
        self._our_nonce = 1
        nonce = struct.pack(">Q", 1)
        metadata = _property(b"Socket-Type", b"ROUTER") + _property(b"Identity", b"")
        box = nacl.crypto_box_easy_afternm(metadata, b"CurveZMQREADY---" + nonce, shared)
        self._command(b"\x05READY" + nonce + box)
        self._short_secret = b""
        self.ready = True

    def _open(self, box: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
        try:
            return nacl.crypto_box_open(box, nonce, public, secret)
        except CryptoError:
            raise ProtocolError("a box does not open: wrong key") from None

    def _command(self, body: bytes) -> None:
        if len(body) > 255:
            self.output += struct.pack(">BQ", FLAG_COMMAND | FLAG_LONG, len(body)) + body
        else:
            self.output += bytes((FLAG_COMMAND, len(body))) + body

    # ------------------------------------------------------------------ messages

    def _message(self, flags: int, body: bytes) -> bytes | None:
        if flags & FLAG_COMMAND or body[:8] != _MESSAGE or len(body) < _OVERHEAD:
            raise ProtocolError("not a CURVE message")
        nonce = int.from_bytes(body[8:16], "big")
        if nonce <= self._their_nonce:
            raise ProtocolError("nonce used again")
        self._their_nonce = nonce
        plain = self._box.open(body[16:], b"CurveZMQMESSAGEC" + body[8:16])
        if plain is None:
            raise ProtocolError("a message does not open")
        inner = plain[0]
        if inner & INNER_COMMAND:
            return None
        if inner & INNER_MORE:
            if not self._in_multipart:
                self.dropped += 1
            self._in_multipart = True
            return None
        if self._in_multipart:
            self._in_multipart = False
            return None
        return plain[1:]


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">I", len(value)) + value
