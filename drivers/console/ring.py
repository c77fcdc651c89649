"""Both ends of a console ring page (io/console.h: 1024 bytes to the guest, 2048 from it).

Indexes run freely and wrap at 2**32; each is read once and checked. An index that makes no sense is reported, never followed.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.abi.io.console import XENCONS_INTERFACE

_U32: Final = 0xFFFFFFFF


class Taken(NamedTuple):
    """What came out of a ring."""

    data: bytes
    notify: bool
    """Something was taken: tell the other end, which may wait for room."""
    broken: bool
    """The other end's indexes make no sense; nothing was taken."""


class Put(NamedTuple):
    """How much went into a ring."""

    taken: int
    notify: bool
    broken: bool


class _Ring:
    def __init__(self, page: memoryview, incoming: str, outgoing: str) -> None:
        octets = page.cast("B")
        if octets.nbytes < XENCONS_INTERFACE.size or octets.readonly:
            raise ValueError("a console ring needs a writable page")
        self._octets: Final = octets
        self._words: Final = octets[: XENCONS_INTERFACE.size & ~3].cast("I")
        self._in: Final = self._place(incoming)
        self._out: Final = self._place(outgoing)

    @staticmethod
    def _place(name: str) -> tuple[int, int, int, int]:
        layout = XENCONS_INTERFACE
        base = "in_" if name == "in" else "out"
        return (
            layout.offset(base),
            layout.field_size(base),
            layout.offset(f"{name}_cons") // 4,
            layout.offset(f"{name}_prod") // 4,
        )

    def take(self, limit: int = 4096) -> Taken:
        """At most `limit` bytes that the other end put in."""
        base, size, cons_word, prod_word = self._in
        cons, prod = self._words[cons_word], self._words[prod_word]
        waiting = (prod - cons) & _U32
        if waiting > size:
            return Taken(b"", False, True)
        count = min(waiting, limit)
        if not count:
            return Taken(b"", False, False)
        start = cons & (size - 1)
        first = min(count, size - start)
        data = bytes(self._octets[base + start : base + start + first])
        data += bytes(self._octets[base : base + count - first])
        self._words[cons_word] = (cons + count) & _U32
        return Taken(data, True, False)

    def put(self, data: bytes) -> Put:
        """As much of `data` as there is room for."""
        base, size, cons_word, prod_word = self._out
        cons, prod = self._words[cons_word], self._words[prod_word]
        used = (prod - cons) & _U32
        if used > size:
            return Put(0, False, True)
        count = min(len(data), size - used)
        if not count:
            return Put(0, False, False)
        start = prod & (size - 1)
        first = min(count, size - start)
        self._octets[base + start : base + start + first] = data[:first]
        self._octets[base : base + count - first] = data[first:count]
        self._words[prod_word] = (prod + count) & _U32  # after the bytes: it publishes them
        return Put(count, True, False)

    def release(self) -> None:
        """Let go of the page; its memory may be unmapped afterwards."""
        self._words.release()
        self._octets.release()


class BackendRing(_Ring):
    """consoled's end: takes what the guest wrote, puts what it is to read."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page, "out", "in")


class FrontendRing(_Ring):
    """The guest's end."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page, "in", "out")
