"""A transaction: an overlay over the committed tree that remembers what it saw.

It costs what it touches. The first look at a path keeps the node (nodes are immutable) or its absence;
later looks see the same. A commit succeeds if everything that was looked at or changed is still as it was,
else EAGAIN.
"""

from __future__ import annotations

from typing import Final

from domains.dom0.xenstore.errors import XsError
from domains.dom0.xenstore.store import Node, Store, Usage

ENTRY_COST: Final = 64
"""Bytes counted for a touched path beside the path and the node."""


class Entry:
    """A path that the transaction touched."""

    __slots__ = ("base", "changed", "node")

    def __init__(self, base: Node | None) -> None:
        self.base: Final = base
        """As it was at the first look; None if it was not there."""
        self.node = base
        self.changed = False


class Transaction:
    """One open transaction. A `View`."""

    def __init__(self, ident: int, store: Store, node_limit: int | None) -> None:
        self.ident: Final = ident
        self._store: Final = store
        self.node_limit: Final = node_limit
        self.entries: dict[bytes, Entry] = {}
        self.events: dict[bytes, bool] = {}
        """Changed paths in the order of their first change; whether only watches on this very path are told.
        """
        self.usage: Final = Usage()
        """Difference to the committed tree's usage."""
        self.cost = 0
        """Bytes that the overlay holds."""
        self.doomed = False
        """It can no longer be committed: something that it built on is no more. It ends with EAGAIN."""

    def _entry(self, path: bytes) -> Entry:
        entry = self.entries.get(path)
        if entry is None:
            if self.node_limit is not None and len(self.entries) >= self.node_limit:
                raise XsError("ENOSPC")
            entry = self.entries[path] = Entry(self._store.get(path))
            self.cost += ENTRY_COST + len(path) + (entry.base.size if entry.base is not None else 0)
        return entry

    def get(self, path: bytes) -> Node | None:
        """As in `View`. XsError ENOSPC if the transaction has touched too many nodes."""
        return self._entry(path).node

    def peek(self, path: bytes) -> Node | None:
        entry = self.entries.get(path)
        return self._store.get(path) if entry is None else entry.node

    def reserve(self, paths: list[bytes]) -> None:
        for path in paths:
            self._entry(path)

    def note(self, path: bytes, exact: bool) -> None:
        """Watchers of this path are told once the transaction is committed."""
        self.events[path] = exact and self.events.get(path, True)

    def put(self, path: bytes, node: Node) -> None:
        entry = self._entry(path)
        if entry.node is not None:
            self.usage.add(path, entry.node, -1)
            self.cost -= entry.node.size if entry.changed else 0
        self._store.generation += 1
        node = node.at(self._store.generation)
        self.usage.add(path, node, 1)
        self.cost += node.size
        entry.node, entry.changed = node, True

    def delete(self, path: bytes) -> None:
        entry = self._entry(path)
        if entry.node is not None:
            self.usage.add(path, entry.node, -1)
            self.cost -= entry.node.size if entry.changed else 0
        entry.node, entry.changed = None, True

    def owned(self, domid: int) -> int:
        return self._store.owned(domid) + self.usage.nodes.get(domid, 0)

    def memory(self, domid: int) -> int:
        return self._store.memory(domid) + self.usage.memory.get(domid, 0)

    def restore(self, path: bytes, base: Node | None, changed: bool, node: Node | None) -> None:
        """An entry as it was dumped (dump.py)."""
        entry = self.entries[path] = Entry(base)
        self.cost += ENTRY_COST + len(path) + (base.size if base is not None else 0)
        if base is not None and changed:
            self.usage.add(path, base, -1)
        if node is not None and changed:
            self.usage.add(path, node, 1)
            self.cost += node.size
        if changed:
            entry.node, entry.changed = node, True

    def conflicts(self) -> bool:
        """Something that was looked at or changed here was changed outside since."""
        get = self._store.get
        for path, entry in self.entries.items():
            now = get(path)
            base = entry.base
            if now is not base and (now is None or base is None or now.generation != base.generation):
                return True
        return self.doomed

    def commit(self, node_quota: int | None) -> bool:
        """Put the changes into the committed tree; whether there were any. XsError EAGAIN (conflict),
        ENOSPC (a domain would own more than `node_quota` nodes; None if the caller has no limit). Nothing
        is changed then.
        """
        if self.conflicts():
            raise XsError("EAGAIN")
        if node_quota is not None:
            for domid, more in self.usage.nodes.items():
                if domid != 0 and more > 0 and self.owned(domid) > node_quota:
                    raise XsError("ENOSPC")
        changed = False
        for path, entry in self.entries.items():
            if not entry.changed or entry.node is entry.base:
                continue
            changed = True
            if entry.node is not None:
                self._store.put(path, entry.node)
            elif entry.base is not None:
                self._store.delete(path)
        return changed

    def touches_domain(self, domid: int) -> bool:
        """A node that was written here gives a domain ownership or access."""
        return any(
            entry.changed and entry.node is not None and any(perm.domid == domid for perm in entry.node.perms)
            for entry in self.entries.values()
        )
