"""What the kernel says of a process that runs in another pid namespace: its CPU time and whether it is stopped.

A process id means nothing outside its namespace, but a descriptor of /proc/PID/stat goes on telling of that very process wherever
it is passed (proc(5)), and gives its holder nothing else. Once the process is gone, reading it fails with ESRCH.
"""

from __future__ import annotations

import ctypes
import os
import stat
from typing import Final

from bus.packets import close_all

PROC_SUPER_MAGIC: Final = 0x9FA0
"""linux/magic.h"""
_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_LONGEST: Final = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def is_proc_file(fd: int) -> bool:
    """A regular file of a proc file system: reading it never blocks. False for whatever else somebody may pass."""
    buffer = (ctypes.c_long * 64)()  # struct statfs, whose first word is f_type
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
    except OSError:
        return False
    return _libc.fstatfs(fd, buffer) == 0 and buffer[0] == PROC_SUPER_MAGIC


def open_files(pid: int) -> list[int]:
    """Descriptors of `stat` and `schedstat` of a process of this namespace. OSError if it is gone."""
    first = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [first, os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)]
    except OSError:
        os.close(first)
        raise


class ProcessView:
    """Takes over the two descriptors."""

    def __init__(self, stat_fd: int, schedstat_fd: int) -> None:
        """ValueError (both closed) if one is no file of a proc file system."""
        self._fds: Final = [stat_fd, schedstat_fd]
        self._used = 0
        if not all(is_proc_file(fd) for fd in self._fds):
            self.close()
            raise ValueError("not files of a proc file system")

    def close(self) -> None:
        """Close both."""
        close_all(self._fds)
        self._fds.clear()

    def _read(self, index: int) -> bytes:
        try:
            return os.pread(self._fds[index], _LONGEST, 0)
        except (OSError, IndexError):
            return b""

    def _fields(self) -> list[bytes]:
        """Of `stat`, from the third (the state) on."""
        return self._read(0).rpartition(b")")[2].split()

    def cpu_ns(self) -> int:
        """CPU time so far, never less than before. Of all threads in clock ticks, and of the main thread in ns: whichever is more."""
        try:
            fields = self._fields()
            ticks = int(fields[11]) + int(fields[12])  # utime, stime
            # The ticks are rounded down twice; the main thread, which runs the vCPUs, is counted exactly.
            main = int(self._read(1).split()[0])
        except (ValueError, IndexError):
            return self._used
        self._used = max(self._used, main, ticks * _TICK_NS)
        return self._used

    def stopped(self) -> bool:
        """The process is stopped (state T). False if it is gone."""
        fields = self._fields()
        return bool(fields) and fields[0] in (b"T", b"t")
