"""How the core refuses: an errno of Xen's (xen/errno.h), carried by one exception that the dispatcher turns
into a reply.

Anything else that is raised is a bug of the core and is not caught here.
"""

from __future__ import annotations

import errno as _errno


class XenError(Exception):
    """The call is refused with `-errno`. `data` (rarely) is what the caller gets nevertheless."""

    def __init__(self, errno: int, text: str = "", data: bytes = b"") -> None:
        super().__init__(f"{_errno.errorcode.get(errno, errno)}{': ' if text else ''}{text}")
        self.errno = errno
        self.data = data
