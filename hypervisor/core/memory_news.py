"""What domains' own processes are told of changes to their memory: collected, merged into runs, and sent
as `memory` orders before the reply to the call that made the change."""

from __future__ import annotations

from bus.addresses import DomId
from hypervisor.core.domains import Domain, DomainTable
from hypervisor.core.hooks import DomainHooks
from hypervisor.core.outbox import Outbox
from hypervisor.core.p2m import P2mChange

RUNS_PER_ORDER = 512
"""Most runs in one order."""


class MemoryNews(DomainHooks):
    """Orders of kind `memory` have one key each: "added" or "removed" (runs of guest RAM, [first MFN,
    count]), "m2p" ([pfn, mfn, count], where a PV guest wants frames that it got) or "p2m" ([gfn, mfn,
    count, type], of an auto-translated guest; type 0 and mfn 0 for what is unmapped)."""

    def __init__(self, domains: DomainTable, outbox: Outbox) -> None:
        self._domains = domains
        self._outbox = outbox
        self._news: list[tuple[DomId, str, list[int]]] = []

    def created(self, now: int, domain: Domain) -> None:
        if domain.p2m is not None:
            domain.p2m.subscribe(self._p2m_changed)

    def _p2m_changed(self, change: P2mChange) -> None:
        mfn, kind = (change.new.mfn, int(change.new.type)) if change.new is not None else (0, 0)
        self._add(change.domain, "p2m", [int(change.gfn), int(mfn), 1, kind])

    def got(self, domid: DomId, mfn: int, count: int) -> None:
        """Guest RAM that the domain got."""
        self._add(domid, "added", [mfn, count])

    def lost(self, domid: DomId, mfn: int) -> None:
        """A frame that the domain no longer owns."""
        self._add(domid, "removed", [mfn, 1])

    def placed(self, domid: DomId, pfn: int, mfn: int, count: int) -> None:
        """A PV guest named pfns for frames that it got: its m2p entries."""
        self._add(domid, "m2p", [pfn, mfn, count])

    def _add(self, domid: DomId, what: str, run: list[int]) -> None:
        """Append, or lengthen the last run if this one continues it."""
        if self._news:
            last_domid, last_what, last = self._news[-1]
            if last_domid == domid and last_what == what:
                if what in ("added", "removed"):
                    if run[0] == last[0] + last[1]:
                        last[1] += run[1]
                        return
                elif run[0] == last[0] + last[2] and run[3:] == last[3:]:
                    unmapped = run[3:] == [0]
                    if run[1] == (0 if unmapped else last[1] + last[2]):
                        last[2] += run[2]
                        return
        self._news.append((domid, what, run))

    def flush(self) -> None:
        """Send what was collected, in its order."""
        if not self._news:
            return
        news, self._news = self._news, []
        start = 0
        for index in range(1, len(news) + 1):
            domid, what, _ = news[start]
            full = index - start == RUNS_PER_ORDER
            if index == len(news) or news[index][:2] != (domid, what) or full:
                found = self._domains.get(domid)
                if found is not None and found.process_alive:
                    self._outbox.tell(domid, "memory", {what: [run for _, _, run in news[start:index]]})
                start = index
