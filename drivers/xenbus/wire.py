"""xenstore's messages as bytes, for both ends (xs_wire.h, docs/misc/xenstore.txt).

A message is a `struct xsd_sockmsg` (type, req_id, tx_id, len: four little-endian u32) and `len` bytes of
payload, at most XENSTORE_PAYLOAD_MAX.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from bus.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX

HEADER: Final = struct.Struct("<4I")
"""`struct xsd_sockmsg`: type, req_id, tx_id, len."""

MESSAGE_MAX: Final = HEADER.size + XENSTORE_PAYLOAD_MAX
"""Bytes of the longest message."""

ERROR_NAMES: Final = (
    *(
        "EINVAL",
        "EACCES",
        "EEXIST",
        "EISDIR",
        "ENOENT",
        "ENOMEM",
        "ENOSPC",
        "EIO",
        "ENOTEMPTY",
        "ENOSYS",
        "EROFS",
    ),
    *("EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
)
"""The errors that a reply of type XS_ERROR can name, in the order of `xsd_errors` in xs_wire.h."""


class WireError(ValueError):
    """The peer broke the protocol (a payload longer than XENSTORE_PAYLOAD_MAX): the stream cannot be
    followed any more.
    """


class Message(NamedTuple):
    """One whole message."""

    type: int
    req_id: int
    tx_id: int
    payload: bytes


def encode(kind: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The message's bytes. ValueError if the payload is too long to send."""
    if len(payload) > XENSTORE_PAYLOAD_MAX:
        raise ValueError(f"payload of {len(payload)} bytes: at most {XENSTORE_PAYLOAD_MAX} can be sent")
    return HEADER.pack(kind, req_id, tx_id, len(payload)) + payload


class Framer:
    """Cuts a stream of bytes into messages. Holds what was fed and not yet taken; who feeds bounds it."""

    __slots__ = ("_buffer",)

    def __init__(self, initial: bytes = b"") -> None:
        self._buffer = bytearray(initial)

    def __len__(self) -> int:
        """Bytes held."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the stream."""
        self._buffer += data

    def raw(self) -> bytes:
        """What is held, as it was fed (for a dump)."""
        return bytes(self._buffer)

    def clear(self) -> None:
        """Forget what is held."""
        self._buffer.clear()

    @property
    def ready(self) -> bool:
        """`take` would give a message, or raise WireError."""
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return False
        length: int = HEADER.unpack_from(buffer)[3]
        return length > XENSTORE_PAYLOAD_MAX or len(buffer) >= HEADER.size + length

    def take(self) -> Message | None:
        """The next whole message, or None until more is fed. WireError if its header announces too long a
        payload.
        """
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return None
        kind, req_id, tx_id, length = HEADER.unpack_from(buffer)
        if length > XENSTORE_PAYLOAD_MAX:
            raise WireError(
                f"payload of {length} bytes announced: at most {XENSTORE_PAYLOAD_MAX} are allowed"
            )
        end = HEADER.size + length
        if len(buffer) < end:
            return None
        payload = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        return Message(kind, req_id, tx_id, payload)


def split_strings(payload: bytes) -> list[bytes]:
    """The nul-terminated strings of a payload; what follows the last nul is left out."""
    return payload.split(b"\0")[:-1]
