"""The core's state as bytes and back, so that it survives a restart of xenstored.

msgpack; version 1. Kept: the tree, generations, quotas, domains, connections with half received and not
yet sent messages, watches, open transactions. Lost by design: who is to blame for waiting events, write
credit. An INTRODUCE that waited for the shell is answered EAGAIN: it can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgpack

from bus.abi.io.xs_wire import XS_ERROR
from domains.dom0.xenstore.connections import Connection, Item, Origin
from domains.dom0.xenstore.core import INPUT_MAX, Core
from domains.dom0.xenstore.effects import ConnId
from domains.dom0.xenstore.errors import DumpError
from domains.dom0.xenstore.paths import ROOT, is_valid
from domains.dom0.xenstore.perms import DOMID_MAX, Perm, Perms
from domains.dom0.xenstore.quota import QUOTA_NAMES
from domains.dom0.xenstore.store import Node, Store
from domains.dom0.xenstore.transaction import Entry, Transaction
from drivers.xenbus.wire import encode

VERSION: Final = 1
MAGIC: Final = "domicile-xenstore"


def dump(core: Core) -> bytes:
    """The whole state of the store: everything that `load` needs."""
    state = {
        "magic": MAGIC,
        "version": VERSION,
        "quota": {name: getattr(core.quota, name) for name in QUOTA_NAMES},
        "generation": core.store.generation,
        "next_transaction": core.next_transaction,
        "nodes": [[path, *_node(node)] for path, node in core.store.nodes.items()],
        "special": [[name, list(perms)] for name, perms in core.store.special.items()],
        "domains": [[d.domid, d.introduced, d.conn, d.shutdown, d.target] for d in core.domains.values()],
        "connections": [_connection(core, conn) for conn in core.connections.values()],
        "watches": [
            [w.serial, w.conn, w.path, w.token, w.prefix]
            for c in core.connections
            for w in core.watches.of(c)
        ],
    }
    packed: bytes = msgpack.packb(state)
    return packed


def load(data: bytes, exists: Callable[[int], bool] | None = None) -> Core:
    """A core in the state that `dump` gave; `exists`: whether a domain is there. DumpError if the bytes are damaged or of another version.

    The shell calls `disconnect` for connections that it no longer has, attaches rings again, and sends what `peek_output` has for each of
    the others.
    """
    core = Core(exists=exists)
    try:
        state = msgpack.unpackb(data, raw=False, strict_map_key=True)
        if state["magic"] != MAGIC or state["version"] != VERSION:
            raise DumpError(f"not a state dump of version {VERSION}")
        _load(state, core)
    except DumpError:
        raise
    except Exception as error:  # any shape of damage ends in this one error: msgpack alone raises six kinds
        raise DumpError(f"damaged state dump: {type(error).__name__}: {error}") from None
    wrong = core.store.check()
    if wrong or ROOT not in core.store.nodes:
        raise DumpError(f"damaged state dump: {wrong[0] if wrong else 'no root'}")
    return core


def _node(node: Node) -> list[Any]:
    return [node.value, list(node.perms), list(node.children), node.generation]


def _entry(path: bytes, entry: Entry) -> list[Any]:
    base = None if entry.base is None else _node(entry.base)
    node = None if entry.node is None else _node(entry.node)
    return [path, base, entry.changed, node if entry.changed else None]


def _connection(core: Core, conn: Connection) -> list[Any]:
    items = [[item.data, item.event] for item in conn.items]
    for waiting in core.introductions.values():
        for ident, message in waiting:
            if ident == conn.ident:
                items.append([encode(XS_ERROR, message.req_id, message.tx_id, b"EAGAIN\0"), False])
    transactions = [
        [
            tx.ident,
            tx.doomed,
            [_entry(p, e) for p, e in tx.entries.items()],
            [list(e) for e in tx.events.items()],
        ]
        for tx in conn.transactions.values()
    ]
    return [
        conn.ident,
        conn.domain.domid,
        conn.ring,
        conn.ignored,
        conn.input.raw(),
        items,
        conn.head,
        transactions,
    ]


def _perms(raw: Any) -> Perms:
    perms = tuple(Perm(int(domid), int(bits)) for domid, bits in raw)
    if not perms or any(not (0 <= perm.domid <= DOMID_MAX and 0 <= perm.bits <= 3) for perm in perms):
        raise DumpError("damaged state dump: permissions")
    return perms


def _read_node(raw: Any) -> Node:
    value, perms, children, generation = raw
    names = dict.fromkeys(bytes(name) for name in children)
    return Node(bytes(value), _perms(perms), names, sum(len(name) + 1 for name in names), int(generation))


def _load(state: Any, core: Core) -> None:
    for name in QUOTA_NAMES:
        setattr(core.quota, name, int(state["quota"][name]))
    core.store = Store()
    core.store.nodes.clear()
    core.store.usage.nodes.clear()
    core.store.usage.memory.clear()
    for path, *raw in state["nodes"]:
        if not is_valid(path):
            raise DumpError(f"damaged state dump: path {path!r}")
        node = core.store.nodes[path] = _read_node(raw)
        core.store.usage.add(path, node, 1)
    core.store.generation = int(state["generation"])
    core.store.special = {bytes(name): _perms(perms) for name, perms in state["special"]}
    core.next_transaction = int(state["next_transaction"])
    for domid, introduced, conn, shutdown, target in state["domains"]:
        domain = core.domain(int(domid))
        domain.introduced, domain.shutdown = bool(introduced), bool(shutdown)
        domain.conn, domain.target = None if conn is None else ConnId(conn), target
    for raw in state["connections"]:
        _load_connection(core, raw)
    for _, conn, path, token, prefix in sorted(state["watches"]):
        watch = core.watches.add(core.connections[ConnId(conn)].ident, bytes(path), bytes(token), int(prefix))
        if watch is None:
            raise DumpError("damaged state dump: two equal watches")
        owner = core.connections[watch.conn].domain
        owner.watches += 1
        owner.watch_bytes += watch.cost


def _load_connection(core: Core, raw: Any) -> None:
    ident, domid, ring, ignored, received, items, head, transactions = raw
    conn = Connection(ConnId(ident), core.domain(int(domid)), ring=bool(ring))
    if len(received) > INPUT_MAX:
        raise DumpError("damaged state dump: too much input")
    core.connections[conn.ident] = conn
    conn.ignored = bool(ignored)
    conn.input.feed(received)
    for data, event in items:
        conn.push(Item(bytes(data), None if event else Origin(conn.domain), bool(event)))
    if head:
        if not conn.items or not 0 < head < len(conn.items[0].data):
            raise DumpError("damaged state dump: more sent than there was")
        conn.taken(int(head))
    for number, doomed, entries, events in transactions:
        limit = core.quota.transaction_nodes if domid != 0 else None
        tx = conn.transactions[int(number)] = Transaction(int(number), core.store, limit)
        tx.doomed = bool(doomed)
        tx.events = {bytes(path): bool(exact) for path, exact in events}
        for path, base, changed, node in entries:
            tx.restore(bytes(path), base and _read_node(base), bool(changed), node and _read_node(node))
        core.open_transactions += 1
    core.resume(conn)
