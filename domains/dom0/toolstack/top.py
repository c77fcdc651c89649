"""What `domicile top` shows: all domains at one moment, with their vCPUs and disks."""

from __future__ import annotations

import time
from typing import Any, Final

from bus.abi import domctl as dc
from bus.abi import sched
from bus.addresses import DomId
from domains.dom0.toolstack.manager import Manager

NO_LIMIT: Final = 0xFFFF_FFFF
"""Pages: more than any machine has."""


Counts = dict[tuple[int, int], tuple[int, ...]]
"""By (domain, number of a disk or interface)."""


def top_view(manager: Manager, disks: Counts, nets: Counts) -> dict[str, Any]:
    """Counters as drivers.block.watch and drivers.net.watch have them. Memory in KiB, times in seconds."""
    physical = manager.xc.physinfo()
    return {
        "time": time.monotonic(),
        "cpus": physical.nr_cpus,
        "total_kib": physical.total_pages << 2,
        "free_kib": physical.free_pages << 2,
        "domains": [_domain(manager, info, disks, nets) for info in manager.xc.domain_list()],
    }


def _domain(
    manager: Manager, info: dc.xen_domctl_getdomaininfo, disks: Counts, nets: Counts
) -> dict[str, Any]:
    return {
        "domid": info.domain,
        "name": manager.name_of(info.domain),
        "state": _state(info),
        "seconds": info.cpu_time / 1e9,
        "memory_kib": info.tot_pages << 2,
        "max_kib": info.max_pages << 2 if info.max_pages < NO_LIMIT else 0,
        "ssid": info.ssidref,
        "vcpus": _vcpus(manager, info),
        "vbds": [
            [disk.vdev, disk.number, *disks.get((info.domain, disk.number), (0,) * 7)]
            for disk in manager.disks.disks.values()
            if disk.domid == info.domain
        ],
        "vifs": [
            [nic.devid, *nets.get((info.domain, nic.devid), (0,) * 6)[:6]]
            for nic in manager.nics.nics
            if nic.domid == info.domain
        ],
    }


def _vcpus(manager: Manager, info: dc.xen_domctl_getdomaininfo) -> list[list[Any]]:
    rows = []
    for number in range(info.max_vcpu_id + 1 if info.max_vcpu_id != 0xFFFFFFFF else 0):
        vcpu = manager.xc.vcpu_info(DomId(info.domain), number)
        state = "running" if vcpu.running else "blocked" if vcpu.blocked else "waiting"
        rows.append([number, vcpu.cpu, state if vcpu.online else "offline", vcpu.cpu_time / 1e9])
    return rows


def _state(info: dc.xen_domctl_getdomaininfo) -> str:
    """xentop's marks, in its order."""
    code = info.flags >> dc.XEN_DOMINF_shutdownshift & dc.XEN_DOMINF_shutdownmask
    shut = bool(info.flags & dc.XEN_DOMINF_shutdown)
    marks = (
        ("d", bool(info.flags & dc.XEN_DOMINF_dying)),
        ("s", shut and code != sched.SHUTDOWN_crash),
        ("b", bool(info.flags & dc.XEN_DOMINF_blocked)),
        ("c", shut and code == sched.SHUTDOWN_crash),
        ("p", bool(info.flags & dc.XEN_DOMINF_paused)),
        ("r", bool(info.flags & dc.XEN_DOMINF_running)),
    )
    return "".join(mark if holds else "-" for mark, holds in marks)
