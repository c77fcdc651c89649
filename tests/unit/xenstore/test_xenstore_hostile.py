"""Quotas, fairness, and the classes of Xen's security advisories about xenstored, by their numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.core import INPUT_MAX, Core
from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.quota import EVENT_TIMEOUT_NS, Quota
from drivers.xenbus import wire
from tests.unit.xenstore.helper_xenstore import Peer, Refused, bench


def until_refused(step: Callable[[int], object]) -> str:
    """The error that ends a series of requests; "" if 100 of them are served."""
    for number in range(100):
        try:
            step(number)
        except Refused as refused:
            return str(refused)
    return ""


def test_node_quota_enospc_leaves_no_trace() -> None:
    core, _, [guest] = bench(3)
    core.quota.nodes = 5  # its home is one
    guest.write("a/b", b"")
    before = dict(core.store.nodes)
    assert guest.error(xs.XS_WRITE, b"c/d/e\0") == "ENOSPC"
    assert core.store.nodes == before
    guest.write("c/d", b"")
    assert guest.error(xs.XS_MKDIR, b"e\0") == "ENOSPC"
    guest.rm("c")
    guest.mkdir("e")


def test_xsa_421_node_quota_holds_across_transactions() -> None:
    core, _, [guest] = bench(3)
    core.quota.nodes = 10
    first, second = guest.start(), guest.start()
    for number in range(6):
        guest.write(f"first{number}", b"", first)
        guest.write(f"second/{number}", b"", second) if number < 5 else None
    assert guest.error(xs.XS_WRITE, b"a/b/c/d/e\0", first) == "ENOSPC"
    guest.end(first)
    assert guest.error(xs.XS_TRANSACTION_END, b"T\0", second) in ("ENOSPC", "EAGAIN")
    assert core.store.owned(3) <= 10
    assert core.store.check() == []


def test_xsa_416_a_commit_beyond_the_quota_is_refused_without_conflict() -> None:
    core, dom0, [guest] = bench(3)
    dom0.write("/open/a", b"")
    dom0.write("/open/b", b"")
    for name in ("/open", "/open/a", "/open/b"):
        dom0.chmod(name, "b0")
    core.quota.nodes = 4
    first, second = guest.start(), guest.start()
    for name, tx in (("/open/a", first), ("/open/b", second)):
        for number in range(3):
            guest.write(f"{name}/{number}", b"", tx)
    guest.end(first)
    with pytest.raises(Refused, match="ENOSPC"):
        guest.end(second)
    assert core.store.owned(3) == 4


def test_other_quotas_and_their_errors() -> None:
    core, dom0, [guest] = bench(3)
    core.quota.watches = 2
    guest.watch("a")
    guest.watch("b")
    assert guest.error(xs.XS_WATCH, b"c\0t\0") == "E2BIG"
    guest.unwatch("a")
    guest.watch("c")
    core.quota.transactions = 2
    guest.start()
    tx = guest.start()
    assert guest.error(xs.XS_TRANSACTION_START, b"\0") == "ENOSPC"
    core.quota.transaction_nodes = 8
    guest.end(tx)
    tx = guest.start()
    assert until_refused(lambda number: guest.write(f"n{number}", b"", tx)) == "ENOSPC"
    assert guest.error(xs.XS_WRITE, b"big\0" + b"x" * 2048) == "ENOSPC"
    core.quota.path_length = 40
    assert guest.error(xs.XS_READ, b"/" + b"a" * 50 + b"\0") == "EINVAL"
    dom0.write("/" + "a" * 50, b"x" * 3000)


def test_privileged_quotas_do_not_bind_domain_0() -> None:
    core, dom0, _ = bench()
    for name in ("nodes", "watches", "transactions", "transaction_nodes"):
        setattr(core.quota, name, 1)
    tx = dom0.start()
    dom0.start()
    for number in range(5):
        dom0.write(f"/x{number}", b"", tx)
        dom0.watch(f"/{number}")
    dom0.end(tx)


def test_xsa_326_memory_quota_bounds_nodes_watches_and_transactions_together() -> None:
    core, _, [guest] = bench(3)
    core.quota.memory = 30_000
    assert until_refused(lambda number: guest.write(f"n{number}", b"x" * 1500)) == "ENOMEM"
    assert until_refused(lambda number: guest.watch(f"w{number}", "t" * 1500)) == "ENOMEM"
    guest.rm("n0")
    guest.rm("n1")
    tx = guest.start()
    assert until_refused(lambda number: guest.write(f"in-transaction{number}", b"x" * 500, tx)) == "ENOMEM"
    usage = core.domain_usage(3)
    assert usage is not None
    assert usage["memory"] < 40_000


def test_xsa_326_a_client_that_reads_no_replies_is_not_served_further() -> None:
    core, _, [guest] = bench(3)
    for _ in range(40):
        if not core.input_room(guest.conn):
            break
        guest.send(xs.XS_READ, b"/\0")
        core.run()
    assert core.domain(3).outstanding == core.quota.outstanding
    assert core.input_room(guest.conn) == 0
    assert not core.busy
    guest.collect()
    assert core.busy
    core.run()
    guest.collect()
    assert core.domain(3).outstanding == 0
    assert len(guest.replies) == guest.number, "nothing was lost"


def test_xsa_326_unread_events_stop_their_cause_then_expire() -> None:
    core, dom0, [guest] = bench(3)
    dom0.watch("/local/domain/3")
    dom0.take_events()
    core.tick(1)
    for number in range(30):
        if core.input_room(guest.conn):
            guest.send(xs.XS_WRITE, b"n%d\0" % number)
        guest.collect()
    assert core.domain(3).outstanding == core.quota.outstanding
    deadline = core.next_deadline()
    assert deadline == 1 + EVENT_TIMEOUT_NS
    core.tick(deadline)
    assert core.busy
    core.run()
    guest.collect()
    assert len(guest.replies) == guest.number


def test_xsa_326_identical_unread_events_are_queued_once() -> None:
    core, dom0, _ = bench(3)
    dom0.watch("/x")
    dom0.take_events()
    writer = Peer(core, 1 << 21, 0)
    for number in range(1000):
        writer.write("/x", b"%d" % number)
    assert dom0.take_events() == [("/x", "t")]
    writer.write("/x", b"")
    assert dom0.take_events() == [("/x", "t")]


def test_a_reader_that_is_away_gets_one_event_a_watch_beyond_the_bound_never_none() -> None:
    core, dom0, [backend] = bench(7)
    core.quota.output = 2000
    dom0.write("/front", b"")
    dom0.chmod("/front", "r0")
    backend.watch("/front", "f")
    backend.take_events()
    for number in range(1000):
        dom0.write(f"/front/{number}", b"")
    assert core.connections[backend.conn].output < 2200
    events = backend.take_events()
    assert events[0] == ("/front/0", "f")
    assert events[-1] == ("/front", "f"), "told that something it may not have heard of changed"
    dom0.write("/front/again", b"")
    assert backend.take_events() == [("/front/again", "f")]


def test_a_domain_0_client_that_reads_nothing_stops_being_served_at_its_bound() -> None:
    core, dom0, _ = bench()
    core.quota.privileged_output = 10_000
    dom0.write("/big", b"x" * 3000)
    sent_before = dom0.number
    for _ in range(10):
        if core.input_room(dom0.conn):
            dom0.send(xs.XS_READ, b"/big\0")
    assert core.connections[dom0.conn].output < 14_000
    dom0.collect()
    core.run()
    dom0.collect()
    assert len(dom0.replies) == dom0.number - sent_before


def test_a_flood_gets_its_budget_and_others_their_turn() -> None:
    core, _, [flooder, quiet] = bench(3, 4)
    core.quota.outstanding = 1000
    message = wire.encode(xs.XS_READ, 1, 0, b"/local\0")
    core.receive(flooder.conn, message * (INPUT_MAX // len(message)))
    flooder.collect()
    assert len(flooder.replies) == core.quota.requests_a_turn
    assert quiet.error(xs.XS_READ, b"x\0") == "ENOENT"
    core.run()
    flooder.collect()
    assert len(flooder.replies) == 2 * core.quota.requests_a_turn
    while core.busy:
        core.run()
        flooder.collect()
    assert len(flooder.replies) == INPUT_MAX // len(message)


def test_a_guest_that_writes_without_end_cannot_starve_transactions() -> None:
    core, dom0, [guest] = bench(3)
    core.tick(10**9)
    tx = dom0.start()
    dom0.read("/local/domain/3", tx)
    for number in range(40):
        if core.input_room(guest.conn):
            guest.send(xs.XS_WRITE, b"spam\0%d" % number)
        guest.collect()
    assert len(guest.replies) < 15
    assert not core.busy
    deadline = core.next_deadline()
    assert deadline is not None
    core.tick(deadline)
    assert core.busy


def test_blame_records_stay_bounded_while_one_reader_sleeps() -> None:
    core, dom0, [guest] = bench(3)
    other = Peer(core, 1 << 21, 0)
    dom0.watch("/local/domain/3/a")
    other.watch("/local/domain/3")
    dom0.take_events()
    for number in range(5000):
        guest.write("a" if number == 0 else "b", b"")
        other.take_events()
    assert len(core._blamed) <= 2048


def test_xsa_115_no_event_for_what_the_watcher_may_not_read() -> None:
    _, dom0, [guest] = bench(3)
    dom0.write("/secret", b"")
    guest.watch("/secret")
    guest.watch("/")
    guest.take_events()
    dom0.write("/secret/key", b"")
    dom0.rm("/secret/key")
    tx = dom0.start()
    dom0.write("/secret/key", b"", tx)
    dom0.end(tx)
    dom0.rm("/secret")
    assert guest.take_events() == []


def test_xsa_115_who_loses_access_is_told_once_more() -> None:
    _, dom0, [guest] = bench(3)
    dom0.write("/x/y", b"")
    dom0.chmod("/x/y", "n0", "r3")
    guest.watch("/x/y")
    guest.take_events()
    dom0.chmod("/x/y", "n0")
    assert guest.take_events() == [("/x/y", "t")]
    dom0.write("/x/y", b"1")
    assert guest.take_events() == []


def test_xsa_322_a_recycled_domid_inherits_neither_permissions_nor_nodes_nor_targets() -> None:
    core, dom0, [old, _other] = bench(3, 4)
    dom0.write("/shared", b"")
    dom0.chmod("/shared", "n0", "b3")
    dom0.chmod("@introduceDomain", "n0", "r3")
    dom0.ask(xs.XS_SET_TARGET, b"4\0003\0")
    old.write("mine", b"secret")
    core.domain_died(3)
    core.domain_died(3)
    new = Peer(core, 33, 3, ring=True)
    assert new.error(xs.XS_READ, b"/shared\0") == "EACCES"
    assert dom0.error(xs.XS_READ, b"/local/domain/3/mine\0") == "ENOENT"
    assert dom0.perms("@introduceDomain") == ["n0"]
    assert core.store.check() == []


def test_xsa_322_permissions_cannot_name_a_domain_that_does_not_exist() -> None:
    core = Core(exists=lambda domid: domid == 9)
    dom0 = Peer(core, 1 << 20, 0)
    dom0.write("/x", b"")
    dom0.chmod("/x", "n0", "r9", "r10")
    assert dom0.perms("/x") == ["n0", "r9"]
    assert dom0.error(xs.XS_SET_PERMS, b"/x\0n10\0") == "ENOENT"


def test_xsa_322_an_open_transaction_cannot_bring_a_dead_domain_back() -> None:
    core, dom0, _ = bench(3)
    tx = dom0.start()
    dom0.write("/late", b"", tx)
    dom0.chmod("/late", "n0", "b3", tx=tx)
    core.domain_died(3)
    with pytest.raises(Refused, match="EAGAIN"):
        dom0.end(tx)


def test_xsa_353_nobody_removes_the_root() -> None:
    _, dom0, [guest] = bench(3)
    assert dom0.error(xs.XS_RM, b"/\0") == "EINVAL"
    assert guest.error(xs.XS_RM, b"/\0") == "EACCES"
    dom0.chmod("/", "b3")
    assert guest.error(xs.XS_RM, b"/\0") == "EINVAL"


def test_xsa_353_the_root_outlives_its_owner() -> None:
    core, dom0, _ = bench(3)
    dom0.chmod("/", "r3")
    core.domain_died(3)
    assert dom0.perms("/") == ["r0"]
    assert core.store.check() == []


def test_xsa_324_an_event_whose_payload_would_be_too_long_comes_with_the_watchs_own_path() -> None:
    _, dom0, [guest] = bench(3)
    guest.watch("x", "t" * 3000)
    guest.take_events()
    guest.write("x/y", b"")
    dom0.write("/local/domain/3/x/" + "a" * 2500, b"")
    assert guest.take_events()[0] == ("x/y", "t" * 3000)
    dom0.chmod("/local/domain/3/x/" + "a" * 2500, "n0", "r3")
    assert guest.take_events() == [("x", "t" * 3000)]


def test_xsa_325_a_domain_that_broke_its_ring_is_still_cleaned_up() -> None:
    core, dom0, [guest] = bench(3)
    guest.write("x", b"")
    core.fail(guest.conn, xs.XENSTORE_ERROR_RINGIDX, "test")
    core.domain_died(3)
    assert core.store.owned(3) == 0
    assert 3 not in core.domains
    assert guest.conn not in core.connections
    assert dom0.error(xs.XS_READ, b"/local/domain/3/x\0") == "ENOENT"


def test_xsa_418_the_deepest_tree_costs_no_stack() -> None:
    core, dom0, _ = bench()
    dom0.write("/a" * 1536, b"bottom")
    dom0.rm("/a")
    dom0.write("/a" * 1536, b"")
    dom0.chmod("/a", "n3")
    core.domain_died(3)
    assert dom0.ls("/") == ["tool"]
    assert core.store.check() == []


def test_xsa_419_cooperating_guests_leave_no_nodes_behind() -> None:
    core, _, [a, b] = bench(3, 4)
    a.mkdir("nest")
    a.chmod("nest", "b3")
    b.write("/local/domain/3/nest/of-b/x", b"")
    core.domain_died(3)
    assert core.store.owned(4) == 1, "only its home: what hung below a dead domain's node went with it"
    core.domain_died(4)
    assert core.store.check() == []
    assert core.store.usage.nodes.keys() == {0}


def test_sockets_of_a_domain_close_with_it() -> None:
    core, _, _ = bench(3)
    native = Peer(core, 1 << 21, 3)
    core.domain_died(3)
    assert native.conn not in core.connections
    assert core.receive(native.conn, b"x") == []


def test_disconnect_forgets_watches_transactions_and_waiting_requests() -> None:
    core, dom0, [guest] = bench(3)
    native = Peer(core, 1 << 21, 3)
    native.watch("x")
    native.start()
    for _ in range(30):
        native.send(xs.XS_READ, b"/\0") if core.input_room(native.conn) else None
    core.disconnect(native.conn)
    core.disconnect(native.conn)
    usage = core.domain_usage(3)
    assert usage is not None
    assert (usage["watches"], usage["transactions"], usage["outstanding"]) == (0, 0, 0)
    assert (core.open_transactions, core.busy) == (0, False)
    guest.write("x", b"")
    assert dom0.take_events() == []


def test_a_quota_object_is_the_cores_own_limits() -> None:
    core = Core(Quota(watches=1))
    core.introduce(5, ConnId(5))
    assert core.quota.watches == 1
