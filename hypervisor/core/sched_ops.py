"""HYPERVISOR_sched_op, as far as it concerns more than the caller's own process: shutdown, remote
shutdown, the latched shutdown code, the domain watchdogs. (yield, block and poll are served in the
domain's process.)"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOSPC

from bus.abi import sched as abi
from bus.abi.xen import HYPERVISOR_sched_op
from bus.addresses import DomId
from hypervisor.core.domains import Domain, DomainTable, Shutdown
from hypervisor.core.errors import XenError
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.hypercalls import Call, Dispatcher, Result
from hypervisor.core.lifecycle import Lifecycle

WATCHDOGS = 2
"""NR_DOMAIN_WATCHDOG_TIMERS of Xen."""


class SchedOps(DomainHooks):
    """Wire form of each command: its structure of sched.h; nothing is returned in it."""

    def __init__(self, domains: DomainTable, lifecycle: Lifecycle, dispatcher: Dispatcher) -> None:
        self._domains = domains
        self._lifecycle = lifecycle
        self._watchdogs: dict[tuple[DomId, int], int] = {}
        for cmd, handler in (
            (abi.SCHEDOP_shutdown, self._shutdown),
            (abi.SCHEDOP_remote_shutdown, self._remote_shutdown),
            (abi.SCHEDOP_shutdown_code, self._shutdown_code),
            (abi.SCHEDOP_watchdog, self._watchdog),
        ):
            dispatcher.register(HYPERVISOR_sched_op, cmd, handler)

    def _shutdown(self, call: Call) -> Result:
        reason = call.item.reason & 0xFF
        if reason == Shutdown.CRASH:
            self._lifecycle.crash(call.now, call.domain, "its guest said so (SHUTDOWN_crash)", kill=False)
        else:
            self._lifecycle.shutdown(call.now, call.domain, reason, by_itself=True)
        return call.reply(0)

    def _remote_shutdown(self, call: Call) -> Result:
        op = call.item
        domain = self._domains.remote(call.domain, op.domain_id)
        self._lifecycle.shutdown(call.now, domain, op.reason, by_itself=False)
        return call.reply(0)

    def _shutdown_code(self, call: Call) -> Result:
        if call.domain.shutting_down:
            raise XenError(EBUSY)
        call.domain.shutdown_code = call.item.reason & 0xFF
        return call.reply(0)

    def _watchdog(self, call: Call) -> Result:
        op = call.item
        domid = call.domain.domid
        deadline = call.now + op.timeout * 1_000_000_000
        if op.id == 0:  # a new one; of 0 seconds, it fires at once
            for number in range(1, WATCHDOGS + 1):
                if (domid, number) not in self._watchdogs:
                    self._watchdogs[domid, number] = deadline
                    return call.reply(number)
            raise XenError(ENOSPC)
        if op.id > WATCHDOGS or (domid, op.id) not in self._watchdogs:
            raise XenError(EINVAL)
        if op.timeout == 0:
            del self._watchdogs[domid, op.id]
        else:
            self._watchdogs[domid, op.id] = deadline
        return call.reply(0)

    # -- life and time
    # --------------------------------------------------------------------------------------------

    def _stop(self, domid: DomId) -> None:
        for number in range(1, WATCHDOGS + 1):
            self._watchdogs.pop((domid, number), None)

    def shut_down(self, now: int, domain: Domain) -> None:
        self._stop(domain.domid)

    def dying(self, now: int, domain: Domain) -> None:
        self._stop(domain.domid)

    def tick(self, now: int) -> None:
        """Shut down the domains whose watchdog was not fed in time."""
        for domid, number in [key for key, deadline in self._watchdogs.items() if deadline <= now]:
            domain = self._domains.get(domid)
            if self._watchdogs.pop((domid, number), None) is not None and domain is not None:
                self._lifecycle.shutdown(now, domain, Shutdown.WATCHDOG, by_itself=False)

    def next_deadline(self) -> int | None:
        """When `tick` next has something to do."""
        return min(self._watchdogs.values()) if self._watchdogs else None
