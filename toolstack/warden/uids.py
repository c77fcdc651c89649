"""User ids for the processes of a machine: a block of its own for each machine on this host."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

FIRST: Final = 1_600_000_000
"""First uid of the first block: above what distributions, subuid ranges and systemd hand out."""
BLOCK: Final = 4096
"""Uids in a block; a machine that used them all takes them again from the start, skipping those in use."""
BLOCKS: Final = 256


ROUNDS: Final = 50
"""Looks for processes that a domain's process left behind: each look kills all that there are at once."""
KILLER_S: Final = 0.5
"""What kills them has this long; then it is killed itself, and the next round's tries again."""
KILLERS: Final = 2 * BLOCK * BLOCKS
"""The killer's real and saved uid is its victims' plus this: nobody else's, so no victim may send it a signal."""


def _living(uids: Collection[int]) -> set[int]:
    """Which of these uids living processes have, by proc(5)."""
    wanted, found = {str(uid) for uid in uids}, set[int]()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "status").read_text()
        except OSError:
            continue
        if "\nState:\tZ" not in text:
            found |= {int(uid) for uid in text.partition("\nUid:")[2].split(None, 4)[:4] if uid in wanted}
    return found


def end_all(uids: Collection[int]) -> bool:
    """Kill every process with one of these uids, children that outlived their parents too (needs root). Whether none is left.

    One system call kills all of a uid, so that none can fork away: kill(-1) by a process that has that effective uid. Its real and
    saved uid are another's (credentials(7), kill(2)): the victims may not stop or kill it before it has done its work."""
    for _ in range(ROUNDS):
        left = _living(uids)
        if not left:
            return True
        for uid in left:
            _kill_all(uid)
        time.sleep(0.002)  # what was killed takes a moment to be gone
    return not _living(uids)


def _kill_all(uid: int) -> None:
    """SIGKILL to all processes of a uid, within a second."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid + KILLERS, uid, uid + KILLERS)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], KILLER_S)[0]:  # it is kept from running, whoever does that
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], KILLER_S)
        os.waitpid(child, os.WNOHANG)
    finally:
        os.close(pidfd)


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
