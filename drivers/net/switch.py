"""A learning bridge in software: ports, a table of addresses, and links that lose, repeat, delay and reorder frames on purpose.

Nothing leaves it but through its ports: a bridge has no port to the host's network. The table is bounded, and so is the part of it that
one port can fill: a guest that sends from a million addresses makes its own frames be flooded, and nobody else's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from drivers.net.frames import ETH_HLEN, Frame, is_multicast

MAX_ADDRESSES: Final = 4096
MAX_PORT_ADDRESSES: Final = 256
AGE_NS: Final = 300_000_000_000
"""An address that is not seen for that long is forgotten."""
MAX_DELAYED: Final = 4096
"""Frames that wait on the delaying links of a bridge; what comes then is lost."""
_LINK_LOCAL: Final = bytes.fromhex("0180c20000")
"""01:80:c2:00:00:00 to 0f are for the bridge itself (IEEE 802.1D): it does not forward them."""


class Receiver(Protocol):
    """Who is at the end of a port."""

    def deliver(self, frames: Sequence[Frame]) -> None:
        """Frames for it, in order. It drops what it has no room for."""


@dataclass(frozen=True, slots=True)
class Link:
    """What happens on the way from the bridge to a port. Probabilities from 0 to 1, times in milliseconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """A frame with that luck is overtaken by the next one."""
    corrupt: float = 0.0
    """One bit of it is turned."""
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    """Up to so much more delay, drawn for each frame."""
    up: bool = True
    """False: nothing passes either way."""

    @property
    def plain(self) -> bool:
        """Nothing happens."""
        return self == PLAIN


PLAIN: Final = Link()


@dataclass(eq=False, slots=True)
class Port:
    """A port of a bridge."""

    name: str
    receiver: Receiver
    link: Link = PLAIN
    addresses: int = 0
    """In the table."""
    held: Frame | None = None
    """To be overtaken."""
    lost: int = 0
    mirror: bool = False
    """All that passes the bridge goes there too."""


@dataclass(slots=True)
class Counters:
    """Of a bridge."""

    forwarded: int = 0
    flooded: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Entry:
    port: Port
    seen: int = field(default=0)


Later = Callable[[int, Callable[[], None]], None]
"""(nanoseconds, what to do then)"""


class Switch:
    """One bridge."""

    def __init__(self, name: str, clock_ns: Callable[[], int], later: Later, seed: int = 0) -> None:
        """`later` runs something after so many nanoseconds. The same frames with the same seed fare the same."""
        self.name: Final = name
        self.ports: Final[list[Port]] = []
        self.counters: Final = Counters()
        self._clock: Final = clock_ns
        self._later: Final = later
        self._table: Final[dict[bytes, _Entry]] = {}
        self._random = random.Random(seed)
        self._delayed = 0
        self._mirrors: Final[list[Port]] = []

    def seed(self, seed: int) -> None:
        """Begin the links' luck anew."""
        self._random = random.Random(seed)

    def add(self, name: str, receiver: Receiver, *, mirror: bool = False) -> Port:
        """A new port."""
        port = Port(name, receiver, mirror=mirror)
        self.ports.append(port)
        if mirror:
            self._mirrors.append(port)
        return port

    def remove(self, port: Port) -> None:
        """It goes, with all addresses behind it."""
        self.ports.remove(port)
        if port.mirror:
            self._mirrors.remove(port)
        for mac in [mac for mac, entry in self._table.items() if entry.port is port]:
            del self._table[mac]

    def where(self, mac: bytes) -> Port | None:
        """The port behind which that address was seen."""
        entry = self._table.get(mac)
        return entry.port if entry is not None else None

    def forward(self, source: Port, frames: Sequence[Frame]) -> None:
        """Frames came in at a port: they go where their destination is, or to all other ports."""
        if not source.link.up:
            source.lost += len(frames)
            return
        now = self._clock()
        out: dict[Port, list[Frame]] = {}
        for frame in frames:
            data = frame.data
            target, sender = data[:6], data[6:12]
            if len(data) < ETH_HLEN or is_multicast(sender) or (target[:5] == _LINK_LOCAL and target[5] < 16):
                self.counters.dropped += 1
                continue
            self._learn(sender, source, now)
            known = None if is_multicast(target) else self._table.get(target)
            if known is not None and now - known.seen <= AGE_NS:
                if known.port is not source:
                    self.counters.forwarded += 1
                    out.setdefault(known.port, []).append(frame)
                for port in self._mirrors:
                    if port is not source and port is not known.port:
                        out.setdefault(port, []).append(frame)
                continue
            self.counters.flooded += 1
            for port in self.ports:
                if port is not source:
                    out.setdefault(port, []).append(frame)
        for port, batch in out.items():
            if port.link.plain and port.held is None:
                port.receiver.deliver(batch)
            else:
                self._through(port, batch)

    def _learn(self, mac: bytes, port: Port, now: int) -> None:
        entry = self._table.get(mac)
        if entry is not None:
            entry.seen = now
            if entry.port is not port:  # it moved
                entry.port.addresses -= 1
                port.addresses += 1
                entry.port = port
            return
        if port.addresses >= MAX_PORT_ADDRESSES or len(self._table) >= MAX_ADDRESSES:
            self._forget_old(now)
            if port.addresses >= MAX_PORT_ADDRESSES or len(self._table) >= MAX_ADDRESSES:
                return
        port.addresses += 1
        self._table[mac] = _Entry(port, now)

    def _forget_old(self, now: int) -> None:
        for mac in [mac for mac, entry in self._table.items() if now - entry.seen > AGE_NS]:
            self._table.pop(mac).port.addresses -= 1

    # ------------------------------------------------------------------ links with faults

    def set_link(self, port: Port, link: Link) -> None:
        """From now on that is the way to a port."""
        port.link = link
        if port.held is not None and not link.reorder:
            held, port.held = port.held, None
            self._arrive(port, [held])

    def _through(self, port: Port, batch: Sequence[Frame]) -> None:
        link, luck = port.link, self._random
        arrived: list[Frame] = []
        for whole in batch:
            if not link.up or luck.random() < link.loss:
                port.lost += 1
                continue
            frame = self._corrupted(whole) if luck.random() < link.corrupt else whole
            copies = [frame, frame] if luck.random() < link.duplicate else [frame]
            if port.held is None and luck.random() < link.reorder:
                port.held, copies = frame, copies[1:]
            elif port.held is not None:
                copies, port.held = [*copies, port.held], None
            arrived += copies
        if not link.delay_ms and not link.jitter_ms:
            if arrived:
                self._arrive(port, arrived)
            return
        for frame in arrived:
            if self._delayed >= MAX_DELAYED:
                port.lost += 1
                continue
            self._delayed += 1
            delay = link.delay_ms + luck.random() * link.jitter_ms
            self._later(int(delay * 1e6), lambda frame=frame: self._after(port, frame))  # type: ignore[misc]  # the default binds now

    def _corrupted(self, frame: Frame) -> Frame:
        """A bit behind the addresses is turned."""
        bit = self._random.randrange(12 * 8, len(frame.data) * 8)
        data = bytearray(frame.data)
        data[bit // 8] ^= 1 << bit % 8
        return frame._replace(data=bytes(data), validated=frame.blank)

    def _after(self, port: Port, frame: Frame) -> None:
        self._delayed -= 1
        self._arrive(port, [frame])

    def _arrive(self, port: Port, frames: Sequence[Frame]) -> None:
        if port in self.ports:
            port.receiver.deliver(frames)
