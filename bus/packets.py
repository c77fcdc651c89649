"""SOCK_SEQPACKET links: one message a packet, with file descriptors beside it (SCM_RIGHTS)."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from bus.messages.envelope import MAX_DESCRIPTORS, MAX_MESSAGE, BadMessage, Message, Registry, decode, encode

_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class LinkClosed(ConnectionError):
    """The other end of the link is gone."""


class LinkFull(BlockingIOError):
    """The other end does not read: the packet was not sent."""


_UCRED = struct.Struct("3i")


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of whoever connected (or listened, for the one that connected), as the kernel recorded it (SO_PEERCRED). The
    pid is 0 for a process that this pid namespace does not show."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected, non-inheritable SOCK_SEQPACKET sockets with room for several of the largest messages."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (left, right):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MAX_MESSAGE)
    return left, right


class PacketLink:
    """One end of such a pair. Non-blocking: `receive` gives None when there is nothing, `send` raises LinkFull."""

    def __init__(self, sock: socket.socket, kinds: Registry, *, descriptors: bool = True) -> None:
        """`kinds` are those that may arrive; with `descriptors` False any that come along are never received."""
        sock.setblocking(False)
        self._socket = sock
        self._kinds = kinds
        self._descriptors = descriptors

    def fileno(self) -> int:
        """For poll and select."""
        return self._socket.fileno()

    def detach(self) -> socket.socket:
        """The socket, for another link of other kinds; this one must not be used any more."""
        return self._socket

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message. LinkFull, LinkClosed, or BadMessage when it is too large."""
        self.send_raw(encode(message), descriptors)

    def send_raw(self, raw: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send an encoded message."""
        try:
            if descriptors:
                socket.send_fds(self._socket, [raw], list(descriptors))
            else:
                self._socket.send(raw)
        except BlockingIOError:
            raise LinkFull("peer does not read") from None
        except OSError as error:
            raise LinkClosed(os.strerror(error.errno or 0)) from None

    def receive_raw(self) -> tuple[bytes, list[int]] | None:
        """The next packet and its descriptors (which the caller must close); None if none waits. LinkClosed."""
        try:
            if not self._descriptors:
                raw = self._socket.recv(MAX_MESSAGE + 1)
                if not raw:
                    raise LinkClosed("closed")
                return raw, []
            raw, ancillary, flags, _ = self._socket.recvmsg(
                MAX_MESSAGE + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except LinkClosed:
            raise
        except OSError as error:
            raise LinkClosed(os.strerror(error.errno or 0)) from None
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not raw:
            close_all(fds)
            raise LinkClosed("closed")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(fds)
            raise BadMessage("packet longer than any message, or too many descriptors")
        return raw, list(fds)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message, validated, and its descriptors. BadMessage (descriptors closed), LinkClosed, None."""
        packet = self.receive_raw()
        if packet is None:
            return None
        raw, fds = packet
        try:
            return decode(raw, self._kinds), fds
        except BadMessage:
            close_all(fds)
            raise

    def burst(
        self, most: int, refused: Callable[[BadMessage], None], closed: Callable[[], None]
    ) -> Iterator[tuple[Message, list[int]]]:
        """What waits, at most so many packets, so that whoever sends them all the time keeps nobody else from being served. `refused` is
        told of one that does not validate, `closed` that the other end is gone. Ends when the taker closes the link."""
        for _ in range(most):
            if self._socket.fileno() < 0:
                return
            try:
                packet = self.receive()
            except BadMessage as error:
                refused(error)
                continue
            except LinkClosed:
                closed()
                return
            if packet is None:
                return
            yield packet


def close_all(descriptors: Sequence[int] | array.array[int]) -> None:
    """Close each, forgiving those that are closed already."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
