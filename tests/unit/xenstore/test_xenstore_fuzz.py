"""Anything that clients send, in any order, with domains coming and going: no exception, no damage, bounds kept."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore import dump
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.quota import Quota
from drivers.xenbus import wire
from tests.unit.xenstore.helper_xenstore import Peer

WORDS = st.one_of(
    st.sampled_from(
        b"/ /a /a/b a a/b /local/domain/1 /local/domain/1/a @releaseDomain //  T F 0 1 2 5 99999 -1 n0 b1 r2 check quota set".split(
            b" "
        )
    ),
    st.binary(max_size=6),
)
PAYLOADS = st.builds(
    lambda words, end: b"\0".join(words) + end,
    st.lists(WORDS, max_size=4),
    st.sampled_from([b"\0", b"", b"\0x"]),
)
REQUESTS = st.tuples(
    st.integers(0, 3), st.sampled_from([*range(xs.XS_TYPE_COUNT), xs.XS_INVALID]), st.integers(0, 4), PAYLOADS
)
EVENTS = st.sampled_from(
    ["died 1", "died 2", "introduce 1", "introduce 2", "shutdown 1", "restart", "tick", "collect"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(REQUESTS, REQUESTS, REQUESTS, EVENTS), max_size=60))
def test_any_requests_and_any_comings_and_goings(moves: list[tuple[int, int, int, bytes] | str]) -> None:
    core = Core(Quota(nodes=12, watches=4, transactions=2, memory=20_000, outstanding=5, output=500))
    for conn, domid in ((0, 0), (10, 0)):
        core.connect(ConnId(conn), domid)
    for domid in (1, 2):
        core.introduce(domid, ConnId(domid))
    core.receive(ConnId(10), wire.encode(xs.XS_WRITE, 0, 0, b"/local/domain/1\0"))
    core.receive(ConnId(10), wire.encode(xs.XS_SET_PERMS, 0, 0, b"/local/domain/1\0b1\0"))
    now = 1
    for move in moves:
        if not isinstance(move, str):
            who, kind, tx, payload = move
            conn = ConnId((0, 1, 2, 10)[who])
            data = wire.encode(kind, 7, tx, payload)
            if core.input_room(conn) >= len(data):
                core.receive(conn, data)
        elif move == "restart":
            core = dump.load(dump.dump(core))
        elif move == "tick":
            now += 10**10
            core.tick(now)
            core.run()
        elif move == "collect":
            for conn in list(core.connections):
                core.output_taken(conn, len(core.peek_output(conn)))
            core.run()
        else:
            what, name = move.split()
            domid = int(name)
            if what == "died":
                core.domain_died(domid)
            elif what == "introduce":
                core.introduce(domid, ConnId(domid))
            else:
                core.domain_shutdown(domid)
        assert core.store.check() == []
        for domid in (1, 2):
            usage = core.domain_usage(domid)
            if usage is not None:
                assert usage["watches"] <= 4 or core.quota.watches > 4
                assert usage["transactions"] <= 2 or core.quota.transactions > 2
                assert usage["outstanding"] <= 5 + 1 or core.quota.outstanding > 5
        assert core.open_transactions == sum(len(c.transactions) for c in core.connections.values())
    for domid in (1, 2):
        core.domain_died(domid)
    assert {domid for domid, count in core.store.usage.nodes.items() if count and domid in (1, 2)} == set()


@given(st.lists(st.binary(max_size=80), max_size=10), st.booleans())
def test_any_stream_of_bytes(chunks: list[bytes], ring: bool) -> None:
    core = Core()
    peer = Peer(core, 5, 5, ring=ring)
    for chunk in chunks:
        if core.input_room(peer.conn) >= len(chunk):
            core.receive(peer.conn, chunk)
    core.domain_died(5)
    assert core.store.check() == []
