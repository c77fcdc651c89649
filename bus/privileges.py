"""Giving up privileges: after a process has loaded its code and before it reads a byte from anybody.

Started as root, each process gets a uid of its own, no supplementary groups, no capabilities and no_new_privs. Otherwise all
share the user's uid and the process only becomes undumpable: isolation between processes of one uid is then not enforced by the
host kernel, and `domicile info` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
CAP_LAST = 63

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a process; None leaves the inherited one."""

    address_space: int | None = None
    """RLIMIT_AS in bytes."""
    open_files: int | None = None
    """RLIMIT_NOFILE."""
    processes: int | None = None
    """RLIMIT_NPROC of the uid (threads count); only set where the process has a uid of its own."""
    oom_score: int = 0
    """oom_score_adj (proc(5)): who is ended first where the host runs out of memory. A guest's process, which nothing keeps from
    allocating it, has a high one; those that all others depend on have a low one, where the machine is started as root."""


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when its parent dies."""
    _prctl(PR_SET_PDEATHSIG, signal_number)


def _prctl(option: int, argument: int, third: int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(third), 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def _give_up_capabilities() -> None:
    """capset(2), version 3: effective, permitted and inheritable sets become empty. OSError."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"capset: {os.strerror(code)}")


def drop(
    uid: int | None,
    limits: Limits = Limits(),  # frozen
    death_signal: int | None = None,
    *,
    keep_capabilities: bool = False,
) -> bool:
    """Become `uid` (None: keep the own one) and give up everything else (`keep_capabilities`: but what root may do, with the own uid). True if the uid is now one of its own: also when it is
    the present one, which means that nobody else on this host has it (a container's).

    OSError if a step is refused: the caller must not go on.
    """
    own = uid is not None
    changes = own and uid != os.getuid()
    # Root may have no other uids to give (a user namespace): then its processes stay root, without what root may do.
    powerful = changes or (os.getuid() == 0 and not keep_capabilities)
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space),
        (resource.RLIMIT_NOFILE, limits.open_files),
    ):
        if value is not None:
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.oom_score:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"%d" % limits.oom_score)  # before privileges go: it cannot be lowered then
    if own:
        if limits.processes is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
        os.umask(0o077)
    if powerful:
        for capability in range(CAP_LAST + 1):
            if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
                break  # beyond the last one that this kernel knows, or not allowed to: setresuid drops the rest
        _libc.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)
    if changes:
        assert uid is not None
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)  # clears the effective and permitted capability sets
    elif powerful:
        _give_up_capabilities()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)
    if death_signal is not None:
        die_with_parent(death_signal)  # after setresuid, which clears it
    return own
