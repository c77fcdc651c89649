"""The hypervisor's side of a lease page: a domain may write any word of it at any time, and that is its own loss alone."""

from __future__ import annotations

import time

from bus import lease_page as lp
from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import DomId
from hypervisor.core.config import MachineConfig
from hypervisor.core.domains import Domain, DomainSpec, DomainTable, Kind, VcpuState
from hypervisor.core.hypercalls import Dispatcher
from hypervisor.core.outbox import Outbox
from hypervisor.core.scheduler import CreditScheduler
from hypervisor.core.scheduler_calls import SchedulerCalls
from hypervisor.shell.leases import Leases

ALL_ONES = (1 << 64) - 1


def test_a_page_full_of_ones_ends_nothing() -> None:
    """Every word of the page, the hypervisor's own too, is overwritten before each decision: leases go on being granted and taken."""
    config = MachineConfig(pcpus=1)
    domains = DomainTable(config)
    calls = SchedulerCalls(CreditScheduler(1), domains, config, Dispatcher(HYPERCALLS, domains, Outbox(16)))
    leases = Leases(
        calls,
        doorbells=True,
        signal=lambda domain, what: None,
        cpu_of=lambda domain: 0,
        ring=lambda domain: None,
        crash=lambda domain, why: None,
        log=lambda level, text, domain: None,
    )
    pages = []
    for number in (1, 2):
        now, domid = time.monotonic_ns(), DomId(number)
        domains.add(Domain(domid, DomainSpec(Kind.PV), None, bytes(16), vcpus=[VcpuState(0, online=True)]))
        calls.created(now, domain=domains.get(domid))  # type: ignore[arg-type]  # just added
        _, fds, bell = leases.open(domid)
        assert bell is not None
        pages.append(lp.LeasePage(fds[0]))
        calls.scheduler.enable(now, domid, True)
    epochs = set()
    for step in range(200):
        for page in pages:
            for word in range(lp.SIZE // 8):
                page.words[word] = ALL_ONES
        leases.told(DomId(1))
        leases.turn(time.monotonic_ns() + step * 10_000_000)
        leases.tell()
        epochs |= {page.words[lp.EPOCH] for page in pages}
    assert len(epochs - {ALL_ONES}) > 3, "leases changed hands meanwhile"
    for page in pages:
        page.close()
    for number in (1, 2):
        leases.close(DomId(number))
