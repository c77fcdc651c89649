"""State survives a restart: a loaded core goes on exactly where the dumped one was."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore import dump
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.errors import DumpError
from drivers.xenbus import wire
from tests.unit.xenstore.helper_xenstore import Peer, Refused, bench


def restart(core: Core, *peers: Peer) -> Core:
    new = dump.load(dump.dump(core))
    for peer in peers:
        peer.core = new
    return new


def test_tree_permissions_order_generation_and_quotas() -> None:
    core, dom0, [guest] = bench(3)
    for name in ("z", "a", "m"):
        dom0.write(f"/d/{name}", b"\0\xff")
    dom0.rm("/d/z")
    dom0.write("/d/z", b"")
    dom0.chmod("/d/a", "n3", "r0", "b9")
    dom0.chmod("@releaseDomain", "n0", "r3")
    core.quota.watches = 77
    before = dom0.ask(xs.XS_DIRECTORY_PART, b"/d\0000\0")
    new = restart(core, dom0, guest)
    assert dom0.ls("/d") == ["a", "m", "z"]
    assert dom0.read("/d/m") == b"\0\xff"
    assert dom0.perms("/d/a") == ["n3", "r0", "b9"]
    assert dom0.perms("@releaseDomain") == ["n0", "r3"]
    assert dom0.ask(xs.XS_DIRECTORY_PART, b"/d\0000\0") == before
    assert new.quota.watches == 77
    assert new.store.generation == core.store.generation
    assert new.store.owned(3) == core.store.owned(3)


def test_watches_fire_after_the_restart_without_a_new_first_event() -> None:
    core, dom0, [guest] = bench(3)
    guest.watch("x", "rel")
    dom0.watch("@releaseDomain", "gone")
    guest.take_events()
    dom0.take_events()
    new = restart(core, dom0, guest)
    guest.write("x/y", b"")
    assert guest.take_events() == [("x/y", "rel")]
    usage = new.domain_usage(3)
    assert usage is not None
    assert usage["watches"] == 1
    new.domain_died(3)
    assert dom0.take_events() == [("@releaseDomain", "gone")]


def test_half_messages_both_ways_and_unread_events() -> None:
    core, dom0, [guest] = bench(3)
    guest.watch("x")
    guest.take_events()
    dom0.write("/local/domain/3/x", b"")
    dom0.chmod("/local/domain/3/x", "n3")
    guest.send(xs.XS_GET_DOMAIN_PATH, b"3\0")
    request = wire.encode(xs.XS_GET_DOMAIN_PATH, 50, 0, b"4\0")
    core.receive(guest.conn, request[:11])
    head = core.peek_output(guest.conn, 9)
    core.output_taken(guest.conn, 9)
    guest.framer.feed(head)
    new = restart(core, dom0, guest)
    new.receive(guest.conn, request[11:])
    guest.collect()
    assert guest.events == [("/local/domain/3/x", "t")] or guest.events == [("x", "t")]
    assert [reply.payload for reply in guest.replies] == [b"/local/domain/3\0", b"/local/domain/4\0"]
    assert new.domain(3).outstanding == 0


def test_a_transaction_goes_on_and_commits() -> None:
    core, dom0, [guest] = bench(3)
    guest.write("x", b"1")
    tx = guest.start()
    assert guest.read("x", tx) == b"1"
    guest.write("new/leaf", b"2", tx)
    guest.watch("new")
    guest.take_events()
    restart(core, dom0, guest)
    assert guest.read("new/leaf", tx) == b"2"
    guest.end(tx)
    assert guest.take_events() == [("new/leaf", "t")]
    assert dom0.read("/local/domain/3/new/leaf") == b"2"


def test_a_transaction_still_sees_its_conflict() -> None:
    core, dom0, [guest] = bench(3)
    guest.write("x", b"1")
    tx = guest.start()
    guest.read("x", tx)
    restart(core, dom0, guest)
    assert guest.read("x", tx) == b"1"
    dom0.write("/local/domain/3/x", b"9")
    assert guest.read("x", tx) == b"1"
    with pytest.raises(Refused, match="EAGAIN"):
        guest.end(tx)


def test_requests_that_waited_for_their_turn_are_served() -> None:
    core, dom0, [guest] = bench(3)
    message = wire.encode(xs.XS_GET_DOMAIN_PATH, 1, 0, b"1\0")
    core.receive(guest.conn, message * 60)
    new = restart(core, dom0, guest)
    for _ in range(10):
        guest.collect()
        new.run()
    assert len(guest.replies) == 60


def test_an_introduction_under_way_is_answered_eagain() -> None:
    core, dom0, _ = bench()
    dom0.send(xs.XS_INTRODUCE, b"5\0001\0009\0")
    restart(core, dom0)
    dom0.collect()
    assert dom0.replies.pop().payload == b"EAGAIN\0"


def test_domains_targets_and_silenced_rings() -> None:
    core, dom0, [stub, guest] = bench(3, 4)
    dom0.ask(xs.XS_SET_TARGET, b"3\0004\0")
    core.fail(guest.conn, xs.XENSTORE_ERROR_RINGIDX, "test")
    new = restart(core, dom0, stub, guest)
    assert new.is_introduced(4)
    assert new.domain(3).target == 4
    assert new.input_room(guest.conn) == 0
    new.introduce(4, ConnId(4))
    assert new.input_room(guest.conn) > 0


def test_a_second_dump_is_the_same() -> None:
    core, dom0, [guest] = bench(3)
    guest.watch("x")
    tx = guest.start()
    guest.write("y", b"", tx)
    guest.rm("y", tx)
    dom0.take_events()
    assert dump.dump(dump.load(dump.dump(core))) == dump.dump(core)


@given(st.binary(max_size=200))
def test_garbage_is_a_dump_error(data: bytes) -> None:
    with pytest.raises(DumpError):
        dump.load(data)


@given(st.data())
def test_a_damaged_dump_is_a_dump_error_or_a_whole_state(data: st.DataObject) -> None:
    core, _, [guest] = bench(3)
    guest.watch("x")
    guest.write("a", b"1", guest.start())
    raw = bytearray(dump.dump(core))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = dump.load(bytes(raw))
    except DumpError:
        return
    assert loaded.store.check() == []


def test_other_versions_are_refused() -> None:
    state = msgpack.unpackb(dump.dump(Core()))
    state["version"] = 99
    with pytest.raises(DumpError, match="version"):
        dump.load(msgpack.packb(state))
