"""`Repeated`: never inside itself, nothing forgotten, and no end of it is cut off by who asks all the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from domains.native.reactor import Reactor
from domains.native.repeated import Repeated


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


def test_who_asks_meanwhile_has_it_done_once_more_afterwards(reactor: Reactor) -> None:
    depth, most, runs = 0, 0, 0

    def act() -> None:
        nonlocal depth, most, runs
        depth += 1
        runs += 1
        most = max(most, depth)
        if runs == 1:
            looks.ask()
            looks.ask()
        depth -= 1

    looks = Repeated(reactor, act, 4)
    looks.ask()
    assert (runs, most) == (2, 1)
    looks.ask()
    assert runs == 3


def test_one_who_asks_all_the_time_waits_with_the_others(reactor: Reactor) -> None:
    runs: list[str] = []

    def act() -> None:
        runs.append("act")
        looks.ask()

    looks = Repeated(reactor, act, 4)
    looks.ask()
    assert runs == ["act"] * 4
    reactor.soon(lambda: runs.append("another"))
    reactor.once(0.0)
    assert runs == ["act"] * 8 + ["another"]
    reactor.once(0.0)
    assert len(runs) == 13


def test_what_was_asked_for_while_it_failed_is_done_soon(reactor: Reactor) -> None:
    runs = 0

    def act() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            looks.ask()
            raise ValueError("the first")

    looks = Repeated(reactor, act, 4)
    with pytest.raises(ValueError, match="the first"):
        looks.ask()
    assert runs == 1
    reactor.once(0.0)
    assert runs == 2
    reactor.once(0.0)
    assert runs == 2


def test_what_was_done_before_its_turn_came_is_not_done_again(reactor: Reactor) -> None:
    runs = 0

    def act() -> None:
        nonlocal runs
        runs += 1
        if runs <= 2:
            looks.ask()

    looks = Repeated(reactor, act, 2)
    looks.ask()  # twice, and once more is to come
    looks.ask()
    assert runs == 3
    reactor.once(0.0)
    assert runs == 3
