"""How every process of a machine begins: load code, read `Begin` from the inherited socket, give up privileges.

A process is started as `python -m MODULE domicile-ROLE FD [UID]`; FD is one end of a SOCK_SEQPACKET pair whose other end the
warden has. It may be started ahead of need and wait there.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from typing import Any

from bus import privileges
from bus.loading import loaded
from bus.messages.envelope import ready
from bus.messages.warden import TO_PROCESS, Begin
from bus.packets import LinkClosed, PacketLink


@dataclass(frozen=True, slots=True)
class Start:
    """What a process is told at its start."""

    role: str
    name: str
    domain: int
    fds: dict[str, int]
    settings: dict[str, Any]
    warden: PacketLink
    own_uid: bool
    """It runs under a uid of its own."""


class LateImports(MetaPathFinder):
    """Refuses each import: what a process needs it loads before it gives up its uid, with which it may not be able to read its own
    program any more (a clone in root's home directory)."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """ImportError."""
        raise ImportError(f"{fullname} is loaded only now: this process has no right to read files any more")


def begin(limits: privileges.Limits = privileges.Limits(), argv: list[str] | None = None) -> Start:  # noqa: B008
    """Wait for `Begin` (for as long as the warden lives), then drop privileges. Exits quietly if the warden goes away.

    All code is to be loaded before: with DOMICILE_LATE_IMPORTS=refuse (as in tests) each later import is refused, as it would be where the
    program lies in a directory that only root may enter."""
    arguments = sys.argv[1:] if argv is None else argv
    fd = int(arguments[1])
    uid = int(arguments[2]) if len(arguments) > 2 else None
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's ^C is for the command, which takes the machine down in order
    link = PacketLink(socket.socket(fileno=fd), TO_PROCESS)
    ready(TO_PROCESS)
    loaded()
    if os.environ.get("DOMICILE_LATE_IMPORTS") == "refuse":
        sys.meta_path.insert(0, LateImports())
    own = privileges.drop(uid, limits, signal.SIGKILL)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll()  # bounded by the warden's life: the kernel reports its end here, and kills this process
    try:
        packet = link.receive()
    except LinkClosed:
        sys.exit(0)
    if packet is None:
        sys.exit(0)
    message, fds = packet
    assert isinstance(message, Begin)
    if len(fds) != len(message.fds):
        sys.exit(f"{message.role}: {len(message.fds)} descriptors announced, {len(fds)} came")
    return Start(
        role=message.role,
        name=message.name,
        domain=message.domain,
        fds=dict(zip(message.fds, fds, strict=True)),
        settings=message.settings,
        warden=link,
        own_uid=own,
    )


def resident_kib() -> int:
    """This process's resident memory in KiB (from /proc/self/statm)."""
    with open(
        "/proc/self/statm", "rb"
    ) as file:  # as bytes: a codec may not be loaded, and out of this uid's reach
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
