"""xenstored inside Dom0: joins its core to the domains' ring pages and event channels, to the Unix socket, and to Dom0's own code."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bus.abi.grant_table import GNTTAB_RESERVED_XENSTORE
from bus.abi.io import xs_wire as xs
from bus.addresses import DomId, GrantRef, Port
from bus.log import Logger
from domains.dom0.xenstore import dump
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import AttachRing, Close, ConnId, DetachRing, Effect, Input, Log, Output
from domains.dom0.xenstore.ring_port import Pumped, RingPort
from domains.dom0.xenstore.socket_server import SocketServer
from domains.native.domain import GrantError, GrantMapping, HypercallError, NativeDomain
from drivers.xenbus.wire import Framer, encode

LOG: Final = Logger("dom0", part="xenstored")


class XenstoreError(Exception):
    """The store's answer to one of Dom0's own requests: 'ENOENT' and so on."""


@dataclass(slots=True)
class _Ring:
    domid: DomId
    port: Port
    mapping: GrantMapping
    ring: RingPort


class XenstoreService:
    """The daemon, on Dom0's reactor."""

    def __init__(
        self, host: NativeDomain, state: Path | None = None, exists: Callable[[int], bool] | None = None
    ) -> None:
        """`state`: a file from which an earlier daemon's store is taken up."""
        self._host = host
        self._exists = exists
        self._state = state
        self.core = Core(exists=exists)
        self._ids = itertools.count(1)
        self._rings: dict[ConnId, _Ring] = {}
        self._by_domain: dict[DomId, ConnId] = {}
        self._server: SocketServer | None = None
        self._listener: socket.socket | None = None
        self._local = self.new_id()
        self.core.tick(time.monotonic_ns())
        self.core.connect(self._local, 0)
        self._framer = Framer()
        self._watches: dict[bytes, Callable[[str], None]] = {}
        self._request = itertools.count(1)
        self._turning = False
        self._again: set[ConnId] = set()
        """Rings that are looked at before the next wait."""
        self._owed: dict[ConnId, None] = {}
        """Rings whose domain is to be notified when the present work is done."""
        self._depth = 0

    # ------------------------------------------------------------------ connections

    def new_id(self) -> ConnId:
        """A number for a new connection."""
        return ConnId(next(self._ids))

    def attach_socket(self, listener: socket.socket) -> None:
        """Serve a Unix socket too. Who may connect is decided by the socket file's permissions; clients act for domain 0."""
        self._listener = listener
        self._server = server = SocketServer(self.core, listener, admit=lambda uid: 0, handle=self._one)
        self._host.reactor.reader(server.fileno(), self._socket_ready)

    def restart(self) -> None:
        """Start the daemon anew from its own dump, as `xenstored --live-update` does: nodes, watches, open transactions, half requests
        and clients go on. DumpError, with the old daemon still serving, if the dump cannot be read back."""
        core = dump.load(dump.dump(self.core), exists=self._exists)
        self.core = core
        core.tick(time.monotonic_ns())
        if self._server is not None and self._listener is not None:
            listener = self._listener.dup()
            self._host.reactor.forget(self._server.fileno())
            clients = self._server.release()
            self.attach_socket(listener)
            for conn, sock in clients.items():
                self._server.adopt(sock, conn)
        for conn, ring in self._rings.items():
            ring.ring.detach()
            ring.ring = RingPort(core, conn, ring.mapping.pages[0])
            ring.ring.connect()
            self._event(conn)
            self._host.notify(ring.port)
        self._socket_ready()
        self._collect()

    def _socket_ready(self) -> None:
        if self._server is None:
            return
        self.core.tick(time.monotonic_ns())
        self._server.on_readable()
        self._schedule(self._server.turn(time.monotonic_ns()))

    def _schedule(self, delay: float | None) -> None:
        if delay is not None and not self._turning:
            self._turning = True
            self._host.reactor.after(delay, self._turn)

    def apply(self, effects: Sequence[Effect]) -> None:
        """Carry out what the core wants, and let it go on while it is busy."""
        for effect in effects:
            self._one(effect)
        if self.core.busy and not self._turning:
            self._turning = True
            self._host.reactor.soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self.core.tick(time.monotonic_ns())
        if self._server is not None:
            self._schedule(self._server.turn(time.monotonic_ns()))
        self.apply(self.core.run())
        for conn in list(self._rings):
            self._pumped(conn, self._rings[conn].ring.pump())

    def _one(self, effect: Effect) -> None:
        if isinstance(effect, Output):
            if effect.conn == self._local:
                self._collect()
            elif effect.conn in self._rings:
                self._pumped(effect.conn, self._rings[effect.conn].ring.push())
            elif self._server is not None:
                self._server.carry_out([effect])
        elif isinstance(effect, Input):
            if effect.conn in self._rings:
                self._host.reactor.soon(lambda: self._event(effect.conn))
        elif isinstance(effect, Close):
            ring = self._rings.get(effect.conn)
            if ring is not None:
                ring.ring.close(effect.error)
                self._host.notify(ring.port)
            elif self._server is not None:
                self._server.carry_out([effect])
        elif isinstance(effect, AttachRing):
            try:
                self.introduce(DomId(effect.domid), Port(effect.port))
            except (GrantError, HypercallError):
                self.apply(self.core.introduce_failed(effect.domid))
        elif isinstance(effect, DetachRing):
            self._detach(DomId(effect.domid))
        elif isinstance(effect, Log):
            LOG.info(effect.text)

    # ------------------------------------------------------------------ rings

    def introduce(self, domid: DomId, remote_port: Port) -> None:
        """Map the domain's ring by its reserved grant and serve it. GrantError, HypercallError."""
        if domid in self._by_domain:
            self.apply(self.core.introduce(domid, self._by_domain[domid]))
            return
        mapping = self._host.map_grants(domid, [GrantRef(GNTTAB_RESERVED_XENSTORE)])
        conn = self.new_id()
        ring = RingPort(self.core, conn, mapping.pages[0])
        try:
            port = self._host.bind_interdomain(domid, remote_port, lambda: self._event(conn))
        except HypercallError:
            ring.detach()
            self._host.unmap_grants(mapping)
            raise
        self._rings[conn] = _Ring(domid, port, mapping, ring)
        self._by_domain[domid] = conn
        effects = self.core.introduce(domid, conn)
        ring.connect()
        self._host.notify(port)
        self.apply(effects)
        self._event(conn)

    def _event(self, conn: ConnId) -> None:
        self.core.tick(time.monotonic_ns())
        ring = self._rings.get(conn)
        if ring is not None:
            self._pumped(conn, ring.ring.pump())

    def _pumped(self, conn: ConnId, pumped: Pumped) -> None:
        """Carry out what follows; one notification says that a request was taken and that its answer is there."""
        if pumped.notify:
            self._owed[conn] = None
            self._look_again(conn)
        self._depth += 1
        try:
            self.apply(pumped.effects)
        finally:
            self._depth -= 1
        while self._owed and not self._depth:
            conn, _ = self._owed.popitem()
            ring = self._rings.get(conn)
            if ring is not None:
                self._host.notify(ring.port)

    def _look_again(self, conn: ConnId) -> None:
        """Something moved: look once more after the domain could see it. A domain may notify only if it finds all it sent before
        taken (Linux does), or the ring full; what it decided before it saw our indexes would be lost."""
        if conn not in self._again:
            self._again.add(conn)
            self._host.reactor.soon(lambda: self._second_look(conn))

    def _second_look(self, conn: ConnId) -> None:
        self._again.discard(conn)
        self._event(conn)

    def _detach(self, domid: DomId) -> None:
        conn = self._by_domain.pop(domid, None)
        ring = self._rings.pop(conn, None) if conn is not None else None
        if ring is not None:
            ring.ring.detach()
            self._host.close_port(ring.port)
            self._host.unmap_grants(ring.mapping)

    def domain_died(self, domid: DomId) -> None:
        """The domain is no more: its connection and nodes go."""
        self.apply(self.core.domain_died(domid))
        self._detach(domid)

    def domain_shutdown(self, domid: DomId) -> None:
        """The domain has shut down: @releaseDomain fires."""
        self.apply(self.core.domain_shutdown(domid))

    # ------------------------------------------------------------------ Dom0's own requests

    def request(self, kind: int, *fields: bytes | str, tx: int = 0, raw: bytes = b"") -> bytes:
        """One request of Dom0's, answered at once. XenstoreError with the store's error name."""
        payload = b"".join((f.encode() if isinstance(f, str) else f) + b"\0" for f in fields) + raw
        number = next(self._request) & 0xFFFFFFFF
        self._reply: tuple[int, int, bytes] | None = None
        self.core.tick(time.monotonic_ns())
        self.apply(self.core.receive(self._local, encode(kind, number, tx, payload)))
        for _ in range(10_000):
            self._collect()
            if self._reply is not None and self._reply[1] == number:
                break
            self.apply(self.core.run())
        if self._reply is None or self._reply[1] != number:
            raise XenstoreError("EIO")
        answered, _, data = self._reply
        if answered == xs.XS_ERROR:
            raise XenstoreError(data.rstrip(b"\0").decode("ascii", "replace"))
        return data

    def _collect(self) -> None:
        data = self.core.peek_output(self._local)
        if not data:
            return
        self.core.output_taken(self._local, len(data))
        self._framer.feed(data)
        while (message := self._framer.take()) is not None:
            if message.type == xs.XS_WATCH_EVENT:
                path, token = message.payload.split(b"\0")[:2]
                callback = self._watches.get(token)
                if callback is not None:
                    text = path.decode()
                    self._host.reactor.soon(lambda callback=callback, text=text: callback(text))  # type: ignore[misc]  # defaults bind now
            else:
                self._reply = (message.type, message.req_id, message.payload)

    def read(self, path: str) -> str | None:
        """A node's value, or None if there is none."""
        try:
            return self.request(xs.XS_READ, path).decode("utf-8", "replace")
        except XenstoreError:
            return None

    def write(self, path: str, value: str) -> None:
        """Write one node."""
        self.request(xs.XS_WRITE, path, raw=value.encode())

    def list(self, path: str) -> list[str]:
        """Names of a node's children; empty if there is no such node."""
        try:
            data = self.request(xs.XS_DIRECTORY, path)
        except XenstoreError:
            return []
        return [name.decode() for name in data.split(b"\0") if name]

    def mkdir(self, path: str) -> None:
        """Create a node."""
        self.request(xs.XS_MKDIR, path)

    def remove(self, path: str) -> None:
        """Remove a node and all below; none there is no error."""
        try:
            self.request(xs.XS_RM, path)
        except XenstoreError as error:
            if str(error) != "ENOENT":
                raise

    def permit(self, path: str, *perms: str) -> None:
        """Set a node's permissions: 'n0', 'r5' ..."""
        self.request(xs.XS_SET_PERMS, path, *perms)

    def watch(self, path: str, callback: Callable[[str], None]) -> None:
        """Call back with the path whenever something at or below it changes (and once now)."""
        token = f"dom0-{len(self._watches)}".encode()
        self._watches[token] = callback
        self.request(xs.XS_WATCH, path, token)
