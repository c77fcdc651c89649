"""The core's domains as the grant tables and the IOMMU want to see them (`grant_ports.GrantDomains`)."""

from __future__ import annotations

from collections.abc import Callable

from bus.addresses import DomId, Gfn, Mfn
from hypervisor.core.domains import Domain, DomainTable, Dying, Kind, may_target
from hypervisor.core.frames import FrameTable
from hypervisor.core.lifecycle import Lifecycle
from hypervisor.core.outbox import Outbox
from hypervisor.core.p2m import P2mType
from hypervisor.core.physmap import PhysMap

NOT_MAPPED = (1 << 64) - 1
"""INVALID_GFN."""


class DomainViews:
    """Questions about a domain by id; the answer for one that does not exist is the harmless one."""

    def __init__(
        self,
        domains: DomainTable,
        frames: FrameTable,
        physmap: PhysMap,
        lifecycle: Lifecycle,
        outbox: Outbox,
        clock: Callable[[], int],
    ) -> None:
        self._domains = domains
        self._frames = frames
        self._physmap = physmap
        self._lifecycle = lifecycle
        self._outbox = outbox
        self._clock = clock

    def _get(self, domid: DomId) -> Domain | None:
        return self._domains.get(domid)

    def exists(self, domain: DomId) -> bool:
        """The domain is there, dying or not."""
        return self._get(domain) is not None

    def is_dying(self, domain: DomId) -> bool:
        """The domain is being destroyed, or gone."""
        found = self._get(domain)
        return found is None or found.dying is not Dying.ALIVE

    def has_process(self, domain: DomId) -> bool:
        """A process runs for the domain and can carry out orders."""
        found = self._get(domain)
        return found is not None and found.process_alive

    def is_translated(self, domain: DomId) -> bool:
        """Its frame numbers are its own (Gfn)."""
        found = self._get(domain)
        return found is not None and found.translated

    def dma_by_p2m(self, domain: DomId) -> bool:
        """HVM and PVH guests."""
        found = self._get(domain)
        return found is not None and found.kind is Kind.HVM

    def controls(self, caller: DomId, target: DomId) -> bool:
        """XSM_TARGET."""
        one, other = self._get(caller), self._get(target)
        return one is not None and other is not None and may_target(one, other)

    def translate(self, domain: DomId, gfn: int) -> Mfn | None:
        """The frame of the domain's own at this frame number."""
        found = self._get(domain)
        entry = self._physmap.frame_at(found, gfn) if found is not None else None
        return entry.mfn if entry is not None and entry.type is P2mType.RAM else None

    def gfn_of(self, domain: DomId, mfn: Mfn) -> int:
        """The number by which the guest knows a frame of its own; ~0 if it has none."""
        found = self._get(domain)
        if found is None or found.p2m is None:
            return mfn
        gfn = found.p2m.gfn_of(mfn)
        return NOT_MAPPED if gfn is None else gfn

    def enter_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn, writable: bool) -> bool:
        """Put a granted frame at an empty gfn of a translated domain. False if that is not possible there."""
        found = self._get(domain)
        if found is None or found.p2m is None or not found.p2m.can_map(gfn) or found.p2m.get(gfn) is not None:
            return False
        found.p2m.set(gfn, mfn, P2mType.GRANT_RW if writable else P2mType.GRANT_RO)
        return True

    def remove_grant(self, domain: DomId, gfn: Gfn, mfn: Mfn) -> bool:
        """Take a granted frame away again. False if it is not mapped there."""
        found = self._get(domain)
        entry = found.p2m.get(gfn) if found is not None and found.p2m is not None else None
        if (
            found is None
            or found.p2m is None
            or entry is None
            or entry.mfn != mfn
            or entry.type not in (P2mType.GRANT_RW, P2mType.GRANT_RO)
        ):
            return False
        found.p2m.clear(gfn)
        return True

    def frame_written(self, domain: DomId, mfn: Mfn, count: int = 1) -> None:
        """Order `drop_code`: the hypervisor wrote to the frame, or so many from it on; translated code of them is stale. A native domain
        runs no guest code."""
        found = self._get(domain)
        if found is not None and found.process_alive and found.kind is not Kind.NATIVE:
            self._outbox.code_is_stale(domain, mfn, count)

    def crash(self, domain: DomId, reason: str) -> None:
        """Crash the domain: its process is ended."""
        found = self._get(domain)
        if found is not None:
            self._lifecycle.crash(self._clock(), found, reason)
