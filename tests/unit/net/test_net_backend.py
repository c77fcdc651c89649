"""The network back end against good and hostile frontends."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from bus.abi.io.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETTXF_csum_blank,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from drivers.net.backend import MAX_GROUPS, QUEUE_FRAMES
from drivers.net.frames import Frame, complete
from drivers.net.journal import Journals
from drivers.net.rate import Credit, parse_rate
from drivers.net.receive import Abilities
from drivers.net.transmit import EXTRA_GSO, REQUEST, RESPONSE, RingBroken, parse
from drivers.xenbus.nodes import NodeError
from tests.unit.net.net_machine import MAC, OTHER, Pair


def plain(size: int = 60, fill: int = 0) -> bytes:
    """A frame with nothing known in it."""
    return OTHER + MAC + b"\x88\xb5" + bytes([fill]) * (size - 14)


def big(payload: int) -> Frame:
    """A TCP frame to be segmented."""
    data = bytes(Ether(dst=OTHER, src=MAC) / IP(src="10.0.0.1", dst="10.0.0.2") / TCP() / Raw(b"z" * payload))
    return Frame(data, True, True, 1000, XEN_NETIF_GSO_TYPE_TCPV4)


# ---------------------------------------------------------------- good frontends


@given(
    st.lists(st.tuples(st.integers(14, 20000), st.lists(st.integers(1, 4096), max_size=12)), max_size=40),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_what_is_sent_arrives_and_what_arrives_is_received(
    frames: list[tuple[int, list[int]]], queues: int
) -> None:
    """Any sizes and fragments, both ways; all slots are answered, all pages come back."""
    pair = Pair(queues=queues)
    sent = []
    for number, (size, cuts) in enumerate(frames):
        data = plain(size, number)
        assert pair.front.send(Frame(data), cuts)
        sent.append(data)
        pair.turn()
    assert sorted(frame.data for frame in pair.wire.frames) == sorted(sent)
    assert (pair.front.pending, pair.front.refused, pair.front.error, pair.back.error) == (0, 0, None, None)
    for data in sent:
        pair.back.deliver([Frame(data)])
        pair.turn()
    assert sorted(frame.data for frame in pair.got) == sorted(sent)
    assert pair.back.counters.rx_dropped == 0
    pair.front.disconnect()
    assert pair.memory.frames == {}
    assert pair.memory.table == {}


def test_one_copy_hypercall_serves_many_frames() -> None:
    pair = Pair()
    pair.rings[0][0].req_event = 1000  # nobody is waked
    for number in range(100):
        pair.front.send(Frame(plain(60, number)))
    before = pair.memory.calls
    pair.turn()
    assert len(pair.wire.frames) == 100
    assert pair.memory.calls == before + 1


def test_order_is_kept_in_each_direction() -> None:
    pair = Pair()
    for number in range(250):
        pair.front.send(Frame(plain(60, number)))
        if number % 7 == 0:
            pair.turn()
    pair.turn()
    assert [frame.data[20] for frame in pair.wire.frames] == list(range(250))
    pair.back.deliver([Frame(plain(60, number)) for number in range(250)])
    pair.turn()
    assert [frame.data[20] for frame in pair.got] == list(range(250))


def test_segments_go_whole_to_who_can_take_them_and_cut_to_who_cannot() -> None:
    whole = big(9000)
    able = Pair()
    assert able.front.send(whole)
    able.turn()
    frame = able.wire.frames[0]
    assert (frame.gso_size, frame.blank, len(frame.data)) == (1000, True, len(whole.data))
    able.back.deliver([frame])
    able.turn()
    assert able.got == [frame]
    for abilities in (Abilities(), Abilities(scatter=True), Abilities(gso_v4=True)):
        pair = Pair(abilities)
        pair.back.deliver([frame])
        pair.turn()
        assert len(pair.got) == 9
        assert all(one.data == complete(one.data) and not one.gso_size for one in pair.got)


def test_checksums_are_completed_for_who_does_not_want_blank_ones() -> None:
    data = bytes(
        Ether(dst=OTHER, src=MAC) / IP(src="1.2.3.4", dst="5.6.7.8") / UDP(chksum=0x1234) / Raw(b"abc")
    )
    for abilities, is_blank in ((Abilities(), True), (Abilities(blank_v4=False), False)):
        pair = Pair(abilities)
        pair.back.deliver([Frame(data, True, True)])
        pair.turn()
        assert pair.got[0].blank is is_blank
        assert complete(pair.got[0].data) == complete(data)
        if not is_blank:
            assert pair.got[0].data == complete(data)


def test_frames_wait_for_pages_and_are_dropped_when_too_many_wait() -> None:
    """Of a frontend that tells of new pages; for one that does not, nothing waits."""
    for notify, left in ((True, QUEUE_FRAMES), (False, 0)):
        pair = Pair(Abilities(notify=notify), pages=10)
        pair.front.poll = lambda: 0  # it is busy
        pair.back.deliver([Frame(plain(60, n & 255)) for n in range(2000)])
        assert len(pair.back.queues[0].waiting) <= left
        assert pair.back.counters.rx_dropped >= 2000 - left - 10
        del pair.front.poll
        for _ in range(300):
            pair.turn()
        assert len(pair.got) + pair.back.counters.rx_dropped == 2000
        assert len(pair.back.queues[0].waiting) == 0


def test_a_frontend_without_scatter_gets_no_frame_longer_than_a_page() -> None:
    pair = Pair(Abilities())
    pair.back.deliver([Frame(plain(4096)), Frame(plain(4097))])
    pair.turn()
    assert [len(frame.data) for frame in pair.got] == [4096]
    assert pair.back.counters.rx_dropped == 1


def test_multicast_groups_that_were_not_asked_for_stay_away() -> None:
    group, other = bytes.fromhex("01005e010203"), bytes.fromhex("01005e010204")
    pair = Pair(Abilities(multicast_control=True))
    frames = [Frame(to + MAC + b"\x88\xb5" + bytes(50)) for to in (group, other, b"\xff" * 6, OTHER)]

    def heard() -> list[bytes]:
        pair.got.clear()
        pair.back.deliver(frames)
        pair.turn()
        return [frame.data[:6] for frame in pair.got]

    assert heard() == [b"\xff" * 6, OTHER]
    assert pair.front.groups([(True, group)])
    pair.turn()
    assert heard() == [group, b"\xff" * 6, OTHER]
    pair.front.groups([(True, other), (False, group)])
    pair.turn()
    assert heard() == [other, b"\xff" * 6, OTHER]
    assert pair.front.refused == 0
    pair.front.groups([(True, OTHER)])
    pair.turn()
    assert pair.front.refused == 1
    for number in range(100):
        pair.front.groups([(True, b"\x01\0\0\0\0" + bytes([number]))])
        pair.turn()
    assert len(pair.back.groups) == MAX_GROUPS


class Death(Exception):
    """The back end's process dies here."""


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_back_end_that_dies_at_any_moment_loses_nothing_that_it_answered(seed: int) -> None:
    """At any step of either direction. Its successor goes on from rings and journals: every frame that was sent arrives, and is answered
    once; frames that arrive are whole; the frontend finds no broken rule."""
    luck = random.Random(seed)
    left = [0]

    def step(name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Death(name)

    pair = Pair(hook=step)
    pair._kick = lambda number: None  # it is polled below
    sent, received = set(), set()
    for number in range(150):
        data = plain(luck.choice((60, 1500, 9000)), number)
        if luck.random() < 0.6 and pair.front.send(Frame(data)):
            sent.add(data)
        left[0] = luck.randint(1, 40) if luck.random() < 0.4 else 0
        try:
            if luck.random() < 0.5:
                arrived = plain(luck.choice((60, 5000)), number)
                received.add(arrived)
                pair.back.deliver([Frame(arrived)])
            if luck.random() < 0.6:
                pair.turn()
        except Death:
            left[0] = 0
            pair.restart()
    left[0] = 0
    for _ in range(3):
        pair.turn()
    assert (pair.front.error, pair.back.error, pair.front.pending, pair.front.refused) == (None, None, 0, 0)
    assert {frame.data for frame in pair.wire.frames} == sent
    assert {frame.data for frame in pair.got} <= received
    pair.front.disconnect()
    assert pair.memory.table == {}


def test_a_journal_that_is_of_another_ring_or_garbage_is_forgotten() -> None:
    for content in (bytes(4096), b"\xff" * 4096, bytes(range(256)) * 16):
        pair = Pair()
        pair.front.send(Frame(plain()))
        journal = pair.journals[0][0]
        journal._page[:] = content
        journal._words[4] = 1
        before = pair.rings[0][0].rsp_prod
        assert journal.recover(pair.rings[0][0]) == 0
        assert pair.rings[0][0].rsp_prod == before
    memory = memoryview(bytearray(4 * 4096))
    journals = Journals(memory)
    first = journals.of(1, 0, 0, keep=False)
    assert journals.of(1, 0, 0, keep=True) is first
    assert Journals(memory).of(1, 0, 0, keep=True).key == (1, 0, 0)
    for ring in (1, 2, 3):
        journals.of(1, 0, ring, keep=False)
    with pytest.raises(ValueError, match="4 rings"):
        journals.of(2, 0, 0, keep=False)
    journals.drop(1, 0)
    assert journals.of(2, 0, 0, keep=False).key == (2, 0, 0)


# ---------------------------------------------------------------- hostile frontends


def answers(pair: Pair) -> list[tuple[int, int]]:
    tx = pair.rings[0][0]
    return [RESPONSE.unpack_from(tx.read_slots(index, 1)) for index in range(tx.rsp_prod)]


def publish(pair: Pair, *slots: bytes) -> None:
    tx = pair.rings[0][0]
    start = tx.req_prod
    for number, slot in enumerate(slots):
        tx.write_slot(start + number, slot)
    tx.req_prod = start + len(slots)
    pair.back.poll_tx(0)


def slot(
    pair: Pair, size: int, flags: int = 0, ident: int = 1, offset: int = 0, ref: int | None = None
) -> bytes:
    if ref is None:
        page = pair.memory.allocate(1)
        page[0].data[:] = plain(4096)
        ref = pair.memory.grant(page, True)[0]
    return REQUEST.pack(ref, offset, flags, ident, size)


@pytest.mark.parametrize(
    ("sizes", "status"),
    [((13,), -1), ((0,), -1), ((14,), 0), ((4096,), 0), ((60, 70), -1), ((100, 40), 0), ((100, 100), 0), ((4096 * 18, *[4096] * 17), -1), ((4096 * 15, *[4096] * 14), 0)],
)  # fmt: skip
def test_a_packet_that_does_not_add_up_costs_that_packet(sizes: tuple[int, ...], status: int) -> None:
    pair = Pair()
    flags = [NETTXF_more_data] * (len(sizes) - 1) + [0]
    publish(
        pair,
        *(
            slot(pair, size & 0xFFFF, flag, ident)
            for ident, (size, flag) in enumerate(zip(sizes, flags, strict=True))
        ),
    )
    assert pair.back.error is None
    assert answers(pair) == [(ident, status) for ident in range(len(sizes))]
    assert len(pair.wire.frames) == (status == 0)


def test_too_many_slots_cost_the_packet_and_far_too_many_the_connection() -> None:
    for count, fatal in ((18, False), (19, False), (20, False), (21, True), (200, True)):
        pair = Pair()
        publish(
            pair,
            *(
                slot(pair, 1000 if at == 0 else 40, NETTXF_more_data if at < count - 1 else 0, at)
                for at in range(count)
            ),
        )
        assert (pair.back.error is not None) is fatal
        if not fatal:
            assert {status for _, status in answers(pair)} == {
                NETIF_RSP_OKAY if count <= 18 else NETIF_RSP_ERROR
            }


def test_a_bad_grant_costs_the_packet() -> None:
    pair = Pair()
    publish(pair, slot(pair, 100, NETTXF_more_data, 1), slot(pair, 40, 0, 2, ref=7777), slot(pair, 60, 0, 3))
    assert answers(pair) == [(1, NETIF_RSP_ERROR), (2, NETIF_RSP_ERROR), (3, NETIF_RSP_OKAY)]
    assert pair.back.counters.tx_errors == 1


def test_a_checksum_for_what_has_none_costs_the_packet() -> None:
    pair = Pair()
    publish(pair, slot(pair, 60, NETTXF_csum_blank))
    assert answers(pair) == [(1, NETIF_RSP_ERROR)]


GSO = EXTRA_GSO.pack(1, 0, 1000, XEN_NETIF_GSO_TYPE_TCPV4, 0)


def test_extra_infos_are_answered_with_null() -> None:
    pair = Pair()
    publish(pair, slot(pair, 60, NETTXF_extra_info, 5), EXTRA_GSO.pack(4, 0, 0, 0, 0))
    assert [status for _, status in answers(pair)] == [NETIF_RSP_OKAY, NETIF_RSP_NULL]
    publish(pair, slot(pair, 60, NETTXF_extra_info, 6), GSO)
    assert [status for _, status in answers(pair)][2:] == [NETIF_RSP_ERROR, NETIF_RSP_NULL]  # no TCP


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("the last slot is missing", lambda p: [slot(p, 60, NETTXF_more_data)]),
        ("extra info is missing", lambda p: [slot(p, 60, NETTXF_extra_info)]),
        ("extra info of no type", lambda p: [slot(p, 60, NETTXF_extra_info), bytes(12)]),
        ("extra info of an unknown type", lambda p: [slot(p, 60, NETTXF_extra_info), EXTRA_GSO.pack(5, 0, 1, 1, 0)]),
        ("extra infos without an end", lambda p: [slot(p, 60, NETTXF_extra_info), *[EXTRA_GSO.pack(4, 1, 0, 0, 0)] * 50]),
        ("segments of no size", lambda p: [slot(p, 60, NETTXF_extra_info), EXTRA_GSO.pack(1, 0, 0, 1, 0)]),
        ("segments of no kind", lambda p: [slot(p, 60, NETTXF_extra_info), EXTRA_GSO.pack(1, 0, 9, 7, 0)]),
        ("over the page's end", lambda p: [slot(p, 60, offset=4090)]),
        ("a fragment over the page's end", lambda p: [slot(p, 6000, NETTXF_more_data), slot(p, 5000, 0)]),
        ("extra info behind a fragment", lambda p: [slot(p, 600, NETTXF_more_data), slot(p, 50, NETTXF_extra_info), GSO]),
        ("groups with more data", lambda p: [slot(p, 0, NETTXF_extra_info | NETTXF_more_data), b"\x02\0\x01\0\x5e\0\0\1" + bytes(4), slot(p, 9)]),
    ],
)  # fmt: skip
def test_a_ring_that_makes_no_sense_ends_the_connection(name: str, slots: object) -> None:
    pair = Pair()
    publish(pair, *slots(pair))  # type: ignore[operator]
    assert pair.back.error, name
    assert pair.wire.frames == []
    pair.back.deliver([Frame(plain())])  # and nothing is done any more
    pair.turn()
    assert pair.got == []


def test_impossible_indexes_end_the_connection() -> None:
    for attack in ("tx", "rx"):
        pair = Pair()
        ring = pair.rings[0][attack == "rx"]
        ring.req_prod = ring.rsp_prod + ring.size + 1
        pair.back.poll_tx(0)
        pair.back.deliver([Frame(plain())])
        assert pair.back.error
    for attack in ("tx", "rx"):
        pair = Pair()
        ring = pair.rings[0][attack == "rx"]
        ring.rsp_prod = ring.req_prod + 1  # it writes what is the back end's
        pair.turn()
        with pytest.raises(ValueError, match="indexes"):
            pair.restart()


def test_a_frontend_that_publishes_without_end_waits_for_its_turn() -> None:
    pair = Pair()
    tx = pair.rings[0][0]

    class Endless:
        def sent(self, frames: object) -> None:
            for index in range(100):
                tx.write_slot(tx.req_prod + index, REQUEST.pack(ref, 0, 0, 1, 60))
            tx.req_prod = tx.req_prod + 100

    pair.back._network = Endless()  # type: ignore[misc]
    ref = pair.memory.grant(pair.memory.allocate(1), True)[0]
    Endless().sent(None)
    pair.back.poll_tx(0)
    assert pair.back.queues[0].unfinished
    assert pair.back.counters.tx_packets < 6 * tx.size


@given(st.binary(max_size=12 * 64))
@settings(max_examples=300, deadline=None)
def test_any_slots_are_taken_or_refused(data: bytes) -> None:
    """Whole chains only, each within its page, and as many answers as slots."""
    count = len(data) // 12
    try:
        packets, taken = parse(data[: count * 12], 1000)
    except RingBroken:
        return
    assert taken == count == sum(len(packet.answers) for packet in packets)
    for packet in packets:
        assert packet.size <= 65535
        assert not packet.error or not packet.parts
        assert all(length > 0 and offset + length <= 4096 for _, offset, length in packet.parts)


@given(
    st.lists(st.tuples(st.binary(min_size=12, max_size=12), st.booleans()), max_size=60),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_garbage_in_both_rings_harms_only_its_own_connection(
    slots: list[tuple[bytes, bool]], index: int
) -> None:
    """The back end raises nothing; it stops with a reason, or serves."""
    pair = Pair()
    tx, rx = pair.rings[0]
    for content, receive in slots:
        ring = rx if receive else tx
        ring.write_slot(ring.req_prod, content[: ring.entry_size])
        ring.req_prod = ring.req_prod + 1
    pair.back.poll_tx(0)
    pair.back.deliver([Frame(plain(5000))] * 5)
    struct.pack_into("<I", bytearray(4), 0, index)
    tx.req_prod = index
    pair.back.poll_tx(0)
    rx.req_prod = index
    pair.back.deliver([Frame(plain(5000))] * 5)
    if pair.back.error is None:
        pair.back.poll_rx(0)


# ---------------------------------------------------------------- rate


def test_a_rate_limit_holds_over_time() -> None:
    """50 kB in 50 ms: 1 MB/s. The frontend offers as much as the ring holds."""
    now = [0]
    pair = Pair(credit=Credit(50_000, 50_000, lambda: now[0]))
    offered = 0
    while now[0] < 2_000_000_000:
        while pair.front.send(Frame(plain(1500, offered & 255))):
            offered += 1
        pair.turn()
        wait = pair.back.waits_for_credit
        assert wait > 0
        now[0] += wait
    rate = pair.back.counters.tx_bytes / 2
    assert 900_000 < rate < 1_100_000


def test_rate_nodes() -> None:
    assert parse_rate(None) is None
    assert parse_rate(b"62500,50000") == (62500, 50000)
    assert parse_rate(b"0,0") is None
    for text in (b"x", b"1", b"1,", b",1", b"-1,5", b"1,2,3", b"9" * 30 + b",1"):
        with pytest.raises(NodeError):
            parse_rate(text)
    with pytest.raises(ValueError, match="0 bytes"):
        Credit(0, 5, lambda: 0)
