"""Doorbells: eventfds for notifications that repeat, never read or written in blocking mode.

A peer that holds the same eventfd can fill it, drain it or change its flags; so a ring that would block counts as rung, and
a spurious wake-up is normal.
"""

from __future__ import annotations

import contextlib
import os


class Doorbell:
    """One direction of one channel."""

    __slots__ = ("fd",)

    def __init__(self, fd: int | None = None) -> None:
        """Takes over `fd`, or makes a new eventfd."""
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if fd is None else fd

    def fileno(self) -> int:
        """For poll and select."""
        return self.fd

    def ring(self) -> None:
        """Notify. Never blocks; a full counter is a notification that was not taken yet."""
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(self.fd, False)
            os.eventfd_write(self.fd, 1)

    def take(self) -> bool:
        """Forget rings so far; True if there was one."""
        try:
            os.set_blocking(self.fd, False)
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
