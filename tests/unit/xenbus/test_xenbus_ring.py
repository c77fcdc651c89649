"""The ring page's codec: bytes arrive in order whatever the pieces, and no index of the other side harms."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import Close, ConnId, Input, Output
from domains.dom0.xenstore.ring_port import RingPort
from drivers.xenbus import wire
from drivers.xenbus.ring import FEATURES, ClientRing, ServerRing

INDEXES = 2048  # req_cons, req_prod, rsp_cons, rsp_prod: after the two rings


def page() -> bytearray:
    return bytearray(4096)


def both(raw: bytearray) -> tuple[ClientRing, ServerRing]:
    return ClientRing(memoryview(raw)), ServerRing(memoryview(raw))


def test_layout_is_that_of_the_header() -> None:
    raw = page()
    client, server = both(raw)
    client.write(b"ask")
    server.write(b"answer")
    seen = xs.XENSTORE_DOMAIN_INTERFACE.unpack(raw)
    assert seen.req[:4] == b"ask\0"
    assert seen.rsp[:7] == b"answer\0"
    assert (seen.req_cons, seen.req_prod, seen.rsp_cons, seen.rsp_prod) == (0, 3, 0, 6)


@given(
    start=st.sampled_from([0, 1000, 1023, 2**32 - 1000, 2**32 - 3]) | st.integers(0, 2**32 - 1),
    chunks=st.lists(st.binary(max_size=1500), max_size=12),
    sips=st.lists(st.integers(0, 1200), min_size=1, max_size=8),
)
def test_a_stream_arrives_whole_and_in_order_across_wraps(
    start: int, chunks: list[bytes], sips: list[int]
) -> None:
    raw = page()
    struct.pack_into("<4I", raw, INDEXES, start, start, start, start)
    for end in (0, 1):
        writer, reader = both(raw) if end == 0 else both(raw)[::-1]
        got, turn = b"", 0
        for chunk in chunks:
            while chunk:
                sent = writer.write(chunk)
                assert sent.error == xs.XENSTORE_ERROR_NONE
                assert sent.notify == (sent.moved > 0)
                chunk = chunk[sent.moved :]
                limit = sips[turn % len(sips)] or 1
                turn += 1
                received = reader.read(limit)
                assert len(received.data) <= limit
                got += received.data
        while data := reader.read().data:
            got += data
        assert got == b"".join(chunks)


@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=7, max_size=7),
    data=st.binary(max_size=64),
    limit=st.integers(-5, 5000),
)
def test_garbage_in_the_page_is_an_error_or_harmless_never_an_exception(
    words: list[int], data: bytes, limit: int
) -> None:
    raw = b"\xa5" * INDEXES + struct.pack("<7I", *words) + b"\x5a" * (4096 - INDEXES - 28)
    for position in (0, 1):
        content = bytearray(raw)
        end = both(content)[position]
        received = end.read(limit)
        assert len(received.data) <= xs.XENSTORE_RING_SIZE
        assert end.write(data).moved <= len(data)
        assert 0 <= end.room <= xs.XENSTORE_RING_SIZE
        assert content[INDEXES + 28 :] == raw[INDEXES + 28 :], "nothing beyond the structure is written"


@given(st.integers(0, 2**32 - 1), st.integers(xs.XENSTORE_RING_SIZE + 1, 2**32 - 1))
def test_indexes_further_apart_than_the_ring_are_reported(cons: int, gap: int) -> None:
    raw = page()
    prod = (cons + gap) % 2**32
    struct.pack_into("<4I", raw, INDEXES, cons, prod, cons, prod)
    before = bytes(raw)
    for end in both(raw):
        assert end.read() == (b"", False, xs.XENSTORE_ERROR_RINGIDX)
        assert end.write(b"x") == (0, False, xs.XENSTORE_ERROR_RINGIDX)
        assert end.room == 0
    assert raw == before


@pytest.mark.parametrize("start", [1020, 2**32 - 4])
def test_bytes_on_both_sides_of_the_wrap_arrive(start: int) -> None:
    raw = page()
    struct.pack_into("<4I", raw, INDEXES, start, start, start, start)
    client, server = both(raw)
    assert client.write(b"0123456789").moved == 10
    assert server.read().data == b"0123456789"
    assert server.write(b"abcdefghij").moved == 10
    assert client.read(7).data == b"abcdefg"
    assert client.read().data == b"hij"


def test_a_full_ring_takes_nothing_and_does_not_notify() -> None:
    client, server = both(page())
    assert client.write(b"x" * 2000).moved == 1024
    assert client.write(b"x") == (0, False, xs.XENSTORE_ERROR_NONE)
    assert len(server.read(24).data) == 24
    assert client.room == 24


def test_connection_reset_and_error_field() -> None:
    raw = page()
    client, server = both(raw)
    assert client.ask_reconnect() is False, "not offered yet"
    server.connect()
    assert client.features == FEATURES
    assert client.connected
    client.write(b"half a message")
    assert client.ask_reconnect()
    assert server.reconnect_wanted
    assert not client.connected
    server.reconnect()
    assert client.connected
    assert server.read().data == b""
    server.set_error(xs.XENSTORE_ERROR_PROTO)
    assert client.error == xs.XENSTORE_ERROR_PROTO


def test_only_a_writable_page_is_taken() -> None:
    for bad in (memoryview(bytes(4096)), memoryview(bytearray(4095))):
        with pytest.raises(ValueError, match="4096"):
            ServerRing(bad)


def attach(core: Core, domid: int) -> tuple[bytearray, ClientRing, RingPort]:
    raw = page()
    port = RingPort(core, ConnId(domid), memoryview(raw))
    core.introduce(domid, ConnId(domid))
    port.connect()
    return raw, ClientRing(memoryview(raw)), port


def exchange(client: ClientRing, port: RingPort, data: bytes) -> bytes:
    got = b""
    for _ in range(64):
        data = data[client.write(data).moved :]
        port.pump()
        port.push()
        got += client.read().data
    return got


def test_port_serves_requests_longer_than_the_ring() -> None:
    core = Core()
    _, client, port = attach(core, 3)
    core.connect(ConnId(99), 0)
    core.receive(ConnId(99), wire.encode(xs.XS_WRITE, 1, 0, b"/big\0" + b"v" * 4000))
    core.receive(ConnId(99), wire.encode(xs.XS_SET_PERMS, 2, 0, b"/big\0r0\0"))
    long_name = b"/" + b"n" * 2000 + b"\0"
    got = exchange(
        client, port, wire.encode(xs.XS_READ, 7, 0, long_name) + wire.encode(xs.XS_READ, 8, 0, b"/big\0")
    )
    framer = wire.Framer(got)
    first, second = framer.take(), framer.take()
    assert first is not None
    assert second is not None
    assert (first.req_id, first.payload) == (7, b"EACCES\0")
    assert (second.req_id, second.payload) == (8, b"v" * 4000)


def test_port_reports_garbage_indexes_and_tells_the_domain() -> None:
    core = Core()
    raw, client, port = attach(core, 3)
    struct.pack_into("<4I", raw, INDEXES, 5, 99999, 0, 0)
    effects = port.pump().effects
    close = next(effect for effect in effects if isinstance(effect, Close))
    assert close.error == xs.XENSTORE_ERROR_RINGIDX
    port.close(close.error)
    assert client.error == xs.XENSTORE_ERROR_RINGIDX
    struct.pack_into("<4I", raw, INDEXES, 0, 0, 0, 0)
    client.write(wire.encode(xs.XS_READ, 1, 0, b"/\0"))
    port.pump()
    assert client.read().data == b"", "it is not listened to any more"


def test_port_no_request_is_left_lying_when_a_domain_reads_late() -> None:
    """The domain fills its ring without reading, is not served, and reads at last. As Linux does, it notifies when it wrote,
    and after reading only if the ring had been full.
    """
    core = Core()
    raw, client, port = attach(core, 3)
    answers = ServerRing(memoryview(raw))
    request = wire.encode(xs.XS_GET_DOMAIN_PATH, 1, 0, b"3\0")
    todo, got = request * 300, wire.Framer()
    replies, idle = 0, 0
    while idle < 3:
        moved = client.write(todo).moved
        todo = todo[moved:]
        effects = list(port.pump().effects) if moved else []
        if not moved:  # only now it reads
            was_full = answers.room == 0
            data = client.read().data
            got.feed(data)
            effects = list(port.pump().effects) if was_full else []
            idle = 0 if data else idle + 1
        for _ in range(10):
            if core.busy:
                effects += core.run()
            for effect in effects[:]:
                effects.remove(effect)
                if isinstance(effect, Output):
                    port.push()
                elif isinstance(effect, Input):
                    effects += port.pump().effects
        while got.take() is not None:
            replies += 1
    assert replies == 300


def test_port_reconnect_drops_what_was_half_said_and_revives_a_broken_ring() -> None:
    core = Core()
    _, client, port = attach(core, 3)
    client.write(b"\xff" * 16)
    port.pump()
    assert client.ask_reconnect()
    assert port.pump().notify
    got = exchange(client, port, wire.encode(xs.XS_GET_DOMAIN_PATH, 1, 0, b"3\0"))
    reply = wire.Framer(got).take()
    assert reply is not None
    assert reply.payload == b"/local/domain/3\0"


@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.tuples(st.integers(0, 6), st.integers(0, 2**32 - 1))),
        max_size=20,
    )
)
def test_port_survives_a_domain_that_writes_anything_anywhere(moves: list[bytes | tuple[int, int]]) -> None:
    core = Core()
    raw, client, port = attach(core, 3)
    for move in moves:
        if isinstance(move, bytes):
            client.write(move)
        else:
            struct.pack_into("<I", raw, INDEXES + 4 * move[0], move[1])
        port.pump()
        core.run()
    core.domain_died(3)
    assert core.store.check() == []
