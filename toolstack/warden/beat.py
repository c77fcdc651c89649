"""A sign of life for a container's health check: a file that is touched while all is well (DOMICILE_BEAT; none: no file)."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

INTERVAL_S: Final = 1.0


class Beat:
    """`beat(True)` as often as one likes; the file's time is at most INTERVAL_S old then."""

    def __init__(self) -> None:
        self._path = os.environ.get("DOMICILE_BEAT", "")
        self._last = 0.0

    def __call__(self, well: bool) -> None:
        """Well: touch the file. Not well: leave it, and it grows old."""
        now = time.monotonic()
        if not self._path or not well or now - self._last < INTERVAL_S:
            return
        self._last = now
        with contextlib.suppress(OSError):  # a health check that fails says it
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.utime(fd)
            os.close(fd)
