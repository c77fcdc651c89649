"""The bridges of a machine by name, and what is to happen on their links."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from drivers.net.frames import Frame
from drivers.net.switch import PLAIN, Link, Port, Receiver, Switch

MAX_BRIDGES: Final = 64
DEFAULT: Final = "xenbr0"
"""As xl's scripts have it where no bridge is named."""


class Bridges:
    """A bridge comes with its first port, and goes with the last one."""

    def __init__(self, after: Callable[[float, Callable[[], None]], None]) -> None:
        """`after(seconds, what)` of the event loop."""
        self._after: Final = after
        self._switches: Final[dict[str, Switch]] = {}
        self._links: Final[dict[tuple[str, str], Link]] = {}
        self._seeds: Final[dict[str, int]] = {}
        self._of: Final[dict[Port, Switch]] = {}

    def join(self, bridge: str, name: str, receiver: Receiver, *, mirror: bool = False) -> Port:
        """A port on a bridge. ValueError if there are too many bridges."""
        switch = self._switches.get(bridge)
        if switch is None:
            if len(self._switches) >= MAX_BRIDGES:
                raise ValueError(f"bridge {bridge!r}: there are {MAX_BRIDGES} already")
            later = lambda ns, what: self._after(ns / 1e9, what)  # noqa: E731  (one line is the shorter form)
            switch = Switch(bridge, time.monotonic_ns, later, self._seeds.get(bridge, 0))
            self._switches[bridge] = switch
        port = switch.add(name, receiver, mirror=mirror)
        self._of[port] = switch
        switch.set_link(port, self._link(bridge, name))
        return port

    def _link(self, bridge: str, name: str) -> Link:
        return self._links.get((bridge, name), self._links.get((bridge, ""), PLAIN))

    def leave(self, port: Port) -> None:
        """The port goes."""
        switch = self._of.pop(port)
        switch.remove(port)
        if not switch.ports:
            del self._switches[switch.name]

    def forward(self, port: Port, frames: Sequence[Frame]) -> None:
        """Frames came in at a port."""
        self._of[port].forward(port, frames)

    def set_link(self, bridge: str, name: str, link: Link, seed: int | None) -> None:
        """The way to a port, or to all ports (no name), from now on."""
        if link.plain:
            self._links.pop((bridge, name), None)
        else:
            self._links[bridge, name] = link
        switch = self._switches.get(bridge)
        if seed is not None:
            self._seeds[bridge] = seed
        if switch is None:
            return
        if seed is not None:
            switch.seed(seed)
        for port in switch.ports:
            if not name or port.name == name:
                switch.set_link(port, self._link(bridge, port.name))
