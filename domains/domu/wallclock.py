"""The time of day that a guest is shown: the host's, or what the control domain set (XENPF_settime64), and the domain's own offset
(XEN_DOMCTL_settimeoffset)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

SECOND: Final = 1_000_000_000


class WallClock:
    """Nanoseconds since 1970, when called."""

    def __init__(
        self, host: Callable[[], int] = time.time_ns, system_time: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """`host`: the host's time of day; `system_time`: Xen's, of the whole machine. Both in ns."""
        self._host = host
        self._system_time = system_time
        self._at_zero: int | None = None
        self._offset = 0

    def __call__(self) -> int:
        base = self._host() if self._at_zero is None else self._at_zero + self._system_time()
        return base + self._offset

    def set(self, ns_at_system_time_0: int) -> int:
        """The control domain set the clock. By how many ns it moved."""
        before = self()
        self._at_zero = ns_at_system_time_0
        return self() - before

    def set_offset(self, seconds: int) -> int:
        """The domain's own offset. By how many ns its clock moved."""
        before, self._offset = self._offset, seconds * SECOND
        return self._offset - before
