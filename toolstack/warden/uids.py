"""User ids for the processes of a machine: a block of its own for each machine on this host.

The kernel counts processes (RLIMIT_NPROC) by user id, and lets processes of one user id signal each other, also across containers, which
do not see each other's locks. So a block is taken at random, and locked against the machines that can be seen.
"""

from __future__ import annotations

import fcntl
import os
import secrets
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
BLOCKS: Final = 32768
TRIES: Final = 1000
"""Blocks that are tried."""
ROUNDS: Final = 50
"""Looks for processes that a domain's process left behind: each look kills all that there are at once."""
KILLER_S: Final = 0.5
"""What kills them has this long; then it is killed itself, and the next round's tries again."""
KILLERS: Final = 2 * BLOCK * BLOCKS
"""The killer's real and saved uid is its victims' plus this: nobody else's, so no victim may send it a signal."""


_CAPABILITIES: Final = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
"""linux/capability.h: what giving a process another uid, and ending it, needs."""


def unavailable(proc: Path = Path("/proc/self")) -> str:
    """Why the processes of a machine cannot have user ids of their own here; empty: they can. user_namespaces(7), capabilities(7).

    A container's root may be the root of a user namespace that maps 65,536 ids, or of one that has been left without capabilities.
    """
    if os.getuid() != 0:
        return "not root"
    last = FIRST + KILLERS + BLOCK * BLOCKS - 1
    ranges = [tuple(map(int, line.split())) for line in (proc / "uid_map").read_text().splitlines()]
    if not any(inside <= FIRST and last < inside + count for inside, _, count in ranges):
        return f"root of a user namespace that has no user ids {FIRST} to {last}"
    effective = int((proc / "status").read_text().partition("\nCapEff:")[2].split(None, 1)[0], 16)
    missing = [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]
    return f"root without {', '.join(missing)}" if missing else ""


def _living(uids: Collection[int]) -> set[int]:
    """Which of these uids living processes have, by proc(5)."""
    wanted, found = {b"%d" % uid for uid in uids}, set[int]()
    # By system calls alone: the host may have thousands of processes, and this is done at each end of one of ours.
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            text = os.read(fd, 4096)  # its end is far behind the uids
        except OSError:
            continue
        finally:
            os.close(fd)
        if b"\nState:\tZ" not in text:
            found |= {int(uid) for uid in text.partition(b"\nUid:")[2].split(None, 4)[:4] if uid in wanted}
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


def _locked(fd: int, path: Path) -> bool:
    """Lock the file, if nobody has, and if it is still the one of that name: who frees a block takes its file away."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _take_block(directory: Path) -> tuple[int, Path, int]:
    """Number, lock file and its descriptor of a free block. RuntimeError."""
    for _ in range(TRIES):
        number = secrets.randbelow(BLOCKS)
        path = directory / f"block-{number}"
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if _locked(fd, path):
            return number, path, fd
        os.close(fd)
    raise RuntimeError(f"no free block of user ids was found: see {directory}")


class UidBlock:
    """A locked block of uids, freed when closed or when the process ends."""

    def __init__(self, directory: Path) -> None:
        """Takes a free block. RuntimeError if none is found."""
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        number, self._path, self._fd = _take_block(directory)
        self._base: Final = FIRST + number * BLOCK
        self._next = 0
        self._used: Final[set[int]] = set()

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
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
