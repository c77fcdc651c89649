"""The states of both ends of a split device (io/xenbus.h): what each end may do, and what it does when the
other changes.

Each end writes its own `state` node and watches the other's. The usual way up::

    frontend  Initialising -------------> Initialised ----------------> Connected
    backend   Initialising -> InitWait ---------------> Connected

A frontend may go from Initialising to Connected at once (no negotiation needed), and a backend may connect
as soon as its peer is Initialised. Down: either end goes to Closing, the other follows, both end Closed. A
frontend that comes back goes to Initialising (a new kernel in the same domain, or a driver that was bound
again), and the backend from Closed or Closing to InitWait. Either end may ask for a change of configuration while connected (Reconfiguring, answered by Reconfigured).
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final, NamedTuple

from bus.abi.io import xenbus


class XenbusState(IntEnum):
    """`enum xenbus_state`; the node's text is its number in decimal."""

    Unknown = xenbus.XenbusStateUnknown
    Initialising = xenbus.XenbusStateInitialising
    InitWait = xenbus.XenbusStateInitWait
    Initialised = xenbus.XenbusStateInitialised
    Connected = xenbus.XenbusStateConnected
    Closing = xenbus.XenbusStateClosing
    Closed = xenbus.XenbusStateClosed
    Reconfiguring = xenbus.XenbusStateReconfiguring
    Reconfigured = xenbus.XenbusStateReconfigured


class End(Enum):
    """Which end of a split device."""

    FRONTEND = "frontend"
    BACKEND = "backend"


_S: Final = XenbusState
_DOWN: Final = {_S.Closing, _S.Closed}

LEGAL: Final[dict[End, dict[XenbusState, frozenset[XenbusState]]]] = {
    End.FRONTEND: {
        _S.Unknown: frozenset({_S.Initialising}),
        _S.Initialising: frozenset({_S.InitWait, _S.Initialised, _S.Connected} | _DOWN),
        _S.InitWait: frozenset({_S.Initialised, _S.Connected} | _DOWN),
        _S.Initialised: frozenset({_S.Connected, _S.Initialising} | _DOWN),
        _S.Connected: frozenset({_S.Reconfiguring, _S.Reconfigured, _S.Initialised, _S.Initialising} | _DOWN),
        _S.Reconfiguring: frozenset({_S.Reconfigured, _S.Connected, _S.Initialising} | _DOWN),
        _S.Reconfigured: frozenset({_S.Connected, _S.Reconfiguring, _S.Initialising} | _DOWN),
        _S.Closing: frozenset({_S.Closed, _S.Initialising}),
        _S.Closed: frozenset({_S.Initialising, _S.Unknown}),
    },
    End.BACKEND: {
        _S.Unknown: frozenset({_S.Initialising}),
        _S.Initialising: frozenset({_S.InitWait, _S.Initialised, _S.Connected} | _DOWN),
        _S.InitWait: frozenset({_S.Initialised, _S.Connected} | _DOWN),
        _S.Initialised: frozenset({_S.Connected, _S.InitWait} | _DOWN),
        _S.Connected: frozenset({_S.Reconfiguring, _S.Reconfigured, _S.InitWait} | _DOWN),
        _S.Reconfiguring: frozenset({_S.Reconfigured, _S.Connected, _S.InitWait} | _DOWN),
        _S.Reconfigured: frozenset({_S.Connected, _S.Reconfiguring, _S.InitWait} | _DOWN),
        _S.Closing: frozenset({_S.Closed, _S.InitWait}),
        _S.Closed: frozenset({_S.InitWait, _S.Initialising, _S.Unknown}),
    },
}
"""From each state, where an end may go of its own accord. Initialising out of a later state is a frontend
that starts anew (kexec, a crashed driver); InitWait out of a later state is the backend's answer to it."""


def parse_state(text: bytes | None) -> XenbusState:
    """The state in a node's value. A node that is missing or holds no state's number counts as Unknown:
    the other end may be hostile, and Unknown is what removes a device.
    """
    if text is None or not 1 <= len(text) <= 2 or not text.isdigit():
        return XenbusState.Unknown
    number = int(text)
    return XenbusState(number) if number <= max(XenbusState) else XenbusState.Unknown


def state_text(state: XenbusState) -> bytes:
    """The node's value for a state."""
    return b"%d" % state


def is_legal(end: End, old: XenbusState, new: XenbusState) -> bool:
    """Whether this end may go from `old` to `new`. Writing the same state again is no transition and
    always legal.
    """
    return old == new or new in LEGAL[end][old]


class Reaction(NamedTuple):
    """What an end does when the other's state is seen. In this order: disconnect, connect, enter, remove."""

    enter: XenbusState | None = None
    """Write this as the own state (after connecting has succeeded)."""
    connect: bool = False
    """Read the other's ring references and event channel, and map them."""
    disconnect: bool = False
    """Let go of the other's rings and event channel."""
    remove: bool = False
    """The device is gone: forget it."""


_NOTHING: Final = Reaction()


def backend_reaction(own: XenbusState, peer: XenbusState, online: bool) -> Reaction:
    """What a backend does when it sees its frontend in state `peer`.

    `online` is the backend's node of that name (missing counts as false): the toolstack clears it to take
    the device away for good; while it is set the backend stays for a frontend that comes back.
    """
    if own == _S.Unknown:
        return Reaction(remove=peer == _S.Unknown)
    match peer:
        case _S.Initialising:
            if own in (_S.Initialising, _S.Closed, _S.Closing):
                return Reaction(enter=_S.InitWait, disconnect=own == _S.Closing)
            if own in (_S.Connected, _S.Initialised, _S.Reconfiguring, _S.Reconfigured):
                return Reaction(enter=_S.InitWait, disconnect=True)
            return _NOTHING
        case _S.Initialised | _S.Connected:
            if own in (_S.InitWait, _S.Initialised, _S.Initialising):
                # Out of Initialising by way of InitWait, which the frontend did not wait for.
                return Reaction(enter=_S.Connected, connect=True)
            return Reaction(enter=_S.Connected) if own == _S.Reconfigured else _NOTHING
        case _S.Reconfiguring:
            return Reaction(enter=_S.Reconfigured) if own in (_S.Connected, _S.Reconfiguring) else _NOTHING
        case _S.Reconfigured:
            return Reaction(enter=_S.Reconfigured) if own == _S.Reconfiguring else _NOTHING
        case _S.Closing:
            return _NOTHING if own in _DOWN else Reaction(enter=_S.Closing, disconnect=True)
        case _S.Closed:
            first = Reaction(enter=_S.Closed, disconnect=own not in _DOWN or own == _S.Closing)
            if own == _S.Closed:
                first = _NOTHING
            return first if online else first._replace(remove=True)
        case _S.Unknown:
            return Reaction(
                enter=None if own == _S.Closed else _S.Closed, disconnect=own != _S.Closed, remove=True
            )
        case _:
            return _NOTHING


def frontend_reaction(own: XenbusState, peer: XenbusState) -> Reaction:
    """What a frontend does when it sees its backend in state `peer`. `connect` means: publish the rings
    (from InitWait on), or, when the own state is Initialised, read what the backend tells about the device.
    """
    if own == _S.Unknown:
        return Reaction(remove=peer == _S.Unknown)
    match peer:
        case _S.InitWait:
            if own == _S.Initialising:
                return Reaction(enter=_S.Initialised, connect=True)
            if own in (_S.Initialised, _S.Connected):
                # The backend started anew: publish the rings again.
                return Reaction(enter=_S.Initialised, disconnect=True, connect=True)
            return _NOTHING
        case _S.Connected:
            return Reaction(enter=_S.Connected, connect=True) if own == _S.Initialised else _NOTHING
        case _S.Reconfiguring:
            return Reaction(enter=_S.Reconfigured, disconnect=True) if own == _S.Connected else _NOTHING
        case _S.Reconfigured:
            back = own in (_S.Reconfiguring, _S.Reconfigured)
            return Reaction(enter=_S.Connected, connect=True) if back else _NOTHING
        case _S.Closing:
            return _NOTHING if own in _DOWN else Reaction(enter=_S.Closed, disconnect=True)
        case _S.Closed | _S.Unknown:
            if own == _S.Closed:
                return Reaction(remove=peer == _S.Unknown)
            if peer == _S.Closed and own == _S.Initialising:
                return _NOTHING  # left over from before: the backend has not answered yet
            return Reaction(enter=_S.Closed, disconnect=True, remove=peer == _S.Unknown)
        case _:
            return _NOTHING
