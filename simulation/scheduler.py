"""Simulated time, and processes that run one at a time.

A simulated process has a call stack of its own (a greenlet), because the code that it runs waits for answers in the middle of one, as
a real process does. Only one ever runs: whoever has nothing to do runs the events itself, until one of them is for another process,
and then hands over. The order is that of (time, serial number) alone: the host's scheduler and clock have no part in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from greenlet import getcurrent, greenlet

Event = Callable[[], None]
START: Final = 1_000_000_000
"""Nanoseconds on the clock when a machine starts."""
FIRST: Final = 1 << 20
MAX_EVENTS: Final = 400_000
"""Events of one run: more is a livelock."""


class Killed(BaseException):
    """The simulated process ends here. No `except Exception` of the product catches it."""


class Livelock(Exception):
    """The machine goes on and on and gets nowhere."""


class Thread:
    """A thread of control: a simulated process's, or the one that runs the simulation."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.ready = False
        self.dead = False
        self.finished = True
        self.stack: greenlet = getcurrent()


class Scheduler:
    """Events in the order of time, and whose turn it is."""

    def __init__(self) -> None:
        self.now = START
        """Nanoseconds."""
        self.events = 0
        self.main: Final = Thread("main")
        self.main.finished = False
        self.running = self.main
        self.error: BaseException | None = None
        self.in_event = False
        """An event runs, on whatever stack: it may not wait."""
        self._heap: list[tuple[int, int, Event]] = []
        self._serial: Final = itertools.count()
        self._next: list[Thread] = []
        self._until: Callable[[], bool] = lambda: True
        self._limit = 0

    def at(self, when: int, event: Event) -> None:
        """Run the event at that time (ns); now, if it is past."""
        heappush(self._heap, (when if when > self.now else self.now, next(self._serial), event))

    def after(self, delay: int, event: Event) -> None:
        """Run the event in so many nanoseconds."""
        heappush(self._heap, (self.now + delay, next(self._serial), event))

    def first(self, when: int, rank: int, event: Event) -> None:
        """Run the event at that time, before all others of it but those of a lower rank that came in this way."""
        heappush(self._heap, (when, rank - FIRST, event))

    # ------------------------------------------------------------------ threads

    def spawn(self, thread: Thread, body: Event) -> None:
        """Start a thread; it runs when it is woken."""
        thread.finished = False

        def run(*_: object) -> None:
            thread.ready = False  # it looks for itself
            try:
                if not thread.dead:
                    body()
            except Killed:
                pass
            except BaseException as error:
                self.error = self.error or error
            thread.finished = thread.dead = True
            self._leave(thread)

        thread.stack = greenlet(run)

    def wake(self, thread: Thread) -> None:
        """It has something to do: it runs before the next event."""
        if not thread.dead and not thread.ready:
            thread.ready = True
            if thread is not self.running:  # else it looks for itself, before it waits
                self._next.append(thread)

    def kill(self, thread: Thread) -> None:
        """It ends the next time it would run; if it is running now, the caller raises `Killed`."""
        thread.dead = True

    def park(self, thread: Thread) -> None:
        """The running thread waits until it is woken. Killed."""
        while not thread.ready:
            if thread.dead:
                raise Killed
            other = self._turn()
            if other is not None and other is not thread:
                self._switch(thread, other)
                if thread.dead:
                    raise Killed
        thread.ready = False
        if thread.dead:
            raise Killed

    def _turn(self) -> Thread | None:
        """One event; the thread whose turn it is then, if it is another's."""
        while self._next:
            thread = self._next.pop(0)
            if not thread.dead and thread.ready:
                return thread
        heap = self._heap
        if self.error is not None or self._until() or not heap or heap[0][0] > self._limit:
            self.main.ready = True
            return self.main
        when, _, event = heappop(heap)
        if when > self.now:
            self.now = when
        self.events += 1
        try:
            if self.events > MAX_EVENTS:
                raise Livelock(f"{MAX_EVENTS} events, and no end")
            self.in_event = True
            event()
        except Killed:
            raise
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.in_event = False
        return None

    def _switch(self, thread: Thread, other: Thread) -> None:
        self.running = other
        other.stack.switch()
        self.running = thread

    def _leave(self, thread: Thread) -> None:
        """The last that a thread does: pass the right to run on."""
        other: Thread | None = None
        self.running = thread
        while other is None:
            try:
                other = self._turn()
            except Killed:
                continue
            if other is thread:
                other = None
        self.running = other
        thread.stack.parent = other.stack  # where a stack that ends goes on

    # ------------------------------------------------------------------ the one that runs the simulation

    def run(self, limit: int, until: Callable[[], bool]) -> None:
        """Run until the condition holds, `limit` (ns, absolute) has come or nothing is left to happen. Raises what went wrong."""
        self._until, self._limit = until, limit
        self.main.stack = getcurrent()
        self.main.ready = False
        self.park(self.main)
        if self.error is not None:
            raise self.error

    def reap(self, thread: Thread) -> None:
        """End a thread that is parked and was killed."""
        thread.dead = True
        if thread.finished:
            return
        self._until = lambda: True
        self._next.clear()
        self._switch(self.main, thread)
