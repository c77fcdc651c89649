"""What ends often is started again, at a bounded rate; what never stays is left alone, and that is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.addresses import DomId
from domains.dom0.toolstack import driver_domain
from domains.dom0.toolstack.driver_domain import (
    FAST_RESTARTS,
    MAX_RESTARTS,
    WINDOW_S,
    DriverDomain,
    Restarts,
)

DOMID = DomId(1)


class Clock:
    """Time, and what is to be done at one."""

    def __init__(self) -> None:
        self.now = 100.0
        self.later: list[tuple[float, Any]] = []

    def after(self, seconds: float, call: Any) -> None:
        self.later.append((self.now + seconds, call))

    def pass_to_next(self) -> None:
        """Until the next thing is due, which is done."""
        (self.now, call), *self.later = sorted(self.later, key=lambda pair: pair[0])
        call()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(driver_domain, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Hypervisor:
    """Whether the driver domain's process runs; how often it was started again."""

    def __init__(self) -> None:
        self.ended = False
        self.resumed = 0

    def domain_info(self, domid: DomId) -> Any:
        return SimpleNamespace(flags=4 if self.ended else 0)

    def resume(self, domid: DomId) -> None:
        assert self.ended
        self.ended = False
        self.resumed += 1

    def destroy(self, domid: DomId) -> None:
        """It is gone."""


def driver(clock: Clock) -> tuple[DriverDomain, Hypervisor, list[str]]:
    lines: list[str] = []
    xc = Hypervisor()
    store = SimpleNamespace(domain_died=lambda domid: None)
    host = cast(Any, SimpleNamespace(reactor=clock))
    made = DriverDomain(host, cast(Any, store), cast(Any, xc), lines.append, name="DomIO", role=1, pages=16)
    made.domid = DOMID
    return made, xc, lines


def test_a_storm_of_ends_is_served_at_a_bounded_rate(clock: Clock) -> None:
    """Sixty ends, each as soon as there is a new process: all are served, and no ten seconds have more than twenty starts."""
    domio, xc, lines = driver(clock)
    starts: list[float] = []
    for _ in range(60):
        xc.ended = True
        domio.check()
        domio.check()  # another domain's end: the same question again
        while xc.ended:
            clock.pass_to_next()
        starts.append(clock.now)
        clock.now += 0.01
    assert xc.resumed == 60
    assert clock.now < 100 + 3 * WINDOW_S
    assert (
        max(sum(start <= other < start + WINDOW_S for other in starts) for start in starts) == FAST_RESTARTS
    )
    waits = [line for line in lines if "a new process starts in" in line]
    assert "DomIO ended 20 times within 10 s" in waits[0]


def test_what_never_stays_is_left_alone_and_that_is_said(clock: Clock) -> None:
    """In one line with the mend; what it served is taken away."""
    domio, xc, lines = driver(clock)
    given_up: list[int] = []
    domio.give_up = lambda: given_up.append(xc.resumed)
    for _ in range(MAX_RESTARTS + 1):
        xc.ended = True
        domio.check()
        while xc.ended and clock.later:
            clock.pass_to_next()
        clock.now += 0.4
    assert given_up == [MAX_RESTARTS]
    assert "is not restarted any more" in lines[-1]
    assert "the next device that is attached to a guest starts it anew" in lines[-1]
    assert all("\n" not in line for line in lines)


def test_a_process_that_ran_for_a_while_begins_anew(clock: Clock) -> None:
    """However often it ended before."""
    restarts = Restarts()
    for _ in range(3 * MAX_RESTARTS):
        assert restarts.wait() == 0
        clock.now += WINDOW_S
    for _ in range(MAX_RESTARTS - 1):
        wait = restarts.wait()
        assert wait is not None
        clock.now += wait + 0.4
    clock.now += WINDOW_S
    assert restarts.wait() == 0


def test_one_that_is_destroyed_while_it_waits_is_not_restarted(clock: Clock) -> None:
    domio, xc, _ = driver(clock)
    for _ in range(FAST_RESTARTS + 1):
        xc.ended = True
        domio.check()
    assert len(clock.later) == 1
    domio.destroy()
    clock.pass_to_next()
    assert xc.resumed == FAST_RESTARTS
