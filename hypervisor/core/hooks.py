"""What a subsystem is told of a domain's life. Each overrides what concerns it; lifecycle calls them in the
order in which they were registered."""

from __future__ import annotations

from hypervisor.core.domains import Domain


class DomainHooks:
    """All methods do nothing unless overridden. `now` is in nanoseconds."""

    def created(self, now: int, domain: Domain) -> None:
        """The domain is in the table; it has no vCPUs and no memory yet."""

    def extent_created(self, now: int, domain: Domain) -> None:
        """It has its MFN range now and its shared info frame: Xen-heap frames can be allocated."""

    def runnable_changed(self, now: int, domain: Domain) -> None:
        """`domain.runnable` may have changed."""

    def shut_down(self, now: int, domain: Domain) -> None:
        """It has shut down, with `domain.shutdown_code`; its vCPUs no longer run."""

    def process_ended(self, now: int, domain: Domain) -> None:
        """Its process is gone. No order to it will be answered."""

    def restarted(self, now: int, domain: Domain) -> None:
        """It has a new process in place of one that ended: tell that what the old one knew."""

    def dying(self, now: int, domain: Domain) -> None:
        """It is being destroyed: close everything that joins it to others. Its process may still run for a
        moment."""

    def gone(self, now: int, domain: Domain) -> None:
        """Its process is gone and its frames are about to be given back: drop every reference it holds."""

    def removed(self, now: int, domain: Domain) -> None:
        """The last frame is free, the id can be used again: forget it."""
