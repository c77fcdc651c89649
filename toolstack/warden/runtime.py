"""The directory of a running machine: sockets, logs, console logs."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,40}$")


def base_directory() -> Path:
    """Where machines of this user live: DOMICILE_RUN, or /run/domicile for root, else XDG_RUNTIME_DIR or /tmp."""
    override = os.environ.get("DOMICILE_RUN")
    if override:
        return Path(override)
    if os.getuid() == 0:
        return Path("/run/domicile")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "domicile"
    return Path(f"/tmp/domicile-{os.getuid()}")


def _check_owner(base: Path) -> None:
    """ValueError for a directory in which somebody else could put things in the way: /tmp/domicile-UID is a name that all know."""
    try:
        status = base.lstat()
    except OSError:
        return  # it is made when it is needed
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{base}: not a directory (set DOMICILE_RUN to another place)")
    writable = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    if status.st_uid not in (os.getuid(), 0) or writable:
        raise ValueError(
            f"{base}: others may write there: remove it, or set DOMICILE_RUN to a directory of your own"
        )


class RuntimeDirectory:
    """Paths of one machine. ipc endpoints have short names: a Unix socket path holds 107 bytes."""

    def __init__(self, name: str) -> None:
        """ValueError for a name that is no plain word, and for a place that is not this user's alone."""
        if not _NAME.match(name):
            raise ValueError(f"machine name {name!r}: use 1 to 40 letters, digits, '_', '.', '-'")
        self.name = name
        self.root = base_directory() / name
        self.bus = self.root / "bus"
        self.logs = self.root / "log"
        self.consoles = self.root / "console"
        self.state = self.root / "state"
        self.control = self.root / "control"
        self.xenstore = self.root / "xenstored"
        self.pid = self.root / "pid"
        _check_owner(self.root.parent)
        if len(str(self.bus)) > 80:
            raise ValueError(
                f"{self.root}: path too long for Unix sockets (set DOMICILE_RUN to a shorter one)"
            )

    def create(self, *, shared: bool = False) -> None:
        """Make the directories afresh. Traversable by the machine's own uids (by all if `shared`), readable by the owner alone."""
        base = self.root.parent
        base.mkdir(mode=0o711, parents=True, exist_ok=True)
        _check_owner(base)  # it was not there a moment ago
        if self.root.exists():
            shutil.rmtree(self.root)
        mode = 0o711 if shared or os.getuid() == 0 else 0o700
        for directory in (self.root, self.bus, self.logs, self.consoles, self.state):
            directory.mkdir()
            directory.chmod(mode)

    def remove_sockets(self) -> None:
        """Leave the logs (DOMICILE_KEEP_LOGS)."""
        for path in (self.control, self.xenstore, self.pid):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.bus, ignore_errors=True)

    def remove(self) -> None:
        """Delete everything of this machine."""
        shutil.rmtree(self.root, ignore_errors=True)
