"""xenstore nodes of split devices: numbers that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from drivers.xenbus import client
from drivers.xenbus.client import Procedure, XenstoreError


class NodeError(Exception):
    """The other end's nodes make no sense, or ask for what is not offered. The text goes to its `error` node."""


def optional(path: str, tx: int = 0) -> Procedure[bytes | None]:
    """The value at a path, or None if there is no such node (or it is not ours to read)."""
    try:
        value: bytes = yield client.read(path, tx)
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


class Nodes:
    """Values of several nodes of one directory, read together."""

    def __init__(self, base: str, values: dict[str, bytes | None]) -> None:
        self._base: Final = base
        self._values: Final = values

    def __getitem__(self, name: str) -> bytes | None:
        """The value; None if there was no such node, or it is not ours to read. KeyError if it was not asked for."""
        return self._values[name]

    def text(self, name: str) -> str:
        """The value as text; empty if there is none."""
        return (self[name] or b"").decode("utf-8", "replace")

    def number(self, name: str, default: int | None, low: int, high: int) -> int:
        """A decimal number. NodeError as `number` has it."""
        return number(self[name], default, low, high, f"{self._base}/{name}")


def read_all(paths: Iterable[str], tx: int = 0) -> Procedure[dict[str, bytes | None]]:
    """`optional` of each of the paths, in one round trip."""
    wanted = list(dict.fromkeys(paths))
    found: dict[str, bytes | None] = {}
    for path, answer in zip(
        wanted, (yield from client.together([client.read(each, tx) for each in wanted])), strict=True
    ):
        if isinstance(answer, XenstoreError) and answer.name not in ("ENOENT", "EACCES"):
            raise answer
        found[path] = answer if isinstance(answer, bytes) else None
    return found


def read_nodes(base: str, names: Iterable[str], tx: int = 0) -> Procedure[Nodes]:
    """Nodes below a path, in one round trip."""
    wanted = list(names)
    found = yield from read_all([f"{base}/{name}" for name in wanted], tx)
    return Nodes(base, {name: found[f"{base}/{name}"] for name in wanted})


def write_all(base: str, nodes: Sequence[tuple[str, str]], tx: int) -> Procedure[None]:
    """Write nodes below a path, in one round trip. The first error, if there is one: the nodes after that one are written all the same, so
    this is for a transaction, which the error abandons."""
    for answer in (
        yield from client.together(
            [client.write(f"{base}/{name}", value.encode(), tx) for name, value in nodes]
        )
    ):
        if isinstance(answer, XenstoreError):
            raise answer
