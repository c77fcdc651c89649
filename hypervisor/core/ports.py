"""What the core needs from outside: machine memory. (Time comes as an argument; everything else is an
effect.)

The real shell implements this with memfds; the simulation with bytearrays.
"""

from __future__ import annotations

from typing import Protocol

from bus.addresses import Mfn


class MachineMemory(Protocol):
    """The content of machine frames. Offsets and lengths are bytes and never cross a frame's end.

    A frame lives in its domain's own extent (one memfd a domain, sparse), or, while another domain maps it by
    a grant, in a window: a memfd that holds only frames granted together to one grantee (docs/architecture.md, section
    4).
    """

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        """A copy of the bytes."""

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        """Store the bytes."""

    def copy(self, source: Mfn, source_offset: int, target: Mfn, target_offset: int, length: int) -> None:
        """Copy within machine memory."""

    def clear(self, mfn: Mfn, count: int = 1) -> None:
        """Make whole frames read as zero and give their host memory back."""

    def create_extent(self, base: Mfn, frames: int) -> None:
        """A new zeroed sparse extent for [base, base + frames)."""

    def drop_extent(self, base: Mfn) -> None:
        """Give the extent that starts at `base` back."""

    def create_window(self, window: int, frames: int) -> None:
        """A new window of `frames` zeroed frames, named by a number the core chose."""

    def place(self, mfn: Mfn, window: int, index: int) -> None:
        """From now on the content of `mfn` is frame `index` of the window (already copied there by the
        owner)."""

    def restore(self, mfn: Mfn) -> None:
        """From now on the content of `mfn` is in its extent again (already copied back there by the
        owner)."""

    def drop_window(self, window: int) -> None:
        """Give the window back. No frame is placed in it any more."""
