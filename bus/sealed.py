"""Sealed memfds: machine memory that no holder of a descriptor can resize (memfd_create(2), F_ADD_SEALS)."""

from __future__ import annotations

import fcntl
import os
from typing import Final

F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 1
F_SEAL_SHRINK: Final = 2
F_SEAL_GROW: Final = 4


def create(name: str, size: int) -> int:
    """A zeroed sparse memfd of `size` bytes, mode 0600, its size and seals fixed for good. OSError if memory is short."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # 0600: another uid that is handed a read-only descriptor cannot reopen it for writing through /proc.
        os.fchmod(fd, 0o600)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_only(fd: int) -> int:
    """A second descriptor of the same memory that cannot be written through."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def check(fd: int, size: int) -> None:
    """Refuse (ValueError) a descriptor that is not a sealed memfd of that size: mapping it could raise SIGBUS later."""
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"descriptor {fd} is not a memfd: {error}") from None
    if seals & (F_SEAL_SHRINK | F_SEAL_GROW) != F_SEAL_SHRINK | F_SEAL_GROW:
        raise ValueError(f"memfd {fd} is not sealed against resizing")
    if os.fstat(fd).st_size != size:
        raise ValueError(f"memfd {fd} has {os.fstat(fd).st_size} bytes, expected {size}")
