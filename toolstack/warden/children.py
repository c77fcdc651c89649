"""Processes that this very process starts: waiting for their `Begin`, running, ended. For the machine's warden, and for an agent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bus.messages.envelope import BadMessage
from bus.messages.warden import Begin, Spawn
from bus.packets import LinkClosed, PacketLink, pair
from toolstack.warden.ended import ended_within

MODULES: Final = {
    "hypervisor": "hypervisor",
    "dom0": "domains.dom0",
    "domio": "domains.domio",
    "netio": "domains.netio",
    "dm": "domains.dm",
    "domu": "domains.domu",
    "nvme": "domains.devices.nvme",
}
"""Python module of each role that can be started."""

SIGNALS: Final = {
    "stop": signal.SIGSTOP,
    "cont": signal.SIGCONT,
    "kill": signal.SIGKILL,
    "usr1": signal.SIGUSR1,
}
KILL_WAIT_S: Final = 5.0
_TAIL: Final = 3000


@dataclass(slots=True)
class Child:
    """A process, waiting for `Begin` or running."""

    role: str
    process: subprocess.Popen[bytes]
    link: PacketLink
    uid: int | None
    pidfd: int
    log: str
    id: int | None = None
    domain: int = -1
    endpoint: Path | None = None
    """The socket that was made for it."""

    def signal(self, what: str) -> None:
        """Send it a signal by its name; nothing if it ended."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, SIGNALS[what])

    def begin(self, order: Spawn, settings: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Send its `Begin`. One that died at once is reported like any other."""
        self.id, self.domain = order.id, order.domain
        message = Begin(
            role=order.role, name=order.name, domain=order.domain, fds=order.fds, settings=settings
        )
        with contextlib.suppress(LinkClosed):
            self.link.send(message, descriptors)

    def reap(self) -> tuple[int, str]:
        """It ended: its status and the end of its log. Its descriptors are closed."""
        status = self.process.wait()
        os.close(self.pidfd)
        self.link.close()
        return status, _tail(self.log)


def start(role: str, log_path: str, uid: int | None, output: int | None = None) -> Child:
    """A process of that role that will wait for its `Begin`, under that uid (None: this process's). BadMessage for an unknown role.

    What it says goes to the log, or to the descriptor `output`."""
    if role not in MODULES:
        raise BadMessage(f"no such role: {role}")
    ours, theirs = pair()
    log = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    command = [sys.executable, "-P", "-m", MODULES[role], f"domicile-{role}", str(theirs.fileno())]
    if uid is not None:
        command.append(str(uid))
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log if output is None else output,
            stderr=log if output is None else output,
            pass_fds=[theirs.fileno()],
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    finally:
        os.close(log)
        theirs.close()
    return Child(role, process, PacketLink(ours, {}), uid, os.pidfd_open(process.pid), log_path)


def end_all(children: Sequence[Child]) -> None:
    """SIGKILL to each, in this order, and wait for their ends, within a bound."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_WAIT_S
    for child in children:
        ended_within(child.process, deadline - time.monotonic())
        child.link.close()


def _environment() -> dict[str, str]:
    """What a process of the machine sees of its starter's environment."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("DOMICILE_")}
    fixed = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
    # No look for plugins of pydantic's among all packages that are installed: there are none of ours, and others' are not wanted.
    return {**kept, **fixed, "PYDANTIC_DISABLE_PLUGINS": "__all__"}


def _tail(path: str, size: int = _TAIL) -> str:
    """The end of a process's log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
