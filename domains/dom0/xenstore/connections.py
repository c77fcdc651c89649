"""The core's records of connections, of domains, and of who is to blame for a message that waits."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.paths import home
from domains.dom0.xenstore.quota import WRITE_BURST
from domains.dom0.xenstore.transaction import Transaction
from drivers.xenbus.wire import Framer


class Domain:
    """A domain that talks to xenstored, or is introduced."""

    __slots__ = (
        "conn",
        "credit",
        "domid",
        "introduced",
        "outstanding",
        "shutdown",
        "target",
        "watch_bytes",
        "watches",
    )

    def __init__(self, domid: int) -> None:
        self.domid: Final = domid
        self.introduced = False
        self.conn: ConnId | None = None
        """Its ring's connection."""
        self.shutdown = False
        """@releaseDomain was fired for its shutdown."""
        self.target: int | None = None
        """SET_TARGET: it may do what this domain may do."""
        self.outstanding = 0
        self.credit = float(WRITE_BURST)
        """Writes that it may still do while others have transactions open; below 0 it waits."""
        self.watches = 0
        self.watch_bytes = 0


class Origin:
    """A request, as long as a message that it caused waits somewhere: it counts as outstanding for its
    domain.
    """

    __slots__ = ("domain", "waiting")

    def __init__(self, domain: Domain) -> None:
        self.domain: Final = domain
        self.waiting = 0

    def add(self) -> None:
        """One more message waits."""
        if self.waiting == 0:
            self.domain.outstanding += 1
        self.waiting += 1

    def done(self) -> None:
        """A message was taken, or nobody waits for it any more."""
        self.waiting -= 1
        if self.waiting == 0:
            self.domain.outstanding -= 1


class Item:
    """A message in a connection's output queue."""

    __slots__ = ("data", "event", "origin")

    def __init__(self, data: bytes, origin: Origin | None, event: bool) -> None:
        self.data: Final = data
        self.origin = origin
        self.event: Final = event

    def settle(self) -> None:
        """The item leaves the queue, or its wait has lasted too long to be blamed on its origin."""
        if self.origin is not None:
            self.origin.done()
            self.origin = None


class Connection:
    """One client."""

    __slots__ = (
        "base",
        "domain",
        "head",
        "ident",
        "ignored",
        "input",
        "items",
        "output",
        "queued",
        "ring",
        "transactions",
    )

    def __init__(self, ident: ConnId, domain: Domain, ring: bool) -> None:
        self.ident: Final = ident
        self.domain: Final = domain
        self.ring: Final = ring
        self.base: Final = home(domain.domid)
        self.input: Final = Framer()
        self.items: Final[deque[Item]] = deque()
        self.head = 0
        """Bytes of the first item that were taken already."""
        self.output = 0
        """Bytes that wait."""
        self.queued: Final[set[bytes]] = set()
        """Events that wait, whole messages: a second one like it is not queued (XSA-326)."""
        self.transactions: Final[dict[int, Transaction]] = {}
        self.ignored = False
        """It broke the protocol: nothing is read from it nor sent to it any more."""

    def push(self, item: Item) -> None:
        """Queue a message."""
        if item.origin is not None:
            item.origin.add()
        if item.event:
            self.queued.add(item.data)
        self.items.append(item)
        self.output += len(item.data)

    def peek(self, limit: int) -> bytes:
        """The next bytes to send, at most `limit`; they stay queued until `taken`."""
        if not self.items:
            return b""
        parts: list[bytes | memoryview] = [memoryview(self.items[0].data)[self.head :]]
        size = len(parts[0])
        for item in islice(self.items, 1, None):
            if size >= limit:
                break
            parts.append(item.data)
            size += len(item.data)
        return b"".join(parts)[:limit]

    def taken(self, count: int) -> None:
        """The first `count` bytes were sent."""
        self.output -= count
        while count:
            item = self.items[0]
            if self.head == 0 and item.event:
                self.queued.discard(item.data)
            rest = len(item.data) - self.head
            if count < rest:
                self.head += count
                return
            count -= rest
            self.head = 0
            self.items.popleft()
            item.settle()

    def clear(self) -> None:
        """Forget input, output and transactions."""
        self.input.clear()
        for item in self.items:
            item.settle()
        self.items.clear()
        self.queued.clear()
        self.transactions.clear()
        self.head = self.output = 0
