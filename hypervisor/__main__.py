"""`domicile-hypervisor`: the Xen process of a machine."""

from __future__ import annotations

import socket

from bus import privileges
from bus.process import begin
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.processes import Processes, WardenGone
from hypervisor.shell.server import Server


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
    server = Server(
        HypervisorCore(memory, config), memory, processes, doorbells=bool(settings.get("doorbells", True))
    )
    try:
        server.run()
    except WardenGone:
        pass
    finally:
        memory.close()


if __name__ == "__main__":
    main()
