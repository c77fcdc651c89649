"""Fuzzers' targets of the network: a hostile frontend, a hostile back end, any journal, and frames of any kind."""

from __future__ import annotations

import struct

from bus.abi.io.netif import NETIF_RSP_ERROR, NETIF_RSP_NULL, NETIF_RSP_OKAY
from drivers.net.backend import QUEUE_BYTES, QUEUE_FRAMES
from drivers.net.frames import Frame
from drivers.net.frontend import Frontend, FrontQueue
from drivers.net.helper import HelperHost
from drivers.net.receive import SLOT as RX_SLOT
from drivers.net.receive import Abilities
from drivers.net.transmit import REQUEST, RESPONSE
from drivers.net.transmit import SLOT as TX_SLOT
from drivers.xenbus.paged_ring import PagedRing
from tests.fuzz.parts import Bytes
from tests.unit.net.net_machine import MAC, OTHER, Memory, Pair


def net_back(data: bytes) -> None:
    """A frontend that writes what it likes into its rings, pages, indexes and the journal of a back end that dies now and then."""
    source = Bytes(data)
    bits = source.number()
    pair = Pair(Abilities(*(bool(bits >> n & 1) for n in range(7))), pages=200)
    pair.front.poll = lambda: 0  # the input is the frontend
    tx, rx = pair.rings[0]
    pages = pair.memory.allocate(4)
    refs = pair.memory.grant(pages, False)
    for _ in range(40):
        if not source.left:
            break
        what = source.number()
        if what < 110:  # a request that means something, now and then
            raw = bytearray(source.take(TX_SLOT))
            if what & 1:
                struct.pack_into("<I", raw, 0, refs[what % 4])
            if what & 2:
                raw[5] &= 15
            if what & 4:
                raw[6] &= 15
                raw[7] = 0
            tx.write_slot(tx.req_prod, bytes(raw))
            tx.req_prod = tx.req_prod + 1
        elif what < 130:
            ring = (tx, rx)[what & 1]
            ring.write_slot(source.number(), source.take(8))
        elif what < 140:
            ring = (tx, rx)[what & 1]
            ring.req_prod = source.number(4)
        elif what < 150:
            ring = (tx, rx)[what & 1]
            ring.rsp_prod = source.number(4)
        elif what < 170:
            at = source.number(2) % 4000
            piece = source.take(32)
            pages[what % 4].data[at : at + len(piece)] = piece
        elif what < 190:
            rx.write_slot(rx.req_prod, struct.pack("<HHI", what, 0, refs[what % 4]))
            rx.req_prod = rx.req_prod + 1
        elif what < 215:
            size = 14 + source.number(2) % 9000
            frame = (source.take(80)).ljust(size, b"\x55")[:size]
            pair.back.deliver(
                [
                    Frame(
                        frame,
                        bool(what & 1),
                        bool(what & 2),
                        source.number(2) if what & 4 else 0,
                        1 + (what & 8 > 0),
                    )
                ]
            )
        elif what < 220:
            journal = pair.journals[0][what & 1]
            piece = source.take(24)
            journal._page[16 : 16 + len(piece)] = piece
        elif what < 226:
            try:
                pair.restart()
            except ValueError:
                return  # the rings make no sense: the frontend must connect anew
        else:
            before, answered = tx.rsp_prod, pair.back.queues[0].tx_cons
            pair.back.poll_tx(0)
            after = pair.back.queues[0].tx_cons
            if before == answered and pair.back.error is None:
                for index in range(before, min(after, before + 4)):
                    _, status = RESPONSE.unpack_from(tx.read_slots(index, 1))
                    assert status in (NETIF_RSP_OKAY, NETIF_RSP_ERROR, NETIF_RSP_NULL)
        queue = pair.back.queues[0]
        assert len(queue.waiting) <= QUEUE_FRAMES
        assert 0 <= queue.bytes <= QUEUE_BYTES
    host = HelperHost("10.0.0.1/24")
    for sent in pair.wire.frames[:8]:
        host.receive(sent.data)


def net_front(data: bytes) -> None:
    """A back end that writes what it likes into a frontend's rings: the frontend finds it, or takes whole frames; its pages all come back."""
    source = Bytes(data)
    memory = Memory(300)
    got: list[Frame] = []
    front = Frontend(memory, got.append)
    tx, rx = (
        PagedRing([memoryview(bytearray(4096))], TX_SLOT),
        PagedRing([memoryview(bytearray(4096))], RX_SLOT),
    )
    tx.init()
    rx.init()
    front.connect([FrontQueue(tx, rx, lambda: None, lambda: None)])
    for _ in range(60):
        if not source.left:
            break
        what = source.number()
        if what < 60:
            size = 14 + source.number(2) % 20000
            front.send(
                Frame((OTHER + MAC).ljust(size, b"\0"), gso_size=source.number() if what & 1 else 0),
                [what + 1] * (what % 5),
            )
        elif what < 110:
            ident = REQUEST.unpack_from(tx.read_slots(tx.rsp_prod, 1))[3]
            tx.write_slot(tx.rsp_prod, RESPONSE.pack(ident if what & 1 else source.number(2), 0))
            tx.rsp_prod = tx.rsp_prod + 1
        elif what < 170:
            index = rx.rsp_prod
            ident = index & 255 if what & 1 else source.number(2)
            rx.write_slot(
                index,
                struct.pack(
                    "<HHHh", ident, source.number(2) % 5000, source.number(), source.number(2) % 5000 - 10
                ),
            )
            rx.rsp_prod = index + 1
        elif what < 180:
            (tx, rx)[what & 1].rsp_prod = source.number(4)
        elif what < 200:
            (tx, rx)[what & 1].write_slot(source.number(), source.take(8))
        else:
            front.poll()
    front.poll()
    assert all(len(frame.data) <= 4096 * 300 for frame in got)
    front.disconnect()
    assert memory.table == {}
    assert memory.frames == {}
