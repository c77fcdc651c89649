"""`domicile-hypervisor`: the Xen process of a machine."""

from __future__ import annotations

import socket
import time

from bus import privileges
from bus.addresses import DomId, Mfn
from bus.process import begin
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.grant_calls import GrantCalls
from hypervisor.core.grants import GrantTables
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.processes import Processes, WardenGone
from hypervisor.shell.server import Server

DOM0_PAGES = 4096
"""Dom0's own memory (16 MiB): what it grants to others, no more; the program itself lives in its process."""


class NoDma:
    """No domain has devices."""

    def has_context(self, domain: DomId) -> bool:
        return False

    def lookup(self, domain: DomId, page: int) -> tuple[Mfn, bool] | None:
        return None

    def map_page(self, domain: DomId, page: int, mfn: Mfn, writable: bool) -> bool:
        return False

    def unmap_page(self, domain: DomId, page: int) -> None:
        return None


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=16384))
    settings = start.settings
    memory = MemfdMemory()
    processes = Processes(
        socket.socket(fileno=start.fds["warden"]), settings["bus"], settings.get("transport", "ipc")
    )
    config = MachineConfig(
        total_pages=int(settings.get("memory_mb", 4096)) << 8, pcpus=int(settings.get("cpus", 2))
    )
    core = HypervisorCore(memory, config)
    no_dma = NoDma()
    grants = GrantTables(core.frames, core.views, memory, core.outbox, no_dma)
    core.attach_hooks(GrantCalls(grants, core.dispatcher))
    core.create_dom0(time.monotonic_ns(), max_pages=DOM0_PAGES)
    server = Server(core, memory, processes, doorbells=bool(settings.get("doorbells", True)))
    try:
        server.run()
    except WardenGone:
        pass
    finally:
        memory.close()


if __name__ == "__main__":
    main()
