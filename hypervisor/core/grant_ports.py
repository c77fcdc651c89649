"""What the grant tables need of the rest of the core: frames, domains, the IOMMU, a way out.

The core's own objects satisfy these protocols (`FrameTable`, `Outbox`); the unit tests have small ones of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.effects import Effect


class GrantFrames(Protocol):
    """The frame table: who owns a machine frame is decided here and nowhere else."""

    def is_ram_of(self, mfn: int, domain: DomId) -> bool:
        """The frame is guest RAM that the domain owns now."""

    def owner(self, mfn: int) -> DomId | None:
        """The domain that owns the frame; None for one that is free, leaving, or not machine memory."""

    def references(self, mfn: int) -> int:
        """How many references are held on the frame beside its allocation."""

    def get_ref(self, mfn: Mfn) -> None:
        """Hold the frame: until `put_ref` nobody else gets it. XenError if the count is full."""

    def put_ref(self, mfn: Mfn) -> None:
        """Let go of the frame; the last one frees a frame that its owner has given back."""

    def allocate_xenheap(self, domain: DomId, count: int = 1) -> Mfn:
        """Frames of the domain's Xen heap, reading as zero. XenError(ENOMEM) if there are none."""

    def release(self, mfn: Mfn) -> bool:
        """Give a frame back (a status frame, at the change to version 1)."""


class GrantDomains(Protocol):
    """What is known about domains, by id. `exists` stays true for a dying domain until its last frame is gone."""

    def exists(self, domain: DomId) -> bool:
        """The domain is there, dying or not."""

    def is_dying(self, domain: DomId) -> bool:
        """The domain is being destroyed."""

    def has_process(self, domain: DomId) -> bool:
        """A process runs for the domain and can carry out orders."""

    def is_translated(self, domain: DomId) -> bool:
        """Auto-translated (HVM, PVH, native): its frame numbers are its own (Gfn). A PV domain's are machine frames."""

    def dma_by_p2m(self, domain: DomId) -> bool:
        """An HVM or PVH guest: its devices reach what is in its p2m, granted frames too, as on Xen where both share tables. (A native
        domain's reach what it enters with GNTMAP_device_map, and no more.)"""

    def controls(self, caller: DomId, target: DomId) -> bool:
        """`caller` may act on `target`'s tables (XSM_TARGET): itself, the control domain, its device model."""

    def translate(self, domain: DomId, gfn: int) -> Mfn | None:
        """The machine frame at the domain's frame number; for a PV domain the number itself. None if there is none."""

    def gfn_of(self, domain: DomId, mfn: Mfn) -> int:
        """The number by which the guest knows a frame of its own: the MFN (PV), the gfn, or ~0 if it is not mapped."""

    def enter_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn, writable: bool) -> bool:
        """Put a granted frame at `gfn` of a translated domain's p2m. False if that is not possible there."""

    def remove_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn) -> bool:
        """Take a granted frame away from `gfn` again. False if `mfn` is not mapped there."""

    def frame_written(self, domain: DomId, mfn: Mfn) -> None:
        """The hypervisor wrote to the domain's frame: translated code of it is stale."""

    def crash(self, domain: DomId, reason: str) -> None:
        """Crash the domain: its process is ended, its outstanding orders fail with "dead", now or soon."""


class DmaMap(Protocol):
    """The domain's I/O page tables (hypervisor/core/iommu.py)."""

    def has_context(self, domain: DomId) -> bool:
        """The domain has I/O page tables."""

    def lookup(self, domain: DomId, page: int) -> tuple[Mfn, bool] | None:
        """(frame, writable) at an I/O virtual page, or None."""

    def map_page(self, domain: DomId, page: int, mfn: Mfn, writable: bool) -> bool:
        """Map one frame at an I/O virtual page, replacing what is there. False if there is no frame for a table."""

    def unmap_page(self, domain: DomId, page: int) -> None:
        """Remove an I/O virtual page. When this returns no DMA can reach the frame through it."""


class GrantOutbox(Protocol):
    """How effects and orders leave the core (hypervisor/core/outbox.py)."""

    def emit(self, effect: Effect) -> None:
        """Append an effect."""

    def log(self, level: str, text: str, domain: DomId | None = None) -> None:
        """A line for the hypervisor's log."""

    def ask(
        self,
        now: int,
        domain: DomId,
        kind: str,
        body: dict[str, object],
        done: Callable[[int, int, bytes], None],
        failed: Callable[[int, str], None],
        *,
        timeout_ns: int,
        windows: tuple[tuple[int, bool], ...] = (),
    ) -> int:
        """An order; exactly one of `done(now, rc, data)` and `failed(now, "expired"|"dead"|"refused")` follows."""
