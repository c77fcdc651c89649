"""Whether this host can run a machine: what is missing, and the mend. Each check is quick and leaves nothing behind."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from toolstack.errors import MachineError
from toolstack.warden.uids import unavailable

MIN_OPEN_FILES: Final = 1024
MIN_MAP_COUNT: Final = 65530
OVERHEAD_MB: Final = 250
"""Memory of a machine's processes beside the guests' own."""
PACKAGES: Final = (
    "zmq",
    "msgpack",
    "unicorn",
    "capstone",
    "pydantic",
    "nacl",
    "elftools",
    "zstandard",
    "lz4",
)
UNICORN_VERSION: Final = "2.1.4"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    name: str
    ok: bool
    text: str
    """What is there, or what is missing."""
    mend: str = ""
    fatal: bool = True
    """Without it no machine runs; else something is slower or less safe."""


class _Missing(Exception):
    """(what is missing, the mend)"""

    def __init__(self, text: str, mend: str, *, fatal: bool = True) -> None:
        super().__init__(text)
        self.mend = mend
        self.fatal = fatal


def _platform() -> str:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise _Missing(f"{sys.platform} on {os.uname().machine}", "use Linux on x86-64 (a container does)")
    return f"Linux {os.uname().release}, Python {sys.version.split()[0]}"


def _memfd() -> str:
    if not hasattr(os, "memfd_create"):
        raise _Missing("no memfd_create", "use a kernel from 3.17 on and a Python built for it")
    try:
        fd = os.memfd_create("domicile-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _Missing(
            f"memfd_create: {error.strerror}", "allow it (a seccomp profile forbids it?)"
        ) from None
    try:
        os.truncate(fd, 4096)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals != seals:
            raise _Missing("memfd seals do not hold", "use a kernel that implements F_ADD_SEALS")
        with contextlib.suppress(OSError):
            os.truncate(fd, 8192)
            raise _Missing("a sealed memfd could be grown", "use a kernel that implements F_ADD_SEALS")
    except OSError as error:
        raise _Missing(
            f"sealing a memfd: {error.strerror}", "use a Linux kernel (not an emulation of one)"
        ) from None
    finally:
        os.close(fd)
    return "memfd with seals"


def _descriptors() -> str:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        bell = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            socket.send_fds(left, [b"x"], [bell])
            _, ancillary, _, _ = right.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
        finally:
            os.close(bell)
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        if len(fds) != 1:
            raise _Missing("SCM_RIGHTS carries no descriptor", "use a Linux kernel (not an emulation of one)")
        try:
            if os.eventfd_read(fds[0]) != 1:
                raise _Missing("an eventfd lost its count", "use a Linux kernel (not an emulation of one)")
        finally:
            os.close(fds[0])
    return "eventfd over SCM_RIGHTS"


def _pidfd() -> str:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        raise _Missing(
            f"pidfd_open: {error}", "use a kernel from 5.3 on (or a seccomp profile that allows it)"
        ) from None
    return "pidfd"


def _open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        raise _Missing(f"only {hard} open files allowed", f"raise the limit: ulimit -Hn {MIN_OPEN_FILES}")
    return f"{soft} open files (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"


def _maps() -> str:
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        count = int(file.read())
    if count < MIN_MAP_COUNT:
        raise _Missing(
            f"vm.max_map_count is {count}",
            f"sysctl -w vm.max_map_count={MIN_MAP_COUNT} (each granted page is a mapping)",
        )
    return f"vm.max_map_count {count}"


def _available_mb() -> int:
    """Memory that can still be had, in MiB: the host's, or the container's if that is less."""
    available = 0
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) >> 10
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read()) >> 20
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read()) >> 20
        with (
            contextlib.suppress(OSError, ValueError, IndexError),
            open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file,
        ):
            # Cached files count as used, but the kernel gives them up.
            for line in file:
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1]) >> 20
        available = min(available, limit - used)
    return available


def _memory(guest_mb: int = 64) -> str:
    available, wanted = _available_mb(), guest_mb + OVERHEAD_MB
    if available < wanted:
        raise _Missing(
            f"{available} MB of memory available, {wanted} wanted ({guest_mb} for the guest)",
            "free some, give the container more, or the guest less (--memory)",
        )
    return f"{available} MB of memory available"


def _shared_memory() -> str:
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        raise _Missing(
            "no writable /dev/shm", "mount -t tmpfs tmpfs /dev/shm (Docker gives one by default)", fatal=False
        )
    status = os.statvfs("/dev/shm")
    return f"/dev/shm, {(status.f_bavail * status.f_frsize) >> 20} MB free"


def _runtime() -> str:
    from toolstack.warden.runtime import base_directory

    base = base_directory()
    existing = base
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _Missing(f"{base} cannot be made", "set DOMICILE_RUN to a directory that you may write to")
    return f"machines live in {base}"


def _packages() -> str:
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise _Missing(
            f"Python packages missing: {', '.join(missing)}", "./devtool setup, and use .venv/bin/domicile"
        )
    return f"{len(PACKAGES)} Python packages"


def _unicorn() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("unicorn")
    except PackageNotFoundError:
        found = "missing"
    if found != UNICORN_VERSION:
        raise _Missing(
            f"unicorn {found}, {UNICORN_VERSION} wanted", f"pip install unicorn=={UNICORN_VERSION}"
        )
    return f"unicorn {found}"


def _isolation() -> str:
    why = unavailable()
    if why:
        raise _Missing(
            f"{why}: all processes of a machine share this uid, and the kernel does not keep them apart",
            "start as root (of the host, or of a container without user namespaces) for a uid of its own each",
            fatal=False,
        )
    return "root: each process gets a uid of its own, without capabilities"


def _processors() -> str:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        raise _Missing("one processor", "two or more run hypervisor and guest side by side", fatal=False)
    return f"{count} processors"


Check = Callable[[], str]
QUICK: Final[dict[str, Check]] = {
    "platform": _platform,
    "memfd": _memfd,
    "descriptors": _descriptors,
    "pidfd": _pidfd,
    "open files": _open_files,
    "directory": _runtime,
}
"""A millisecond in all: `run` and `up` do these first."""
MORE: Final[dict[str, Check]] = {
    "memory": _memory,
    "shared memory": _shared_memory,
    "mappings": _maps,
    "packages": _packages,
    "unicorn": _unicorn,
    "isolation": _isolation,
    "processors": _processors,
}


def _examine(name: str, check: Check) -> Finding:
    try:
        return Finding(name, True, check())
    except _Missing as missing:
        return Finding(name, False, str(missing), missing.mend, missing.fatal)
    except OSError as error:
        return Finding(name, False, f"{error.strerror or error}", "use a Linux kernel and mount /proc", True)


def examine() -> Iterator[Finding]:
    """Every check."""
    for name, check in {**QUICK, **MORE}.items():
        yield _examine(name, check)


def require_quick(guest_mb: int) -> None:
    """MachineError for the first thing without which no machine runs."""
    for name, check in {**QUICK, "memory": lambda: _memory(guest_mb)}.items():
        finding = _examine(name, check)
        if not finding.ok:
            raise MachineError(f"this host: {finding.text}: {finding.mend} (`domicile doctor` checks all)")
