"""Watches and transactions: who is told what, when; what conflicts."""

from __future__ import annotations

import pytest

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.effects import ConnId
from drivers.xenbus import wire
from tests.unit.xenstore.helper_xenstore import Refused, bench


def test_a_new_watch_fires_once_after_its_reply() -> None:
    core, dom0, _ = bench()
    dom0.send(xs.XS_WATCH, b"/nowhere/yet\0tok\0")
    framer = wire.Framer(core.peek_output(dom0.conn))
    first, second = framer.take(), framer.take()
    assert first is not None
    assert second is not None
    assert (first.type, second.type) == (xs.XS_WATCH, xs.XS_WATCH_EVENT)
    assert second.payload == b"/nowhere/yet\0tok\0"


def test_the_reply_comes_before_the_events_of_the_request() -> None:
    core, dom0, _ = bench()
    dom0.watch("/a")
    dom0.take_events()
    dom0.send(xs.XS_WRITE, b"/a\0x")
    framer = wire.Framer(core.peek_output(dom0.conn))
    kinds = [message.type for message in iter(framer.take, None)]
    assert kinds == [xs.XS_WRITE, xs.XS_WATCH_EVENT]


def test_watchers_of_the_path_and_above_are_told_in_order_of_registration() -> None:
    _, dom0, _ = bench()
    for path, token in (("/a/b", "1"), ("/", "2"), ("/a", "3"), ("/a/b/c", "4"), ("/a/bb", "5")):
        dom0.watch(path, token)
    dom0.take_events()
    dom0.write("/a/b", b"")
    assert dom0.take_events() == [("/a/b", "1"), ("/a/b", "2"), ("/a/b", "3")]


def test_relative_watches_report_relative_paths_absolute_ones_absolute() -> None:
    _, dom0, [guest] = bench(3)
    guest.watch("dev", "rel")
    guest.watch("/local/domain/3/dev", "abs")
    assert guest.take_events() == [("dev", "rel"), ("/local/domain/3/dev", "abs")]
    dom0.write("/local/domain/3/dev/x", b"")
    dom0.chmod("/local/domain/3/dev", "n0", "r3")
    guest.take_events()
    dom0.write("/local/domain/3/dev/x", b"2")
    assert guest.take_events() == [("dev/x", "rel"), ("/local/domain/3/dev/x", "abs")]


def test_every_kind_of_change_is_told_and_mkdir_of_what_exists_is_none() -> None:
    _, dom0, _ = bench()
    dom0.watch("/a")
    dom0.take_events()
    dom0.mkdir("/a/b")
    dom0.mkdir("/a/b")
    dom0.write("/a/c", b"")
    dom0.chmod("/a/c", "r0")
    dom0.rm("/a/b")
    dom0.rm("/a/b")
    assert dom0.take_events() == [("/a/b", "t"), ("/a/c", "t"), ("/a/c", "t"), ("/a/b", "t")]


def test_removal_of_a_tree_tells_each_watched_node_below_its_own_path() -> None:
    _, dom0, _ = bench()
    dom0.write("/a/b/c", b"")
    dom0.write("/a/x", b"")
    for path in ("/", "/a/b", "/a/b/c", "/a/x"):
        dom0.watch(path, path)
    dom0.take_events()
    dom0.rm("/a")
    events = dom0.take_events()
    assert sorted(events) == [("/a", "/"), ("/a/b", "/a/b"), ("/a/b/c", "/a/b/c"), ("/a/x", "/a/x")]
    assert events[-1] == ("/a", "/")


def test_watch_and_unwatch_errors() -> None:
    _, dom0, [guest] = bench(3)
    dom0.watch("/a")
    assert dom0.error(xs.XS_WATCH, b"/a\0t\0") == "EEXIST"
    assert dom0.error(xs.XS_WATCH, b"/a\0") == "EINVAL"
    assert dom0.error(xs.XS_WATCH, b"/a//b\0t\0") == "EINVAL"
    assert dom0.error(xs.XS_WATCH, b"@" + b"x" * 2048 + b"\0t\0") == "EINVAL"
    assert dom0.error(xs.XS_UNWATCH, b"/a\0other\0") == "ENOENT"
    guest.watch("/a")
    dom0.unwatch("/a")
    dom0.take_events()
    dom0.write("/a", b"")
    assert dom0.take_events() == []
    assert dom0.error(xs.XS_UNWATCH, b"/a\0t\0") == "ENOENT"


def test_reset_watches_also_ends_transactions() -> None:
    _, _, [guest] = bench(3)
    guest.watch("x")
    tx = guest.start()
    guest.ask(xs.XS_RESET_WATCHES, b"\0")
    guest.take_events()
    guest.write("x", b"")
    assert guest.take_events() == []
    assert guest.error(xs.XS_READ, b"x\0", tx) == "ENOENT"


def test_special_watches_follow_their_permissions() -> None:
    core, dom0, [guest] = bench(3)
    guest.watch("@releaseDomain", "g")
    guest.take_events()
    core.introduce(4, ConnId(4))
    core.domain_shutdown(4)
    assert guest.take_events() == []
    assert guest.error(xs.XS_SET_PERMS, b"@releaseDomain\0n3\0") == "EACCES"
    assert dom0.error(xs.XS_SET_PERMS, b"@whatever\0n0\0") == "EINVAL"
    dom0.chmod("@releaseDomain", "n0", "r3")
    assert dom0.perms("@releaseDomain") == ["n0", "r3"]
    core.domain_died(4)
    assert guest.take_events() == [("@releaseDomain", "g")]


def test_a_transaction_sees_itself_and_others_see_nothing_before_the_commit() -> None:
    _, dom0, [guest] = bench(3)
    dom0.watch("/local/domain/3")
    dom0.take_events()
    tx = guest.start()
    guest.write("a/b", b"1", tx)
    guest.write("a/b", b"2", tx)
    assert guest.read("a/b", tx) == b"2"
    assert guest.ls("a", tx) == ["b"]
    assert guest.error(xs.XS_READ, b"a/b\0") == "ENOENT"
    assert dom0.take_events() == []
    guest.end(tx)
    assert guest.read("a/b") == b"2"
    assert dom0.take_events() == [("/local/domain/3/a/b", "t")]
    assert guest.error(xs.XS_TRANSACTION_END, b"T\0", tx) == "ENOENT"


def test_an_abandoned_transaction_leaves_nothing() -> None:
    core, dom0, [guest] = bench(3)
    dom0.watch("/")
    dom0.take_events()
    before = dict(core.store.nodes)
    tx = guest.start()
    guest.write("x/y", b"1", tx)
    guest.end(tx, commit=False)
    assert core.store.nodes == before
    assert core.store.check() == []
    assert dom0.take_events() == []


@pytest.mark.parametrize("look", ["read", "missing", "directory", "write"])
def test_a_change_to_what_the_transaction_touched_gives_eagain(look: str) -> None:
    _, dom0, [guest] = bench(3)
    guest.write("x", b"1")
    tx = guest.start()
    if look == "read":
        guest.read("x", tx)
        dom0.write("/local/domain/3/x", b"9")
    elif look == "missing":
        assert guest.error(xs.XS_READ, b"y\0", tx) == "ENOENT"
        dom0.write("/local/domain/3/y", b"9")
    elif look == "directory":
        guest.ls("/local/domain/3", tx)
        dom0.mkdir("/local/domain/3/new")
    else:
        guest.write("x", b"2", tx)
        dom0.rm("/local/domain/3/x")
    with pytest.raises(Refused, match="EAGAIN"):
        guest.end(tx)
    assert guest.error(xs.XS_TRANSACTION_END, b"T\0", tx) == "ENOENT"


def test_changes_elsewhere_do_not_disturb_and_reads_repeat() -> None:
    _, dom0, [guest] = bench(3)
    guest.write("x", b"1")
    tx = guest.start()
    assert guest.read("x", tx) == b"1"
    dom0.write("/elsewhere", b"")
    guest.write("y", b"2", tx)
    guest.end(tx)
    tx = guest.start()
    assert guest.read("x", tx) == b"1"
    dom0.write("/local/domain/3/x", b"changed")
    assert guest.read("x", tx) == b"1"
    with pytest.raises(Refused, match="EAGAIN"):
        guest.end(tx)


def test_writing_an_existing_node_does_not_conflict_with_new_siblings() -> None:
    _, dom0, [guest] = bench(3)
    guest.write("d/x", b"1")
    tx = guest.start()
    guest.write("d/x", b"2", tx)
    dom0.write("/local/domain/3/d/sibling", b"")
    guest.end(tx)
    assert guest.read("d/x") == b"2"


def test_removal_in_a_transaction_is_told_after_the_commit_even_if_the_parent_went_too() -> None:
    _, dom0, [guest] = bench(3)
    guest.write("a/b", b"")
    guest.watch("a/b", "leaf")
    dom0.watch("/local/domain/3/a", "top")
    guest.take_events()
    dom0.take_events()
    tx = guest.start()
    guest.rm("a/b", tx)
    guest.rm("a", tx)
    guest.end(tx)
    assert ("a/b", "leaf") in guest.take_events()
    assert ("/local/domain/3/a", "top") in dom0.take_events()


def test_created_and_removed_again_in_one_transaction_is_nothing() -> None:
    core, _, [guest] = bench(3)
    tx = guest.start()
    guest.write("a/b", b"", tx)
    guest.rm("a", tx)
    guest.end(tx)
    assert guest.error(xs.XS_READ, b"a\0") == "ENOENT"
    assert core.store.check() == []


def test_transaction_errors() -> None:
    _, dom0, [guest] = bench(3)
    assert guest.error(xs.XS_READ, b"x\0", 99) == "ENOENT"
    assert guest.error(xs.XS_TRANSACTION_END, b"T\0") == "ENOENT"
    tx = guest.start()
    assert guest.error(xs.XS_TRANSACTION_START, b"\0", tx) == "EBUSY"
    assert guest.error(xs.XS_TRANSACTION_END, b"X\0", tx) == "EINVAL"
    assert dom0.error(xs.XS_READ, b"/\0", tx) == "ENOENT", "a transaction belongs to one connection"
    guest.end(tx)


def test_transaction_numbers_wrap_without_zero_or_reuse() -> None:
    core, dom0, _ = bench()
    first = dom0.start()
    core.next_transaction = 0xFFFFFFFF
    assert dom0.start() == 0xFFFFFFFF
    core.next_transaction = (first + 0) & 0xFFFFFFFF
    assert dom0.start() not in (0, first, 0xFFFFFFFF)
