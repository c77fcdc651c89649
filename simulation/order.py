"""What may come twice on a link, or in another order than it was sent; and the place on a link where it does.

Each message that answers carries the number of what it answers: the first answer counts, and one to a number that nobody waits for is
dropped. A notification says no more than "look". So these may come twice, and two of a kind may change places; but answers to DMA keep
their order, because what a batch wrote may make the driver act before the device has the answer: it submits a command under the number of
one that the device has not ended yet. Everything else (hypercalls, orders, register accesses, DMA requests, hellos) is carried out each
time it comes, and in the order in which it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bus.messages.device import AccessDone, DmaDone
from bus.messages.domain import HypercallReply, OrderDone, Raised

NOTIFICATION: Final = "notification"
"""To a domain: event channels were raised."""
ANSWER: Final = "answer"
"""To a domain: of a hypercall; to a device: of a DMA batch."""
DONE: Final = "done"
"""From a domain: of an order; from a device: of a register access."""
KINDS: Final = (NOTIFICATION, ANSWER, DONE)
_KINDS: Final[dict[type, str]] = {
    Raised: NOTIFICATION,
    HypercallReply: ANSWER,
    DmaDone: ANSWER,
    OrderDone: DONE,
    AccessDone: DONE,
}


def kind_of(message: object) -> str:
    """Of KINDS; '' for what comes once, in order."""
    return _KINDS.get(type(message), "")


def refusal(what: str, event: str, devices: tuple[str, ...], domains: tuple[str, ...]) -> str | None:
    """Why a plan cannot have the message of this event come twice, or later than the next; None: it can. The roles at links' other ends."""
    kind, _, role = event.partition(":")
    if kind not in KINDS:
        link, whose = (f"on the link of {role} ", role) if kind in ("from", "to") else ("", "ROLE")
        allowed = ", ".join(f"{one}:{whose}" for one in KINDS)
        return (
            f"{what}: hypercalls, orders, register accesses and DMA requests come once and in order; {link}only {allowed} "
            "may come twice or change places"
        )
    if role in devices and kind == ANSWER and what == "reorder":
        return f"reorder: answers to DMA come in order, and a device may rely on that: {event} may come twice, and not change places"
    if role in devices and kind == NOTIFICATION:
        return f"{what}: nobody notifies {role} by its link"
    if role not in (*domains, *devices):
        return f"{what}: {event}: no link has that name; {', '.join((*domains, *devices))} have one"
    return None


class Turns:
    """One direction of a link, where messages pass in order but for what a plan says. Each passes by its `put`."""

    def __init__(self, later: Callable[[Callable[[], None]], None]) -> None:
        """`later`: have this called when who waits to be overtaken has waited long enough."""
        self._later: Final = later
        self._held: tuple[str, Callable[[], None]] | None = None

    def through(self, kind: str, put: Callable[[], None], *, twice: bool = False, swap: bool = False) -> None:
        """A message of that kind. `twice`: it passes two times. `swap`: once the next of its kind has passed, or its time is over; an
        answer passes before what is of another kind, whatever happens: what it answers was done before that."""
        held = self._held
        if held is not None and kind != held[0] and held[0] != NOTIFICATION:
            self._release(held)
            held = None
        if swap and held is None:
            waiting = (kind, put)
            self._held = waiting
            self._later(lambda: self._release(waiting))
            return
        put()
        if twice:
            put()
        if held is not None and kind == held[0]:
            self._release(held)

    def _release(self, held: tuple[str, Callable[[], None]]) -> None:
        if self._held is held:
            self._held = None
            held[1]()
