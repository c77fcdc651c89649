"""Pages of a frontend's memory, and its grant table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

PAGE: Final = 4096


class Page(NamedTuple):
    """A page of the frontend's memory."""

    gfn: int
    data: memoryview


class PageSource(Protocol):
    """The frontend's memory and grant table."""

    def allocate(self, count: int) -> list[Page]:
        """Pages for I/O. MemoryError if there are none."""

    def free(self, pages: Sequence[Page]) -> None:
        """They are not needed any more."""

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        """Let the back end's domain at them: grant references."""

    def end(self, refs: Sequence[int]) -> list[bool]:
        """End the grants; False for one that the back end has mapped still (its page must not be used again)."""
