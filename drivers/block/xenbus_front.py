"""The frontend's side of a virtual disk's way up and down (XenbusState; nodes as in blkif.h).

`FrontDevice.changed` is a procedure for `drivers.xenbus.client.Client.start`; the shell runs it after every event of
its watch on the back end's `state`, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from drivers.block.frontend import Features
from drivers.block.nodes import QueueLink
from drivers.block.wire import X86_64, Abi
from drivers.xenbus import client
from drivers.xenbus.client import Procedure, transaction
from drivers.xenbus.nodes import NodeError, optional, read_number, write_all
from drivers.xenbus.paged_ring import MAX_ORDER
from drivers.xenbus.states import Reaction, XenbusState, frontend_reaction, parse_state, state_text


@dataclass(frozen=True, slots=True)
class Wish:
    """What a frontend would like; it gets no more than the back end offers."""

    queues: int = 1
    order: int = 0
    persistent: bool = True
    large_sectors: bool = True
    abi: Abi = X86_64


class FrontPort(Protocol):
    """What the shell does when told."""

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        """Make new rings of so many pages, grant them, and allocate event channels."""

    def connected(self, features: Features) -> None:
        """The disk can be used: `Frontend.connect`."""

    def disconnect(self) -> None:
        """Let go of the rings: `Frontend.disconnect`, end the grants, close the channels. Nothing is an error."""

    def removed(self) -> None:
        """The back end is gone for good."""


class FrontDevice:
    """One virtual disk at the frontend."""

    def __init__(self, path: str, backend: str, port: FrontPort, wish: Wish | None = None) -> None:
        """`path`, `backend`: the two ends' directories."""
        self.path: Final = path
        self.backend: Final = backend
        self.port: Final = port
        self.wish: Final = wish if wish is not None else Wish()
        self.state = XenbusState.Initialising
        self.error = ""
        self._fresh = False
        self._peer = XenbusState.Unknown

    def changed(self) -> Procedure[None]:
        """See what changed at the back end, and answer to it."""
        peer = parse_state((yield from optional(f"{self.backend}/state")))
        before, self._peer = self._peer, peer
        if peer == before == XenbusState.InitWait and self.state == XenbusState.Initialised:
            return  # a watch fires more often than the state changes: our rings are published, perhaps taken already
        if peer == XenbusState.Closing and self._fresh:
            return  # that is about the connection before: its answer to Initialising comes
        self._fresh = False
        reaction = frontend_reaction(self.state, peer)
        if self.state == XenbusState.Closing and peer == XenbusState.Closing:
            # It was us who began: the back end has let go of the rings and waits for Closed.
            reaction = Reaction(enter=XenbusState.Closed, disconnect=True)
        if reaction.disconnect:
            self.port.disconnect()
        try:
            if reaction.connect:
                if reaction.enter == XenbusState.Initialised:
                    yield from self._publish()
                    return
                self.port.connected((yield from self._features()))
        except (NodeError, ValueError, MemoryError) as error:
            self.error = str(error)
            self.port.disconnect()
            yield from self._write(XenbusState.Closing)
            return
        if reaction.enter is not None:
            yield from self._write(reaction.enter)
        if reaction.remove:
            self.port.removed()

    def restart(self) -> Procedure[None]:
        """Begin anew, as after a resume of the whole domain: the old rings are worth nothing."""
        self.port.disconnect()
        self._fresh = True
        yield from self._write(XenbusState.Initialising)
        yield from self.changed()

    def close(self) -> Procedure[None]:
        """Give the disk up; the back end follows to Closed, and we then do."""
        if self.state not in (XenbusState.Closing, XenbusState.Closed):
            yield from self._write(XenbusState.Closing)

    def _write(self, state: XenbusState) -> Procedure[None]:
        yield client.write(f"{self.path}/state", state_text(state))
        self.state = state

    def _publish(self) -> Procedure[None]:
        wish, base = self.wish, self.backend
        order = min(wish.order, (yield from read_number(f"{base}/max-ring-page-order", 0, 0, 31)), MAX_ORDER)
        count = min(wish.queues, (yield from read_number(f"{base}/multi-queue-max-queues", 1, 1, 0xFFFF)))
        queues = self.port.publish(count, 1 << order)
        nodes = [("protocol", wish.abi.protocol)]
        nodes.append(("feature-persistent", str(int(wish.persistent))))
        nodes.append(("feature-large-sector-size", str(int(wish.large_sectors))))
        if order:
            nodes += [("ring-page-order", str(order)), ("num-ring-pages", str(1 << order))]
        if count > 1:
            nodes.append(("multi-queue-num-queues", str(count)))
        for number, queue in enumerate(queues):
            place = f"queue-{number}/" if count > 1 else ""
            nodes.append((f"{place}event-channel", str(queue.event_channel)))
            if order:
                nodes += [(f"{place}ring-ref{at}", str(ref)) for at, ref in enumerate(queue.ring_refs)]
            else:
                nodes.append((f"{place}ring-ref", str(queue.ring_refs[0])))
        nodes.append(("state", str(int(XenbusState.Initialised))))
        yield from transaction(lambda tx: self._replace(nodes, tx))
        self.state = XenbusState.Initialised

    def _replace(self, nodes: list[tuple[str, str]], tx: int) -> Procedure[None]:
        """What an earlier connection published, with other queues and pages perhaps, must not be read again."""
        stale = ["ring-page-order", "num-ring-pages", "multi-queue-num-queues", "ring-ref", "event-channel"]
        stale += [name for name in (yield from self._children(tx)) if name.startswith(("queue-", "ring-ref"))]
        for name in dict.fromkeys(stale):
            if (yield from optional(f"{self.path}/{name}", tx)) is not None:
                yield client.remove(f"{self.path}/{name}", tx)
        yield from write_all(self.path, nodes, tx)

    def _children(self, tx: int) -> Procedure[list[str]]:
        return client.names((yield client.directory(self.path, tx)))

    def _features(self) -> Procedure[Features]:
        base = self.backend
        size = yield from read_number(f"{base}/sector-size", 512, 512, 4096)
        flags = {}
        for name in ("flush-cache", "barrier", "discard", "persistent"):
            flags[name] = bool((yield from read_number(f"{base}/feature-{name}", 0, 0, 1)))
        return Features(
            sectors=(yield from read_number(f"{base}/sectors", None, 0, 1 << 55)),
            sector_size=size,
            read_only=bool((yield from read_number(f"{base}/info", 0, 0, 0xFFFFFFFF)) & 4),
            flush=flags["flush-cache"],
            barrier=flags["barrier"],
            discard=flags["discard"],
            discard_secure=bool((yield from read_number(f"{base}/discard-secure", 0, 0, 1))),
            max_indirect=(yield from read_number(f"{base}/feature-max-indirect-segments", 0, 0, 0xFFFFFFFF)),
            persistent=flags["persistent"] and self.wish.persistent,
        )
