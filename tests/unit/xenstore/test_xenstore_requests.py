"""Each request of xs_wire.h: its reply, and the error that Xen's xenstored gives."""

from __future__ import annotations

import pytest

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore import paths
from domains.dom0.xenstore.effects import AttachRing, Close, ConnId, DetachRing, Log
from domains.dom0.xenstore.errors import XsError
from drivers.xenbus import wire
from tests.unit.xenstore.helper_xenstore import Peer, Refused, bench


def test_write_creates_parents_and_read_returns_binary_values() -> None:
    _, dom0, _ = bench()
    dom0.write("/a/b/c", b"x\0y\xff")
    assert dom0.read("/a/b/c") == b"x\0y\xff"
    assert dom0.read("/a/b") == b""
    assert dom0.ls("/a") == ["b"]
    assert dom0.ls("/") == ["tool", "a"]


def test_mkdir_leaves_a_value_alone() -> None:
    _, dom0, _ = bench()
    dom0.write("/a", b"1")
    dom0.mkdir("/a")
    assert dom0.read("/a") == b"1"


def test_children_are_listed_in_order_of_creation() -> None:
    _, dom0, _ = bench()
    for name in ("z", "a", "m"):
        dom0.mkdir(f"/d/{name}")
    dom0.rm("/d/z")
    dom0.mkdir("/d/z")
    assert dom0.ls("/d") == ["a", "m", "z"]


def test_rm_errors() -> None:
    _, dom0, _ = bench()
    dom0.write("/a/b/c", b"")
    dom0.rm("/a/nothing")
    assert dom0.error(xs.XS_RM, b"/x/y\0") == "ENOENT"
    assert dom0.error(xs.XS_RM, b"/\0") == "EINVAL"
    dom0.rm("/a")
    assert dom0.error(xs.XS_READ, b"/a/b/c\0") == "ENOENT"


@pytest.mark.parametrize(
    "path",
    ["", "//", "/a//b", "/a/", "/a b", "/a.b", "/ü", "/" + "a" * 3072, "@releaseDomain", "a" * 2049, "/a\n"],
)
def test_bad_paths_get_einval_from_every_request_on_nodes(path: str) -> None:
    _, dom0, _ = bench()
    raw = path.encode() + b"\0"
    for kind in (xs.XS_READ, xs.XS_WRITE, xs.XS_MKDIR, xs.XS_RM, xs.XS_DIRECTORY):
        assert dom0.error(kind, raw) == "EINVAL"


def test_longest_paths_are_served() -> None:
    _, dom0, [guest] = bench(3)
    dom0.write("/" + "a" * 3071, b"x")
    assert dom0.read("/" + "a" * 3071) == b"x"
    assert guest.error(xs.XS_READ, b"a" * 2048 + b"\0") == "ENOENT"


@pytest.mark.parametrize("payload", [b"", b"/a", b"/a\0b\0", b"/a\0b"])
def test_requests_of_one_string_take_exactly_one(payload: bytes) -> None:
    _, dom0, _ = bench()
    for kind in (xs.XS_READ, xs.XS_MKDIR, xs.XS_RM, xs.XS_DIRECTORY, xs.XS_GET_PERMS):
        assert dom0.error(kind, payload) == "EINVAL"


def test_relative_paths_are_below_the_callers_home() -> None:
    _, dom0, [guest] = bench(3)
    guest.write("device/x", b"1")
    assert dom0.read("/local/domain/3/device/x") == b"1"
    assert guest.read("device/x") == b"1"


def test_permissions_owner_list_and_default() -> None:
    _, dom0, [a, b] = bench(3, 4)
    dom0.write("/shared", b"v")
    dom0.chmod("/shared", "r3", "b4")
    assert dom0.perms("/shared") == ["r3", "b4"]
    a.write("/shared", b"by owner")
    b.write("/shared", b"by list")
    dom0.chmod("/shared", "r0", "w4")
    assert a.read("/shared") == b"by list"
    assert a.error(xs.XS_WRITE, b"/shared\0x") == "EACCES"
    assert b.error(xs.XS_READ, b"/shared\0") == "EACCES"
    assert b.error(xs.XS_GET_PERMS, b"/shared\0") == "EACCES"


def test_what_is_missing_below_an_unreadable_node_is_not_told() -> None:
    _, dom0, [guest] = bench(3)
    dom0.write("/secret/x", b"")
    assert guest.error(xs.XS_READ, b"/secret/x\0") == "EACCES"
    assert guest.error(xs.XS_READ, b"/secret/no\0") == "EACCES"
    assert guest.error(xs.XS_READ, b"no\0") == "ENOENT"


def test_new_nodes_inherit_permissions_and_belong_to_an_unprivileged_creator() -> None:
    _, dom0, [a, b] = bench(3, 4)
    dom0.write("/open", b"")
    dom0.chmod("/open", "n0", "b3", "r4")
    a.write("/open/sub/leaf", b"1")
    assert dom0.perms("/open/sub/leaf") == ["n3", "b3", "r4"]
    assert b.read("/open/sub/leaf") == b"1"
    dom0.write("/open/other", b"")
    assert dom0.perms("/open/other") == ["n0", "b3", "r4"]


def test_set_perms_errors() -> None:
    _, dom0, [guest] = bench(3)
    guest.write("x", b"")
    assert guest.error(xs.XS_SET_PERMS, b"x\0") == "EINVAL"
    assert guest.error(xs.XS_SET_PERMS, b"x\0q3\0") == "EINVAL"
    assert guest.error(xs.XS_SET_PERMS, b"x\0n99999\0") == "EINVAL"
    assert guest.error(xs.XS_SET_PERMS, b"x\0n0\0") == "EPERM"
    assert guest.error(xs.XS_SET_PERMS, b"x\0" + b"n3\0" * 6) == "ENOSPC"
    dom0.write("/y", b"")
    dom0.chmod("/y", "b0")
    assert guest.error(xs.XS_SET_PERMS, b"/y\0b3\0") == "EACCES"
    guest.chmod("x", "n3", "r0")
    assert guest.perms("x") == ["n3", "r0"]


def test_directory_part_pages_through_a_long_list() -> None:
    _, dom0, _ = bench()
    names = [f"node-{number:05}-{'x' * 20}" for number in range(300)]
    for name in names:
        dom0.mkdir(f"/big/{name}")
    assert dom0.error(xs.XS_DIRECTORY, b"/big\0") == "E2BIG"
    got, generations = b"", set()
    while True:
        part = dom0.ask(xs.XS_DIRECTORY_PART, b"/big\0%d\0" % len(got))
        generation, rest = part.split(b"\0", 1)
        generations.add(generation)
        got += rest
        if rest.endswith(b"\0\0") or rest == b"\0":
            break
    assert [n.decode() for n in wire.split_strings(got[:-1])] == names
    assert len(generations) == 1
    dom0.mkdir("/big/one-more")
    assert dom0.ask(xs.XS_DIRECTORY_PART, b"/big\0000\0").split(b"\0")[0] not in generations
    assert dom0.ask(xs.XS_DIRECTORY_PART, b"/big\09999999\0").split(b"\0")[1:] == [b"", b""]
    assert dom0.error(xs.XS_DIRECTORY_PART, b"/big\0") == "EINVAL"
    assert dom0.error(xs.XS_DIRECTORY_PART, b"/big\0-4\0") == "EINVAL"


def test_privileged_requests_are_refused_to_guests() -> None:
    _, _, [guest] = bench(3)
    for kind in (xs.XS_CONTROL, xs.XS_INTRODUCE, xs.XS_RELEASE, xs.XS_IS_DOMAIN_INTRODUCED, xs.XS_RESUME):
        assert guest.error(kind, b"3\0") == "EACCES"
    assert guest.error(xs.XS_SET_TARGET, b"3\0000\0") == "EACCES"


@pytest.mark.parametrize(
    "kind", [xs.XS_WATCH_EVENT, xs.XS_ERROR, 20, xs.XS_TYPE_COUNT, xs.XS_INVALID, 2**32 - 1]
)
def test_unknown_requests_get_enosys(kind: int) -> None:
    _, dom0, _ = bench()
    assert dom0.error(kind, b"x\0") == "ENOSYS"


def test_introduce_waits_for_the_ring_and_tells_failure() -> None:
    core, dom0, _ = bench()
    dom0.watch("@introduceDomain", "new")
    dom0.take_events()
    dom0.send(xs.XS_INTRODUCE, b"5\0-77\09\0")
    assert AttachRing(5, -77, 9) in dom0.effects
    dom0.collect()
    assert dom0.replies == []
    core.introduce_failed(5, "EINVAL")
    dom0.collect()
    assert dom0.replies.pop().payload == b"EINVAL\0"
    assert dom0.ask(xs.XS_IS_DOMAIN_INTRODUCED, b"5\0") == b"F\0"
    dom0.send(xs.XS_INTRODUCE, b"5\0-77\09\0")
    core.introduce(5, ConnId(5))
    assert dom0.take_events() == [("@introduceDomain", "new")]
    assert dom0.replies.pop().payload == b"OK\0"
    assert dom0.ask(xs.XS_IS_DOMAIN_INTRODUCED, b"5\0") == b"T\0"
    assert dom0.ask(xs.XS_IS_DOMAIN_INTRODUCED, b"0\0") == b"T\0"


@pytest.mark.parametrize(
    "payload", [b"5\0001\0", b"5\0001\0000\0", b"32752\0001\0009\0", b"x\0001\0009\0", b"5\0001\0-1\0"]
)
def test_introduce_checks_its_arguments(payload: bytes) -> None:
    _, dom0, _ = bench()
    assert dom0.error(xs.XS_INTRODUCE, payload) == "EINVAL"


def test_introducing_again_resets_the_connection() -> None:
    core, dom0, [guest] = bench(3)
    guest.watch("x")
    guest.start()
    guest.send(xs.XS_READ, b"x\0")
    core.introduce(3, guest.conn)
    assert core.peek_output(guest.conn) == b""
    dom0.write("/local/domain/3/x", b"1")
    assert core.peek_output(guest.conn) == b""
    assert core.open_transactions == 0


def test_release_disconnects_and_fires() -> None:
    _, dom0, [_guest] = bench(3)
    dom0.watch("@releaseDomain", "gone")
    dom0.take_events()
    dom0.ask(xs.XS_RELEASE, b"3\0")
    assert DetachRing(3, ConnId(3)) in dom0.effects
    assert dom0.take_events() == [("@releaseDomain", "gone")]
    assert dom0.error(xs.XS_RELEASE, b"3\0") == "ENOENT"
    assert dom0.error(xs.XS_RELEASE, b"0\0") == "EINVAL"


def test_shutdown_fires_once_until_resume() -> None:
    core, dom0, _ = bench(3)
    dom0.watch("@releaseDomain", "gone")
    dom0.take_events()
    core.domain_shutdown(3)
    core.domain_shutdown(3)
    assert dom0.take_events() == [("@releaseDomain", "gone")]
    dom0.ask(xs.XS_RESUME, b"3\0")
    core.domain_shutdown(3)
    assert dom0.take_events() == [("@releaseDomain", "gone")]
    assert dom0.error(xs.XS_RESUME, b"77\0") == "ENOENT"


def test_set_target_lends_the_targets_rights_until_it_dies() -> None:
    core, dom0, [stub, guest] = bench(3, 4)
    guest.write("x", b"1")
    assert stub.error(xs.XS_READ, b"/local/domain/4/x\0") == "EACCES"
    assert dom0.error(xs.XS_SET_TARGET, b"3\00099\0") == "ENOENT"
    dom0.ask(xs.XS_SET_TARGET, b"3\0004\0")
    stub.write("/local/domain/4/x", b"2")
    core.domain_died(4)
    assert core.domain(3).target is None


def test_get_domain_path_normalises() -> None:
    _, _, [guest] = bench(3)
    assert guest.ask(xs.XS_GET_DOMAIN_PATH, b"007\0") == b"/local/domain/7\0"
    assert guest.error(xs.XS_GET_DOMAIN_PATH, b"70000\0") == "EINVAL"


def test_control_commands() -> None:
    core, dom0, _ = bench(3)
    assert dom0.ask(xs.XS_CONTROL, b"check\0") == b"OK\0"
    assert b"quota" in dom0.ask(xs.XS_CONTROL, b"help\0")
    assert dom0.ask(xs.XS_CONTROL, b"print\0hello\0") == b"OK\0"
    assert Log("hello") in dom0.effects
    assert dom0.ask(xs.XS_CONTROL, b"quota\0set\0nodes\0005\0") == b"OK\0"
    assert core.quota.nodes == 5
    assert b"Domain 3" in dom0.ask(xs.XS_CONTROL, b"quota\0003\0")
    assert b"nodes: " in dom0.ask(xs.XS_CONTROL, b"memreport\0")
    for bad in (b"", b"what\0", b"quota\0set\0nodes\0x\0", b"quota\0set\0no\0001\0", b"print\0"):
        assert dom0.error(xs.XS_CONTROL, bad) == "EINVAL"
    assert dom0.error(xs.XS_CONTROL, b"quota\00099\0") == "ENOENT"


def test_check_finds_damage() -> None:
    core, dom0, _ = bench()
    dom0.write("/a/b", b"")
    del core.store.nodes[b"/a/b"]
    assert dom0.error(xs.XS_CONTROL, b"check\0") == "EIO"


def test_too_long_a_payload_drops_a_socket() -> None:
    core, dom0, _ = bench()
    effects = core.receive(dom0.conn, wire.HEADER.pack(xs.XS_READ, 1, 0, 4097))
    assert [e.error for e in effects if isinstance(e, Close)] == [xs.XENSTORE_ERROR_PROTO]
    assert dom0.conn not in core.connections
    assert core.receive(dom0.conn, b"anything") == []


def test_too_long_a_payload_silences_a_ring_but_its_domain_stays_introduced() -> None:
    core, dom0, [guest] = bench(3)
    effects = core.receive(guest.conn, wire.HEADER.pack(xs.XS_READ, 1, 0, 1 << 31))
    assert [e.error for e in effects if isinstance(e, Close)] == [xs.XENSTORE_ERROR_PROTO]
    assert core.input_room(guest.conn) == 0
    dom0.watch("@releaseDomain", "gone")
    dom0.take_events()
    core.domain_died(3)
    assert dom0.take_events() == [("@releaseDomain", "gone")]


def test_requests_in_pieces_and_several_at_once() -> None:
    core, dom0, _ = bench()
    dom0.write("/a", b"1")
    stream = b"".join(wire.encode(xs.XS_READ, n, 0, b"/a\0") for n in range(3))
    for index in range(len(stream)):
        core.receive(dom0.conn, stream[index : index + 1])
    dom0.collect()
    assert [reply.req_id for reply in dom0.replies] == [0, 1, 2]


def test_shell_misuse_is_told() -> None:
    core, dom0, _ = bench()
    with pytest.raises(ValueError, match="exists"):
        core.connect(dom0.conn, 0)
    with pytest.raises(ValueError, match="input_room"):
        core.receive(dom0.conn, b"\0" * (core.input_room(dom0.conn) + 1))
    with pytest.raises(ValueError, match="queued"):
        core.output_taken(dom0.conn, 1)
    with pytest.raises(ValueError, match="domain 0"):
        core.release(0)


def test_path_parts() -> None:
    assert paths.ancestors(b"/a/b") == [b"/a/b", b"/a", b"/"]
    assert paths.ancestors(b"/") == [b"/"]
    assert (paths.parent(b"/a"), paths.parent(b"/a/b"), paths.leaf(b"/a/b")) == (b"/", b"/a", b"b")
    assert paths.child(b"/", b"x") == b"/x"
    with pytest.raises(XsError, match="EINVAL"):
        paths.canonical(b"a" * 2048, b"/" + b"b" * 1100)


def test_peer_raises_refused() -> None:
    """The bench itself: an error reply is never taken for success."""
    _, dom0, _ = bench()
    with pytest.raises(Refused, match="ENOENT"):
        dom0.read("/no")
    assert isinstance(dom0, Peer)
