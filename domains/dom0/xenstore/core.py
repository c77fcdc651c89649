"""xenstored without I/O: bytes of clients in, effects out.

A shell numbers its connections, feeds what clients send, and sends what the core queued for them::

    core.tick(now_ns)                    # first in every turn of the shell's loop
    effects = core.receive(conn, data)   # at most core.input_room(conn) bytes
    effects = core.run()                 # once a turn, while core.busy
    data = core.peek_output(conn, n); core.output_taken(conn, sent)

Order: the reply to a request is queued before the watch events that the request causes; events of one
request keep the order of its changes. A client is served `quota.requests_a_turn` requests a turn. A domain
with `quota.outstanding` requests whose consequences (its reply; events at other clients) nobody took is
not served; after 20 s others' events no longer count. Each queue is bounded: when a client does not take
its events, further ones become one event a watch, at the watch's own path (a watch may fire spuriously,
never silently not).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from bus.abi.io.xs_wire import (
    XENSTORE_ERROR_COMM,
    XENSTORE_ERROR_PROTO,
    XENSTORE_PAYLOAD_MAX,
    XS_ERROR,
    XS_WATCH_EVENT,
)
from domains.dom0.xenstore import paths
from domains.dom0.xenstore.connections import Connection, Domain, Item, Origin
from domains.dom0.xenstore.effects import AttachRing, Close, ConnId, DetachRing, Effect, Input, Output
from domains.dom0.xenstore.errors import XsError
from domains.dom0.xenstore.operations import Caller, Change, Limits, remove_subtree
from domains.dom0.xenstore.perms import READ, Perm, Perms, access, without
from domains.dom0.xenstore.quota import EVENT_TIMEOUT_NS, WRITE_BURST, WRITE_RATE, Quota
from domains.dom0.xenstore.requests import REQUESTS
from domains.dom0.xenstore.store import Store, walk_down
from domains.dom0.xenstore.transaction import Transaction
from domains.dom0.xenstore.watches import Watch, WatchTable
from drivers.xenbus.wire import HEADER, MESSAGE_MAX, Message, WireError, encode

INPUT_MAX: Final = 4 * MESSAGE_MAX
"""Bytes that a connection may have fed without being served."""


class Core:
    """The daemon's state and everything that changes it."""

    def __init__(self, quota: Quota | None = None, exists: Callable[[int], bool] | None = None) -> None:
        """`exists` says whether a domain exists, for permissions that name it (None: every one does)."""
        self.quota: Final = quota or Quota()
        self.store = Store()
        self.watches = WatchTable()
        self.connections: dict[ConnId, Connection] = {}
        self.domains: dict[int, Domain] = {}
        self.next_transaction = 1
        self.open_transactions = 0
        self.now_ns = 0
        self._exists: Final = exists
        self._effects: list[Effect] = []
        self._announced: dict[ConnId, None] = {}
        self._changes: list[Change] = []
        self._first_events: list[Watch] = []
        self._waiting: dict[ConnId, None] = {}
        """Connections that have a whole request to serve, longest waiting first."""
        self._blamed: deque[tuple[int, Item]] = deque()
        """(when its origin is no longer blamed, event): in order of time."""
        self._blamed_limit = 1024
        """Longer than this, entries of events that were taken are thrown out."""
        self.introductions: dict[int, list[tuple[ConnId, Message]]] = {}
        """INTRODUCE requests that wait for the shell."""

    # ---- connections

    def connect(self, conn: ConnId, domid: int) -> None:
        """A client connected that is (or acts for) this domain, by a socket. ValueError if the number is
        in use.
        """
        if conn in self.connections:
            raise ValueError(f"connection {conn} exists")
        self.connections[conn] = Connection(conn, self.domain(domid), ring=False)

    def disconnect(self, conn: ConnId) -> None:
        """The client is gone. Its watches and transactions go with it."""
        connection = self.connections.get(conn)
        if connection is not None:
            self._drop(connection)

    def reset(self, conn: ConnId) -> list[Effect]:
        """The client of a ring reconnected: as new, with no watches, transactions, and nothing half sent."""
        connection = self.connections.get(conn)
        if connection is not None:
            self._clear(connection)
            connection.ignored = False
        return self._flush()

    def fail(self, conn: ConnId, error: int, reason: str) -> list[Effect]:
        """The shell found the connection broken (XENSTORE_ERROR_*): drop it, but keep a ring's domain
        introduced.
        """
        connection = self.connections.get(conn)
        if connection is not None:
            self._break(connection, error, reason)
        return self._flush()

    def input_room(self, conn: ConnId) -> int:
        """How many bytes `receive` takes of this connection now; 0 while it has requests that must wait."""
        connection = self.connections.get(conn)
        if connection is None or connection.ignored or conn in self._waiting:
            return 0
        return INPUT_MAX - len(connection.input)

    def receive(self, conn: ConnId, data: bytes) -> list[Effect]:
        """Bytes that a client sent; serves up to one turn's requests. ValueError if there are more than
        `input_room`.
        """
        connection = self.connections.get(conn)
        if connection is None or connection.ignored:
            return []
        if len(data) > INPUT_MAX - len(connection.input):
            raise ValueError("more bytes than input_room() allows")
        connection.input.feed(data)
        self._turn(connection)
        return self._flush()

    @property
    def busy(self) -> bool:
        """`run` would serve something now."""
        return any(not self._throttled(self.connections[conn]) for conn in self._waiting)

    def run(self) -> list[Effect]:
        """One turn for every connection that has requests left and may be served."""
        for conn in list(self._waiting):
            connection = self.connections.get(conn)
            if connection is not None and not self._throttled(connection):
                self._turn(connection)
        return self._flush()

    def resume(self, conn: Connection) -> None:
        """A connection was loaded from a dump: go on where it was."""
        if conn.input.ready and not conn.ignored:
            self._waiting[conn.ident] = None

    def tick(self, now_ns: int) -> None:
        """The time is `now_ns` (monotonic): waits end, write credit grows."""
        elapsed = now_ns - self.now_ns
        if elapsed > 0:
            self.now_ns = now_ns
            share = elapsed * WRITE_RATE / 1e9 / max(1, len(self.domains))
            for domain in self.domains.values():
                if domain.credit < WRITE_BURST:
                    domain.credit = min(float(WRITE_BURST), domain.credit + share)
        while self._blamed and (self._blamed[0][0] <= now_ns or self._blamed[0][1].origin is None):
            self._blamed.popleft()[1].settle()

    def next_deadline(self) -> int | None:
        """When `tick` should be called at the latest, in ns of the same clock; None: no matter when."""
        if not self._waiting:
            return None
        deadlines = [self._blamed[0][0]] if self._blamed else []
        poor = [d.credit for c in self._waiting if (d := self.connections[c].domain).credit < 0]
        if poor:
            deadlines.append(self.now_ns + int(-max(poor) * len(self.domains) / WRITE_RATE * 1e9) + 1_000_000)
        return min(deadlines, default=None)

    def peek_output(self, conn: ConnId, limit: int = 65536) -> bytes:
        """The next bytes for the client, at most `limit`; they stay queued until `output_taken`."""
        connection = self.connections.get(conn)
        return b"" if connection is None else connection.peek(limit)

    def output_taken(self, conn: ConnId, count: int) -> None:
        """The first `count` bytes of `peek_output` are on their way. May make the core `busy`."""
        connection = self.connections.get(conn)
        if connection is not None:
            if not 0 <= count <= connection.output:
                raise ValueError("more bytes taken than were queued")
            connection.taken(count)

    # ---- domains

    def introduce(self, domid: int, conn: ConnId) -> list[Effect]:
        """The domain's ring is attached and is this connection. A domain that was introduced before has
        its connection reset; else @introduceDomain fires. Requesters of INTRODUCE get their reply.
        """
        domain = self.domain(domid)
        if domain.introduced and domain.conn == conn:
            self._clear(self.connections[conn])
            self.connections[conn].ignored = False
        else:
            if conn in self.connections:
                raise ValueError(f"connection {conn} exists")
            if domain.conn is not None:
                self._drop(self.connections[domain.conn])
            self.connections[conn] = Connection(conn, domain, ring=True)
            domain.conn = conn
            if not domain.introduced and domid != 0:
                self._fire_special(paths.INTRODUCE_DOMAIN)
            domain.introduced = True
        self._answer_introductions(domid, None)
        self._fire()
        return self._flush()

    def introduce_failed(self, domid: int, error: str = "EINVAL") -> list[Effect]:
        """The ring could not be attached: requesters of INTRODUCE get this error."""
        self._answer_introductions(domid, error)
        return self._flush()

    def release(self, domid: int) -> list[Effect]:
        """As the request RELEASE."""
        self.forget(domid)
        self._fire()
        return self._flush()

    def domain_died(self, domid: int) -> list[Effect]:
        """The domain is no more. Its connections close, its nodes go, and nobody who gets its number later
        inherits what was granted to it (XSA-322, XSA-417, XSA-419).
        """
        return self.release(domid)

    def domain_shutdown(self, domid: int) -> list[Effect]:
        """The domain has shut down or crashed but still exists: @releaseDomain fires, once (until RESUME)."""
        domain = self.domains.get(domid)
        if domain is not None and domain.introduced and not domain.shutdown:
            domain.shutdown = True
            self._fire_special(paths.RELEASE_DOMAIN)
            self._fire()
        return self._flush()

    # ---- for the handlers of requests (requests.py, control.py)

    def domain(self, domid: int) -> Domain:
        """The record of a domain, made if there is none."""
        found = self.domains.get(domid)
        if found is None:
            found = self.domains[domid] = Domain(domid)
        return found

    def emit(self, effect: Effect) -> None:
        """One more effect."""
        self._effects.append(effect)

    def caller(self, conn: Connection, tx: Transaction | None) -> Caller:
        """Who asks, and within which limits. XsError ENOMEM if the domain costs too much to be served at
        all."""
        domain = conn.domain
        if domain.domid == 0:
            return Caller(0, domain.target, None)
        room = self.quota.memory - domain.watch_bytes
        room -= (self.store if tx is None else tx).memory(domain.domid)
        if self.open_transactions:
            room -= sum(
                t.cost
                for c in self.connections.values()
                if c.domain is domain
                for t in c.transactions.values()
            )
            if tx is not None and room < 0:
                raise XsError("ENOMEM")
        limits = Limits(self.quota.nodes, self.quota.node_size, self.quota.permissions, room)
        return Caller(domain.domid, domain.target, limits)

    def note(self, tx: Transaction | None, changes: list[Change]) -> None:
        """Changes happened: in a transaction their events wait for its commit."""
        if tx is None:
            self._changes += changes
        else:
            for change in changes:
                tx.note(change.path, change.exact)

    def domain_exists(self, domid: int) -> bool:
        """Whether permissions may name the domain."""
        return domid == 0 or domid in self.domains or self._exists is None or self._exists(domid)

    def is_introduced(self, domid: int) -> bool:
        """Whether the domain was introduced and not released. Domain 0 is from the start, as with Xen's own daemon."""
        domain = self.domains.get(domid)
        return domid == 0 or (domain is not None and domain.introduced)

    def special_perms(self, conn: Connection, name: bytes) -> Perms:
        """Permissions of a special event. XsError EINVAL (no such event), EACCES."""
        listed = self.store.special.get(name)
        if listed is None:
            raise XsError("EINVAL")
        if not access(listed, conn.domain.domid, conn.domain.target) & READ:
            raise XsError("EACCES")
        return listed

    def add_watch(self, conn: Connection, path: bytes, token: bytes, prefix: int) -> None:
        """Register a watch; it fires once, after the reply. XsError EEXIST, E2BIG, ENOMEM."""
        domain = conn.domain
        if domain.domid != 0 and domain.watches >= self.quota.watches:
            raise XsError("E2BIG")
        who = self.caller(conn, None)
        watch = self.watches.add(conn.ident, path, token, prefix)
        if watch is None:
            raise XsError("EEXIST")
        if who.limits is not None and watch.cost > who.limits.memory_room:
            self.watches.remove(conn.ident, path, token)
            raise XsError("ENOMEM")
        domain.watches += 1
        domain.watch_bytes += watch.cost
        self._first_events.append(watch)

    def remove_watch(self, conn: Connection, path: bytes, token: bytes) -> None:
        """XsError ENOENT."""
        watch = self.watches.remove(conn.ident, path, token)
        if watch is None:
            raise XsError("ENOENT")
        self._uncount(conn, [watch])

    def drop_watches(self, conn: Connection) -> None:
        """Remove all watches of a connection."""
        self._uncount(conn, self.watches.remove_all(conn.ident))

    def drop_transactions(self, conn: Connection) -> None:
        """Abandon all transactions of a connection."""
        self.open_transactions -= len(conn.transactions)
        conn.transactions.clear()

    def start_transaction(self, conn: Connection) -> int:
        """A new transaction's number. XsError ENOSPC."""
        limited = conn.domain.domid != 0
        if limited:
            mine = sum(len(c.transactions) for c in self.connections.values() if c.domain is conn.domain)
            if mine >= self.quota.transactions:
                raise XsError("ENOSPC")
        while self.next_transaction == 0 or self.next_transaction in conn.transactions:
            self.next_transaction = (self.next_transaction + 1) & 0xFFFFFFFF
        ident = self.next_transaction
        self.next_transaction = (ident + 1) & 0xFFFFFFFF
        conn.transactions[ident] = Transaction(
            ident, self.store, self.quota.transaction_nodes if limited else None
        )
        self.open_transactions += 1
        return ident

    def end_transaction(self, conn: Connection, tx: Transaction, commit: bool) -> None:
        """End a transaction, whatever the outcome. XsError EAGAIN, ENOSPC as of `Transaction.commit`."""
        del conn.transactions[tx.ident]
        self.open_transactions -= 1
        if not commit:
            return
        before = {
            path: tuple(
                node.perms
                for above in (path, paths.parent(path))
                if (node := self.store.get(above)) is not None
            )
            for path in tx.events
        }
        tx.commit(self.quota.nodes if conn.domain.domid != 0 else None)
        for path, exact in tx.events.items():
            node, above = self.store.get(path), self.store.get(paths.parent(path))
            now = (node.perms, above.perms) if node is not None and above is not None else ()
            self._changes.append(Change(path, exact, before[path] + now))

    def ask_introduction(self, conn: Connection, message: Message, effect: AttachRing) -> None:
        """INTRODUCE: the shell does it; the reply comes with `introduce` or `introduce_failed`."""
        self.introductions.setdefault(effect.domid, []).append((conn.ident, message))
        self._effects.append(effect)

    def forget(self, domid: int) -> None:
        """Release a domain: close its connections, remove what it owns and what was granted to it."""
        if domid == 0:
            raise ValueError("domain 0 is never released")
        domain = self.domains.get(domid)
        ring = None if domain is None else domain.conn
        if domain is not None:
            for connection in [c for c in self.connections.values() if c.domain is domain]:
                if connection.ring or connection.ignored:
                    self._drop(connection)
                else:
                    self._break(connection, XENSTORE_ERROR_COMM, f"domain {domid} is no more")
        self._answer_introductions(domid, "EINVAL")
        for other in self.domains.values():
            if other.target == domid:
                other.target = None
        for connection in self.connections.values():
            for tx in connection.transactions.values():
                tx.doomed = tx.doomed or tx.touches_domain(domid)
        self._remove_domain_from_tree(domid)
        if domain is not None:
            if domain.introduced:
                self._effects.append(DetachRing(domid, ring))
                self._fire_special(paths.RELEASE_DOMAIN)
            del self.domains[domid]

    def domain_usage(self, domid: int) -> dict[str, int] | None:
        """What a domain uses of its quotas; None if xenstored knows nothing of it."""
        domain = self.domains.get(domid)
        if domain is None:
            return None
        open_here = [
            tx for c in self.connections.values() if c.domain is domain for tx in c.transactions.values()
        ]
        return {
            "nodes": self.store.owned(domid),
            "watches": domain.watches,
            "transactions": len(open_here),
            "outstanding": domain.outstanding,
            "memory": self.store.memory(domid) + domain.watch_bytes + sum(tx.cost for tx in open_here),
        }

    # ---- inside

    def _remove_domain_from_tree(self, domid: int) -> None:
        for path, node in walk_down(self.store, paths.ROOT):
            if not any(perm.domid == domid for perm in node.perms) or path not in self.store.nodes:
                continue
            if node.perms[0].domid == domid and path != paths.ROOT:
                self._changes += remove_subtree(self.store, path)
            else:
                kept = without(self.store.nodes[path].perms, domid)
                owner = Perm(0, kept[0].bits) if kept[0].domid == domid else kept[0]
                self.store.put(path, self.store.nodes[path].with_perms((owner, *kept[1:])))
        for name, listed in self.store.special.items():
            kept = without(listed, domid)
            self.store.special[name] = (Perm(0, 0) if kept[0].domid == domid else kept[0], *kept[1:])
        self.store.usage.forget_empty(domid)

    def _throttled(self, conn: Connection) -> bool:
        domain = conn.domain
        if domain.domid == 0:
            return conn.output >= self.quota.privileged_output
        return domain.outstanding >= self.quota.outstanding or domain.credit < 0

    def _turn(self, conn: Connection) -> None:
        waited = conn.ident in self._waiting
        self._waiting.pop(conn.ident, None)
        for _ in range(self.quota.requests_a_turn):
            if not conn.input.ready or self._throttled(conn):
                break
            try:
                message = conn.input.take()
            except WireError as error:
                self._break(conn, XENSTORE_ERROR_PROTO, str(error))
                return
            if message is not None:
                self._serve(conn, message)
            if conn.ignored or conn.ident not in self.connections:
                return
        if conn.input.ready:
            self._waiting[conn.ident] = None
        elif waited:
            self._effects.append(Input(conn.ident))

    def _serve(self, conn: Connection, message: Message) -> None:
        origin = Origin(conn.domain)
        others = self.open_transactions - len(conn.transactions)
        try:
            payload = self._answer(conn, message)
        except XsError as error:
            self._reply(conn, XS_ERROR, message, error.name.encode() + b"\0", origin)
        else:
            if payload is not None:
                self._reply(conn, message.type, message, payload, origin)
        if self._changes or self._first_events:
            if others and self._changes and conn.domain.domid != 0:
                conn.domain.credit -= 1
            self._fire(origin)

    def _answer(self, conn: Connection, message: Message) -> bytes | None:
        entry = REQUESTS.get(message.type)
        if entry is None:
            raise XsError("ENOSYS")
        if entry.privileged and conn.domain.domid != 0:
            raise XsError("EACCES")
        tx = None
        if message.tx_id and not entry.ignores_transaction:
            tx = conn.transactions.get(message.tx_id)
            if tx is None:
                raise XsError("ENOENT")
        return entry.serve(self, conn, tx, message)

    def _reply(self, conn: Connection, kind: int, message: Message, payload: bytes, origin: Origin) -> None:
        if len(payload) > XENSTORE_PAYLOAD_MAX:
            kind, payload = XS_ERROR, b"E2BIG\0"
        data = HEADER.pack(kind, message.req_id, message.tx_id, len(payload)) + payload
        conn.push(Item(data, origin, event=False))
        self._announced[conn.ident] = None

    def _fire(self, origin: Origin | None = None) -> None:
        """Queue the events of what changed, and the first event of each new watch."""
        changes, self._changes = self._changes, []
        for change in changes:
            for watch in self.watches.matching(change.path, change.exact):
                conn = self.connections[watch.conn]
                domid, target = conn.domain.domid, conn.domain.target
                if domid == 0 or any(access(perms, domid, target) & READ for perms in change.seen_by):
                    self._event(conn, watch, change.path, origin)
        first, self._first_events = self._first_events, []
        for watch in first:
            self._event(self.connections[watch.conn], watch, watch.path, origin)

    def _event(self, conn: Connection, watch: Watch, path: bytes, origin: Origin | None) -> None:
        payload = watch.event(path)
        limit = self.quota.output if conn.domain.domid != 0 else self.quota.privileged_output
        if conn.output + len(payload) > limit or len(payload) > XENSTORE_PAYLOAD_MAX:
            payload = watch.event(watch.path)
        if conn.ignored:
            return
        data = encode(XS_WATCH_EVENT, 0, 0, payload)
        if data in conn.queued:
            return
        # Domain 0 is never throttled, so nobody keeps account of what it causes.
        blamed = origin if origin is not None and origin.domain.domid != 0 else None
        item = Item(data, blamed, event=True)
        conn.push(item)
        if blamed is not None:
            self._blamed.append((self.now_ns + EVENT_TIMEOUT_NS, item))
            if len(self._blamed) > self._blamed_limit:
                self._blamed = deque(entry for entry in self._blamed if entry[1].origin is not None)
                self._blamed_limit = 2 * len(self._blamed) + 1024
        self._announced[conn.ident] = None

    def _fire_special(self, name: bytes) -> None:
        self._changes.append(Change(name, True, (self.store.special[name],)))

    def _answer_introductions(self, domid: int, error: str | None) -> None:
        for ident, message in self.introductions.pop(domid, []):
            conn = self.connections.get(ident)
            if conn is not None and not conn.ignored:
                payload = b"OK\0" if error is None else error.encode() + b"\0"
                self._reply(
                    conn, message.type if error is None else XS_ERROR, message, payload, Origin(conn.domain)
                )

    def _uncount(self, conn: Connection, watches: list[Watch]) -> None:
        conn.domain.watches -= len(watches)
        conn.domain.watch_bytes -= sum(watch.cost for watch in watches)

    def _clear(self, conn: Connection) -> None:
        self.drop_watches(conn)
        self.drop_transactions(conn)
        conn.clear()
        self._waiting.pop(conn.ident, None)
        self._announced.pop(conn.ident, None)
        self._first_events = [watch for watch in self._first_events if watch.conn != conn.ident]

    def _break(self, conn: Connection, error: int, reason: str) -> None:
        """The client broke the protocol. A ring stays known (its domain lives) but is not listened to; a
        socket is gone.
        """
        self._clear(conn)
        conn.ignored = True
        if not conn.ring:
            self._drop(conn)
        self._effects.append(Close(conn.ident, error, reason))

    def _drop(self, conn: Connection) -> None:
        self._clear(conn)
        self.connections.pop(conn.ident, None)
        domain = conn.domain
        if conn.ident == domain.conn:
            domain.conn = None

    def _flush(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        effects += [Output(conn) for conn in self._announced]
        self._announced = {}
        return effects
