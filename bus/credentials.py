"""What a domain's process needs to reach its own endpoint: handed over in a sealed memfd, never in arguments,
environment or a file that others read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, ClassVar

import zmq.utils.z85
from nacl.bindings import crypto_box_keypair
from pydantic import Field

from bus import sealed
from bus.messages.envelope import Message, decode, encode, registry

Key = Annotated[bytes, Field(min_length=40, max_length=40)]
"""A CURVE key in Z85 text form (40 bytes)."""


class ClientCredentials(Message):
    """The domain's half: where its endpoint is, whom to expect there, and its own key pair."""

    KIND: ClassVar[str] = "client_credentials"
    endpoint: Annotated[str, Field(max_length=200)]
    server_public: Key
    public: Key
    secret: Key


@dataclass(frozen=True, slots=True)
class ServerCredentials:
    """The hypervisor's half: its secret key for this endpoint, and the one client key it lets in (32 bytes each)."""

    secret: bytes
    client_public: bytes


_KINDS = registry(ClientCredentials)


def make(endpoint: str) -> tuple[ServerCredentials, ClientCredentials]:
    """Two fresh key pairs for one endpoint."""
    server_public, server_secret = crypto_box_keypair()
    public, secret = crypto_box_keypair()
    z85 = zmq.utils.z85.encode
    return (
        ServerCredentials(secret=server_secret, client_public=public),
        ClientCredentials(
            endpoint=endpoint, server_public=z85(server_public), public=z85(public), secret=z85(secret)
        ),
    )


def to_descriptor(credentials: ClientCredentials) -> int:
    """A sealed memfd that holds the credentials."""
    raw = encode(credentials)
    fd = sealed.create("domicile-credentials", len(raw))
    os.pwrite(fd, raw, 0)
    return fd


def from_descriptor(fd: int) -> ClientCredentials:
    """The credentials in the memfd, which is closed. BadMessage if they are not."""
    try:
        message = decode(os.pread(fd, os.fstat(fd).st_size, 0), _KINDS)
    finally:
        os.close(fd)
    assert isinstance(message, ClientCredentials)
    return message
