"""Paths of xenstore: validation and their parts. A path is `bytes` and absolute once it is canonical.

Rules (docs/misc/xenstore.txt): ASCII letters, digits and "-/_@"; no "//", no "/" at the end save for the
root; not empty; at most XENSTORE_ABS_PATH_MAX bytes. A relative path stands below the caller's
/local/domain/<domid> and has at most XENSTORE_REL_PATH_MAX bytes. A path that starts with "@" is a special
one: it names an event or, for permissions, who may watch for it.
"""

from __future__ import annotations

import re
from typing import Final

from bus.abi.io.xs_wire import XENSTORE_ABS_PATH_MAX, XENSTORE_REL_PATH_MAX
from domains.dom0.xenstore.errors import XsError

ROOT: Final = b"/"
INTRODUCE_DOMAIN: Final = b"@introduceDomain"
RELEASE_DOMAIN: Final = b"@releaseDomain"
SPECIAL_PATHS: Final = (INTRODUCE_DOMAIN, RELEASE_DOMAIN)

_VALID: Final = re.compile(rb"/|(?:/[A-Za-z0-9_@-]+)+")


def is_valid(path: bytes) -> bool:
    """An absolute path that may name a node."""
    return len(path) <= XENSTORE_ABS_PATH_MAX and _VALID.fullmatch(path) is not None


def home(domid: int) -> bytes:
    """What relative paths of a domain stand below."""
    return b"/local/domain/%d" % domid


def canonical(path: bytes, base: bytes) -> bytes:
    """The absolute and valid form of a path that a caller with this base named. XsError EINVAL."""
    if not path.startswith(b"/"):
        if not path or path.startswith(b"@") or len(path) > XENSTORE_REL_PATH_MAX:
            raise XsError("EINVAL")
        path = base + b"/" + path
    if len(path) > XENSTORE_ABS_PATH_MAX or _VALID.fullmatch(path) is None:
        raise XsError("EINVAL")
    return path


def parent(path: bytes) -> bytes:
    """The path of the node above. The root is its own parent."""
    return path[: path.rindex(b"/")] or ROOT


def leaf(path: bytes) -> bytes:
    """The last part of a path; empty for the root."""
    return path[path.rindex(b"/") + 1 :]


def child(path: bytes, name: bytes) -> bytes:
    """The path of a child of this name."""
    return ROOT + name if path == ROOT else path + b"/" + name


def ancestors(path: bytes) -> list[bytes]:
    """The path itself and every path above it, nearest first, the root last."""
    found = [path]
    end = path.rfind(b"/")
    while end > 0:
        path = path[:end]
        found.append(path)
        end = path.rfind(b"/")
    if found[-1] != ROOT:
        found.append(ROOT)
    return found
