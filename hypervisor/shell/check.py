"""Debug keys, printed to the hypervisor's log as Xen's are: e, g, h and q as there (keyhandler.c's help texts), and I of our own.

'I' has the machine's own records checked (docs/architecture.md, section 2), and says how much of everything is in use: one line
`invariants: PROBLEM` for each problem (at most 50), then one line `invariants: N problems, ` with the counters as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

from bus.process import resident_kib
from hypervisor.core.core import HypervisorCore
from hypervisor.core.event_channels import State
from hypervisor.core.grants import GrantTables
from hypervisor.core.invariants import InvariantChecker
from hypervisor.shell.server import Server

MAX_PROBLEMS: Final = 50
MAX_LINES: Final = 512
"""Of one key: a guest with very many ports does not push everything else out of the log."""
HELP: Final = {
    "e": "dump event channels",
    "g": "dump grant tables",
    "h": "this help",
    "q": "dump domains and their vCPUs",
    "I": "check the machine's own records",
}


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
        makers = {
            "e": self._events,
            "g": self._tables,
            "h": self._help,
            "q": self._domains,
            "I": self._invariants,
        }
        maker = makers.get(key)
        if maker is None:
            return []
        lines = maker()
        return (
            lines
            if len(lines) <= MAX_LINES
            else [*lines[:MAX_LINES], f"... {len(lines) - MAX_LINES} more lines"]
        )

    def _help(self) -> list[str]:
        return [
            "'h' pressed -> showing installed handlers",
            *(f" key '{key}' => {text}" for key, text in HELP.items()),
        ]

    def _events(self) -> list[str]:
        """A line a port: number, state as Xen's digit for it, and what it is bound to."""
        lines = ["'e' pressed -> dumping event-channel info"]
        for domain in self._core.domains:
            lines.append(f"Event channel information for domain {domain.domid}:")
            for port, channel in sorted(self._core.events.ports_of(domain.domid).channels.items()):
                text = f"    {port:4}: s={channel.state.value} n={channel.vcpu}"
                if channel.state is State.UNBOUND:
                    text += f" d={channel.remote_domain}"
                elif channel.state is State.INTERDOMAIN:
                    text += f" d={channel.remote_domain} p={channel.remote_port}"
                elif channel.state in (State.VIRQ, State.PIRQ):
                    text += f" {channel.state.name.lower()}={channel.number}"
                lines.append(text + (" (Xen's)" if channel.consumer is not None else ""))
        return lines

    def _tables(self) -> list[str]:
        lines = ["'g' pressed -> dumping grant tables"]
        for domain in self._core.domains:
            lines += self._grants.dump(domain.domid)
        return lines

    def _domains(self) -> list[str]:
        lines = ["'q' pressed -> dumping domain info"]
        for domain in self._core.domains:
            of = self._of_domain(int(domain.domid))
            lines.append(
                f"General information for domain {domain.domid}: {domain.kind.value}, paused={domain.controller_pause + domain.internal_pause} "
                f"tot_pages={of['frames']} max_pages={domain.max_pages} pid={of['pid']} mappings={of['mappings']} orders={of['orders']}"
            )
            lines += [
                f"    VCPU{vcpu.index}: {'online' if vcpu.online else 'offline'}{'' if vcpu.initialised else ', not initialised'}"
                for vcpu in domain.vcpus
            ]
        return lines

    def _invariants(self) -> list[str]:
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
