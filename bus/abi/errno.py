"""XEN_E*: the error numbers of the guest interface (errno.h). Hypercalls return them negated."""

from __future__ import annotations

from typing import Final

XEN_EPERM: Final = 1

XEN_ENOENT: Final = 2

XEN_ESRCH: Final = 3

XEN_EIO: Final = 5

XEN_ENXIO: Final = 6

XEN_E2BIG: Final = 7

XEN_ENOEXEC: Final = 8

XEN_EBADF: Final = 9

XEN_ECHILD: Final = 10

XEN_EAGAIN: Final = 11

XEN_EWOULDBLOCK: Final = 11

XEN_ENOMEM: Final = 12

XEN_EACCES: Final = 13

XEN_EFAULT: Final = 14

XEN_EBUSY: Final = 16

XEN_EEXIST: Final = 17

XEN_EXDEV: Final = 18

XEN_ENODEV: Final = 19

XEN_ENOTDIR: Final = 20

XEN_EISDIR: Final = 21

XEN_EINVAL: Final = 22

XEN_ENFILE: Final = 23

XEN_EMFILE: Final = 24

XEN_ENOSPC: Final = 28

XEN_EROFS: Final = 30

XEN_EMLINK: Final = 31

XEN_EDOM: Final = 33

XEN_ERANGE: Final = 34

XEN_EDEADLK: Final = 35

XEN_EDEADLOCK: Final = 35

XEN_ENAMETOOLONG: Final = 36

XEN_ENOLCK: Final = 37

XEN_ENOSYS: Final = 38

XEN_ENOTEMPTY: Final = 39

XEN_ENODATA: Final = 61

XEN_ETIME: Final = 62

XEN_EBADMSG: Final = 74

XEN_EOVERFLOW: Final = 75

XEN_EILSEQ: Final = 84

XEN_ENOTSOCK: Final = 88

XEN_EMSGSIZE: Final = 90

XEN_EOPNOTSUPP: Final = 95

XEN_EADDRINUSE: Final = 98

XEN_EADDRNOTAVAIL: Final = 99

XEN_ENOBUFS: Final = 105

XEN_EISCONN: Final = 106

XEN_ENOTCONN: Final = 107

XEN_ETIMEDOUT: Final = 110

XEN_ECONNREFUSED: Final = 111


NAMES: Final[dict[int, str]] = {
    value: name.removeprefix("XEN_")
    for name, value in globals().copy().items()
    if name.startswith("XEN_E")
    and isinstance(value, int)
    and name not in ("XEN_EWOULDBLOCK", "XEN_EDEADLOCK")
}
"""Name by number: NAMES[22] == "EINVAL"."""


def errno_name(rc: int) -> str:
    """The name of a hypercall's return value: "EINVAL" for -22; the number itself if it is not an error."""
    return NAMES.get(-rc, str(rc)) if rc < 0 else str(rc)
