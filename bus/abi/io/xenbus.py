"""XenbusState*: the states of both ends of a split device (io/xenbus.h)."""

from __future__ import annotations

from typing import Final

XenbusStateUnknown: Final = 0

XenbusStateInitialising: Final = 1

XenbusStateInitWait: Final = 2

XenbusStateInitialised: Final = 3

XenbusStateConnected: Final = 4

XenbusStateClosing: Final = 5

XenbusStateClosed: Final = 6

XenbusStateReconfiguring: Final = 7

XenbusStateReconfigured: Final = 8


STATE_NAMES: Final = (
    "Unknown",
    "Initialising",
    "InitWait",
    "Initialised",
    "Connected",
    "Closing",
    "Closed",
    "Reconfiguring",
    "Reconfigured",
)
"""Name by number, without the prefix XenbusState."""
