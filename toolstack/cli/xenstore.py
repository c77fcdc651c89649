"""The machine's xenstored over its Unix socket, for the command: one request at a time, with a bound on each wait."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Final, TypeVar

from drivers.xenbus import client as xs
from toolstack.cli.state import state
from toolstack.errors import InputError, MachineError, MachineGone, TimedOut
from toolstack.machine import runtime_directory

T = TypeVar("T")
REPLY_TIMEOUT_S: Final = 10.0
MENDS: Final = {
    "ENOENT": "no such node",
    "EINVAL": "not a path (use /, letters, digits, '-', '_', '@', ':')",
    "EACCES": "permission denied",
    "ENOSPC": "over a quota of xenstored",
    "E2BIG": "too long: a request holds 4096 bytes",
    "EAGAIN": "others kept changing it: try again",
    "EBUSY": "xenstored has too much to do: try again",
    "EEXIST": "exists already",
}


class Store:
    """A connection, as domain 0."""

    def __init__(self) -> None:
        """MachineError if none can be had."""
        path = runtime_directory(state.machine).xenstore
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(REPLY_TIMEOUT_S)
        try:
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise MachineError(
                f"{path}: the machine belongs to another user: run the command as that user"
            ) from None
        except OSError:
            self._socket.close()
            raise MachineError(f"no machine runs at {path.parent}: start one with `domicile up`") from None
        self._client = xs.Client()
        self._events: deque[xs.WatchEvent] = deque()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # ------------------------------------------------------------------ the connection

    def _flush(self) -> None:
        while output := self._client.peek_output():
            try:
                self._client.output_taken(self._socket.send(output))
            except TimeoutError:
                raise TimedOut("xenstored does not read: is the machine frozen?") from None
            except OSError:
                raise MachineGone("xenstored closed the connection: the machine went down") from None

    def _pump(self, timeout: float | None) -> bool:
        """Take what comes; False if nothing came in time."""
        ready, _, _ = select.select([self._socket], [], [], timeout)
        if not ready:
            return False
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            raise MachineGone("xenstored closed the connection: the machine went down")
        self._events.extend(self._client.feed(data))
        return True

    def _do(self, procedure: xs.Procedure[T], what: str) -> T:
        results: list[T] = []
        failures: list[xs.XenstoreError] = []
        self._client.start(procedure, results.append, failures.append)
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while not results and not failures:
            self._flush()
            if not self._pump(max(0.0, deadline - time.monotonic())):
                raise TimedOut(f"{what}: xenstored did not answer within {REPLY_TIMEOUT_S:.0f} s")
        if failures:
            name = failures[0].name
            text = f"{what}: {MENDS.get(name, 'refused')} ({name})"
            raise InputError(text) if name in ("EINVAL", "E2BIG") else MachineError(text)
        return results[0]

    def _one(self, request: xs.Request, what: str) -> bytes:
        return self._do(xs.single(request), what)

    # ------------------------------------------------------------------ what one can do

    def read(self, path: str) -> bytes:
        """A value. MachineError if there is none."""
        return self._one(xs.read(path), path)

    def remove(self, path: str) -> None:
        """A node and all below it."""
        self._one(xs.remove(path), path)

    def children(self, path: str) -> list[str]:
        """Names."""
        return self._do(xs.list_directory(path), path)

    def permissions(self, path: str) -> list[str]:
        """As xenstore shows them: n0, r3 ..."""
        return xs.names(self._one(xs.get_perms(path), path))

    def write_all(self, pairs: list[tuple[str, str]]) -> None:
        """Set values in one transaction."""
        encoded = [(path, value.encode("utf-8", "surrogateescape")) for path, value in pairs]

        def body(tx: int) -> xs.Procedure[None]:
            for path, value in encoded:
                yield xs.write(path, value, tx)

        what = pairs[0][0] if len(pairs) == 1 else ", ".join(path for path, _ in pairs)
        self._do(xs.transaction(body), what[:200])

    def watch(self, paths: list[str], count: int, timeout: float) -> Iterator[str]:
        """Paths that change. TimedOut if `count` (0: without end) have not come within `timeout` s (0: no bound)."""
        for index, path in enumerate(paths):
            self._one(xs.watch(path, str(index)), path)
        deadline = time.monotonic() + timeout if timeout else None
        seen = 0
        while True:
            while self._events:
                yield self._events.popleft().path
                seen += 1
                if seen == count:
                    return
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._pump(left):
                raise TimedOut(f"xenstore-watch: {seen} events within {timeout:g} s")


def printable(value: bytes) -> str:
    r"""A value as xenstore-utils print it: \n \r \t \\ and octal for what is no printable ASCII."""
    named = {0x09: r"\t", 0x0A: r"\n", 0x0D: r"\r", 0x5C: r"\\"}
    return "".join(
        named[byte] if byte in named else chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
        for byte in value
    )


def tree(store: Store, path: str, *, full: bool = False, permissions: bool = False) -> Iterator[str]:
    """Lines of xenstore-ls. Nodes that vanish meanwhile are left out."""
    root = path.rstrip("/") or "/"
    waiting = [(root, name, 0) for name in sorted(store.children(root), reverse=True)]
    while waiting:
        parent, name, depth = waiting.pop()
        node = f"{parent.rstrip('/')}/{name}"
        try:
            value = store.read(node)
            children = store.children(node)
            extra = f"   ({','.join(store.permissions(node))})" if permissions else ""
        except MachineError as error:
            if "ENOENT" in str(error):
                continue
            raise
        yield f'{node if full else " " * depth + name} = "{printable(value)}"{extra}'
        waiting += [(node, child, depth + 1) for child in sorted(children, reverse=True)]
