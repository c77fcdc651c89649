"""Domains on simulated CPUs: each runs whenever it holds a lease and has something to do, and gives way some time after its
lease is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.addresses import DomId
from hypervisor.core.scheduler import Change, CreditScheduler, State


@dataclass
class Guest:
    """Busy all the time, or for `burst` ns of each `every` ns."""

    domain: DomId
    burst: int = 0
    every: int = 0
    left: int = 0
    next_wake: int = 0
    lease: Change | None = None
    ran: int = 0
    woken_at: int | None = None
    latencies: list[int] = field(default_factory=list)


class World:
    """Time passes from one thing that happens to the next. `lag` ns pass between a lease's end and the CPU being free."""

    def __init__(self, cpus: int, lag: int = 150_000) -> None:
        self.scheduler = CreditScheduler(cpus)
        self.cpus = cpus
        self.now = 0
        self.lag = lag
        self.guests: dict[DomId, Guest] = {}
        self.leaving: dict[DomId, int] = {}

    def add(
        self, number: int, *, weight: int = 256, cap: int = 0, burst: int = 0, every: int = 0, mask: int = -1
    ) -> Guest:
        """A guest, started at once."""
        domain = DomId(number)
        s = self.scheduler
        s.add(self.now, domain)
        s.set_weight(domain, weight)
        s.set_cap(self.now, domain, cap)
        if mask != -1:
            s.set_affinity(self.now, domain, mask)
        s.enable(self.now, domain, True)
        guest = self.guests[domain] = Guest(domain, burst, every)
        if every:
            guest.next_wake = self.now + every
        else:
            s.woke(self.now, domain)
        return guest

    def _running(self) -> list[Guest]:
        return [
            g
            for g in self.guests.values()
            if ((g.lease is not None and g.lease.granted) or g.domain in self.leaving)
            and (g.left > 0 or not g.every)
        ]

    def _settle(self) -> None:
        for _ in range(64):
            if (
                not self.scheduler.dirty
                and (d := self.scheduler.next_deadline()) is not None
                and d > self.now
            ):
                break
            for change in self.scheduler.schedule(self.now):
                self._take(change)
            self.check()
            if not self.scheduler.dirty:
                break
        else:
            raise AssertionError("the scheduler does not settle")

    def _take(self, change: Change) -> None:
        guest = self.guests[change.domain]
        unit = self.scheduler.get(change.domain)
        assert unit is not None
        if change.granted:
            assert unit.may_use(change.cpu)
            if guest.woken_at is not None:
                guest.latencies.append(self.now - guest.woken_at)
                guest.woken_at = None
            guest.lease = change
            self.leaving.pop(change.domain, None)
        else:
            guest.lease = None
            if unit.state is State.LEAVING:
                self.leaving[change.domain] = self.now + self.lag

    def check(self) -> None:
        """One holder a CPU; nobody waits that could use a free CPU."""
        held = [u.cpu for u in self.scheduler if u.cpu >= 0]
        assert len(held) == len(set(held))
        if not self.scheduler.dirty:
            free = set(range(self.cpus)) - set(held)
            for u in self.scheduler:
                if u.state is State.WAITING and not (u.cap and u.budget < 200_000):
                    assert not any(u.may_use(cpu) for cpu in free), "a CPU is free, and somebody waits for it"

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + int(seconds * 1e9)
        while self.now < end:
            self._settle()
            times = [end]
            deadline = self.scheduler.next_deadline()
            if deadline is not None:
                times.append(deadline)
            times += self.leaving.values()
            times += [g.next_wake for g in self.guests.values() if g.every]
            times += [self.now + g.left for g in self._running() if g.every]
            times += [g.lease.end + self.lag for g in self.guests.values() if g.lease and g.lease.end]
            step = max(1, min(times) - self.now)
            for guest in self._running():
                guest.ran += step
                self.scheduler.charge(guest.domain, step)
                if guest.every:
                    guest.left -= step
            self.now += step
            self._happen()

    def _happen(self) -> None:
        s, now = self.scheduler, self.now
        for guest in self.guests.values():
            if guest.every and now >= guest.next_wake:
                guest.next_wake += guest.every
                if guest.left <= 0:
                    guest.left = guest.burst
                    guest.woken_at = now if guest.lease is None else None
                    s.woke(now, guest.domain)
            elif guest.every and guest.left <= 0 and guest.woken_at is None:
                s.blocked(now, guest.domain)
            if guest.lease and guest.lease.end and now >= guest.lease.end + self.lag:
                s.returned(now, guest.domain)
        for domain, when in list(self.leaving.items()):
            if now >= when:
                del self.leaving[domain]
                s.returned(now, domain)
