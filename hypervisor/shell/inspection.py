"""What the control domain may see of the IOMMU (`domicile iommu`): assignment, tables, I/O TLB, faults, a walk. Only reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from errno import EINVAL, ENODEV, ESRCH
from typing import Any, Final

import msgpack

from bus.addresses import PAGE_SHIFT, Bdf, DomId
from hypervisor.core.errors import XenError
from hypervisor.core.iommu import Device, Iommu

MAX_FAULTS: Final = 32
"""The latest so many are shown."""
MAX_ROWS: Final = 64
"""Devices, and domains, of one answer: it must fit into a message."""


def _number(args: dict[str, Any], name: str) -> int | None:
    """An argument that may be missing. XenError(EINVAL) if it is no number of 64 bits."""
    value = args.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise XenError(EINVAL)
    return value


def iommu_answer(iommu: Iommu, args: dict[str, Any], present: Callable[[Bdf], bool]) -> tuple[int, bytes]:
    """(0, the view in msgpack), or (-errno, nothing)."""
    try:
        return 0, msgpack.packb(iommu_view(iommu, args, present))
    except XenError as error:
        return -error.errno, b""


def iommu_view(iommu: Iommu, args: dict[str, Any], present: Callable[[Bdf], bool]) -> dict[str, Any]:
    """Of one device (`bdf`), one domain (`domain`) or all; with `iova`, also the path of that address through the domain's
    tables. `present`: the device's process has said hello. EINVAL, ENODEV (no such device, or one without owner to walk for), ESRCH (no I/O page tables)."""
    bdf, domain, iova = (_number(args, name) for name in ("bdf", "domain", "iova"))
    devices = iommu.devices()
    if bdf is not None:
        devices = [iommu.device(Bdf(bdf))]
        owner = devices[0].domain
    else:
        owner = DomId(domain) if domain is not None else None
        if owner is not None:
            devices = [device for device in devices if device.domain == owner]
            if not iommu.has_context(owner):
                raise XenError(ESRCH)
    of_interest = {device.domain for device in devices} | {owner}
    domains = sorted(each for each in of_interest if each is not None)
    tlb = iommu.tlb
    shown = {device.bdf for device in devices}
    records = [
        record
        for record in iommu.faults.records()
        if (bdf is None and domain is None) or record.bdf in shown or (bdf is None and record.domain == owner)
    ]
    view: dict[str, Any] = {
        "devices": [_device(iommu, device, present(device.bdf)) for device in devices[:MAX_ROWS]],
        "domains": [{"domain": each, **asdict(iommu.statistics(DomId(each)))} for each in domains[:MAX_ROWS]],
        "tlb": {
            name: getattr(tlb, name)
            for name in ("capacity", "size", "hits", "misses", "evictions", "invalidations")
        },
        "faults": [
            {**record._asdict(), "reason": record.reason.name, "text": record.text()}
            for record in records[-MAX_FAULTS:]
        ],
        "faults_total": iommu.faults.total(Bdf(bdf)) if bdf is not None else iommu.faults.total(),
        "faults_suppressed": iommu.faults.suppressed,
    }
    if iova is not None:
        if owner is None:
            raise XenError(ENODEV if bdf is not None else EINVAL)
        view["walk"] = _walk(iommu, owner, iova)
    return view


def _device(iommu: Iommu, device: Device, present: bool) -> dict[str, Any]:
    row = {**asdict(device), "present": present}
    row["vectors"] = [[entry, index] for entry, index in sorted(device.vectors.items())]
    row["faults"] = {reason.name: count for reason, count in iommu.faults.counts.get(device.bdf, {}).items()}
    return row


def _walk(iommu: Iommu, domain: DomId, iova: int) -> dict[str, Any]:
    """Level by level, and where it ends."""
    found = iommu.lookup(domain, iova >> PAGE_SHIFT)
    return {
        "domain": domain,
        "iova": iova,
        "steps": [step._asdict() for step in iommu.walk(domain, iova)],
        "mfn": found[0] if found else None,
        "writable": found[1] if found else False,
        "cached": iova >> PAGE_SHIFT in iommu.tlb.of(domain),
    }
