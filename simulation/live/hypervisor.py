"""The hypervisor of a machine with a fault plan (a program, in place of `hypervisor`): what passes its links is counted, held, changed.

The product's server and peers run as they are; this stands at their edge: messages as they come, messages as they go."""

from __future__ import annotations

import heapq
import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any, Final

import hypervisor.__main__ as product
from bus.abi import grant_table as gt
from bus.abi.errno import XEN_ENOMEM, XEN_ENOSPC
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.xen import HYPERVISOR_grant_table_op
from bus.dma_lane import pack, unpack
from bus.messages.device import FROM_ANY_DOMAIN, FROM_DEVICE, Dma, DmaRequest
from bus.messages.domain import Hypercall, HypercallReply, OrderDone, Raised, Refused
from bus.messages.envelope import BadMessage, Message, decode, encode
from hypervisor.shell.devices import address_of, is_device
from hypervisor.shell.heartbeat import PING_ORDER
from hypervisor.shell.peers import Peer
from hypervisor.shell.server import Server
from simulation.live.edge import Edge
from simulation.live.plan import LINKS, Fault, What
from simulation.order import ANSWER, Turns, kind_of

STRANGE_IOVA: Final = 0x7FFF_0000_0000
ANSWER_BYTES: Final = 12
"""Of a DMA batch, on the lane."""
NAMES: Final = {
    (number, command.number): command.name.lower()
    for number, call in HYPERCALLS.items()
    if call is not None
    for command in call.commands
}
EDGE: Final = Edge("hypervisor")
MS: Final = 1_000_000


def damaged(raw: bytes, fault: Fault) -> bytes:
    """A message's bytes after CORRUPT or TRUNCATE."""
    if fault.what is What.TRUNCATE:
        return raw[: len(raw) // 2]
    at = random.Random(fault.seed).randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :]


def size_of(message: Message | DmaRequest) -> int:
    """Bytes of it, and of the data that it has moved."""
    moved = sum(item[1] for item in message.items) if isinstance(message, Dma | DmaRequest) else 0
    return len(pack(*message) if isinstance(message, DmaRequest) else encode(message)) + moved


class _Link:
    """One process's link: until when it is slow or silent, and when what it holds is due."""

    def __init__(self, hold: Callable[[int, Callable[[], None]], None]) -> None:
        def later(release: Callable[[], None]) -> None:
            hold(time.monotonic_ns() + self.wait, release)

        self.until = 0
        self.latency = self.jitter = 0
        self.bytes_per_s, self.narrow_until = 0, 0
        self.turns = {"from": Turns(later), "to": Turns(later)}
        self.wait = 0
        """So long a message waits to be overtaken (ns)."""
        self.due = {"from": 0, "to": 0}
        """Nothing passes before this: messages keep their order."""
        self.rng = random.Random(0)

    def delay(self, now: int, way: str, more: int = 0, size: Callable[[], int] = lambda: 0) -> int:
        """When a message of now passes; 0: at once. `size`: in bytes, asked for where it matters."""
        when = now + more
        if now < self.narrow_until:  # it begins when what was before it is through
            when = max(when, self.due[way]) + size() * 1_000_000_000 // self.bytes_per_s
        if now < self.until:
            when += self.latency + (self.rng.randrange(self.jitter) if self.jitter else 0)
        when = max(when, self.due[way])
        if when <= now:
            return 0
        self.due[way] = when
        return when


class FaultyServer(Server):
    """The server between its edges."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._joins.interrupts = False  # they stay messages, which can be lost
        self._links: dict[int, _Link] = {}
        self._held: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._passing = False
        self._timer = product_timer()
        self._by_fd[self._timer] = self._clock = _Clock()  # type: ignore[assignment]  # told apart in `_serve`
        self._epoll.register(self._timer, 1)
        self._by_fd[EDGE.fileno()] = self._clock  # type: ignore[assignment]  # as well
        self._epoll.register(EDGE.fileno(), 1)
        EDGE.board.write_table({"hypervisor": ["hypervisor", os.getpid()]})

    # ------------------------------------------------------------------ who is who

    def _role(self, number: int) -> str:
        running = self.processes.of(number)  # type: ignore[arg-type]  # DomId is int
        return running.role if running is not None else ""

    def _table(self) -> None:
        table: dict[str, list[Any]] = {"hypervisor": ["hypervisor", os.getpid()]}
        for number in self.peers:
            running = self.processes.of(number)
            if running is not None and running.pid:
                name = address_of(number) if is_device(number) else number
                table[f"{running.role}:{int(name)}"] = [running.role, running.pid]
        EDGE.board.write_table(table)

    def _process_news(self) -> None:
        super()._process_news()
        self._table()

    def _targets(self, fault: Fault) -> list[int]:
        role, _, name = fault.target.partition(":")
        return [
            number
            for number in self.peers
            if self._role(number) == role
            and (not name or int(name) == int(address_of(number) if is_device(number) else number))
        ]

    # ------------------------------------------------------------------ time

    def _serve(self, peer: Peer, fd: int, events: int) -> None:
        if fd == self._timer:
            os.read(self._timer, 8)
            self._release()
            return
        if fd == EDGE.fileno():
            self._obey_times()
            return
        super()._serve(peer, fd, events)

    def _obey_times(self) -> None:
        """Faults whose time has come."""
        if not EDGE.obey(lambda faults: self._act(faults, time.monotonic_ns())):
            self._epoll.unregister(EDGE.fileno())
        self._apply()

    def _hold(self, when: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._held, (when, next(self._serial), action))
        set_timer(self._timer, self._held[0][0])

    def _release(self) -> None:
        if EDGE.timed:
            EDGE.obey(lambda faults: self._act(faults, time.monotonic_ns()))
        now = time.monotonic_ns()
        while self._held and self._held[0][0] <= now:
            heapq.heappop(self._held)[2]()
        if self._held:
            set_timer(self._timer, self._held[0][0])
        self._apply()

    def _link(self, number: int) -> _Link:
        link = self._links.get(int(number))
        if link is None:
            link = self._links[int(number)] = _Link(self._hold)
        return link

    def _turn_of(self, peer: Peer, way: str, kind: str, put: Callable[[], None]) -> None:
        """A message of that kind (simulation.order) passes, or comes twice, or waits for the next one."""
        faults = EDGE.happen(f"{kind}:{self._role(peer.domain)}") if kind else []
        link = self._link(peer.domain)
        swap = [fault for fault in faults if fault.what is What.REORDER]
        if swap:
            link.wait = int(swap[0].latency_ms * MS)
        self._act([fault for fault in faults if fault not in swap], time.monotonic_ns())
        if any(fault.what is What.LOSE for fault in faults):
            return
        twice = any(fault.what is What.DUPLICATE for fault in faults)
        link.turns[way].through(kind, put, twice=twice, swap=bool(swap))

    def _act(self, faults: list[Fault], now: int) -> None:
        """Faults of links; those of processes were carried out by the controller."""
        for fault in faults:
            if fault.what is What.CLOCK_JUMP:
                platform = self.core.platform
                here = platform.wallclock_ns
                if here is None:
                    here = time.time_ns() - time.monotonic_ns()
                platform.set_wallclock(here + int(fault.by_ms * MS))
            for number in self._targets(fault) if fault.what in LINKS else ():
                link = self._link(number)
                if fault.what is What.DELAY:
                    link.rng = random.Random(fault.seed)
                    link.until = now + int(fault.for_ms * MS)
                    link.latency, link.jitter = int(fault.latency_ms * MS), int(fault.jitter_ms * MS)
                elif fault.what is What.BANDWIDTH:
                    link.bytes_per_s, link.narrow_until = fault.bytes_per_s, now + int(fault.for_ms * MS)
                elif fault.what is What.SILENCE:
                    link.due = dict.fromkeys(link.due, now + int(fault.for_ms * MS))
                else:
                    peer = self.peers[number]  # type: ignore[index]  # DomId is int
                    connection = peer._connection
                    if connection is not None:
                        peer._close(connection, connection.socket.fileno())

    # ------------------------------------------------------------------ messages that come

    def _obey(self, peer: Peer, message: Message | DmaRequest) -> None:
        if self._passing:
            super()._obey(peer, message)
            return
        now, role = time.monotonic_ns(), self._role(peer.domain)
        faults = EDGE.happen(f"from:{role}")
        names: list[str] = []
        if isinstance(message, Hypercall):
            names.append(f"hypercall:{NAMES.get((message.nr, message.cmd), f'{message.nr}.{message.cmd}')}")
            if message.nr == HYPERVISOR_grant_table_op:
                if message.cmd == gt.GNTTABOP_map_grant_ref:
                    names.append("grant:map")
                elif message.cmd in (gt.GNTTABOP_unmap_grant_ref, gt.GNTTABOP_unmap_and_replace):
                    names.append("grant:unmap")
        elif isinstance(message, Dma | DmaRequest):
            names.append("dma")
        own = [fault for name in names for fault in EDGE.happen(name)]
        # A delay at this very message holds it; any other is of its target's link.
        held = sum(int(f.latency_ms * MS) for f in own if f.what is What.DELAY)
        self._act([*faults, *(f for f in own if f.what is not What.DELAY)], now)
        changed = self._changed(peer, message, [*faults, *own])
        if changed is None:
            return
        if EDGE.timed:  # they came while an answer was waited for
            set_timer(self._timer, now)
        link, plain = self._link(peer.domain), super()._obey

        def put() -> None:
            when = link.delay(now, "from", held, lambda: size_of(changed))
            if when:
                self._hold(when, lambda: self._pass(peer, changed))
            elif self.peers.get(peer.domain) is peer:
                plain(peer, changed)

        pinged = isinstance(changed, OrderDone) and changed.order == PING_ORDER
        self._turn_of(peer, "from", "" if pinged else kind_of(changed), put)

    def _pass(self, peer: Peer, message: Message | DmaRequest) -> None:
        if self.peers.get(peer.domain) is peer:
            self._passing = True
            try:
                self._take(peer, message)
            finally:
                self._passing = False

    def _changed(
        self, peer: Peer, message: Message | DmaRequest, faults: list[Fault]
    ) -> Message | DmaRequest | None:
        """The message after its faults; None: it was answered, or refused."""
        for fault in faults:
            what = fault.what
            if what in (What.CORRUPT, What.TRUNCATE) and fault.event.startswith("from:"):
                kinds = FROM_DEVICE if is_device(peer.domain) else FROM_ANY_DOMAIN
                try:
                    if isinstance(message, DmaRequest):
                        message = unpack(damaged(pack(*message), fault))
                    else:
                        message = decode(damaged(encode(message), fault), kinds)
                except BadMessage as error:
                    peer.bad += 1
                    peer.send(Refused(why=str(error)[:400], count=peer.bad))
                    return None
            elif isinstance(message, Hypercall) and what in (What.NO_MEMORY, What.NO_PORTS):
                errno = XEN_ENOMEM if what is What.NO_MEMORY else XEN_ENOSPC
                peer.send(HypercallReply(token=message.token, rc=-errno))
                return None
            elif isinstance(message, Hypercall) and what in (What.NO_GRANTS, What.NO_IOMMU):
                status = gt.GNTST_no_space if what is What.NO_GRANTS else gt.GNTST_general_error
                peer.send(HypercallReply(token=message.token, rc=0, data=refused(message.data, status)))
                return None
            elif isinstance(message, Dma | DmaRequest) and what is What.WRONG_DMA and message.items:
                _, length, write, position = message.items[0]
                items = [(STRANGE_IOVA, length, write, position), *message.items[1:]]
                message = with_changes(message, items=items)
            elif isinstance(message, Dma | DmaRequest) and what is What.LOSE:
                message = with_changes(message, vectors=[])
            elif isinstance(message, Dma | DmaRequest) and what is What.SPURIOUS:
                message = with_changes(message, vectors=sorted({*message.vectors, 0, 1}))
        return message

    # ------------------------------------------------------------------ messages that go

    def _add_peer(self, peer: Peer) -> None:
        sends, replies, raises = peer.send, peer.reply, peer.raised
        self._links.pop(int(peer.domain), None)

        def passes(message: Message, plain: Callable[[Message], None]) -> None:
            now = time.monotonic_ns()
            faults = EDGE.happen(f"to:{self._role(peer.domain)}")
            self._act(faults, now)
            put = self._put(peer, message, faults, plain)
            if put is None:
                return
            passed = put

            def go() -> None:
                when = self._link(peer.domain).delay(now, "to", 0, lambda: size_of(message))
                if when:
                    self._hold(when, passed)
                else:
                    passed()

            self._turn_of(peer, "to", kind_of(message), go)

        def send(message: Message) -> None:
            passes(message, sends)

        def reply(token: int, rc: int, data: bytes) -> None:
            passes(HypercallReply.made(token=token, rc=rc, data=data), lambda _: replies(token, rc, data))

        def raised(events: list[tuple[int, int]]) -> None:
            passes(Raised.made(events=events), lambda _: raises(events))

        at_once = peer.answer_dma

        def answer_dma(token: int, fault: int) -> None:
            """An answer on the DMA lane: it can be late, and not be damaged (its way is the kernel's alone)."""
            now = time.monotonic_ns()
            self._act(EDGE.happen(f"to:{self._role(peer.domain)}"), now)
            lane = peer.lane

            def put() -> None:
                if self.peers.get(peer.domain) is peer and peer.lane is lane:
                    at_once(token, fault)

            def go() -> None:
                when = self._link(peer.domain).delay(now, "to", 0, lambda: ANSWER_BYTES)
                if when:
                    self._hold(when, put)
                else:
                    put()

            self._turn_of(peer, "to", ANSWER, go)

        peer.send = send  # type: ignore[method-assign]  # this edge
        peer.reply = reply  # type: ignore[method-assign]  # the same
        peer.raised = raised  # type: ignore[method-assign]  # the same
        peer.answer_dma = answer_dma  # type: ignore[method-assign]  # the same
        super()._add_peer(peer)

    def _put(
        self, peer: Peer, message: Message, faults: list[Fault], plain: Callable[[Message], None]
    ) -> Callable[[], None] | None:
        hurt = [fault for fault in faults if fault.what in (What.CORRUPT, What.TRUNCATE)]
        if isinstance(message, Raised) and any(fault.what is What.LOSE for fault in faults):
            return None
        if not hurt:
            return lambda: plain(message) if self.peers.get(peer.domain) is peer else None
        raw = damaged(encode(message), hurt[0])

        def put() -> None:
            if self.peers.get(peer.domain) is peer:
                peer._backlog.append(raw)
                peer.flush()

        return put


def with_changes(message: Dma | DmaRequest, **changes: Any) -> Dma | DmaRequest:
    """The batch with other fields."""
    if isinstance(message, DmaRequest):
        return message._replace(**changes)
    return message.model_copy(update=changes)


class _Clock:
    """Stands in the table of descriptors for the timer."""


def product_timer() -> int:
    """A timerfd on CLOCK_MONOTONIC."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(1, 0o2004000)  # TFD_CLOEXEC | TFD_NONBLOCK
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return fd


def set_timer(fd: int, when_ns: int) -> None:
    """Have it go off at that time (CLOCK_MONOTONIC)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    spec = (ctypes.c_uint64 * 4)(0, 0, *divmod(max(1, when_ns), 1_000_000_000))
    libc.timerfd_settime(fd, 1, ctypes.byref(spec), None)


def refused(data: bytes, status: int) -> bytes:
    """A batch of grant maps, each with that status."""
    layout = gt.GNTTAB_MAP_GRANT_REF
    return b"".join(
        layout.pack(layout.unpack(data, at)._replace(status=status))
        for at in range(0, len(data), layout.size)
    )


if __name__ == "__main__":
    vars(product)["Server"] = FaultyServer  # this program's purpose
    product.main()
