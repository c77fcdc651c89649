"""Carries a fault plan out: counts events, and breaks what the plan says when its time has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from bus.abi.errno import XEN_ENOMEM, XEN_ENOSPC
from bus.messages.envelope import Message
from simulation.order import KINDS, Turns, kind_of
from simulation.plan import Fault, What

if TYPE_CHECKING:
    from simulation.machine import Machine

STRANGE_IOVA: Final = 0x7FFF_0000_0000
MS: Final = 1_000_000
NONE: Final[tuple[Fault, ...]] = ()
AT_ONCE: Final = (0,)
PASSIVE: Final = (
    What.LOSE,
    What.DUPLICATE,
    What.REORDER,
    What.DELAY,
    What.NO_MEMORY,
    What.NO_PORTS,
    What.NO_GRANTS,
    What.WRONG_DMA,
)
"""Whoever reports the event acts on them."""


class Injector:
    """One plan on one machine. Nothing breaks before `arm`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.faults: tuple[Fault, ...] = ()
        self.armed = False
        self._armed_at = 0
        self.fired: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self._by_event: dict[str, list[Fault]] = {}
        self._links = False
        """A plan has events of links."""

    def arm(self, faults: tuple[Fault, ...]) -> None:
        """Carry these out: from now on events count, and time runs."""
        self.armed = True
        self._armed_at = self.machine.now
        self.add(faults)

    def add(self, faults: tuple[Fault, ...]) -> None:
        """These too, of which none was due since `arm`."""
        self.faults += faults
        for number, fault in enumerate(faults):
            if fault.at_ms is not None:
                when = self._armed_at + int(fault.at_ms * MS)
                self.machine.scheduler.first(when, number, lambda fault=fault: self._fire(fault))  # type: ignore[misc]  # bound now
            else:
                self._by_event.setdefault(fault.event, []).append(fault)
                self._links = self._links or fault.event.partition(":")[0] in KINDS

    @property
    def armed_for(self) -> int:
        """How long ago `arm` was (ns)."""
        return self.machine.now - self._armed_at

    def happen(self, event: str) -> Sequence[Fault]:
        """An event. The faults that it sets off."""
        if not self.armed:
            return NONE
        count = self.counts[event] = self.counts.get(event, 0) + 1
        machine = self.machine
        machine.lines.append((machine.scheduler.now, event))
        faults = self._by_event.get(event)
        if faults is None:
            return NONE
        now = [fault for fault in faults if fault.n == count]
        for fault in now:
            self._fire(fault)
        return now

    def _fire(self, fault: Fault) -> None:
        machine = self.machine
        machine.trace(f"fault {fault.what} {fault.target}")
        self.fired.append(fault)
        span = int(fault.for_ms * MS)
        if fault.what is What.KILL:
            machine.kill(fault.target)
        elif fault.what is What.FREEZE:
            machine.freeze(fault.target, span)
        elif fault.what is What.SLOW:
            machine.slow(fault.target, span, fault.factor)
        elif fault.what is What.POWER_CUT:
            machine.power_cut()
        elif fault.what is What.DEVICE_ERROR:
            machine.media.fail += fault.count
        elif fault.what is What.CLOCK_JUMP:
            machine.scheduler.now += span
        elif fault.what not in PASSIVE:
            raise AssertionError(
                f"{fault.what} is in no list"
            )  # a plan has only what there is (simulation.plan)

    # ------------------------------------------------------------------ what others ask

    def notification(self, event: str) -> Sequence[int]:
        """A notification is sent: the delays (ns) with which it arrives; none if it is lost."""
        faults = self.happen(event)
        if not faults:
            return AT_ONCE
        delays = [0]
        for fault in faults:
            if fault.what is What.LOSE:
                delays = []
            elif fault.what is What.DUPLICATE:
                delays = [*delays, self.machine.latency()]
            elif fault.what is What.DELAY:
                delays = [delay + int(fault.for_ms * MS) for delay in delays]
        return delays

    def link(self, turns: Turns, role: str, message: Message, put: Callable[[], None]) -> None:
        """A message of the process of that role, or to it, passes."""
        if not self._links:
            put()
            return
        kind = kind_of(message)
        faults = self.happen(f"{kind}:{role}") if kind else NONE
        what = [fault.what for fault in faults]
        turns.through(kind, put, twice=What.DUPLICATE in what, swap=What.REORDER in what)

    def hypercall(self, name: str) -> int:
        """A hypercall is made: 0, or the negative errno with which it is refused."""
        for fault in self.happen(f"hypercall:{name}"):
            if fault.what is What.NO_MEMORY:
                return -XEN_ENOMEM
            if fault.what is What.NO_PORTS:
                return -XEN_ENOSPC
        return 0

    def grants_short(self) -> bool:
        """A map of granted frames is asked for: True if it is refused."""
        return any(fault.what is What.NO_GRANTS for fault in self.happen("grant:map"))

    def dma(self, items: list[tuple[int, int, bool, int]]) -> list[tuple[int, int, bool, int]]:
        """A device asks for DMA: what it really asks for."""
        if any(fault.what is What.WRONG_DMA for fault in self.happen("dma")) and items:
            _, length, to_memory, position = items[0]
            return [(STRANGE_IOVA, length, to_memory, position), *items[1:]]
        return items
