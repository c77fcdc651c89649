"""A frontend's pages and its grant table, in one process. `PageSource` of the drivers."""

from __future__ import annotations

from collections.abc import Sequence

from drivers.xenbus.pages import Page


class GrantedPages:
    """At most so many pages at a time; references are never used twice."""

    def __init__(self, pages: int) -> None:
        self.left = pages
        self.frames: dict[int, bytearray] = {}
        self.table: dict[int, tuple[int, bool]] = {}
        """Reference -> (frame, read-only)."""
        self.next_ref = 8

    def allocate(self, count: int) -> list[Page]:
        """See PageSource."""
        if len(self.frames) + count > self.left:
            raise MemoryError
        pages = []
        for _ in range(count):
            number = max(self.frames, default=0) + 1
            self.frames[number] = bytearray(4096)
            pages.append(Page(number, memoryview(self.frames[number])))
        return pages

    def free(self, pages: Sequence[Page]) -> None:
        """See PageSource."""
        for page in pages:
            del self.frames[page.gfn]

    def grant(self, pages: Sequence[Page], readonly: bool) -> list[int]:
        """See PageSource."""
        refs = []
        for page in pages:
            self.table[self.next_ref] = (page.gfn, readonly)
            refs.append(self.next_ref)
            self.next_ref += 1
        return refs

    def end(self, refs: Sequence[int]) -> list[bool]:
        """See PageSource."""
        for ref in refs:
            del self.table[ref]
        return [True] * len(refs)
