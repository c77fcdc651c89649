"""A domain's process learns from its lease page, before it runs guest code, of which frames translated code is stale."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bus import lease_page as lp
from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import DomId
from domains.domu.lease import Lease
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import DomainTable
from hypervisor.core.hypercalls import Dispatcher
from hypervisor.core.outbox import Outbox
from hypervisor.core.scheduler import CreditScheduler
from hypervisor.core.scheduler_calls import SchedulerCalls
from hypervisor.shell.leases import Leases

GUEST = DomId(1)
LONG = [
    (100, lp.MAX_STALE_RUN),
    (100 + lp.MAX_STALE_RUN, lp.MAX_STALE_RUN),
    (100 + 2 * lp.MAX_STALE_RUN, 1),
]
"""A run that is too long for an entry, as it is told."""


class Both:
    """The hypervisor's side and the process's of one page."""

    def __init__(self, *, doorbells: bool) -> None:
        config = MachineConfig(pcpus=1)
        dispatcher = Dispatcher(HYPERCALLS, DomainTable(config), Outbox(16))
        calls = SchedulerCalls(CreditScheduler(1), DomainTable(config), config, dispatcher)
        self.rings: list[DomId] = []
        self.leases = Leases(
            calls,
            doorbells=doorbells,
            signal=lambda domain, what: None,
            cpu_of=lambda domain: 0,
            ring=self.rings.append,
            crash=lambda domain, why: None,
            log=lambda level, text, domain: None,
        )
        _, fds, _ = self.leases.open(GUEST)
        self.page = lp.LeasePage(fds[0])
        self.lease = Lease(lambda: None)
        self.bell = self.lease.attach([os.dup(fd) for fd in fds])


@pytest.fixture(params=[True, False], ids=["doorbells", "messages"])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    """Both sides."""
    it = Both(doorbells=request.param)
    yield it
    it.page.close()
    it.leases.close(GUEST)


def test_runs_of_stale_frames_are_told_once(both: Both) -> None:
    """In order, neighbours together; a vCPU that runs is stopped, nobody is woken."""
    assert Lease(lambda: None).take_stale() == [], "without a page there is nobody to tell"
    assert both.lease.take_stale() == []
    both.leases.stale(GUEST, [(7, 3), (3, 1), (5, 1), (4, 1)])
    both.leases.stale(GUEST, [(10, 1), (100, 2 * lp.MAX_STALE_RUN + 1)])
    assert both.rings == []
    assert both.page.words[lp.BELL] == 1
    assert both.lease.take_stale() == [(7, 3), (3, 1), (5, 1), (4, 1), (10, 1), *LONG]
    assert both.lease.take_stale() == []


def test_the_ring_goes_round(both: Both) -> None:
    """No frame is lost over many times its size."""
    told: list[int] = []
    for number in range(0, 5 * lp.STALE_ENTRIES, 6):
        both.leases.stale(GUEST, [(2 * (number + step), 1) for step in range(6)])
        if number % 7 == 0:
            told += [first for first, _ in both.lease.take_stale() or ()]
    told += [first for first, _ in both.lease.take_stale() or ()]
    assert told == [2 * number for number in range(5 * lp.STALE_ENTRIES + 2)]


def test_where_there_is_no_room_all_frames_are_stale(both: Both) -> None:
    """A process that did not look for long drops everything, once; then it is told frame by frame again."""
    for number in range(2 * lp.STALE_ENTRIES):
        both.leases.stale(GUEST, [(2 * number, 1)])
    assert both.lease.take_stale() is None
    assert both.lease.take_stale() == []
    both.leases.stale(GUEST, [(12, 1)])
    assert both.lease.take_stale() == [(12, 1)]
    both.leases.stale(GUEST, [(2 * number, 1) for number in range(lp.STALE_ENTRIES + 1)])
    assert both.lease.take_stale() is None


def test_a_page_that_the_domain_wrote_over_costs_nobody_else(both: Both) -> None:
    """Whatever is in its words, neither side fails; what its own guest runs then is its own affair."""
    for value in (0, 1, 1 << 40, (1 << 64) - 1):
        for word in range(lp.SIZE // 8):
            both.page.words[word] = value
        both.leases.stale(GUEST, [(1, 2), (5, 1)])
        both.lease.take_stale()
    assert both.lease.take_stale() == []


def test_a_domain_without_a_page_is_told_nothing(both: Both) -> None:
    """It has no process, or runs no guest code."""
    both.leases.stale(DomId(2), [(1, 1)])
    both.leases.stale(GUEST, [])
    assert both.lease.take_stale() == []
