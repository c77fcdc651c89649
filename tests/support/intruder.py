"""What a domain that is in an attacker's hands might try on another process, tried under the domain's uid (a program):
`intruder.py UID PID SOCKET...` prints each attempt and its outcome as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

SYS_PIDFD_GETFD = 438
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
ALLOWED = "allowed"

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def call(function: Callable[..., int], *arguments: object) -> None:
    """A function of the C library; OSError if it gives -1."""
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")


def connect(path: str) -> None:
    """To a Unix socket, stream or packets."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            try:
                sock.connect(path)
            except OSError as error:
                if kind == socket.SOCK_SEQPACKET:
                    raise
                failure = error
            else:
                return
    raise failure


def main() -> None:
    """Become the uid, then try."""
    uid, target, paths = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    pidfd = os.pidfd_open(target)
    buffer = ctypes.create_string_buffer(16)
    here, there = Iovec(ctypes.addressof(buffer), 16), Iovec(0x400000, 16)
    transfer = (target, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    attempts: dict[str, Callable[[], object]] = {
        "signal 0": partial(os.kill, target, 0),
        "signal KILL": partial(os.kill, target, signal.SIGKILL),
        "signal STOP": partial(os.kill, target, signal.SIGSTOP),
        "pidfd signal": partial(signal.pidfd_send_signal, pidfd, signal.SIGTERM),
        "ptrace attach": partial(call, libc.ptrace, PTRACE_ATTACH, target, None, None),
        "ptrace seize": partial(call, libc.ptrace, PTRACE_SEIZE, target, None, None),
        "process_vm_readv": partial(call, libc.process_vm_readv, *transfer),
        "process_vm_writev": partial(call, libc.process_vm_writev, *transfer),
        "open mem": partial(os.open, f"/proc/{target}/mem", os.O_RDWR),
        "list fd": partial(os.listdir, f"/proc/{target}/fd"),
        "open fd": partial(os.open, f"/proc/{target}/fd/3", os.O_RDONLY),
        "map_files": partial(os.listdir, f"/proc/{target}/map_files"),
        "environ": partial(os.open, f"/proc/{target}/environ", os.O_RDONLY),
        "pidfd_getfd": partial(call, libc.syscall, SYS_PIDFD_GETFD, pidfd, 3, 0),
        "setpriority": partial(os.setpriority, os.PRIO_PROCESS, target, 10),
        "sched_setaffinity": partial(os.sched_setaffinity, target, {0}),
        "prlimit": partial(resource.prlimit, target, resource.RLIMIT_NOFILE, (3, 3)),
    }
    for path in paths:
        attempts[f"connect {path}"] = partial(connect, path)
        attempts[f"unlink {path}"] = partial(os.unlink, path)
    result = {}
    for name, act in attempts.items():
        try:
            act()
            result[name] = ALLOWED
        except OSError as error:
            result[name] = os.strerror(error.errno or 0)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
