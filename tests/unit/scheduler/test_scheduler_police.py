"""Who runs without a lease is found out in time, and who works a little is not."""

from __future__ import annotations

from bus.addresses import DomId
from hypervisor.core.scheduler_police import INTERVAL, Police

ONE = DomId(1)
MS = 1_000_000


def found_after(share: float, limit: int = 2_000 * MS) -> int | None:
    """Nanoseconds until a process that uses this share of a CPU is found out."""
    police, now = Police(), 0
    police.watch(0, ONE, 5)
    while now < limit:
        now += INTERVAL
        if police.sample(now, ONE, 5 + int(now * share)):
            return now
    return None


def test_a_spinning_process_is_found_within_25_ms() -> None:
    """Half of the 50 ms are left for the signal; at half speed (a busy host) it is still within 50."""
    full, half = found_after(1.0), found_after(0.5)
    assert full is not None
    assert full <= 25 * MS
    assert half is not None
    assert half <= 50 * MS


def test_a_little_work_is_allowed_for_ever() -> None:
    """Messages and orders: 9 % of a CPU."""
    assert found_after(0.09) is None


def test_one_with_a_lease_is_not_looked_at() -> None:
    """Not before its lease is over, nor after it got another; a clock that jumps back harms nobody."""
    police = Police()
    assert not police.sample(0, ONE, 10**12)
    police.watch(0, ONE, 0)
    assert police.watched(ONE)
    police.forget(ONE)
    assert not police.sample(10, ONE, 10**12)
    police.watch(10, ONE, 100)
    assert not police.sample(5, ONE, 50)
