"""Deliberately broken copies of the network's drivers (drivers/net, domains/netio); `simulation.mutants` has those of the block side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import domains.netio.vif as vif
from drivers.net.backend import Backend, Queue
from drivers.net.frames import Frame
from drivers.net.journal import Journal
from drivers.xenbus.paged_ring import PagedRing
from simulation.mutant import Mutant, Undo, patched


def _answers_not_noted() -> list[Undo]:
    return patched(Journal, "note", lambda self, old, answers: None)


def _journal_not_read() -> list[Undo]:
    return patched(Journal, "recover", lambda self, ring: 0)


def _successor_starts_late() -> list[Undo]:
    real = Queue.__init__

    def init(self: Queue, tx: PagedRing, *rest: Any) -> None:
        real(self, tx, *rest)
        self.tx_cons = tx.req_prod  # "all that is published has surely been taken"

    return patched(Queue, "__init__", init)


def _never_sent() -> list[Undo]:
    class Nowhere:
        def sent(self, frames: Sequence[Frame]) -> None:
            """They are gone."""

    real = Backend.__init__

    def init(self: Backend, abilities: Any, copier: Any, network: Any, **options: Any) -> None:
        real(self, abilities, copier, Nowhere(), **options)

    return patched(Backend, "__init__", init)


def _second_page_wrong() -> list[Undo]:
    real = Backend._fill

    def fill(self: Backend, queue: Queue, batch: Sequence[Frame], slots: int) -> None:
        short = [frame._replace(data=frame.data[:4096].ljust(len(frame.data), b"\0")) for frame in batch]
        real(self, queue, short, slots)

    return patched(Backend, "_fill", fill)


def _rings_stay_mapped() -> list[Undo]:
    real = vif.VifServer._release

    def release(self: vif.VifServer) -> None:
        self._mappings = []  # forgotten: the next connection maps its own
        real(self)

    return patched(vif.VifServer, "_release", release)


def _answered_before_copied() -> list[Undo]:
    def fill(self: Backend, queue: Queue, batch: Sequence[Frame], slots: int) -> None:
        copier = self._copier
        later: list[Sequence[tuple[int, bytes]]] = []

        class Later:
            """Says that all is copied, and keeps it."""

            def store(self, items: Sequence[tuple[int, bytes]]) -> Sequence[int]:
                later.append(items)
                return [0] * len(items)

        self._copier = Later()  # type: ignore[assignment, misc]  # of the frontend's pages nothing is read here
        try:
            real_fill(self, queue, batch, slots)  # the responses are published, and the frontend is notified
        finally:
            self._copier = copier  # type: ignore[misc]  # as it was
        for items in later:
            copier.store(items)

    real_fill = Backend._fill
    return patched(Backend, "_fill", fill)


NETWORK_MUTANTS: Final = (
    Mutant("net-answers-not-noted", "responses that are about to be written are not noted for a successor", 40, _answers_not_noted, "network"),
    Mutant("net-journal-not-read", "a successor does not publish the responses that were begun", 40, _journal_not_read, "network"),
    Mutant("net-late-start", "a successor takes what is published for answered", 20, _successor_starts_late, "network"),
    Mutant("net-never-sent", "packets are answered and not sent", 20, _never_sent, "network"),
    Mutant("net-second-page", "what a frame has in its second page is lost on the way to the frontend", 20, _second_page_wrong, "network"),
    Mutant("net-rings-stay-mapped", "ring pages are not unmapped when the frontend goes", 20, _rings_stay_mapped, "network"),
    Mutant("net-answered-before-copied", "a page is said to be filled before the frame is copied to it", 20, _answered_before_copied, "network"),
)  # fmt: skip
