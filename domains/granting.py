"""The granter's part of grant maps, in its own process: check and flag the entries, move frames into windows and back.

Orders `grant_map` and `grant_unmap` of the hypervisor (hypervisor/core/grant_map.py, grant_core.py). The vCPUs are stopped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from bus.abi.grant_table import GNTST_general_error, GNTST_okay, GTF_reading, GTF_writing
from bus.addresses import Mfn
from bus.packets import close_all
from domains.hostmem import HostMemory

IN_USE: Final = GTF_reading | GTF_writing
Hold = Callable[[Mfn, bool], int]
"""(frame, writable) -> 0, or non-zero if a frame must not be granted like that (a page table, say)."""
Release = Callable[[Mfn, bool], None]


class Granting:
    """Carries out both orders on this domain's own memory."""

    def __init__(
        self,
        memory: HostMemory,
        hold: Hold = lambda mfn, writable: 0,
        release: Release = lambda mfn, writable: None,
        changed: Callable[[Mfn], None] = lambda mfn: None,
    ) -> None:
        """`hold`/`release`: a domain with page types holds a reference for as long as the flag is set in the entry.
        `changed`: others may have written to the frame; translated code of it is stale."""
        self._memory = memory
        self._hold = hold
        self._release = release
        self._changed = changed
        self._places: dict[int, tuple[int, int]] = {}
        """Where frames are that were moved by this process: frame -> (window, index)."""

    def grant_map(self, body: dict[str, Any], windows: Sequence[int]) -> bytes:
        """Set flags, then move frames. One status (int16) for each check and each move."""
        by_number = dict(zip(body.get("windows", ()), windows, strict=True))
        try:
            results = [self._check(*item) for item in body["checks"]]
            results += [
                self._move(Mfn(mfn), by_number[window], index) for mfn, window, index in body["moves"]
            ]
        finally:
            close_all(windows)
        return struct.pack(f"<{len(results)}h", *results)

    def _check(
        self, mfn: int, offset: int, raw: bytes, word_mfn: int, word_offset: int, bits: int, frame: int
    ) -> int:
        """Set GTF_* bits in an entry if it still says what the hypervisor read."""
        now = bytearray(self._memory.page(Mfn(mfn))[offset : offset + len(raw)])
        # The in-use bits are ours to set: they may have changed since the hypervisor read the entry.
        then = bytearray(raw)
        now[0] &= ~IN_USE & 0xFF
        then[0] &= ~IN_USE & 0xFF
        if now != then:
            return GNTST_general_error
        word = self._memory.page(Mfn(word_mfn))[word_offset : word_offset + 2]
        old = struct.unpack("<H", word)[0]
        held: list[bool] = []
        for bit in (GTF_reading, GTF_writing):
            if bits & ~old & bit:
                if self._hold(Mfn(frame), bit == GTF_writing):
                    for writable in held:
                        self._release(Mfn(frame), writable)
                    return GNTST_general_error
                held.append(bit == GTF_writing)
        word[:] = struct.pack("<H", old | bits)
        return GNTST_okay

    def _move(self, mfn: Mfn, window: int, index: int) -> int:
        try:
            self._memory.move_to_window(mfn, window, index)
        except (OSError, ValueError):
            return GNTST_general_error
        return GNTST_okay

    def grant_unmap(self, body: dict[str, Any]) -> bytes:
        """Bring frames home, then clear flags. One status for each."""
        results: list[int] = []
        for mfn, window, index in body["moves"]:
            # Not there: the map that put it there never happened, or the frame was moved on since.
            if self._places.get(mfn, (window, index)) == (window, index):
                self._places.pop(mfn, None)
                self._memory.move_back(Mfn(mfn))
                self._changed(Mfn(mfn))
            results.append(GNTST_okay)
        for word_mfn, word_offset, bits, frame in body["clears"]:
            word = self._memory.page(Mfn(word_mfn))[word_offset : word_offset + 2]
            old = struct.unpack("<H", word)[0]
            word[:] = struct.pack("<H", old & ~bits)
            for bit in (GTF_reading, GTF_writing):
                if old & bits & bit:
                    self._release(Mfn(frame), bit == GTF_writing)
            results.append(GNTST_okay)
        return struct.pack(f"<{len(results)}h", *results)
