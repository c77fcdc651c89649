"""netback without I/O: the rings of one virtual network interface, from its frontend's frames to a network and back.

Frames are taken and answered in the ring's order, a whole packet at a time, so after the death of a process `rsp_prod` says where its
successor goes on: the packets after it were not answered. Some may have been sent already, and are sent twice, as networks do; none that
was answered is lost by it. The one thing that a ring does not say is which responses were being written (over their requests) when the
process died: they are in a journal (drivers.net.journal).

A packet's life: its slots are copied from the ring and checked -> its fragments are fetched by grant copy -> it goes to the network -> its
slots are answered. One hypercall fetches for many packets. The other way: frames wait (at most so many bytes, then they are dropped) -> pages
are taken from the ring -> filled by grant copy -> answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bus.abi.io.ring import MASK32, distance, full_barrier
from drivers.net.frames import BROADCAST, Frame, FrameError, flow_hash, is_multicast
from drivers.net.journal import Journal
from drivers.net.ports import GrantCopier, Network
from drivers.net.rate import Credit
from drivers.net.receive import REQUEST as RX_REQUEST
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.receive import Abilities, pages_of, responses, slots_of
from drivers.net.transmit import RESPONSE as TX_RESPONSE
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.net.transmit import Packet, RingBroken, fail, frame_of, parse
from drivers.xenbus.paged_ring import PagedRing

ROUNDS: Final = 4
"""Rings full of requests that one `poll` takes: a frontend can publish as fast as it is answered."""
BATCH: Final = 128
"""Fragments that are fetched, and pages that are filled, at once (about)."""
QUEUE_BYTES: Final = 1 << 20
QUEUE_FRAMES: Final = 1024
"""Frames that wait for one queue's pages; what comes then is dropped."""
MAX_GROUPS: Final = 64
"""Multicast groups that a frontend may ask for."""


@dataclass(slots=True)
class Counters:
    """What happened, from the frontend's point of view: it transmits, it receives."""

    tx_packets: int = 0
    tx_bytes: int = 0
    tx_errors: int = 0
    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    notifications: int = 0


class Queue:
    """A pair of rings."""

    def __init__(
        self,
        tx: PagedRing,
        rx: PagedRing,
        notify_tx: Callable[[], None],
        notify_rx: Callable[[], None],
        journals: tuple[Journal, Journal] | None = None,
    ) -> None:
        """`journals` of tx and rx: what is in them is carried out first. None: nobody takes over."""
        self.tx: Final = tx
        self.rx: Final = rx
        self.journals: Final = journals
        if journals is not None:
            journals[0].recover(tx)
            journals[1].recover(rx)
        self.notify_tx: Final = notify_tx
        self.notify_rx: Final = notify_rx
        self.tx_cons = tx.rsp_prod
        """All before it is answered: consumed and answered are one."""
        self.rx_cons = rx.rsp_prod
        self.waiting: deque[Frame] = deque()
        self.bytes = 0
        self.look_again = False
        self.unfinished = False
        """There was more than one `poll_tx` takes: poll again when others had their turn."""


class Backend:
    """A virtual interface's back end. The shell makes it when the rings are mapped, calls `poll_tx` and `poll_rx` when a channel is
    notified and `deliver` when the network has frames for it, and drops it; it holds nothing that had to be given back."""

    def __init__(
        self,
        abilities: Abilities,
        copier: GrantCopier,
        network: Network,
        *,
        mac: bytes,
        credit: Credit | None = None,
        fence: Callable[[], None] = full_barrier,
        hook: Callable[[str], None] | None = None,
    ) -> None:
        """`credit`: how much the frontend may transmit; None: all that it can. `hook` is called with the name of each step: tests
        crash there."""
        self.abilities: Final = abilities
        self.counters: Final = Counters()
        self.queues: list[Queue] = []
        self.error: str | None = None
        """Why the frontend is served no more: it broke a ring. The shell writes it to xenstore and closes."""
        self.groups: set[bytes] = set()
        self.mac: Final = mac
        self._copier: Final = copier
        self._network: Final = network
        self._credit: Final = credit
        self._fence: Final = fence
        self._hook: Final = hook

    def _step(self, name: str) -> None:
        if self._hook is not None:
            self._hook(name)

    def connect(self, queues: Sequence[Queue]) -> None:
        """Serve rings, new ones or those that a process before this one served. ValueError if their indexes make no sense."""
        if self.queues:
            raise ValueError("it is connected already")
        for queue in queues:
            for ring, slot in ((queue.tx, TX_SLOT), (queue.rx, RX_SLOT)):
                if ring.entry_size != slot:
                    raise ValueError(f"a ring with slots of {ring.entry_size} bytes")
                if distance(ring.req_prod, ring.rsp_prod) > ring.size:
                    raise ValueError(
                        f"a ring of {ring.size} slots with indexes {ring.req_prod} and {ring.rsp_prod}"
                    )
        self.queues = list(queues)
        for number, queue in enumerate(self.queues):
            self.poll_tx(number)
            # A process before this one may have died between publishing and notifying.
            self._notify(queue.notify_tx)
            if queue.notify_rx is not queue.notify_tx:
                self._notify(queue.notify_rx)

    @property
    def waits_for_credit(self) -> int:
        """Nanoseconds until `poll_tx` may go on, if it stopped for the rate limit; else 0."""
        return self._credit.wait_ns if self._credit is not None else 0

    # ------------------------------------------------------------------ from the frontend

    def poll_tx(self, number: int) -> bool:
        """Take what the frontend has published. True if something was taken; else the shell may poll once more a little later
        if the queue's `look_again` is set."""
        queue = self.queues[number]
        ring = queue.tx
        took = 0
        queue.unfinished = False
        while self.error is None and (self._credit is None or self._credit.available):
            count = distance(ring.req_prod, queue.tx_cons)
            if count == 0:
                if not ring.ask_for_requests(queue.tx_cons, self._fence):
                    break
                continue
            if count > ring.size:
                self.error = f"queue {number}: {count} requests published where {ring.size} slots are"
                break
            if took >= ROUNDS * ring.size:
                queue.unfinished = True
                break
            full_barrier()  # the slots are read after the index
            try:
                packets, slots = parse(ring.read_slots(queue.tx_cons, count), BATCH)
            except RingBroken as broken:
                self.error = f"queue {number}: {broken}"
                break
            self._send(queue, packets)
            self._step("answered")
            took += slots
        queue.look_again = not took and not self.waits_for_credit
        return bool(took)

    def _send(self, queue: Queue, packets: Sequence[Packet]) -> None:
        self._step("copied")
        items = [part for packet in packets for part in packet.parts]
        pieces = iter(self._copier.fetch(items)) if items else iter(())
        frames: list[Frame] = []
        counters = self.counters
        for packet in packets:
            found = [next(pieces) for _ in packet.parts]
            good = [piece for piece in found if isinstance(piece, bytes)]
            if packet.groups:
                self._change_groups(packet)
                continue
            try:
                if not found or len(good) < len(found):
                    raise FrameError(packet.error or "its grants cannot be copied from")
                frame = frame_of(packet, good)
            except FrameError:
                fail(packet)
                counters.tx_errors += 1
                continue
            frames.append(frame)
            counters.tx_packets += 1
            counters.tx_bytes += len(frame.data)
            if self._credit is not None:
                self._credit.spend(len(frame.data))
        self._step("fetched")
        if frames:
            self._network.sent(frames)
            self._step("sent")
        answers = [TX_RESPONSE.pack(*answer) for packet in packets for answer in packet.answers]
        journal = queue.journals[0] if queue.journals is not None else None
        queue.tx_cons = self._answer(queue.tx, queue.tx_cons, answers, journal, queue.notify_tx)

    def _answer(
        self,
        ring: PagedRing,
        old: int,
        answers: Sequence[bytes],
        journal: Journal | None,
        notify: Callable[[], None],
    ) -> int:
        """Write responses from index `old` on and publish them; the index behind them."""
        if journal is not None:
            journal.note(old, answers)
            self._step("noted")
        for index, answer in enumerate(answers):
            ring.write_slot(old + index, answer)
            if index == 0:
                self._step("begun")
        self._step("written")
        new = (old + len(answers)) & MASK32
        wanted = ring.push_responses(new, old)
        self._step("published")
        if journal is not None:
            journal.done()
        if wanted:
            self._notify(notify)
        return new

    def _change_groups(self, packet: Packet) -> None:
        for add, group in packet.groups:
            if not add:
                self.groups.discard(group)
            elif not is_multicast(group) or len(self.groups) >= MAX_GROUPS:
                fail(packet)
            else:
                self.groups.add(group)

    def _notify(self, call: Callable[[], None]) -> None:
        self.counters.notifications += 1
        call()

    # ------------------------------------------------------------------ to the frontend

    def deliver(self, frames: Sequence[Frame]) -> None:
        """The network has frames for it. Those for which there is no room are dropped."""
        if not self.queues or self.error is not None:
            self.counters.rx_dropped += len(frames)
            return
        touched = set()
        for arrived in frames:
            if not self._wanted(arrived.data):
                continue
            suited = self.abilities.suited(arrived)
            self.counters.rx_dropped += not suited
            for frame in suited:
                number = flow_hash(frame.data) % len(self.queues) if len(self.queues) > 1 else 0
                queue = self.queues[number]
                if queue.bytes + len(frame.data) > QUEUE_BYTES or len(queue.waiting) >= QUEUE_FRAMES:
                    self.counters.rx_dropped += 1
                    continue
                queue.waiting.append(frame)
                queue.bytes += len(frame.data)
                touched.add(number)
        for number in touched:
            self.poll_rx(number)

    def _wanted(self, data: bytes) -> bool:
        if not self.abilities.multicast_control or not is_multicast(data[:6]):
            return True
        return data[:6] == BROADCAST or data[:6] in self.groups

    def poll_rx(self, number: int) -> bool:
        """Fill the pages that the frontend has given. True if frames went to it."""
        queue = self.queues[number]
        ring = queue.rx
        moved = False
        while queue.waiting and self.error is None:
            given = ring.req_prod
            free = distance(given, queue.rx_cons)
            if free > ring.size:
                self.error = f"queue {number}: {free} pages given where {ring.size} slots are"
                break
            batch, slots = self._batch(queue, free)
            if not batch:
                if ring.ask_for_requests(given, self._fence):
                    continue
                queue.look_again = True
                self._starved(queue)
                break
            full_barrier()
            self._fill(queue, batch, slots)
            moved = True
        return moved

    def _starved(self, queue: Queue) -> None:
        if not self.abilities.notify:  # nobody would tell us of new pages
            self.counters.rx_dropped += len(queue.waiting)
            queue.waiting.clear()
            queue.bytes = 0

    def _batch(self, queue: Queue, free: int) -> tuple[list[Frame], int]:
        batch: list[Frame] = []
        slots = 0
        while queue.waiting and slots < BATCH:
            need = slots_of(queue.waiting[0])
            if slots + need > free:
                break
            frame = queue.waiting.popleft()
            queue.bytes -= len(frame.data)
            batch.append(frame)
            slots += need
        return batch, slots

    def _fill(self, queue: Queue, batch: Sequence[Frame], slots: int) -> None:
        data = queue.rx.read_slots(queue.rx_cons, slots)
        given = [RX_REQUEST.unpack_from(data, at * RX_SLOT) for at in range(slots)]
        items: list[tuple[int, bytes]] = []
        at = 0
        spans: list[tuple[Frame, int, int]] = []
        for frame in batch:
            pages = pages_of(frame)
            skip = bool(frame.gso_size)  # the second slot is for the extra info
            for index, page in enumerate(pages):
                items.append((given[at + index + (skip and index > 0)][1], page))
            spans.append((frame, at, len(pages)))
            at += len(pages) + skip
        self._step("taken")
        stati = iter(self._copier.store(items))
        self._step("filled")
        answers: list[bytes] = []
        for frame, start, count in spans:
            idents = [ident for ident, _ in given[start : start + slots_of(frame)]]
            found = [next(stati) for _ in range(count)]
            answers += responses(frame, idents, found)
            if any(found):
                self.counters.rx_dropped += 1
            else:
                self.counters.rx_packets += 1
                self.counters.rx_bytes += len(frame.data)
        journal = queue.journals[1] if queue.journals is not None else None
        queue.rx_cons = self._answer(queue.rx, queue.rx_cons, answers, journal, queue.notify_rx)
