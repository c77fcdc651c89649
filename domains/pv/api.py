"""The seams inside a PV domain process: memory by machine frame, the MMU, and what each needs of the other.

* `GuestFrames` is the domain's machine memory as this process sees it (implemented by `domains.pv.frames`).
* `PagingHost` is what the memory-management code (`domains/pv/mm/`) asks of the CPU side.
* `domains.pv.mm.Mmu` is the memory-management code itself: page types, page tables, descriptor tables.
"""

from __future__ import annotations

from typing import Protocol

from bus.addresses import DomId, Mfn


class GuestFrames(Protocol):
    """Machine frames that this domain process can reach.

    A domain's own frames are one contiguous MFN range [base, base + count): first its guest RAM (as much as the domain
    may ever own), then its Xen-heap frames (shared info, grant table frames, ...). Frames granted by others may be
    mapped in addition, each at its own MFN.
    """

    base: Mfn
    count: int
    ram_count: int
    """The first `ram_count` frames of the range are guest RAM; the rest are Xen-heap frames shared with the guest."""
    words: memoryview
    """The own range as 64-bit words: word `(mfn - base) * 512 + i`. Format 'Q', writable."""
    octets: memoryview
    """The same memory as bytes: byte `(mfn - base) << 12 | offset`."""

    def owned(self, mfn: Mfn) -> bool:
        """The domain owns this RAM frame now (it was populated and not given back)."""

    def shared_by_xen(self, mfn: Mfn) -> bool:
        """A Xen-heap frame that the guest may map (shared info, grant table, ...)."""

    def foreign(self, mfn: Mfn) -> tuple[DomId, bool] | None:
        """For a frame that is mapped here by a live grant: (granter, writable). None for any other."""

    def page(self, mfn: Mfn) -> memoryview | None:
        """4096 bytes of any frame that is reachable here, own or granted; None if there is none."""


class PagingHost(Protocol):
    """What the MMU needs of the CPU side."""

    def flush_tlb(self) -> None:
        """Drop cached translations of the vCPU that runs (the only one with any: vCPUs take turns, and a switch flushes)."""

    def drop_code(self, mfn: Mfn) -> None:
        """Drop translated code of a frame."""

    def load_cr3(self, kernel: Mfn, user: Mfn | None) -> None:
        """New page-table roots of the current vCPU; the one of its current mode is loaded into CR3, flushed."""

    def current_roots(self) -> tuple[Mfn, Mfn | None]:
        """(kernel, user) page-table roots of the current vCPU."""

    def is_kernel_mode(self) -> bool:
        """The current vCPU runs guest-kernel code (of the two CPL3 modes)."""
