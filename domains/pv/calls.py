"""What all hypercall handlers have in common: their type and what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domains.pv.api import Continuation

MASK64: Final = (1 << 64) - 1
LOW32: Final = 0xFFFFFFFF


class NoResult:
    """The handler set every register itself: nothing is written to RAX."""

    __slots__ = ()


NO_RESULT: Final = NoResult()

Result = int | Continuation | NoResult
"""Xen's return value, a hypercall that goes on later, or NO_RESULT."""

Handler = Callable[[int, int, int, int, int], Result]
"""A hypercall with its five argument registers (RDI, RSI, RDX, R10, R8), unsigned 64-bit. GuestFault becomes -EFAULT."""
