"""A domain process's lease: may it run a vCPU now, until when; asking for one and giving it up. See `bus.lease_page`."""

from __future__ import annotations

import time
from collections.abc import Callable

from bus import lease_page as lp
from bus.doorbell import Doorbell
from domains.vcpu.thunks import lend_control_page


class Lease:
    """Used by the vCPU thread only. Before the page has come, every lease stands (a process under test has no hypervisor)."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """`tell`: have the hypervisor look at the page, by a message; used where there are no doorbells."""
        self._tell = tell
        self._page: lp.LeasePage | None = None
        self._ours: Doorbell | None = None
        self._theirs: Doorbell | None = None
        self._asked = -1
        self._dropped = 0

    def attach(self, fds: list[int]) -> int | None:
        """The page and the doorbells of the order `lease_page`, which are taken over. A descriptor to listen to, if any: `take`
        when it is readable."""
        self._page = lp.map_page(fds[0])
        lend_control_page(self._page.memory, lp.CONTROL)
        if len(fds) < 3:
            return None
        self._ours, self._theirs = Doorbell(fds[1]), Doorbell(fds[2])
        return self._ours.fd

    def take(self, fd: int) -> bool:
        """Forget rings; False if the descriptor is not the lease's."""
        if self._ours is None or fd != self._ours.fd:
            return False
        self._ours.take()
        return True

    def take_stale(self) -> list[tuple[int, int]] | None:
        """Runs (first MFN, count) of frames that others wrote to since the last call: their translated code must be dropped before guest
        code runs. None: there may be any."""
        # A vCPU's bell was cleared before this, with system calls in between: a write that is not seen here rings it anew.
        page = self._page
        if page is None or (end := page.words[lp.STALE]) == self._dropped:
            return []
        words, begin = page.words, self._dropped
        runs: list[tuple[int, int]] | None = None
        if words[lp.STALE_ALL] <= begin and begin < end <= begin + lp.STALE_ENTRIES:
            runs = []
            for number in range(begin, end):
                entry = words[lp.STALE_RING + number % lp.STALE_ENTRIES]
                runs.append((entry & ((1 << lp.STALE_RUN_SHIFT) - 1), entry >> lp.STALE_RUN_SHIFT))
        words[lp.DROPPED] = self._dropped = end
        return runs

    def may_run(self) -> bool:
        """The domain holds a lease that is not over."""
        if self._page is None:
            return True
        words = self._page.words
        state = words[lp.STATE]
        return bool(state == lp.STANDING or (state == lp.GRANTED and time.monotonic_ns() < words[lp.END]))

    @property
    def end(self) -> int:
        """CLOCK_MONOTONIC ns at which the lease ends; 0: it stands."""
        if self._page is None or self._page.words[lp.STATE] != lp.GRANTED:
            return 0
        return int(self._page.words[lp.END])

    def running(self) -> None:
        """A vCPU is about to run."""
        if self._page is not None:
            words = self._page.words
            words[lp.WANTS] = words[lp.RUNNING] = 1
            words[lp.SEEN] = words[lp.EPOCH]

    def ran(self, vcpu: int, ns: int) -> None:
        """A vCPU ran for so long."""
        if self._page is not None and 0 <= vcpu < lp.MAX_VCPUS:
            words = self._page.words
            words[lp.CURRENT] = vcpu
            words[lp.VCPU_TIME + vcpu] += max(0, ns)

    def sleeping(self) -> None:
        """Nothing to run. A lease that stands is kept; one that ends is given up."""
        if self._page is None:
            return
        words = self._page.words
        was = words[lp.WANTS]
        words[lp.WANTS] = words[lp.RUNNING] = 0
        self._asked = -1
        if was and words[lp.STATE] != lp.STANDING:
            self._ring()

    def ask(self) -> None:
        """There is something to run, and no lease (any more): stop, and ask once a grant or revocation."""
        if self._page is None:
            return
        words = self._page.words
        words[lp.WANTS] = 1
        words[lp.RUNNING] = 0
        epoch = words[lp.SEEN] = words[lp.EPOCH]
        if self._asked != epoch:
            self._asked = epoch
            self._ring()

    def yielded(self) -> bool:
        """Its vCPU gives the CPU up for a moment (SCHEDOP_yield): if the lease ends, somebody may be waiting, and the hypervisor
        decides who goes on. True: run nothing before `may_run` after the next word of the hypervisor."""
        if self._page is None:
            return False
        words = self._page.words
        if words[lp.STATE] != lp.GRANTED:
            return False
        words[lp.RUNNING] = 0
        words[lp.SEEN] = words[lp.EPOCH]
        words[lp.YIELDS] += 1
        self._ring()
        return True

    @property
    def answered(self) -> bool:
        """The hypervisor has decided since `yielded`."""
        return self._page is None or bool(self._page.words[lp.EPOCH] != self._page.words[lp.SEEN])

    def _ring(self) -> None:
        if self._theirs is not None:
            self._theirs.ring()
        else:
            self._tell()
