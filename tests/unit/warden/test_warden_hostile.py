"""Parts of the warden: what a process leaves behind goes with it, logs do not grow for ever, and nobody else's directory is used."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from toolstack.warden import uids, warden
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.uids import end_all

UID = uids.FIRST - 7 - 10 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
"""And the two below: of this worker alone, for the tests kill all that have them."""
ROOT = os.getuid() == 0


def left_behind(uid: int, forks: int) -> list[int]:
    """Descriptors that report the ends of processes which a process of that uid forked before it ended."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.setsid()
            for _ in range(forks):
                if not os.fork():
                    os.setsid()
                    os.write(write, os.getpid().to_bytes(4, "little"))
                    time.sleep(600)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    pids = [int.from_bytes(os.read(read, 4), "little") for _ in range(forks)]
    os.close(read)
    os.close(write)
    return [os.pidfd_open(pid) for pid in pids]


def ended(pidfds: list[int], seconds: float = 5.0) -> bool:
    """All of them, within that time."""
    deadline = time.monotonic() + seconds
    return all(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0] for fd in pidfds)


@pytest.mark.skipif(not ROOT, reason="processes get uids of their own where the machine is started as root")
def test_what_a_process_forked_is_ended_with_it() -> None:
    """It may have changed sessions, and its parent may be gone: its uid is used again only when nothing runs under it."""
    mine, others = left_behind(UID, 5), left_behind(UID - 1, 1)
    try:
        assert not ended(mine, 0.0)
        assert end_all({UID})
        assert ended(mine)
        assert not ended(others, 0.0), "another uid's are left alone"
        assert end_all({UID - 1, UID - 2})
        assert ended(others)
    finally:
        for fd in (*mine, *others):
            os.close(fd)


def stopper(uid: int) -> int:
    """A descriptor that reports the end of a process of that uid which stops all others of it, again and again."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(write, b"r")
            while True:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGSTOP)
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"r"
    os.close(read)
    os.close(write)
    return os.pidfd_open(child)


@pytest.mark.skipif(not ROOT, reason="processes get uids of their own where the machine is started as root")
@pytest.mark.timeout(60)
def test_who_stops_all_of_his_uid_does_not_stop_the_warden() -> None:
    """kill(-1, SIGSTOP) in a loop: what ends the leftovers has their effective uid, and is not theirs to stop."""
    for turn in range(20):
        attacker = stopper(UID)
        try:
            begun = time.monotonic()
            assert end_all({UID})
            assert ended([attacker], 1.0), f"turn {turn}"
            assert time.monotonic() - begun < 10.0
        finally:
            signal.pidfd_send_signal(attacker, signal.SIGKILL)
            os.waitid(os.P_PIDFD, attacker, os.WEXITED)
            os.close(attacker)


@pytest.mark.skipif(not ROOT, reason="processes get uids of their own where the machine is started as root")
@pytest.mark.timeout(60)
def test_a_killer_that_is_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever may (root): the warden's wait has a bound, the stopped one is killed, and the next round ends what is left."""
    mine = left_behind(UID, 1)
    turns = iter([True])
    fork = os.fork

    def stopped_once() -> int:
        first = next(turns, False)
        child = fork()
        if first and not child:
            os.kill(os.getpid(), signal.SIGSTOP)
        return child

    monkeypatch.setattr(os, "fork", stopped_once)
    try:
        begun = time.monotonic()
        assert end_all({UID})
        assert uids.KILLER_S <= time.monotonic() - begun < 10.0
        assert ended(mine)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
    finally:
        os.close(mine[0])


def test_a_log_that_has_grown_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are on the host's /run: no process fills that. It is opened for appending, so that it goes on at the beginning."""
    monkeypatch.setattr(warden, "LOG_LIMIT", 100)
    path = tmp_path / "log"
    child = SimpleNamespace(log=str(path))
    gone = SimpleNamespace(log=str(tmp_path / "none"))
    it = cast(Any, warden.LocalWarden.__new__(warden.LocalWarden))
    it._children, it._ready, it._looked = {1: child}, {"domu": [gone]}, 0.0
    with path.open("ab", buffering=0) as file:
        file.write(b"x" * 101)
        it._idle()
        file.write(b"new\n")
        assert path.read_bytes() == b"new\n"
        file.write(b"x" * 101)
        it._idle()
        assert path.stat().st_size > 100, "it is not looked at all the time"


@pytest.mark.parametrize("how", ["link", "file", "open to all", "of another"])
def test_a_directory_that_others_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """/tmp/domicile-UID is a name that all know: who made it could put another control socket in the place of the machine's."""
    base = tmp_path / "domicile"
    if how == "link":
        (tmp_path / "elsewhere").mkdir()
        base.symlink_to(tmp_path / "elsewhere")
    elif how == "file":
        base.touch()
    else:
        base.mkdir()
        base.chmod(0o777 if how == "open to all" else 0o711)
        if how == "of another":
            if not ROOT:
                pytest.skip("only root makes a directory of another user's")
            os.chown(base, UID, UID)
    monkeypatch.setenv("DOMICILE_RUN", str(base))
    with pytest.raises(ValueError, match="DOMICILE_RUN"):
        RuntimeDirectory("m")
    assert stat.S_ISLNK(base.lstat().st_mode) == (how == "link"), "nothing was changed"


def test_a_directory_of_ones_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made if it is missing."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has 107 bytes
        monkeypatch.setenv("DOMICILE_RUN", f"{short}/run")
        runtime = RuntimeDirectory("m")
        runtime.create()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(runtime.control))
        RuntimeDirectory("m").create()
        assert runtime.bus.is_dir()
