"""netfront without I/O: frames as ring requests, and their bytes in granted pages.

The back end is not trusted: its producer indexes, the ids and sizes in its responses are checked, and a page whose grant cannot be ended is
never used again (XSA-396). What breaks the rules sets `error`; the interface is then of no use until it is connected anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bus.abi.io.netif import (
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_EXTRA_TYPE_MCAST_DEL,
    XEN_NETIF_NR_SLOTS_MIN,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from bus.abi.io.ring import MASK32, distance, full_barrier
from drivers.net.frames import Frame
from drivers.net.receive import REQUEST as RX_REQUEST
from drivers.net.receive import RESPONSE as RX_RESPONSE
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.transmit import EXTRA_GSO
from drivers.net.transmit import REQUEST as TX_REQUEST
from drivers.net.transmit import RESPONSE as TX_RESPONSE
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.xenbus.paged_ring import PagedRing
from drivers.xenbus.pages import PAGE, Page, PageSource

GIVEN: Final = 64
"""Pages that the back end has of each queue, to fill."""


@dataclass(slots=True)
class _Sent:
    """A slot with data that is under way."""

    page: Page
    ref: int


@dataclass(eq=False, slots=True)
class FrontQueue:
    """A pair of rings of the frontend's."""

    tx: PagedRing
    rx: PagedRing
    notify_tx: Callable[[], None]
    notify_rx: Callable[[], None]
    tx_prod: int = 0
    tx_cons: int = 0
    rx_prod: int = 0
    rx_cons: int = 0
    sent: dict[int, _Sent] = field(default_factory=dict)
    """By id."""
    order: dict[int, int] = field(default_factory=dict)
    """Slots in the ring that are not answered: index -> id, or -1 of an extra info."""
    given: dict[int, tuple[Page, int]] = field(default_factory=dict)
    """Pages to be filled, with their grants, by id: the slot's index in the ring."""


class Frontend:
    """A virtual interface as its user sees it."""

    def __init__(self, pages: PageSource, received: Callable[[Frame], None]) -> None:
        self._pages: Final = pages
        self._received: Final = received
        self._queues: list[FrontQueue] = []
        self._turn = 0
        self._serial = 0
        self.error: str | None = None
        self.leaked = 0
        """Pages that the back end would not let go of."""
        self.refused = 0
        """Packets that the back end answered with an error."""

    @property
    def pending(self) -> int:
        """Slots that are not answered yet."""
        return sum(len(queue.order) for queue in self._queues)

    def connect(self, queues: Sequence[FrontQueue]) -> None:
        """Use these rings (initialised; they may be published before or after). All pages are given."""
        if (
            any(queue.tx.entry_size != TX_SLOT or queue.rx.entry_size != RX_SLOT for queue in queues)
            or not queues
        ):
            raise ValueError("rings of another kind")
        self.disconnect()
        self.error = None
        self._queues = list(queues)
        for queue in self._queues:
            self._give(queue)

    def disconnect(self) -> None:
        """The back end is gone: what was under way is lost."""
        for queue in self._queues:
            held = [(each.page, each.ref) for each in queue.sent.values()] + list(queue.given.values())
            self._end(held)
        self._queues = []

    def _end(self, held: Sequence[tuple[Page, int]]) -> None:
        ended = self._pages.end([ref for _, ref in held])
        self.leaked += ended.count(False)
        self._pages.free([page for (page, _), fine in zip(held, ended, strict=True) if fine])

    def _give(self, queue: FrontQueue) -> None:
        want = min(GIVEN, queue.rx.size) - len(queue.given)
        for _ in range(want):
            try:
                page = self._pages.allocate(1)[0]
            except MemoryError:
                break
            ref = self._pages.grant([page], False)[0]
            ident = queue.rx_prod & (queue.rx.size - 1)
            queue.rx.write_slot(queue.rx_prod, RX_REQUEST.pack(ident, ref))
            queue.given[ident] = (page, ref)
            queue.rx_prod = (queue.rx_prod + 1) & MASK32
        if want and queue.rx.push_requests(queue.rx_prod):
            queue.notify_rx()

    # ------------------------------------------------------------------ sending

    def send(self, frame: Frame, fragments: Sequence[int] = ()) -> bool:
        """Send a frame, in fragments of these sizes (the rest in pages), at most 18 in all. False: there is no room now."""
        pieces = _pieces(frame.data, fragments)
        if len(pieces) > XEN_NETIF_NR_SLOTS_MIN:
            raise ValueError(f"{len(pieces)} fragments")
        queue = self._room(len(pieces) + bool(frame.gso_size))
        if queue is None:
            return False
        try:
            pages = self._pages.allocate(len(pieces))
        except MemoryError:
            return False
        refs = self._pages.grant(pages, True)
        flags = (NETTXF_csum_blank | NETTXF_data_validated) if frame.blank else 0
        if frame.validated:
            flags |= NETTXF_data_validated
        for at, (piece, page, ref) in enumerate(zip(pieces, pages, refs, strict=True)):
            page.data[: len(piece)] = piece
            shown = (flags if at == 0 else 0) | (NETTXF_more_data if at < len(pieces) - 1 else 0)
            if at == 0 and frame.gso_size:
                shown |= NETTXF_extra_info
            ident = self._ident(queue)
            queue.sent[ident] = _Sent(page, ref)
            size = len(frame.data) if at == 0 else len(piece)
            self._put(queue, TX_REQUEST.pack(ref, 0, shown, ident, size), ident)
            if at == 0 and frame.gso_size:
                self._put(
                    queue, EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, frame.gso_size, frame.gso_type, 0), -1
                )
        self._publish(queue)
        return True

    def groups(self, changes: Sequence[tuple[bool, bytes]]) -> bool:
        """Ask for multicast groups (True) or do not ask for them any more. False: there is no room now."""
        queue = self._room(1 + len(changes))
        if queue is None or not changes:
            return not changes
        ident = self._ident(queue)
        self._put(queue, TX_REQUEST.pack(0, 0, NETTXF_extra_info, ident, 0), ident)
        for at, (add, group) in enumerate(changes):
            kind = XEN_NETIF_EXTRA_TYPE_MCAST_ADD if add else XEN_NETIF_EXTRA_TYPE_MCAST_DEL
            more = XEN_NETIF_EXTRA_FLAG_MORE if at < len(changes) - 1 else 0
            self._put(queue, bytes((kind, more)) + group, -1)
        self._publish(queue)
        return True

    def _room(self, slots: int) -> FrontQueue | None:
        for _ in self._queues if self.error is None else ():
            queue = self._queues[self._turn % len(self._queues)]
            self._turn += 1
            if queue.tx.size - distance(queue.tx_prod, queue.tx_cons) >= slots:
                return queue
        return None

    def _ident(self, queue: FrontQueue) -> int:
        while True:
            self._serial = (self._serial + 1) & 0xFFFF
            if self._serial not in queue.sent:
                return self._serial

    @staticmethod
    def _put(queue: FrontQueue, slot: bytes, ident: int) -> None:
        queue.tx.write_slot(queue.tx_prod, slot)
        queue.order[queue.tx_prod] = ident
        queue.tx_prod = (queue.tx_prod + 1) & MASK32

    @staticmethod
    def _publish(queue: FrontQueue) -> None:
        if queue.tx.push_requests(queue.tx_prod):
            queue.notify_tx()

    # ------------------------------------------------------------------ what comes

    def poll(self) -> int:
        """Take answers and frames; how many slots. Frames go to `received`."""
        took = 0
        for queue in self._queues:
            took += self._answers(queue) + self._frames(queue)
        return took

    def _answers(self, queue: FrontQueue) -> int:
        took = 0
        while self.error is None:
            count = distance(queue.tx.rsp_prod, queue.tx_cons)
            if count == 0:
                if not queue.tx.ask_for_responses(queue.tx_cons):
                    break
                continue
            if count > distance(queue.tx_prod, queue.tx_cons):
                self.error = f"{count} answers to {distance(queue.tx_prod, queue.tx_cons)} slots"
                break
            full_barrier()
            data = queue.tx.read_slots(queue.tx_cons, count)
            for at in range(count):
                if not self._answer(queue, *TX_RESPONSE.unpack_from(data, at * TX_SLOT)):
                    return took
                took += 1
        return took

    def _answer(self, queue: FrontQueue, ident: int, status: int) -> bool:
        asked = queue.order.pop(queue.tx_cons)
        queue.tx_cons = (queue.tx_cons + 1) & MASK32
        if asked == -1:
            if status != NETIF_RSP_NULL:
                self.error = f"an extra info is answered with {status}"
            return self.error is None
        if ident != asked:
            self.error = f"an answer to {ident}, where {asked} is to be answered"
            return False
        self.refused += status != NETIF_RSP_OKAY
        sent = queue.sent.pop(ident, None)
        if sent is not None:
            self._end([(sent.page, sent.ref)])
        return True

    def _frames(self, queue: FrontQueue) -> int:
        took = 0
        while self.error is None:
            count = distance(queue.rx.rsp_prod, queue.rx_cons)
            if count == 0:
                if not queue.rx.ask_for_responses(queue.rx_cons):
                    break
                continue
            if count > distance(queue.rx_prod, queue.rx_cons):
                self.error = f"{count} pages filled of {distance(queue.rx_prod, queue.rx_cons)}"
                break
            full_barrier()
            data = queue.rx.read_slots(queue.rx_cons, count)
            at = 0
            while at < count and self.error is None:
                at = self._frame(queue, data, at, count)
            took += at
            self._give(queue)
        return took

    def _frame(self, queue: FrontQueue, data: bytes, at: int, count: int) -> int:
        """One frame's slots; where the next one begins."""
        parts: list[bytes] = []
        first, gso, bad = 0, (0, 0), False
        start = at
        while True:
            if at >= count:
                self.error = "a frame's last slots are missing"
                return at
            page, ref = self._filled(queue)
            ident, offset, flags, status = RX_RESPONSE.unpack_from(data, at * RX_SLOT)
            if ident != (queue.rx_cons - 1) & (queue.rx.size - 1) or offset + max(status, 0) > PAGE:
                self.error = f"page {ident} with {status} bytes at {offset}"
            bad = bad or status < 0
            if self.error is None and status > 0:
                parts.append(bytes(page.data[offset : offset + status]))
            self._end([(page, ref)])
            if at == start:
                first = flags
            at += 1
            if at - 1 == start and flags & NETRXF_extra_info:
                if at >= count:
                    self.error = "extra info is missing"
                    return at
                kind, more, size, gso_type, _ = EXTRA_GSO.unpack_from(data, at * RX_SLOT)
                self._end([self._filled(queue)])
                at += 1
                if kind != XEN_NETIF_EXTRA_TYPE_GSO or more:
                    self.error = f"extra info of type {kind}, flags {more}"
                gso = (size, gso_type)
            if self.error is not None or not flags & NETRXF_more_data:
                break
        if self.error is None and not bad:
            blank = bool(first & NETRXF_csum_blank)
            self._received(Frame(b"".join(parts), blank, bool(first & NETRXF_data_validated), *gso))
        return at

    def _filled(self, queue: FrontQueue) -> tuple[Page, int]:
        """The page at the next slot of the ring."""
        found = queue.given.pop(queue.rx_cons & (queue.rx.size - 1))
        queue.rx_cons = (queue.rx_cons + 1) & MASK32
        return found


def _pieces(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces: list[bytes] = []
    at = 0
    for size in sizes:
        if not 0 < size <= PAGE or at + size >= len(data):
            break
        pieces.append(data[at : at + size])
        at += size
    return pieces + [data[start : start + PAGE] for start in range(at, len(data), PAGE)]
