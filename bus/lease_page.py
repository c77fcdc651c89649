"""The lease page: one sealed memfd a domain, shared by the hypervisor and the domain's process.

Words are u64, little-endian, written by one side each. The hypervisor believes nothing that the domain writes: it measures CPU
time itself. Beside the page go two doorbells: one by which the hypervisor says "look at the page", one by which the domain does.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from bus import sealed

SIZE: Final = 6 * 4096
MAX_VCPUS: Final = 128

NONE: Final = 0
GRANTED: Final = 1
STANDING: Final = 2

# written by the hypervisor
STATE: Final = 0
"""NONE: run no vCPU; GRANTED: until END; STANDING: until it is taken back."""
EPOCH: Final = 1
"""Counts the grants and revocations."""
END: Final = 2
"""CLOCK_MONOTONIC ns at which a GRANTED lease ends."""
STALE: Final = 3
"""Counts the entries of the ring of stale frames: what others wrote to, so that code translated from it is stale. An entry, this count,
and then BELL, are written before anybody is told of the write: a vCPU that runs stops before its next block of code, and the domain's process
takes the entries before it runs guest code again."""
STALE_ALL: Final = 4
"""The ring was full when STALE had this value: any frame may be stale up to there. Written before STALE."""

# written by the domain
WANTS: Final = 8
"""1: it has something to run; 0: all its vCPUs are blocked."""
RUNNING: Final = 9
"""1: a vCPU runs or is about to."""
SEEN: Final = 10
"""The last EPOCH that it has obeyed."""
CURRENT: Final = 11
"""The vCPU that ran last."""
YIELDS: Final = 12
"""Counts how often it let others go first. The hypervisor answers each by an EPOCH of its own, whatever it decides."""
DROPPED: Final = 13
"""Entries of the ring of stale frames that it has taken: room for more. Said too high, its own guest runs stale code."""
VCPU_TIME: Final = 16
"""From here on, for each vCPU: ns on a CPU."""

# written by the hypervisor
STALE_RING: Final = 512
"""From here on the ring: entry n is in word STALE_RING + n % STALE_ENTRIES: the first MFN, and above STALE_RUN_SHIFT the count of frames."""
STALE_ENTRIES: Final = 2048
STALE_RUN_SHIFT: Final = 48
MAX_STALE_RUN: Final = (1 << 16) - 1

# written by both
CONTROL: Final = 5 * 4096
"""Byte offset of the page that the vCPU's machine code looks at (domains.vcpu.thunks.Control): the domain's own, but for its bell."""
BELL: Final = (CONTROL + 8) // 8
"""The bell, as a word of the page: 1 makes the vCPU stop before its next block. The domain clears it, and looks at all else after that."""


class LeasePage:
    """A mapping of the page: `words[STATE]` and so on."""

    def __init__(self, fd: int) -> None:
        """Maps the page; the descriptor stays the caller's. ValueError if it is no sealed page."""
        sealed.check(fd, SIZE)
        self._map: Final = mmap.mmap(fd, SIZE)
        self.words: Final = memoryview(self._map).cast("Q")

    @property
    def memory(self) -> mmap.mmap:
        """The mapping itself."""
        return self._map

    def close(self) -> None:
        """Unmap."""
        self.words.release()
        self._map.close()


def create() -> int:
    """The descriptor of a new page. OSError if memory is short."""
    return sealed.create("domicile-lease", SIZE)


def map_page(fd: int) -> LeasePage:
    """Map the page and close the descriptor."""
    try:
        return LeasePage(fd)
    finally:
        os.close(fd)
