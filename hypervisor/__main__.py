"""`domicile-hypervisor`: the Xen process of a machine."""

from __future__ import annotations

import socket
import time

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.abi.memory import XENMEM_resource_grant_table
from bus.addresses import Mfn
from bus.process import begin
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.devices import DeviceService
from hypervisor.core.grant_calls import GrantCalls
from hypervisor.core.grants import GrantTables
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import DmaService
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.pool import XenPool
from hypervisor.core.scheduler import CreditScheduler
from hypervisor.core.scheduler_calls import SchedulerCalls
from hypervisor.shell.check import DebugKey
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.processes import Processes, WardenGone
from hypervisor.shell.server import Server
from hypervisor.shell.trace_pages import TracePages

DOM0_PAGES = 4096
"""Dom0's own memory (16 MiB): what it grants to others, no more; the program itself lives in its process."""


TABLE_FRAMES = 16384
"""Frames for I/O page tables (64 MiB, sparse): enough to map 32 GiB page by page."""


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=16384, oom_score=-500))
    settings = start.settings
    memory = MemfdMemory()
    processes = Processes(
        socket.socket(fileno=start.fds["warden"]), settings["bus"], settings.get("transport", "ipc")
    )
    config = MachineConfig(
        total_pages=int(settings.get("memory_mb", 4096)) << 8, pcpus=int(settings.get("cpus", 2))
    )
    core = HypervisorCore(memory, config)
    traces = TracePages()
    iommu = Iommu(memory, XenPool(memory, Mfn(config.mfn_limit), TABLE_FRAMES))
    grants = GrantTables(core.frames, core.views, memory, core.outbox, iommu)
    grant_calls = GrantCalls(grants, core.dispatcher, core.outbox, traces.own)
    core.attach_hooks(grant_calls)
    core.physmap.grant_frame = grant_calls.physmap_frame
    core.memory_ops.resources[XENMEM_resource_grant_table] = grant_calls.resource

    def written(mfn: Mfn, count: int) -> None:
        for owner, first, frames in core.frames.owners(mfn, count):
            core.views.frame_written(owner, Mfn(first), frames)

    def interrupt(now: int, entry: InterruptEntry) -> None:
        devices.interrupt(now, entry)

    dma = DmaService(
        iommu,
        grants,
        written,
        interrupt,
        trace=traces.own,
        owner=core.frames.owner,
        tell_written=core.outbox.tell_stale,
    )
    devices = DeviceService(
        iommu,
        dma,
        core.physdev,
        core.domains,
        core.events,
        core.outbox,
        core.dispatcher,
        core.frames,
        core.news,
    )
    core.attach_hooks(devices)
    scheduler = SchedulerCalls(CreditScheduler(config.pcpus), core.domains, config, core.dispatcher)
    core.attach_hooks(scheduler)
    core.create_dom0(time.monotonic_ns(), max_pages=DOM0_PAGES)
    doorbells = bool(settings.get("doorbells", True))
    server = Server(core, memory, processes, devices, scheduler, traces, doorbells=doorbells)
    core.sysctl.idle_ns = server.leases.idle_ns
    core.sysctl.debug_key = DebugKey(core, grants, server)
    try:
        server.run()
    except WardenGone:
        pass
    finally:
        traces.close()
        memory.close()


if __name__ == "__main__":
    main()
