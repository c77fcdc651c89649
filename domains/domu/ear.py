"""The ear: a thread that listens while guest code runs, and rings the vCPU's bell. It does nothing else (docs/vcpu.md: a busy Python
thread beside the vCPU thread costs milliseconds)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading
from collections.abc import Callable
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
CLOCK_MONOTONIC: Final = 1
TFD_NONBLOCK: Final = 0o4000
TFD_CLOEXEC: Final = 0o2000000
TFD_TIMER_ABSTIME: Final = 1


class Ear:
    """Descriptors and one timer, which the vCPU thread waits on when idle, and this thread while guest code runs."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """`ring` makes the vCPU's run return soon; it is called on the ear's thread."""
        self._ring = ring
        self._epoll = select.epoll()
        self._timer = _libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._timer, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._gate = threading.Semaphore(0)
        self._parked = True
        self._stopping = False
        self._deadline = 0
        self._spec = ctypes.create_string_buffer(32)
        self._thread = threading.Thread(target=self._listen, name="ear", daemon=True)
        self._thread.start()

    def add(self, fd: int) -> None:
        """Listen to `fd` as well (until it is readable no more: level-triggered)."""
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """No longer. Before it is closed."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def set_deadline(self, monotonic_ns: int) -> None:
        """Ring at that time of CLOCK_MONOTONIC; 0: never."""
        if monotonic_ns == self._deadline:
            return
        self._deadline = monotonic_ns
        struct.pack_into("<QQQQ", self._spec, 0, 0, 0, *divmod(monotonic_ns, 1_000_000_000))
        _libc.timerfd_settime(self._timer, TFD_TIMER_ABSTIME, self._spec, None)

    def arm(self) -> None:
        """Guest code is about to run: have the thread listen."""
        if self._parked:
            self._parked = False
            self._gate.release()

    def ready(self, timeout: float) -> list[int]:
        """Descriptors that are readable now, or within `timeout` seconds. For the vCPU thread."""
        fds = [fd for fd, _ in self._epoll.poll(timeout)]
        if self._timer in fds:
            fds.remove(self._timer)
            with contextlib.suppress(BlockingIOError):
                os.read(self._timer, 8)
            self._deadline = 0
        return fds

    def _listen(self) -> None:
        while True:
            self._gate.acquire()
            if self._stopping:
                return
            self._epoll.poll()  # ends by an event, or by `close`
            self._parked = True
            if self._stopping:
                return
            self._ring()

    def close(self) -> None:
        """End the thread and close everything."""
        self._stopping = True
        os.eventfd_write(self._stop, 1)
        self._gate.release()
        self._thread.join(5.0)
        self._epoll.close()
        os.close(self._timer)
        os.close(self._stop)
