"""A guest's time of day: the host's, or what was set for the machine, and its own offset."""

from __future__ import annotations

from domains.domu.wallclock import SECOND, WallClock


class Host:
    day, system = 1_700_000_000 * SECOND, 50 * SECOND


def clock(host: Host) -> WallClock:
    return WallClock(lambda: host.day, lambda: host.system)


def test_at_first_it_is_the_hosts() -> None:
    host = Host()
    wall = clock(host)
    assert wall() == host.day
    host.day += 7
    assert wall() == host.day


def test_what_was_set_goes_on_with_system_time() -> None:
    """And no longer with the host's time of day."""
    host = Host()
    wall = clock(host)
    assert wall.set(host.day + 3600 * SECOND - host.system) == 3600 * SECOND
    host.system += 5
    host.day -= 99 * SECOND
    assert wall() == Host.day + 3600 * SECOND + 5


def test_an_offset_is_in_place_of_the_one_before() -> None:
    host = Host()
    wall = clock(host)
    assert wall.set_offset(100) == 100 * SECOND
    assert wall.set_offset(-50) == -150 * SECOND
    assert wall() == host.day - 50 * SECOND
    assert wall.set(0) == host.system - host.day
    assert wall() == host.system - 50 * SECOND
