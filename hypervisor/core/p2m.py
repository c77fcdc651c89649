"""The guest-physical address space of an auto-translated domain (HVM, PVH, native): gfn -> mfn with a type,
and back.

Whoever must follow it (the IOMMU's tables, the domain's own process) subscribes to changes: a listener is
called before the call that made the change is answered, so that there is no time at which a removed frame can
be reached.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from enum import IntEnum
from errno import EINVAL, ENOMEM
from typing import Final, NamedTuple

from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.errors import XenError


class P2mType(IntEnum):
    """What a guest frame is. Values are part of the `memory` order's body."""

    RAM = 1
    """The domain's own frame, guest RAM or Xen heap."""
    GRANT_RW = 2
    GRANT_RO = 3
    FOREIGN = 4
    """Another domain's frame, mapped by privilege over it (XENMAPSPACE_gmfn_foreign)."""
    MMIO = 5
    """A device's BAR page."""


class P2mEntry(NamedTuple):
    """One guest frame's mapping."""

    mfn: Mfn
    type: P2mType


class P2mChange(NamedTuple):
    """`old` or `new` None: there was, or is now, nothing."""

    domain: DomId
    gfn: Gfn
    old: P2mEntry | None
    new: P2mEntry | None


_CHUNK = 512
FREE_CHUNKS = 64
"""Chunks that every domain may use."""
PAGES_PER_CHUNK = 64
"""And one more for so many pages of its maximum: eight times what a dense layout needs."""
_TYPES: Final = {kind.value: kind for kind in P2mType}
"""A look-up takes a tenth of the time of the enumeration's call."""
_TYPE_BITS = 4
_EMPTY: Final = bytes(8 * _CHUNK)
GFN_LIMIT = 1 << 36
"""Guest frames are below this (48-bit guest-physical addresses)."""


class P2m:
    """One domain's table. Only whole 4 KiB entries; compact (8 bytes an entry, in chunks of 512)."""

    def __init__(self, domain: DomId) -> None:
        self.domain = domain
        self._chunks: dict[int, array[int]] = {}
        self._used: dict[int, int] = {}  # entries in each chunk
        self.max_chunks = FREE_CHUNKS
        """Chunks (2 MiB of guest-physical addresses each) that may have entries: a guest that scatters its
        pages must not cost the hypervisor as much memory as it has itself."""
        self._gfn_of: dict[int, int] = {}  # own frames only: mfn -> gfn (one place each, as Xen's m2p)
        self._listeners: list[Callable[[P2mChange], None]] = []
        self.count = 0

    def subscribe(self, listener: Callable[[P2mChange], None]) -> None:
        """Call `listener` at each change."""
        self._listeners.append(listener)

    def get(self, gfn: int) -> P2mEntry | None:
        """The entry of a guest frame."""
        chunk = self._chunks.get(gfn // _CHUNK)
        word = chunk[gfn % _CHUNK] if chunk is not None else 0
        return P2mEntry(Mfn(word >> _TYPE_BITS), _TYPES[word & 15]) if word else None

    def gfn_of(self, mfn: int) -> Gfn | None:
        """Where the domain's own frame is mapped."""
        gfn = self._gfn_of.get(mfn)
        return None if gfn is None else Gfn(gfn)

    def can_map(self, gfn: int) -> bool:
        """`set` at this gfn would work."""
        return 0 <= gfn < GFN_LIMIT and (gfn // _CHUNK in self._chunks or len(self._chunks) < self.max_chunks)

    def set(self, gfn: Gfn, mfn: Mfn, kind: P2mType) -> None:
        """Map. What was there is replaced; references are the caller's matter. XenError: EINVAL beyond
        GFN_LIMIT, ENOMEM if the guest's pages are too scattered (nothing has changed then)."""
        if not 0 <= gfn < GFN_LIMIT:
            raise XenError(EINVAL, f"gfn {gfn:#x} is beyond the guest-physical address space")
        if gfn // _CHUNK not in self._chunks and len(self._chunks) >= self.max_chunks:
            raise XenError(ENOMEM, "the guest-physical address space is too scattered")
        key, index = divmod(gfn, _CHUNK)
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = array("Q", _EMPTY)
        word = chunk[index]
        old = P2mEntry(Mfn(word >> _TYPE_BITS), _TYPES[word & 15]) if word else None
        chunk[index] = mfn << _TYPE_BITS | kind
        if old is None:
            self.count += 1
            self._used[key] = self._used.get(key, 0) + 1
        elif old.type is P2mType.RAM and self._gfn_of.get(old.mfn) == gfn:
            del self._gfn_of[old.mfn]
        if kind is P2mType.RAM:
            self._gfn_of[mfn] = gfn
        self._publish(gfn, old, P2mEntry(mfn, kind))

    def clear(self, gfn: Gfn) -> P2mEntry | None:
        """Unmap; returns what was there."""
        old = self.get(gfn)
        if old is None:
            return None
        key = gfn // _CHUNK
        self._chunks[key][gfn % _CHUNK] = 0
        self.count -= 1
        self._used[key] -= 1
        if not self._used[key]:
            del self._chunks[key], self._used[key]
        if old.type is P2mType.RAM and self._gfn_of.get(old.mfn) == gfn:
            del self._gfn_of[old.mfn]
        self._publish(gfn, old, None)
        return old

    def drop(self) -> list[Mfn]:
        """The end of the domain: empty the table at once, without a word to listeners (a page takes 20 us with them, and a guest has
        a million). Frames of others that were mapped, one for each place."""
        foreign = self.foreign()
        self._chunks.clear()
        self._used.clear()
        self._gfn_of.clear()
        self.count = 0
        return foreign

    def foreign(self) -> list[Mfn]:
        """Frames of others that are mapped (not by grants), one for each place."""
        kind = P2mType.FOREIGN.value
        return [
            Mfn(word >> _TYPE_BITS) for chunk in self._chunks.values() for word in chunk if word & 15 == kind
        ]

    def _publish(self, gfn: Gfn, old: P2mEntry | None, new: P2mEntry | None) -> None:
        if self._listeners:
            change = P2mChange(self.domain, gfn, old, new)
            for listener in self._listeners:
                listener(change)

    def entries(self) -> Iterator[tuple[Gfn, P2mEntry]]:
        """All entries by gfn."""
        for gfn, mfn, kind in self.mapped():
            yield Gfn(gfn), P2mEntry(Mfn(mfn), _TYPES[kind])

    def mapped(self) -> list[tuple[int, int, int]]:
        """The same as plain numbers, which is faster by half: (gfn, mfn, type)."""
        return [
            (key * _CHUNK + index, word >> _TYPE_BITS, word & 15)
            for key in sorted(self._chunks)
            for index, word in enumerate(self._chunks[key])
            if word
        ]

    def max_gfn(self) -> int:
        """Highest mapped gfn; -1 if there is none."""
        for key in sorted(self._chunks, reverse=True):
            chunk = self._chunks[key]
            for index in range(_CHUNK - 1, -1, -1):
                if chunk[index]:
                    return key * _CHUNK + index
        return -1

    def runs(self) -> list[list[int]]:
        """[[gfn, mfn, count, type], ...]: runs in which both numbers count up together."""
        runs: list[list[int]] = []
        ahead, shift, last, run = -1, 0, 0, [0, 0, 0, 0]
        for gfn, mfn, kind in self.mapped():
            if gfn == ahead and gfn - mfn == shift and kind == last:
                run[2] += 1
            else:
                shift, last, run = gfn - mfn, kind, [gfn, mfn, 1, kind]
                runs.append(run)
            ahead = gfn + 1
        return runs
