"""A credit2-like scheduler of whole domains on physical CPUs: who holds a lease, until when, who gives way to whom.

The vCPUs of a domain take turns on one thread, so the unit that is scheduled is the domain. Pure: times are nanoseconds
(CLOCK_MONOTONIC) given by the caller, CPU time used comes from the caller too (`charge`), and what must happen comes out of
`schedule` as changes of leases.

* Credit burns in proportion to CPU time / weight. When the best that waits has none left, everybody gets CREDIT_INIT again, so
  that shares follow the weights. What a sleeper may have saved is bounded by CREDIT_INIT.
* A domain that wakes runs at once on a free CPU, or on one whose holder sleeps (leases stay with sleepers until somebody else
  needs the CPU); or it preempts a holder with less credit that has run for the rate limit.
* While nobody waits for its CPU a lease stands (`end` None). Otherwise it ends after a slice of SLICE_MIN to SLICE_MAX.
* A cap gives a budget for each PERIOD; a domain without budget is parked until the next period. What it overran is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from bus.addresses import DomId

DEFAULT_WEIGHT: Final = 256
MAX_WEIGHT: Final = 65535
CREDIT_INIT: Final = 10_000_000
"""Credit of a fresh domain, in ns of CPU time at the weight DEFAULT_WEIGHT."""
CREDIT_FLOOR: Final = -100 * CREDIT_INIT
"""Debts beyond this are forgotten: a reset adds CREDIT_INIT many times over, but not for ever."""
SLICE_MIN: Final = 2_000_000
SLICE_MAX: Final = 5_000_000
PERIOD: Final = 10_000_000
"""Of caps' budgets (CSCHED2_BDGT_REPL_PERIOD)."""
BUDGET_MIN: Final = 200_000
"""A parked domain runs again when it has so much budget: less is not worth a switch."""
RENEW: Final = 600_000
"""A lease of one that is still the best is renewed so long before its end: its domain does not notice."""
LATE: Final = 300_000
"""A holder stops by itself at its lease's end; its lease is taken back if it has not said so by then."""
RATELIMIT_DEFAULT: Final = 1_000_000
"""Shortest run before a preemption (sysctl: ratelimit_us)."""


class State(Enum):
    """Where a domain is with the scheduler."""

    ASLEEP = auto()
    """Wants no CPU and holds none."""
    WAITING = auto()
    """Wants a CPU."""
    HOLDING = auto()
    """Has a lease (and uses it, if `wants`)."""
    LEAVING = auto()
    """Its lease was taken back; its CPU is free when it says so (`returned`), or is stopped."""


class Change(NamedTuple):
    """A lease is new, or has another end; or (`granted` False) is taken back."""

    domain: DomId
    granted: bool
    end: int | None
    """None: it stands."""
    cpu: int


@dataclass(slots=True)
class Unit:
    """One domain."""

    domain: DomId
    weight: int = DEFAULT_WEIGHT
    cap: int = 0
    """Per cent of one CPU; 0: none."""
    affinity: int = -1
    """Bitmap of CPUs it may use; -1: all."""
    state: State = State.ASLEEP
    wants: bool = False
    """Has something to run, as far as is known."""
    enabled: bool = False
    """Started, not paused, alive."""
    credit: int = CREDIT_INIT
    budget: int = 0
    replenish: int = 0
    """When the next period begins (with a cap)."""
    cpu: int = -1
    last_cpu: int = 0
    since: int = 0
    """Start of the present state."""
    end: int | None = None
    check: int = 0
    """When to look at this holder again, if its lease ends."""
    used: int = 0
    """CPU time so far."""
    serial: int = 0
    """Order of arrival in the queue: the first of equals."""

    def may_use(self, cpu: int) -> bool:
        """Its affinity has this CPU."""
        return bool(self.affinity >> cpu & 1)


class CreditScheduler:
    """See the module."""

    def __init__(self, cpus: int) -> None:
        """ValueError without a CPU."""
        if cpus < 1:
            raise ValueError(f"{cpus} physical CPUs")
        self.cpus: Final = cpus
        self.ratelimit = RATELIMIT_DEFAULT
        self.busy = [0] * cpus
        """CPU time (ns) that domains used on each CPU."""
        self._units: dict[DomId, Unit] = {}
        self._holder: list[Unit | None] = [None] * cpus
        self._serial = 0
        self._changes: list[Change] = []
        self.dirty = False
        """`schedule` has something to look at."""

    # ------------------------------------------------------------------ who there is

    def add(self, now: int, domain: DomId) -> None:
        """A new domain, not enabled."""
        self._units[domain] = Unit(domain, since=now)

    def remove(self, now: int, domain: DomId) -> None:
        """It is gone; its CPU is free. Nothing happens if it is not known."""
        unit = self._units.pop(domain, None)
        if unit is not None:
            self._vacate(unit)
            self.dirty = True

    def get(self, domain: DomId) -> Unit | None:
        """The record of a domain (to read)."""
        return self._units.get(domain)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units.values())

    # ------------------------------------------------------------------ what happens

    def enable(self, now: int, domain: DomId, enabled: bool) -> None:
        """It may run (unpaused) or may not: then its lease is taken back."""
        unit = self._units.get(domain)
        if unit is None or unit.enabled == enabled:
            return
        unit.enabled = enabled
        self.dirty = True
        if not enabled:
            unit.wants = False
            if unit.state is State.HOLDING:
                self._revoke(now, unit)
            elif unit.state is State.WAITING:
                self._to(now, unit, State.ASLEEP)

    def woke(self, now: int, domain: DomId) -> None:
        """It wants a CPU."""
        unit = self._units.get(domain)
        if unit is None or not unit.enabled or unit.wants:
            return
        unit.wants = True
        self.dirty = True
        if unit.state is State.ASLEEP:
            self._queue(now, unit)

    def blocked(self, now: int, domain: DomId) -> None:
        """It has nothing to run. It keeps a lease that stands; one that ends is given back by this."""
        unit = self._units.get(domain)
        if unit is None:
            return
        if unit.wants:
            unit.wants = False
            self.dirty = True
        if unit.state is State.WAITING:
            self._to(now, unit, State.ASLEEP)
        elif unit.state is State.LEAVING or (unit.state is State.HOLDING and unit.end is not None):
            self._give_back(now, unit)

    def returned(self, now: int, domain: DomId) -> None:
        """It does not run any more, its lease being over or taken back, but would like to."""
        unit = self._units.get(domain)
        if unit is None:
            return
        if unit.state is State.LEAVING or (
            unit.state is State.HOLDING and unit.end is not None and now >= unit.end
        ):
            self._give_back(now, unit)

    def yielded(self, now: int, domain: DomId) -> None:
        """It lets others go first: its lease ends now, if somebody waits for its CPU."""
        unit = self._units.get(domain)
        if unit is not None and unit.state is State.HOLDING and self._waiting_for(unit.cpu):
            unit.credit = min(unit.credit, min(u.credit for u in self._waiting_for(unit.cpu)))
            self._give_back(now, unit)

    def charge(self, domain: DomId, ran: int) -> None:
        """It used so much CPU time (ns) since it was last charged."""
        unit = self._units.get(domain)
        if unit is None or ran <= 0:
            return
        unit.used += ran
        self.busy[unit.cpu if unit.cpu >= 0 else unit.last_cpu] += ran
        left = unit.credit - ran * DEFAULT_WEIGHT // unit.weight
        if unit.state is State.HOLDING and unit.end is None:
            left = max(left, min(unit.credit, 0))  # nobody waited: that makes no debt
        unit.credit = max(CREDIT_FLOOR, left)
        if unit.cap:
            unit.budget -= ran

    # ------------------------------------------------------------------ parameters

    def set_weight(self, domain: DomId, weight: int) -> None:
        """ValueError outside 1..65535."""
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueError(f"weight {weight}")
        self._units[domain].weight = weight
        self.dirty = True

    def set_cap(self, now: int, domain: DomId, cap: int) -> None:
        """Per cent of one CPU, 0 for no limit."""
        unit = self._units[domain]
        if cap and not unit.cap:
            unit.budget, unit.replenish = cap * PERIOD // 100, now + PERIOD
        unit.cap = cap
        self.dirty = True

    def set_affinity(self, now: int, domain: DomId, mask: int) -> None:
        """Hard affinity: bitmap of CPUs. ValueError if no CPU is left."""
        if not mask & (1 << self.cpus) - 1:
            raise ValueError(f"no CPU of this machine in {mask:#x}")
        unit = self._units[domain]
        unit.affinity = mask
        self.dirty = True
        if unit.state is State.HOLDING and not unit.may_use(unit.cpu):
            self._revoke(now, unit)

    # ------------------------------------------------------------------ decisions

    def schedule(self, now: int) -> list[Change]:
        """Decide; what changes. Charge what was used first."""
        for unit in self._units.values():
            self._replenish(now, unit)
        active = [u for u in self._units.values() if u.wants and not self._parked(u)]
        if active and all(u.credit <= 0 for u in active):
            self._reset(max(u.credit for u in active))
        for holder in self._holder:
            if holder is not None and holder.state is State.HOLDING and self._over(now, holder):
                self._revoke(now, holder)
        while (best := self._next()) is not None:
            self._place(now, *best)
        for holder in self._holder:
            if holder is None or holder.state is not State.HOLDING:
                continue
            if holder.cap and not holder.wants:
                self._give_back(now, holder)  # its budget is counted only while it runs
            else:
                self._set_end(now, holder)
        self.dirty = False
        changes, self._changes = self._changes, []
        return changes

    def next_deadline(self) -> int | None:
        """When `schedule` has to be called next, if nothing else happens."""
        found = [
            u.check for u in self._holder if u is not None and u.state is State.HOLDING and u.end is not None
        ]
        found += [u.replenish for u in self._units.values() if u.state is State.WAITING and self._parked(u)]
        return min(found, default=None)

    # ------------------------------------------------------------------ inside

    def _to(self, now: int, unit: Unit, state: State) -> None:
        unit.state, unit.since = state, now

    def _queue(self, now: int, unit: Unit) -> None:
        self._serial += 1
        unit.serial = self._serial
        self._to(now, unit, State.WAITING)

    def _vacate(self, unit: Unit) -> None:
        if unit.cpu >= 0:
            self._holder[unit.cpu] = None
            unit.last_cpu, unit.cpu = unit.cpu, -1
        unit.end = None

    def _give_back(self, now: int, unit: Unit) -> None:
        self._changes.append(Change(unit.domain, False, None, unit.cpu))
        self._vacate(unit)
        self.dirty = True
        if unit.wants and unit.enabled:
            self._queue(now, unit)
        else:
            self._to(now, unit, State.ASLEEP)

    def _revoke(self, now: int, unit: Unit) -> None:
        """Take its lease; its CPU is not free before it says so."""
        self._changes.append(Change(unit.domain, False, None, unit.cpu))
        self._to(now, unit, State.LEAVING)
        unit.end = None

    def _parked(self, unit: Unit) -> bool:
        return bool(unit.cap) and unit.budget < min(BUDGET_MIN, unit.cap * PERIOD // 100)

    def _replenish(self, now: int, unit: Unit) -> None:
        if not unit.cap or now < unit.replenish:
            return
        periods = (now - unit.replenish) // PERIOD + 1
        total = unit.cap * PERIOD // 100
        unit.budget = min(total, unit.budget + periods * total)
        unit.replenish += periods * PERIOD

    def _waiting_for(self, cpu: int) -> list[Unit]:
        return [
            u
            for u in self._units.values()
            if u.state is State.WAITING and u.may_use(cpu) and not self._parked(u)
        ]

    def _over(self, now: int, unit: Unit) -> bool:
        """The holder's time is up: its slice with somebody waiting, or its budget."""
        if unit.cap and unit.budget <= 0:
            return True
        return unit.end is not None and now >= unit.end + LATE and bool(self._waiting_for(unit.cpu))

    def _next(self) -> tuple[Unit, int] | None:
        """The best of those that wait and could get a CPU at once, and that CPU."""
        waiting = [u for u in self._units.values() if u.state is State.WAITING and not self._parked(u)]
        for unit in sorted(waiting, key=lambda u: (-u.credit, u.serial)):
            cpu = self._candidate(unit)
            if cpu is not None:
                if unit.credit <= 0:
                    self._reset(unit.credit)
                return unit, cpu
        return None

    def _candidate(self, unit: Unit) -> int | None:
        """A CPU that this one could have at once: its last, another free one, one whose holder sleeps."""
        last = unit.last_cpu
        if unit.may_use(last) and self._holder[last] is None:
            return last
        asleep = None
        for cpu, holder in enumerate(self._holder):
            if not unit.may_use(cpu):
                continue
            if holder is None:
                return cpu
            if asleep is None and holder.state is State.HOLDING and not holder.wants:
                asleep = cpu
        return asleep

    def _place(self, now: int, unit: Unit, cpu: int) -> None:
        holder = self._holder[cpu]
        if holder is not None:
            self._give_back(now, holder)
        self._holder[cpu] = unit
        unit.cpu = unit.last_cpu = cpu
        self._to(now, unit, State.HOLDING)
        unit.end = None
        self._changes.append(Change(unit.domain, True, None, cpu))

    def _set_end(self, now: int, unit: Unit) -> None:
        """The end of a holder's lease, as things are now; a better one that waits may preempt it."""
        waiting = self._waiting_for(unit.cpu)
        end: int | None = None
        if waiting and unit.wants:
            lead = (unit.credit - max(u.credit for u in waiting)) * unit.weight // DEFAULT_WEIGHT
            if unit.end is None or (lead > 0 and now >= unit.end - RENEW):
                end = now + min(SLICE_MAX, max(SLICE_MIN, lead))
            else:
                end = unit.end
            if lead < 0:
                end = min(end, max(now, unit.since + max(self.ratelimit, BUDGET_MIN)))
        if unit.cap:
            limit = now + max(unit.budget, BUDGET_MIN)
            end = limit if end is None else min(end, limit)
        if end is not None:
            unit.check = end - RENEW if end - now > 2 * RENEW else max(now, end) + LATE
        if end is not None and end <= now and end != unit.end:
            self._revoke(now, unit)  # preempted
        elif end != unit.end or self._is_new(unit):
            unit.end = end
            self._changes = [c for c in self._changes if not (c.granted and c.domain == unit.domain)]
            self._changes.append(Change(unit.domain, True, end, unit.cpu))

    def _is_new(self, unit: Unit) -> bool:
        return any(c.granted and c.domain == unit.domain for c in self._changes)

    def _reset(self, best: int) -> None:
        """Everybody gets CREDIT_INIT, as often as the one whose turn it is needs to have some again."""
        times = 1 + -best // CREDIT_INIT
        for unit in self._units.values():
            unit.credit = min(CREDIT_INIT, unit.credit + times * CREDIT_INIT)
