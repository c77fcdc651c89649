"""What the network back end needs from outside. The shell provides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from drivers.net.frames import Frame


class GrantCopier(Protocol):
    """The frontend's granted frames, by GNTTABOP_copy: one hypercall for each call here (or few), however many items."""

    def fetch(self, items: Sequence[tuple[int, int, int]]) -> list[bytes | int]:
        """A private copy of each (ref, offset, length), which lies within one page; or a negative GNTST_*."""

    def store(self, items: Sequence[tuple[int, bytes]]) -> list[int]:
        """Write each (ref, at most 4096 bytes) to the start of the page. A GNTST_* each: 0, or negative."""


class Network(Protocol):
    """Where a frontend's frames go."""

    def sent(self, frames: Sequence[Frame]) -> None:
        """The frontend sent these, in order."""
