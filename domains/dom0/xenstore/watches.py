"""Watches, found by path: an event at a path concerns those who watch the path or one above it."""

from __future__ import annotations

from typing import Final

from domains.dom0.xenstore import paths
from domains.dom0.xenstore.effects import ConnId

WATCH_COST: Final = 128
"""Bytes counted for a watch beside its path and token."""


class Watch:
    """One watch of a connection."""

    __slots__ = ("conn", "path", "prefix", "serial", "token")

    def __init__(self, conn: ConnId, path: bytes, token: bytes, prefix: int, serial: int) -> None:
        self.conn: Final = conn
        self.path: Final = path
        """Canonical, or special (@...)."""
        self.token: Final = token
        self.prefix: Final = prefix
        """Bytes cut off an event's path: those of the base if the watch was registered with a relative path.
        """
        self.serial: Final = serial
        """Watches are told of an event in this order."""

    @property
    def cost(self) -> int:
        """Bytes, as the memory quota counts them."""
        return WATCH_COST + len(self.path) + len(self.token)

    def event(self, path: bytes) -> bytes:
        """Payload of the WATCH_EVENT for a change at this path."""
        return path[self.prefix :] + b"\0" + self.token + b"\0"


class WatchTable:
    """All watches."""

    def __init__(self) -> None:
        self._by_path: dict[bytes, dict[int, Watch]] = {}
        self._by_conn: dict[ConnId, dict[tuple[bytes, bytes], Watch]] = {}
        self.serial = 0

    def add(self, conn: ConnId, path: bytes, token: bytes, prefix: int) -> Watch | None:
        """A new watch; None if the connection has one of this path and token."""
        own = self._by_conn.setdefault(conn, {})
        if (path, token) in own:
            return None
        self.serial += 1
        watch = own[path, token] = Watch(conn, path, token, prefix, self.serial)
        self._by_path.setdefault(path, {})[watch.serial] = watch
        return watch

    def remove(self, conn: ConnId, path: bytes, token: bytes) -> Watch | None:
        """Take a watch away; None if there is none of this path and token."""
        watch = self._by_conn.get(conn, {}).pop((path, token), None)
        if watch is not None:
            self._unlink(watch)
        return watch

    def remove_all(self, conn: ConnId) -> list[Watch]:
        """Take all watches of a connection away."""
        gone = list(self._by_conn.pop(conn, {}).values())
        for watch in gone:
            self._unlink(watch)
        return gone

    def of(self, conn: ConnId) -> list[Watch]:
        """The watches of a connection, oldest first."""
        return list(self._by_conn.get(conn, {}).values())

    def matching(self, path: bytes, exact: bool) -> list[Watch]:
        """Who watches the path or, unless `exact`, one above it; oldest first."""
        if not self._by_path:
            return []
        if exact or path.startswith(b"@"):
            return list(self._by_path.get(path, {}).values())
        found: list[Watch] = []
        for above in paths.ancestors(path):
            there = self._by_path.get(above)
            if there:
                found += there.values()
        if len(found) > 1:
            found.sort(key=lambda watch: watch.serial)
        return found

    def _unlink(self, watch: Watch) -> None:
        there = self._by_path[watch.path]
        del there[watch.serial]
        if not there:
            del self._by_path[watch.path]
