"""vCPUs that take turns on one vCPU object: what PV and HVM domains have in common of running, slice by slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from bus.abi.vcpu import RUNSTATE_running
from bus.addresses import Port, VcpuId
from domains.pv.cpu import Cpu
from domains.pv.events import EventChannels
from domains.pv.life import Life
from domains.pv.state import VcpuState
from domains.pv.time import Timekeeper, idle_runstate

SLICE_BLOCKS: Final = 40_000
"""Translated blocks between two looks at timers and at the other vCPUs: about a millisecond."""


class Slice(NamedTuple):
    """What the run loop has to do next."""

    runnable: bool
    """Call `run_slice` again as soon as the lease allows."""
    deadline: int | None
    """While not runnable: system time (ns) of the next timer; None: only an event can wake the domain."""
    bell: bool
    """The bell rang, and is cleared already: the caller looks what for."""
    yielded: bool = False
    """The vCPU let others go first (SCHEDOP_yield), and none of this domain's wants to: other domains may."""


State = TypeVar("State", bound=VcpuState)


class Turns(ABC, Generic[State]):
    """The process shell calls `run_slice` in a loop and does what it returns: run again, or wait until the deadline or until
    something arrives (`deliver`, `pause`, an order)."""

    def __init__(
        self, cpu: Cpu, states: Sequence[State], time: Timekeeper, life: Life, events: EventChannels
    ) -> None:
        self._cpu: Final = cpu
        self._states: Final = states
        self._time: Final = time
        self._life: Final = life
        self._events: Final = events
        self.paused = True
        """No vCPU runs: at first, and while the toolstack says so."""
        self._turn = 0

    # --- what the shell calls between runs

    def deliver(self, port: Port, vcpu: VcpuId) -> None:
        """The hypervisor says that a port became pending. A vCPU that does not exist is ignored."""
        if self._events.valid(port) and vcpu < len(self._states):
            self._events.set_pending(port, vcpu)

    def pause(self) -> None:
        """Run no vCPU from now on; call `ring` to end a slice that runs."""
        self.paused = True
        self.preempted()

    def unpause(self) -> None:
        """Run again."""
        self.paused = False

    @abstractmethod
    def ring(self) -> None:
        """From any thread: make `run_slice` return soon. A ring between two slices ends the next one at once, so that none is
        lost: the shell looks at everything after each slice."""

    @property
    def finished(self) -> bool:
        """The domain has shut down or crashed."""
        return self._life.shutdown_code is not None or self._cpu.crash_reason is not None

    def preempted(self) -> None:
        """The shell will not call `run_slice` for a while although the domain could run (its lease is over): the time counts
        as runnable, not as running."""
        current = self._cpu.current
        if current.runstate == RUNSTATE_running:
            self._time.set_runstate(current, idle_runstate(current))

    # --- running

    def run_slice(self) -> Slice:
        """Run one vCPU for a slice, and say what comes next. A domain that ended, or is paused, runs nothing."""
        if self.paused or self.finished:
            return Slice(False, None, False)
        self._expire_all()
        state = self._choose()
        if state is None:
            return Slice(False, self.next_deadline(), False)
        bell = self._run(state)
        if self.finished:
            self._ended()
            return Slice(False, None, bell)
        self._expire_all()
        runnable = any(other.runnable for other in self._states)
        yielded, self._cpu.yielded = self._cpu.yielded, False
        if yielded and any(other.runnable for other in self._states if other is not state):
            yielded = False
        return Slice(runnable, None if runnable else self.next_deadline(), bell, yielded)

    def next_deadline(self) -> int | None:
        """System time (ns) of the next timer of any vCPU that is up."""
        found = [d for state in self._states if state.online and (d := state.deadline()) is not None]
        return min(found, default=None)

    def _choose(self) -> State | None:
        """The next vCPU in turn that can run."""
        states = self._states
        count = len(states)
        for step in range(count):
            state = states[(self._turn + step) % count]
            if state.runnable:
                self._turn = (state.id + 1) % count
                return state
        return None

    @abstractmethod
    def _run(self, state: State) -> bool:
        """One slice of one vCPU. True: the bell ended it."""

    @abstractmethod
    def _expire_all(self) -> None:
        """Fire the timers that are due."""

    @abstractmethod
    def _ended(self) -> None:
        """The domain shut down or crashed in this slice: tell whom it concerns."""
