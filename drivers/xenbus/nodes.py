"""xenstore nodes of split devices: numbers that somebody else wrote."""

from __future__ import annotations

from collections.abc import Sequence

from drivers.xenbus import client
from drivers.xenbus.client import Procedure, XenstoreError


class NodeError(Exception):
    """The other end's nodes make no sense, or ask for what is not offered. The text goes to its `error` node."""


def optional(path: str, tx: int = 0) -> Procedure[bytes | None]:
    """The value at a path, or None if there is no such node (or it is not ours to read)."""
    try:
        value = yield client.read(path, tx)
    except XenstoreError as error:
        if error.name in ("ENOENT", "EACCES"):
            return None
        raise
    return value


def number(value: bytes | None, default: int | None, low: int, high: int, what: str) -> int:
    """A decimal number of a node. NodeError if it is missing without a default, none, or out of bounds."""
    if value is None:
        if default is None:
            raise NodeError(f"{what} is missing")
        return default
    text = value.rstrip(b"\0\n")
    if not text.isdigit() or len(text) > 20:
        raise NodeError(f"{what} is {value[:32]!r}: not a number")
    found = int(text)
    if not low <= found <= high:
        raise NodeError(f"{what} is {found}: not within {low} to {high}")
    return found


def read_number(path: str, default: int | None, low: int, high: int, tx: int = 0) -> Procedure[int]:
    """`number` of the node at a path."""
    value = yield from optional(path, tx)
    return number(value, default, low, high, path)


def write_all(base: str, nodes: Sequence[tuple[str, str]], tx: int) -> Procedure[None]:
    """Write nodes below a path."""
    for name, value in nodes:
        yield client.write(f"{base}/{name}", value.encode(), tx)
