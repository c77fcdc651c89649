"""The committed tree: nodes by their absolute path, and what each domain owns in it.

Nodes are immutable: a change puts a new node in place of the old one, so a transaction keeps what it saw
by keeping a reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from domains.dom0.xenstore import paths
from domains.dom0.xenstore.perms import NONE, Perm, Perms

NODE_HEADER: Final = 24
"""Bytes that xenstored counts for a node beside its permissions, value and children (`struct
xs_tdb_record_hdr`).
"""
PERM_SIZE: Final = 8

Children = dict[bytes, None]
"""Names of children in the order in which they were made."""


class Node:
    """One node. `generation` differs between any two nodes that were ever committed."""

    __slots__ = ("children", "children_size", "generation", "perms", "value")

    def __init__(
        self, value: bytes, perms: Perms, children: Children, children_size: int, generation: int = 0
    ) -> None:
        self.value: Final = value
        self.perms: Final = perms
        self.children: Final = children
        """Shared between versions of the node: copied before it is changed."""
        self.children_size: Final = children_size
        """Bytes of the children's names, with a nul each."""
        self.generation: Final = generation

    @property
    def size(self) -> int:
        """Bytes, as the quota counts them."""
        return NODE_HEADER + PERM_SIZE * len(self.perms) + len(self.value) + self.children_size

    def with_value(self, value: bytes) -> Node:
        """This node with another value."""
        return Node(value, self.perms, self.children, self.children_size)

    def with_perms(self, perms: Perms) -> Node:
        """This node with other permissions."""
        return Node(self.value, perms, self.children, self.children_size)

    def with_child(self, name: bytes) -> Node:
        """This node with one more child (itself if it has that one: in a transaction with a conflict, that may be)."""
        if name in self.children:
            return self
        children = self.children.copy()
        children[name] = None
        return Node(self.value, self.perms, children, self.children_size + len(name) + 1)

    def without_child(self, name: bytes) -> Node:
        """This node without a child (itself if it has none of that name: as in `with_child`)."""
        if name not in self.children:
            return self
        children = self.children.copy()
        del children[name]
        return Node(self.value, self.perms, children, self.children_size - len(name) - 1)

    def at(self, generation: int) -> Node:
        """This node as committed with this generation."""
        return Node(self.value, self.perms, self.children, self.children_size, generation)


class Usage:
    """What domains own: nodes and bytes."""

    __slots__ = ("memory", "nodes")

    def __init__(self) -> None:
        self.nodes: dict[int, int] = {}
        self.memory: dict[int, int] = {}

    def add(self, path: bytes, node: Node, sign: int) -> None:
        """Count a node for its owner (sign 1), or no more (sign -1)."""
        owner = node.perms[0].domid
        self.nodes[owner] = self.nodes.get(owner, 0) + sign
        self.memory[owner] = self.memory.get(owner, 0) + sign * (len(path) + node.size)

    def forget_empty(self, domid: int) -> None:
        """Drop a domain's counters where they are zero."""
        for counters in (self.nodes, self.memory):
            if counters.get(domid) == 0:
                del counters[domid]


class View(Protocol):
    """The tree as a request sees it: the committed one, or a transaction's."""

    def get(self, path: bytes) -> Node | None:
        """The node, or None."""

    def peek(self, path: bytes) -> Node | None:
        """As `get`, but a transaction does not count the path as looked at."""

    def reserve(self, paths: list[bytes]) -> None:
        """Touch these paths, so that no later `put` or `delete` of them fails. XsError ENOSPC
        (transactions only).
        """

    def put(self, path: bytes, node: Node) -> None:
        """Make or replace a node. Its parent exists and names it as a child, or will before anybody looks."""

    def delete(self, path: bytes) -> None:
        """Remove a node that exists."""

    def owned(self, domid: int) -> int:
        """How many nodes the domain owns in this view."""

    def memory(self, domid: int) -> int:
        """How many bytes of nodes the domain owns in this view."""


class Store:
    """The committed tree."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.generation = 0
        """The last generation given out."""
        self.usage: Final = Usage()
        self.special: dict[bytes, Perms] = {path: (Perm(0, NONE),) for path in paths.SPECIAL_PATHS}
        """Who may watch for the special events."""
        self.put(paths.ROOT, Node(b"", (Perm(0, NONE),), {b"tool": None}, 5))
        self.put(b"/tool", Node(b"", (Perm(0, NONE),), {b"xenstored": None}, 10))
        self.put(b"/tool/xenstored", Node(b"", (Perm(0, NONE),), {}, 0))

    def get(self, path: bytes) -> Node | None:
        return self.nodes.get(path)

    peek = get

    def reserve(self, paths: list[bytes]) -> None:
        """Nothing: here no path can fail."""

    def put(self, path: bytes, node: Node) -> None:
        old = self.nodes.get(path)
        if old is not None:
            self.usage.add(path, old, -1)
        self.generation += 1
        self.nodes[path] = node.at(self.generation)
        self.usage.add(path, node, 1)

    def delete(self, path: bytes) -> None:
        self.usage.add(path, self.nodes.pop(path), -1)
        self.generation += 1

    def owned(self, domid: int) -> int:
        return self.usage.nodes.get(domid, 0)

    def memory(self, domid: int) -> int:
        return self.usage.memory.get(domid, 0)

    def check(self) -> list[str]:
        """What is wrong with the tree; empty if it is whole."""
        wrong = []
        usage = Usage()
        for path, node in self.nodes.items():
            usage.add(path, node, 1)
            if path != paths.ROOT:
                above = self.nodes.get(paths.parent(path))
                if above is None or paths.leaf(path) not in above.children:
                    wrong.append(f"{path!r} is not a child of its parent")
            wrong += [f"{path!r} has no node for its child {n!r}" for n in self._dangling(path, node)]
            if node.children_size != sum(len(name) + 1 for name in node.children):
                wrong.append(f"{path!r}: size of children miscounted")
        for domid in {*usage.nodes, *self.usage.nodes}:
            if usage.nodes.get(domid, 0) != self.owned(domid) or usage.memory.get(domid, 0) != self.memory(
                domid
            ):
                wrong.append(f"domain {domid}: nodes or bytes miscounted")
        return wrong

    def _dangling(self, path: bytes, node: Node) -> Iterator[bytes]:
        return (name for name in node.children if paths.child(path, name) not in self.nodes)


def walk_down(view: View, top: bytes) -> list[tuple[bytes, Node]]:
    """The node and everything below it, parents before children. Without recursion: depth costs no stack
    (XSA-418).
    """
    found: list[tuple[bytes, Node]] = []
    pending = [top]
    while pending:
        path = pending.pop()
        node = view.get(path)
        if node is not None:
            found.append((path, node))
            pending += [paths.child(path, name) for name in reversed(node.children)]
    return found
