"""Doorbells: datagram sockets for notifications that repeat. Neither end can make the other wait.

A peer that is not trusted holds the other end, and perhaps a copy of this one: it can fill it, drain it, and change its flags at any
moment. So no operation here depends on the descriptor's own O_NONBLOCK (between setting that and a call a peer can clear it, as on an
eventfd that two processes share): each call itself says that it does not wait (MSG_DONTWAIT). A ring that would block counts as
rung, and a spurious wake-up is normal. Datagrams, as a peer that closes its end then leaves no end of file that would be readable
for ever.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

TAKEN_AT_ONCE: Final = 16
"""Rings that one `take` forgets: more than an honest ringer can have outstanding; what is left makes the descriptor readable again."""
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Doorbell:
    """One end of one direction of one channel."""

    __slots__ = ("_socket", "fd")

    def __init__(self, fd: int) -> None:
        """Takes over `fd`, an end of `pair` that another process handed over. OSError if it is no socket."""
        self.fd = fd
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=fd)

    @classmethod
    def pair(cls) -> tuple[Doorbell, Doorbell]:
        """The end that rings and the end that listens."""
        ringer, listener = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Room for a few rings: those that were not taken yet say all that there is to say.
        ringer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return cls(ringer.detach()), cls(listener.detach())

    def fileno(self) -> int:
        """For poll and select."""
        return self.fd

    def ring(self) -> None:
        """Notify. Never blocks; a full queue is a notification that was not taken yet, and nobody at the other end is no error."""
        with contextlib.suppress(OSError):
            self._socket.send(b"!", _FLAGS)

    def take(self) -> bool:
        """Forget rings so far; True if there was one. Never blocks."""
        count = 0
        try:
            while count < TAKEN_AT_ONCE:
                self._socket.recv(1, _FLAGS)
                count += 1
        except OSError:
            pass
        return bool(count)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            self._socket.close()
            self.fd = -1
