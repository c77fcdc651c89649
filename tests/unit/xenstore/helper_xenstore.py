"""A bench for the core: connections by domain, one request at a time, and what comes back."""

from __future__ import annotations

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.effects import ConnId, Effect
from drivers.xenbus import wire


class Refused(Exception):
    """An error reply; str() is its name."""


class Peer:
    """One client."""

    def __init__(self, core: Core, conn: int, domid: int, *, ring: bool = False) -> None:
        self.core, self.conn, self.domid = core, ConnId(conn), domid
        if ring:
            core.introduce(domid, self.conn)
        else:
            core.connect(self.conn, domid)
        self.framer = wire.Framer()
        self.events: list[tuple[str, str]] = []
        self.replies: list[wire.Message] = []
        self.effects: list[Effect] = []
        self.number = 0

    def send(self, kind: int, payload: bytes, tx: int = 0) -> int:
        self.number += 1
        self.effects += self.core.receive(self.conn, wire.encode(kind, self.number, tx, payload))
        return self.number

    def collect(self) -> None:
        """Take all output; sort it into replies and events."""
        while data := self.core.peek_output(self.conn):
            self.core.output_taken(self.conn, len(data))
            self.framer.feed(data)
        while message := self.framer.take():
            if message.type == xs.XS_WATCH_EVENT:
                path, token, rest = message.payload.split(b"\0")
                assert rest == b""
                assert (message.req_id, message.tx_id) == (0, 0)
                self.events.append((path.decode(), token.decode()))
            else:
                self.replies.append(message)

    def ask(self, kind: int, payload: bytes, tx: int = 0) -> bytes:
        number = self.send(kind, payload, tx)
        self.collect()
        reply = self.replies.pop(0)
        assert (reply.req_id, reply.tx_id) == (number, tx)
        if reply.type == xs.XS_ERROR:
            assert reply.payload.endswith(b"\0")
            raise Refused(reply.payload[:-1].decode())
        assert reply.type == kind
        return reply.payload

    def error(self, kind: int, payload: bytes, tx: int = 0) -> str:
        """The name of the error that the request gets; "" if it is served."""
        try:
            self.ask(kind, payload, tx)
        except Refused as refused:
            return str(refused)
        return ""

    def read(self, path: str, tx: int = 0) -> bytes:
        return self.ask(xs.XS_READ, path.encode() + b"\0", tx)

    def write(self, path: str, value: bytes, tx: int = 0) -> None:
        assert self.ask(xs.XS_WRITE, path.encode() + b"\0" + value, tx) == b"OK\0"

    def mkdir(self, path: str, tx: int = 0) -> None:
        assert self.ask(xs.XS_MKDIR, path.encode() + b"\0", tx) == b"OK\0"

    def rm(self, path: str, tx: int = 0) -> None:
        assert self.ask(xs.XS_RM, path.encode() + b"\0", tx) == b"OK\0"

    def ls(self, path: str, tx: int = 0) -> list[str]:
        return [n.decode() for n in wire.split_strings(self.ask(xs.XS_DIRECTORY, path.encode() + b"\0", tx))]

    def perms(self, path: str) -> list[str]:
        return [n.decode() for n in wire.split_strings(self.ask(xs.XS_GET_PERMS, path.encode() + b"\0"))]

    def chmod(self, path: str, *perms: str, tx: int = 0) -> None:
        self.ask(xs.XS_SET_PERMS, b"".join(p.encode() + b"\0" for p in (path, *perms)), tx)

    def watch(self, path: str, token: str = "t") -> None:
        self.ask(xs.XS_WATCH, f"{path}\0{token}\0".encode())

    def unwatch(self, path: str, token: str = "t") -> None:
        self.ask(xs.XS_UNWATCH, f"{path}\0{token}\0".encode())

    def start(self) -> int:
        return int(self.ask(xs.XS_TRANSACTION_START, b"\0")[:-1])

    def end(self, tx: int, commit: bool = True) -> None:
        self.ask(xs.XS_TRANSACTION_END, b"T\0" if commit else b"F\0", tx)

    def take_events(self) -> list[tuple[str, str]]:
        self.collect()
        events, self.events = self.events, []
        return events


def bench(*guests: int) -> tuple[Core, Peer, list[Peer]]:
    """(core, domain 0, ring clients of these domains with a home of their own)."""
    core = Core()
    dom0 = Peer(core, 1 << 20, 0)
    peers = []
    for domid in guests:
        dom0.write(f"/local/domain/{domid}", b"")
        dom0.chmod(f"/local/domain/{domid}", f"n{domid}")
        peers.append(Peer(core, domid, domid, ring=True))
    return core, dom0, peers
