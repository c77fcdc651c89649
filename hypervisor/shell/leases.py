"""Leases between the scheduler and domains' processes: shared pages, doorbells, CPU clocks, and SIGSTOP for those that ignore them.

The hot path has no message: a domain whose lease stands runs, blocks and wakes by itself. It rings when it wants a lease, and
when it gives up one that ends. What it writes is believed only where believing it costs nobody else: that it does not want the
CPU, or has stopped; the CPU time that it uses is read from the kernel (the process's CPU clock, which counts all its threads and
may be read across uids; of a process in another container, its files in /proc that came with it).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bus import lease_page as lp
from bus.addresses import DomId
from bus.doorbell import Doorbell
from bus.trace import Kind, Trace, off
from hypervisor.core.scheduler import Change, State, Unit
from hypervisor.core.scheduler_calls import SchedulerCalls
from hypervisor.core.scheduler_police import INTERVAL, LEAVE_LIMIT, Police

MAX_OFFENCES: Final = 200
"""A domain is crashed when its process was stopped for running without a lease so many times more often than it obeyed."""


def cpu_clock(pid: int) -> int:
    """CPU time of all threads of a process in ns (clock_getcpuclockid(3)); 0 if there is none."""
    try:
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:
        return 0


def _short_runs(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same frames, in runs that fit an entry."""
    for first, count in runs:
        for start in range(first, first + count, lp.MAX_STALE_RUN):
            yield start, min(lp.MAX_STALE_RUN, first + count - start)


@dataclass(slots=True)
class _Lease:
    domain: DomId
    fd: int
    page: lp.LeasePage
    to_domain: Doorbell | None
    to_us: Doorbell | None
    theirs: tuple[Doorbell, ...] = ()
    """The domain's ends of both, which its process has copies of."""
    base: int | None = None
    used: int = 0
    epoch: int = 0
    """As last written to the page: the domain may write there too, so the page is never the place to count."""
    stopped: bool = False
    enabled: bool = False
    offences: int = 0
    stale: int = 0
    """Entries of stale frames that were written."""
    yields: int = 0


class Leases:
    """All leases of a machine. `signal`, `cpu_of` (ns that its process used, None while it has none), `ring` (by message), `crash` and
    `log` act on a domain."""

    def __init__(
        self,
        calls: SchedulerCalls,
        *,
        doorbells: bool,
        signal: Callable[[DomId, str], None],
        cpu_of: Callable[[DomId], int | None],
        ring: Callable[[DomId], None],
        crash: Callable[[DomId, str], None],
        log: Callable[[str, str, DomId], None],
        trace: Trace | None = None,
    ) -> None:
        self._calls = calls
        self._scheduler = calls.scheduler
        self._doorbells = doorbells
        self._signal = signal
        self._cpu_of = cpu_of
        self._ring_by_message = ring
        self._crash = crash
        self._log = log
        self._trace = trace or off()
        self._police = Police()
        self._leases: dict[DomId, _Lease] = {}
        self._by_fd: dict[int, _Lease] = {}
        self._natives: dict[DomId, int] = {}
        self._rung = False
        self._yielded: list[_Lease] = []
        self._sample_at: int | None = None
        self._began = time.monotonic_ns()
        self.turns = 0
        """How often anything was decided."""

    # ------------------------------------------------------------------ domains come and go

    def open(self, domain: DomId) -> tuple[dict[str, Any], list[int], int | None]:
        """The body and the descriptors of the order `lease_page` for a new domain's process, and a descriptor to poll: call
        `rang` with it when it is readable. The descriptors stay this object's."""
        self.close(domain)
        fd = lp.create()
        lease = _Lease(domain, fd, lp.LeasePage(fd), None, None)
        fds = [fd]
        if self._doorbells:
            lease.to_domain, listens = Doorbell.pair()
            rings, lease.to_us = Doorbell.pair()
            lease.theirs = (listens, rings)
            fds += [listens.fd, rings.fd]
            self._by_fd[lease.to_us.fd] = lease
        self._leases[domain] = lease
        return {}, fds, lease.to_us.fd if lease.to_us is not None else None

    def close(self, domain: DomId) -> None:
        """The domain's process is gone."""
        self._natives.pop(domain, None)
        self._police.forget(domain)
        lease = self._leases.pop(domain, None)
        if lease is None:
            return
        self._rung = True
        lease.page.close()
        os.close(lease.fd)
        for bell in (lease.to_domain, lease.to_us, *lease.theirs):
            if bell is not None:
                self._by_fd.pop(bell.fd, None)
                bell.close()

    def note(self, now: int) -> None:
        """For the trace, whose watching begins: who holds which CPU."""
        for unit in self._scheduler:
            if unit.state is State.HOLDING:
                self._trace.add(Kind.LEASE, unit.cpu, unit.domain, 1, unit.end or 0, time=now)

    def stale(self, domain: DomId, runs: Sequence[tuple[int, int]]) -> None:
        """These frames of the domain, (first, count) each, were written by somebody else: its process drops what it translated from them before it runs guest
        code. A vCPU that runs stops before its next block; one that does not needs no waking. A domain without a process, or that runs
        no guest code, has nothing to drop."""
        lease = self._leases.get(domain)
        if lease is None or not runs:
            return
        words = lease.page.words
        taken = words[lp.DROPPED]  # its own word: what it says wrong harms its own guest
        if any(count > lp.MAX_STALE_RUN for _, count in runs):
            runs = list(_short_runs(runs))
        if taken > lease.stale or lease.stale + len(runs) - taken > lp.STALE_ENTRIES:
            lease.stale += 1
            words[lp.STALE_ALL] = lease.stale
        else:
            for first, count in runs:
                words[lp.STALE_RING + lease.stale % lp.STALE_ENTRIES] = first | count << lp.STALE_RUN_SHIFT
                lease.stale += 1
        words[lp.STALE] = lease.stale
        words[lp.BELL] = 1

    def rang(self, fd: int) -> bool:
        """A descriptor was readable. False if it is none of a lease."""
        lease = self._by_fd.get(fd)
        if lease is None or lease.to_us is None:
            return False
        lease.to_us.take()
        self._rung = True
        return True

    def told(self, domain: DomId) -> None:
        """The same, by a message (`Report` 'lease')."""
        self._rung = True

    # ------------------------------------------------------------------ time

    def next_deadline(self) -> int | None:
        """When `turn` has to be called next (CLOCK_MONOTONIC ns); 0: now."""
        if self._rung or self._scheduler.dirty:
            return 0
        found = [] if self._sample_at is None else [self._sample_at]
        deadline = self._scheduler.next_deadline()
        if deadline is not None:
            found.append(deadline)
        return min(found, default=None)

    def idle_ns(self, cpu: int) -> int:
        """How long a CPU had no work since the machine came up (XEN_SYSCTL_getcpuinfo)."""
        return max(0, time.monotonic_ns() - self._began - self._scheduler.busy[cpu])

    def measure(self) -> None:
        """Bring CPU times up to date: before the toolstack asks, and before each decision."""
        for lease in self._leases.values():
            self._measure(lease)

    def measure_native(self, domain: DomId, *, running: bool) -> None:
        """The same for a domain without a lease."""
        used = self._cpu_of(domain)
        if used is not None:
            base = self._natives.setdefault(domain, used)
            self._calls.measured(domain, used - base, wants=running, current=0)

    def _measure(self, lease: _Lease) -> None:
        counted = self._cpu_of(lease.domain)
        if counted is None:
            return
        if lease.base is None:
            lease.base = counted
            return
        used = counted - lease.base
        if used <= lease.used:
            return
        self._scheduler.charge(lease.domain, used - lease.used)
        lease.used = used

    def tell(self) -> None:
        """Put what is known into the domains' records (`list`, `vcpu-list`)."""
        for lease in self._leases.values():
            words = lease.page.words
            times = [min(words[lp.VCPU_TIME + i], 1 << 62) for i in range(lp.MAX_VCPUS)]
            wants, current = bool(words[lp.WANTS]), words[lp.CURRENT]
            self._calls.measured(lease.domain, lease.used, wants=wants, current=current, vcpu_times=times)

    def turn(self, now: int) -> None:
        """Look at every page, charge what was used, decide, and write the pages anew."""
        self.turns += 1
        self._rung = False
        for lease in self._leases.values():
            self._measure(lease)
            unit = self._scheduler.get(lease.domain)
            if unit is not None:
                self._look(now, lease, unit)
        self._patrol(now)
        for change in self._scheduler.schedule(now):
            self._change(now, change)
        for lease in self._yielded:
            self._next_epoch(lease)  # the answer: it goes on if a lease was left, or given, to it
            self._ring(lease)
        self._yielded.clear()
        self._sample_at = now + INTERVAL if self._needs_patrol() else None

    def _look(self, now: int, lease: _Lease, unit: Unit) -> None:
        """What the domain says of itself."""
        scheduler, words = self._scheduler, lease.page.words
        was_enabled, lease.enabled = lease.enabled, unit.enabled
        if lease.stopped and was_enabled and not unit.enabled:
            self._continue(lease)  # it was paused or shut down, and has to answer that
        if lease.stopped or not unit.enabled:
            if unit.state is State.LEAVING and (lease.stopped or not words[lp.RUNNING]):
                scheduler.returned(now, lease.domain)
            return
        if not words[lp.WANTS]:
            scheduler.blocked(now, lease.domain)
            return
        scheduler.woke(now, lease.domain)
        if words[lp.YIELDS] != lease.yields:
            lease.yields = words[lp.YIELDS]
            scheduler.yielded(now, lease.domain)
            self._yielded.append(lease)
        elif not words[lp.RUNNING]:
            scheduler.returned(now, lease.domain)

    def _change(self, now: int, change: Change) -> None:
        lease = self._leases.get(change.domain)
        if lease is None:
            return
        words = lease.page.words
        if self._trace.on[0]:
            end = change.end or 0
            self._trace.add(Kind.LEASE, change.cpu, change.domain, change.granted, end, time=now)
        if not change.granted:
            words[lp.STATE] = lp.NONE
            self._next_epoch(lease)
            self._police.watch(now, lease.domain, lease.used)
            self._ring(lease)
            return
        self._police.forget(lease.domain)
        had = words[lp.STATE]
        if change.end is None:
            words[lp.STATE] = lp.STANDING
        else:
            words[lp.END] = change.end
            words[lp.STATE] = lp.GRANTED
        if lease.stopped:
            self._continue(lease)
        elif had == lp.NONE:
            lease.offences = max(0, lease.offences - 1)
        if had == lp.NONE:
            self._next_epoch(lease)
            self._ring(lease)

    @staticmethod
    def _next_epoch(lease: _Lease) -> None:
        lease.epoch += 1
        lease.page.words[lp.EPOCH] = lease.epoch

    def _continue(self, lease: _Lease) -> None:
        lease.stopped = False
        self._signal(lease.domain, "cont")

    def _ring(self, lease: _Lease) -> None:
        if lease.to_domain is not None:
            lease.to_domain.ring()
        else:
            self._ring_by_message(lease.domain)

    # ------------------------------------------------------------------ those that ignore it

    def _patrol(self, now: int) -> None:
        for lease in list(self._leases.values()):
            unit = self._scheduler.get(lease.domain)
            if unit is None or lease.stopped:
                continue
            if self._police.sample(now, lease.domain, lease.used):
                self._stop(now, lease, "runs without a lease")
            elif unit.state is State.LEAVING and now - unit.since > LEAVE_LIMIT:
                # It does not run, though it did not say so: the host keeps it waiting. Its CPU is free.
                self._scheduler.returned(now, lease.domain)

    def _stop(self, now: int, lease: _Lease, why: str) -> None:
        """Off the CPU. It goes on when it is its turn again: from here on its leases are enforced by signals."""
        lease.offences += 1
        if lease.offences > MAX_OFFENCES:
            self._crash(lease.domain, f"its process {why}")
            return
        if lease.offences == 1:
            self._log("warning", f"stopped: its process {why}", lease.domain)
        lease.stopped = True
        self._signal(lease.domain, "stop")
        self._scheduler.woke(now, lease.domain)
        self._scheduler.returned(now, lease.domain)

    def _needs_patrol(self) -> bool:
        """Somebody runs or waits, and somebody without a lease could be in the way."""
        leases = [lease for lease in self._leases.values() if not lease.stopped]
        return any(self._police.watched(lease.domain) for lease in leases) and any(
            unit.wants for unit in self._scheduler
        )
