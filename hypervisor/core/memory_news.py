"""What domains' own processes are told of changes to their memory: collected, merged into runs, and sent
as `memory` orders before the reply to the call that made the change."""

from __future__ import annotations

from collections.abc import Callable

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
        self.on_owned: Callable[[DomId, int, int, bool], None] = lambda domid, mfn, count, owned: None
        """(domain, first MFN, frames, got or lost): told at once, while the call that makes the change is carried out."""

    def created(self, now: int, domain: Domain) -> None:
        if domain.p2m is not None:
            domain.p2m.subscribe(self._p2m_changed)

    def _p2m_changed(self, change: P2mChange) -> None:
        mfn, kind = (change.new.mfn, int(change.new.type)) if change.new is not None else (0, 0)
        self._add(change.domain, "p2m", [int(change.gfn), int(mfn), 1, kind])

    def got(self, domid: DomId, mfn: int, count: int) -> None:
        """Guest RAM that the domain got."""
        self.on_owned(domid, mfn, count, True)
        self._add(domid, "added", [mfn, count])

    def lost(self, domid: DomId, mfn: int) -> None:
        """A frame that the domain no longer owns."""
        self.on_owned(domid, mfn, 1, False)
        self._add(domid, "removed", [mfn, 1])

    def placed(self, domid: DomId, pfn: int, mfn: int, count: int) -> None:
        """A PV guest named pfns for frames that it got: its m2p entries."""
        self._add(domid, "m2p", [pfn, mfn, count])

    def _add(self, domid: DomId, what: str, run: list[int]) -> None:
        """Append, or lengthen the last run of the same kind if this one continues it. News of what was got
        and of where it is wanted come by turns: each may be lengthened across the other, but not across a
        loss."""
        for last_domid, last_what, last in self._news[:-3:-1]:
            if last_domid != domid:
                break
            if last_what == what:
                if _continues(what, last, run):
                    count = 1 if what in ("added", "removed") else 2
                    last[count] += run[count]
                    return
                break
            if "removed" in (what, last_what):
                break
        self._news.append((domid, what, run))

    def flush(self) -> None:
        """Send what was collected, in its order."""
        if not self._news:
            return
        news, self._news = _unmapped_first(self._news), []
        start = 0
        for index in range(1, len(news) + 1):
            domid, what, _ = news[start]
            full = index - start == RUNS_PER_ORDER
            if index == len(news) or news[index][:2] != (domid, what) or full:
                found = self._domains.get(domid)
                if found is not None and found.process_alive:
                    self._outbox.tell(domid, "memory", {what: [run for _, _, run in news[start:index]]})
                start = index


def _unmapped_first(news: list[tuple[DomId, str, list[int]]]) -> list[tuple[DomId, str, list[int]]]:
    """Where a domain gives back many frames, each is unmapped and then lost: told in that order of all together, as a few long orders
    instead of two for each frame."""
    out: list[tuple[DomId, str, list[int]]] = []
    lost: list[tuple[DomId, str, list[int]]] = []
    for item in news:
        domid, what, run = item
        if lost and domid != lost[0][0]:
            out += lost
            lost = []
        if what == "removed":
            lost.append(item)
        elif what == "p2m" and run[3] == 0:
            out.append(item)
        else:
            out += lost
            lost = []
            out.append(item)
    return out + lost


def _continues(what: str, last: list[int], run: list[int]) -> bool:
    """`run` begins where `last` ends."""
    if what in ("added", "removed"):
        return run[0] == last[0] + last[1]
    unmapped = run[3:] == [0]
    end = 0 if unmapped else last[1] + last[2]
    return run[0] == last[0] + last[2] and run[3:] == last[3:] and run[1] == end
