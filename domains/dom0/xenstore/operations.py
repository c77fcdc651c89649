"""What requests do to the tree, over any `View`. Every check comes before the first change, so a refused
request leaves no trace.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from domains.dom0.xenstore import paths
from domains.dom0.xenstore.errors import XsError
from domains.dom0.xenstore.perms import OWNER, READ, WRITE, Perm, Perms, access
from domains.dom0.xenstore.store import Node, View, walk_down


class Limits(NamedTuple):
    """What binds an unprivileged caller (None instead of this binds nobody)."""

    nodes: int
    node_size: int
    permissions: int
    memory_room: int
    """Bytes that the caller may still add."""


class Caller(NamedTuple):
    """Who asks."""

    domid: int
    target: int | None
    limits: Limits | None


class Change(NamedTuple):
    """A change that watchers hear of."""

    path: bytes
    exact: bool
    """Only who watches this very path is told (a node that went with the removal of one above it)."""
    seen_by: tuple[Perms, ...]
    """A watcher is told if one of these lets it read: the node's before and after, the parent's (XSA-115)."""


def lookup(view: View, who: Caller, path: bytes, need: int) -> Node:
    """The node, if the caller may do to it what `need` says. XsError EACCES; ENOENT if it is not there and
    the caller may do the same to the nearest node above (else EACCES, so nobody learns what is in a place
    that they may not read).
    """
    node = view.get(path)
    if node is not None:
        if access(node.perms, who.domid, who.target) & need != need:
            raise XsError("EACCES")
        return node
    for above in paths.ancestors(path)[1:]:
        node = view.get(above)
        if node is not None:
            break
    allowed = node is not None and access(node.perms, who.domid, who.target) & need
    raise XsError("ENOENT" if allowed else "EACCES")


def read(view: View, who: Caller, path: bytes) -> Node:
    """The node, if the caller may read it. XsError ENOENT, EACCES."""
    return lookup(view, who, path, READ)


def write(view: View, who: Caller, path: bytes, value: bytes) -> list[Change]:
    """Store a value, creating what is missing. XsError EACCES, ENOSPC (quota), ENOMEM (memory quota)."""
    try:
        node = lookup(view, who, path, WRITE)
    except XsError as error:
        if error.name != "ENOENT":
            raise
        return _create(view, who, path, value)
    new = node.with_value(value)
    _check_size(who, new)
    _check_memory(who, len(value) - len(node.value))
    view.put(path, new)
    return [Change(path, False, (node.perms, *_parent_perms(view, path)))]


def mkdir(view: View, who: Caller, path: bytes) -> list[Change]:
    """Make the node exist; no change if it does. Errors as of `write`."""
    try:
        lookup(view, who, path, WRITE)
    except XsError as error:
        if error.name != "ENOENT":
            raise
        return _create(view, who, path, b"")
    return []


def remove(view: View, who: Caller, path: bytes) -> list[Change]:
    """Remove the node and all below it. XsError EINVAL (the root), EACCES, ENOENT (not even its parent
    exists).
    """
    try:
        lookup(view, who, path, WRITE)
    except XsError as error:
        if error.name == "ENOENT" and view.get(paths.parent(path)) is not None:
            return []
        raise
    if path == paths.ROOT:
        raise XsError("EINVAL")
    return remove_subtree(view, path)


def remove_subtree(view: View, top: bytes) -> list[Change]:
    """Remove a node that exists and is not the root, and all below it; nobody's permission is asked.

    A transaction that has a conflict already may see a child without its parent: it goes on, and ends with EAGAIN.
    """
    above = paths.parent(top)
    doomed = walk_down(view, top)
    view.reserve([above])
    perms = {path: node.perms for path, node in doomed}
    holder = view.get(above)
    if holder is not None:
        perms[above] = holder.perms
        view.put(above, holder.without_child(paths.leaf(top)))
    changes = []
    for path, node in reversed(doomed):
        view.delete(path)
        changes.append(Change(path, path != top, (node.perms, perms.get(paths.parent(path), node.perms))))
    return changes


def set_perms(view: View, who: Caller, path: bytes, perms: Perms) -> list[Change]:
    """Replace a node's permissions; the caller must own it. XsError EACCES, ENOENT, EPERM (an unprivileged
    caller would give it away), ENOSPC (too many).
    """
    if who.limits is not None and len(perms) > who.limits.permissions:
        raise XsError("ENOSPC")
    node = lookup(view, who, path, WRITE | OWNER)
    if who.limits is not None and perms[0].domid != node.perms[0].domid:
        raise XsError("EPERM")
    new = node.with_perms(perms)
    _check_size(who, new)
    _check_memory(who, new.size - node.size)
    view.put(path, new)
    return [Change(path, False, (node.perms, perms, *_parent_perms(view, path)))]


def _create(view: View, who: Caller, path: bytes, value: bytes) -> list[Change]:
    missing: list[bytes] = []
    holder: Node | None = None
    for above in paths.ancestors(path):
        holder = view.get(above)
        if holder is not None:
            break
        missing.append(above)
    if holder is None:
        raise XsError("ENOENT")  # no root: cannot be, but a damaged tree must not crash the daemon
    perms = holder.perms
    if who.limits is not None:
        perms = (Perm(who.domid, perms[0].bits), *perms[1:])
    holder_path = paths.parent(missing[-1])
    changed: Final = {holder_path: holder.with_child(paths.leaf(missing[-1]))}
    below = b""
    for new in missing:
        name = paths.leaf(below) if below else b""
        children, size = ({name: None}, len(name) + 1) if below else ({}, 0)
        changed[new] = Node(b"" if below else value, perms, children, size)
        below = new
    if who.limits is not None:
        if view.owned(who.domid) + len(missing) > who.limits.nodes:
            raise XsError("ENOSPC")
        for node in changed.values():
            _check_size(who, node)
        _check_memory(who, sum(len(new) + changed[new].size for new in missing))
    view.reserve(list(changed))
    for new, node in changed.items():
        view.put(new, node)
    above_perms = changed[missing[1]].perms if len(missing) > 1 else holder.perms
    return [Change(path, False, (perms, above_perms))]


def _parent_perms(view: View, path: bytes) -> tuple[Perms, ...]:
    node = view.peek(paths.parent(path))
    return () if node is None else (node.perms,)


def _check_size(who: Caller, node: Node) -> None:
    if who.limits is not None and node.size >= who.limits.node_size:
        raise XsError("ENOSPC")


def _check_memory(who: Caller, more: int) -> None:
    if who.limits is not None and more > 0 and more > who.limits.memory_room:
        raise XsError("ENOMEM")
