"""A small event loop for a native domain's one thread: descriptors, timers, and work to do after each round."""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable

Callback = Callable[[], None]


class Reactor:
    """Level-triggered epoll with timers. An exception of a callback ends `run`: what a callback can expect it handles itself."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Callback]] = []
        self._serial = itertools.count()
        self._soon: list[Callback] = []
        self.before_wait: list[Callable[[], bool]] = []
        """Called before each wait; one that returns True did something, and the round does not wait. For sources whose descriptor
        is not enough: a ZeroMQ socket signals only what comes after a receive found nothing."""
        self.stopping = False

    def reader(self, fd: int, callback: Callback) -> None:
        """Call back whenever `fd` is readable."""
        self._readers[fd] = callback
        self._update(fd)

    def writer(self, fd: int, callback: Callback | None) -> None:
        """Call back whenever `fd` is writable; None: no more."""
        if callback is None:
            self._writers.pop(fd, None)
        else:
            self._writers[fd] = callback
        self._update(fd)

    def forget(self, fd: int) -> None:
        """No more callbacks for `fd`. Call it before closing it."""
        self._readers.pop(fd, None)
        self._writers.pop(fd, None)
        self._update(fd)

    def _update(self, fd: int) -> None:
        events = (select.EPOLLIN if fd in self._readers else 0) | (
            select.EPOLLOUT if fd in self._writers else 0
        )
        try:
            if events:
                self._epoll.modify(fd, events)
            else:
                self._epoll.unregister(fd)
        except FileNotFoundError:
            if events:
                self._epoll.register(fd, events)
        except OSError:
            if events:
                raise

    def after(self, seconds: float, callback: Callback) -> None:
        """Call back once, in that many seconds."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), callback))

    def soon(self, callback: Callback) -> None:
        """Call back before the next wait."""
        self._soon.append(callback)

    def run(self) -> None:
        """Until `stopping` is set."""
        while not self.stopping:
            self.once(60.0)

    def once(self, timeout: float) -> None:
        """One round: wait for at most `timeout` seconds, then call back."""
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()
        for look in self.before_wait:
            if look():
                timeout = 0.0
        if self._soon or self.stopping:
            timeout = 0.0
        if self._timers:
            timeout = max(0.0, min(timeout, self._timers[0][0] - time.monotonic()))
        for fd, events in self._epoll.poll(timeout):
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and fd in self._readers:
                self._readers[fd]()
            if events & (select.EPOLLOUT | select.EPOLLERR) and fd in self._writers:
                self._writers[fd]()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()
