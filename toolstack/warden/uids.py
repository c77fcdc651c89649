"""User ids for the processes of a machine: a block of its own for each machine on this host."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

FIRST: Final = 1_600_000_000
"""First uid of the first block: above what distributions, subuid ranges and systemd hand out."""
BLOCK: Final = 4096
"""Uids in a block; a machine that used them all takes them again from the start, skipping those in use."""
BLOCKS: Final = 256


class UidBlock:
    """A locked block of uids, freed when closed or when the process ends."""

    def __init__(self, directory: Path) -> None:
        """Takes the first free block. RuntimeError if all are taken."""
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        for number in range(BLOCKS):
            fd = os.open(directory / f"block-{number}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            self._fd = fd
            self._base = FIRST + number * BLOCK
            self._next = 0
            self._used: set[int] = set()
            return
        raise RuntimeError(f"all {BLOCKS} blocks of user ids are taken by running machines")

    def take(self) -> int:
        """A uid that no process of this machine has."""
        for _ in range(BLOCK):
            uid = self._base + self._next
            self._next = (self._next + 1) % BLOCK
            if uid not in self._used:
                self._used.add(uid)
                return uid
        raise RuntimeError(f"the machine has {BLOCK} processes already")

    def give_back(self, uid: int) -> None:
        """The last process with that uid ended."""
        self._used.discard(uid)

    def close(self) -> None:
        """Free the block."""
        os.close(self._fd)
