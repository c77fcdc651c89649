"""The client against the real core, and against a daemon that answers nonsense."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId
from drivers.xenbus import client as xb
from drivers.xenbus import wire
from drivers.xenbus.client import Client, Procedure, WatchEvent, XenstoreError


class Link:
    """A client joined to a core; everything moves at once."""

    def __init__(self, core: Core, conn: int, domid: int) -> None:
        self.core, self.conn, self.client = core, ConnId(conn), Client()
        core.connect(self.conn, domid)
        self.events: list[WatchEvent] = []

    def move(self) -> None:
        while True:
            out = self.client.peek_output(1000)
            if out:
                self.client.output_taken(len(out))
                self.core.receive(self.conn, out)
            back = self.core.peek_output(self.conn, 777)
            if back:
                self.core.output_taken(self.conn, len(back))
                self.events += self.client.feed(back)
            if not out and not back and not self.core.run():
                return

    def run(self, procedure: Procedure[object]) -> object:
        results: list[object] = []
        self.client.start(procedure, results.append, results.append)
        self.move()
        [result] = results
        if isinstance(result, XenstoreError):
            raise result
        return result


one = xb.single


def test_requests_and_errors() -> None:
    link = Link(Core(), 1, 0)
    link.run(one(xb.write("/a/b", b"1")))
    assert link.run(one(xb.read("/a/b"))) == b"1"
    assert xb.names(link.run(one(xb.directory("/a")))) == ["b"]  # type: ignore[arg-type]  # run() gives object
    link.run(one(xb.set_perms("/a/b", ["r0", "b3"])))
    assert link.run(one(xb.get_perms("/a/b"))) == b"r0\0b3\0"
    link.run(one(xb.mkdir("/a/c")))
    link.run(one(xb.remove("/a")))
    with pytest.raises(XenstoreError, match="ENOENT"):
        link.run(one(xb.read("/a/b")))
    assert link.run(one(xb.domain_path(4))) == b"/local/domain/4\0"
    with pytest.raises(XenstoreError, match="EINVAL"):
        link.run(one(xb.introduce(4, 1, 0)))
    with pytest.raises(XenstoreError, match="ENOENT"):
        link.run(one(xb.release(4)))
    assert link.client.pending == 0


def test_watch_events_arrive_in_order() -> None:
    link = Link(Core(), 1, 0)
    link.run(one(xb.watch("/w", "tok")))
    link.run(one(xb.write("/w/x", b"")))
    link.run(one(xb.unwatch("/w", "tok")))
    link.run(one(xb.write("/w/y", b"")))
    assert link.events == [WatchEvent("/w", "tok"), WatchEvent("/w/x", "tok")]


def test_a_transaction_is_run_again_after_eagain() -> None:
    core = Core()
    link, other = Link(core, 1, 0), Link(core, 2, 0)
    link.run(one(xb.write("/n", b"0")))
    tries = []

    def add(tx: int) -> Procedure[int]:
        value = int((yield xb.read("/n", tx)))
        tries.append(value)
        if len(tries) == 1:
            other.run(one(xb.write("/n", b"41")))
        yield xb.write("/n", b"%d" % (value + 1), tx)
        return value + 1

    assert link.run(xb.transaction(add)) == 42
    assert tries == [0, 41]
    assert core.open_transactions == 0


def test_a_transaction_whose_body_fails_is_abandoned() -> None:
    core = Core()
    link = Link(core, 1, 0)

    def body(tx: int) -> Procedure[None]:
        yield xb.write("/half", b"", tx)
        yield xb.read("/missing", tx)

    with pytest.raises(XenstoreError, match="ENOENT"):
        link.run(xb.transaction(body))
    assert core.open_transactions == 0
    with pytest.raises(XenstoreError, match="ENOENT"):
        link.run(one(xb.read("/half")))


def test_a_transaction_gives_up_in_the_end() -> None:
    core = Core()
    link, other = Link(core, 1, 0), Link(core, 2, 0)

    def body(tx: int) -> Procedure[None]:
        yield xb.read("/", tx)
        other.run(one(xb.write(f"/n{tx}", b"")))

    with pytest.raises(XenstoreError, match="EAGAIN"):
        link.run(xb.transaction(body, tries=3))


def test_requests_that_go_together_are_answered_each() -> None:
    """In their order, more of them than are sent at once, and an error of one is that one's."""
    link = Link(Core(), 1, 0)
    writes = [xb.write(f"/n/{number}", b"%d" % number) for number in range(150)]
    assert link.run(xb.together(writes)) == [b"OK\0"] * 150
    reads = [xb.read("/n/7"), xb.read("/none"), xb.read("/n/149")]
    seven, none, last = cast(list[Any], link.run(xb.together(reads)))
    assert (seven, none.name, last) == (b"7", "ENOENT", b"149")
    assert link.run(xb.together([])) == []
    assert link.client.pending == 0


def test_requests_that_go_together_are_one_round_trip() -> None:
    client = Client()
    done: list[object] = []
    client.start(xb.together([xb.read("/a"), xb.read("/b")]), done.append, done.append)
    asked = client.peek_output()
    assert asked.count(b"/a\0") == asked.count(b"/b\0") == 1
    assert client.pending == 2
    client.fail("gone")
    [[first, second]] = cast(list[list[Any]], done)
    assert (first.name, second.name) == ("ECONNRESET", "ECONNRESET")


def test_too_many_requests_together_fail_alone() -> None:
    """Those for which there is no place among the waiting ones."""
    link = Link(Core(), 1, 0)
    for _ in range(xb.PENDING_MAX - 1):
        link.client.request(xb.read("/"), lambda data: None, lambda error: None)
    done: list[object] = []
    link.client.start(xb.together([xb.read("/"), xb.read("/")]), done.append, done.append)
    link.move()
    [[first, second]] = cast(list[list[Any]], done)
    assert (first, second.name) == (b"", "EBUSY")


def test_long_directories_are_listed() -> None:
    link = Link(Core(), 1, 0)
    names = [f"{'n' * 40}{number}" for number in range(300)]
    for name in names:
        link.run(one(xb.write(f"/d/{name}", b"")))
    assert link.run(xb.list_directory("/d")) == names
    assert link.run(xb.list_directory("/tool/xenstored")) == []


def test_a_directory_that_changes_between_two_parts_is_listed_anew() -> None:
    link = Link(Core(), 1, 0)
    names = [f"{'n' * 40}{number}" for number in range(150)]
    for name in names:
        link.run(one(xb.write(f"/d/{name}", b"")))
    asked = []

    def meddle() -> Procedure[list[str]]:
        listing = xb.list_directory("/d")
        request = next(listing)
        while True:
            assert isinstance(request, xb.Request)
            asked.append(request.payload)
            payload = yield request
            if len(asked) == 1:
                yield xb.remove(f"/d/{names[0]}")
            try:
                request = listing.send(payload)
            except StopIteration as stop:
                result: list[str] = stop.value
                return result

    assert link.run(meddle()) == names[1:]
    assert asked.count(b"/d\x000\x00") == 2


def test_replies_match_by_number_in_any_order_and_strays_are_counted() -> None:
    client = Client()
    got: list[object] = []
    a = client.request(
        xb.read("/a"), lambda data: got.append(("a", data)), lambda e: got.append(("a", e.name))
    )
    b = client.request(
        xb.read("/b"), lambda data: got.append(("b", data)), lambda e: got.append(("b", e.name))
    )
    client.feed(wire.encode(xs.XS_READ, b, 0, b"2") + wire.encode(xs.XS_WRITE, a, 0, b"OK\0"))
    client.feed(wire.encode(xs.XS_READ, 999, 0, b"") + wire.encode(xs.XS_WATCH_EVENT, 0, 0, b"torn"))
    client.feed(wire.encode(xs.XS_ERROR, a, 0, b"EBOGUS\0"))
    assert got == [("b", b"2"), ("a", "EIO")]
    assert client.strays == 3


def test_a_lost_connection_fails_everything_and_reset_mends() -> None:
    client = Client()
    got: list[object] = []
    client.request(xb.read("/a"), got.append, lambda error: got.append(error.name))
    client.start(xb.transaction(lambda tx: one(xb.read("/x", tx))), got.append, lambda e: got.append(e.name))
    client.feed(wire.HEADER.pack(xs.XS_READ, 1, 0, 5000))
    assert got == ["ECONNRESET", "ECONNRESET"]
    assert client.broken is not None
    with pytest.raises(XenstoreError, match="ECONNRESET"):
        client.request(xb.read("/a"), got.append, got.append)
    client.reset()
    client.request(xb.read("/a"), got.append, got.append)
    assert client.peek_output()


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    client = Client()
    got: list[object] = []
    with pytest.raises(XenstoreError, match="E2BIG"):
        client.request(xb.write("/a", b"x" * 4096), got.append, got.append)
    for _ in range(xb.PENDING_MAX):
        client.request(xb.read("/a"), got.append, got.append)
    with pytest.raises(XenstoreError, match="EBUSY"):
        client.request(xb.read("/a"), got.append, got.append)
    client.start(one(xb.read("/a")), got.append, lambda error: got.append(error.name))
    assert got == ["EBUSY"]


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_from_the_daemon_are_survived(chunks: list[bytes]) -> None:
    client = Client()
    client.start(xb.list_directory("/"), lambda _: None, lambda _: None)
    client.start(xb.transaction(lambda tx: one(xb.read("/", tx))), lambda _: None, lambda _: None)
    for chunk in chunks:
        client.feed(chunk)


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_any_payloads_as_replies_end_a_listing_and_a_transaction(payloads: list[bytes]) -> None:
    client = Client()
    ended: list[object] = []
    client.start(xb.list_directory("/"), ended.append, ended.append)
    client.start(xb.transaction(lambda tx: one(xb.read("/", tx))), ended.append, ended.append)
    for payload in payloads:
        for number, entry in list(client._pending.items()):
            client.feed(wire.encode(entry.type, number, entry.tx_id, payload))
    client.fail("end")
    assert len(ended) == 2
