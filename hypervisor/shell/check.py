"""The debug key 'I': have the machine's own records checked (docs/architecture.md, section 2), and say how much of everything is in use.

Printed to the hypervisor's log, as Xen's debug keys do: one line `invariants: PROBLEM` for each problem (at most 50), then one
line `invariants: N problems, ` with the counters as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

from bus.process import resident_kib
from hypervisor.core.core import HypervisorCore
from hypervisor.core.grants import GrantTables
from hypervisor.core.invariants import InvariantChecker
from hypervisor.shell.server import Server

KEY: Final = "I"
MAX_PROBLEMS: Final = 50


class DebugKey:
    """What `SysctlOps.debug_key` calls."""

    def __init__(self, core: HypervisorCore, grants: GrantTables, server: Server) -> None:
        self._core = core
        self._grants = grants
        self._server = server
        self._checker = InvariantChecker(core)
        self._checker.add_references(grants.references)

    def __call__(self, key: str) -> list[str]:
        """Lines for the log; none for a key that is not known."""
        if key != KEY:
            return []
        problems = [*self._checker.check(), *self._grants.check()]
        lines = [f"invariants: {problem[:300]}" for problem in problems[:MAX_PROBLEMS]]
        return [*lines, f"invariants: {len(problems)} problems, {json.dumps(self.counters())}"]

    def counters(self) -> dict[str, Any]:
        """Of the machine, and of each domain by its number."""
        core = self._core
        return {
            "free_pages": core.frames.free_pages,
            "total_pages": core.frames.total_pages,
            "windows": self._grants.window_count,
            "grant_jobs": self._grants.busy,
            "grant_references": sum(1 for _ in self._grants.references()),
            "resident_kib": resident_kib(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "domains": {int(domain.domid): self._of_domain(int(domain.domid)) for domain in core.domains},
        }

    def _of_domain(self, number: int) -> dict[str, int]:
        core, server = self._core, self._server
        domain = next(domain for domain in core.domains if domain.domid == number)
        peer = server.peers.get(domain.domid)
        process = server.processes.of(domain.domid)
        extent = core.frames.extent_of(domain.domid)
        return {
            "pid": process.pid if process is not None else 0,
            "uid": process.uid if process is not None else 0,
            "extent": int(extent.base) if extent is not None else 0,
            "extent_end": extent.end if extent is not None else 0,
            "frames": core.frames.ram_pages(domain.domid),
            "ports": len(core.events.ports_of(domain.domid).channels),
            "mappings": len(self._grants.mappings(domain.domid)),
            "orders": core.outbox.outstanding(domain.domid),
            "messages": peer.received if peer is not None else 0,
            "refused": peer.bad if peer is not None else 0,
        }
