"""Every order that the core itself gives to a domain's process (the grant tables add their own): its body,
and whether it is answered. An answered order that fails or is late has the consequence that is named."""

from __future__ import annotations

from typing import NamedTuple


class OrderKind(NamedTuple):
    """One kind of order."""

    name: str
    answered: bool
    body: str
    """Keys of the body and their meaning."""
    meaning: str
    to: str = "guests"
    """Which processes obey it: `guests` (PV and HVM; native domains as far as it concerns them), `hvm`, `builder` (who builds or models
    another domain), or `page` (nobody: told in shared memory)."""


_KINDS = (
    OrderKind(
        "configure",
        False,
        "domid, kind (pv, hvm, native), handle (16 bytes), max_vcpus, flags (XEN_DOMCTL_CDF_*), "
        "emulation_flags, privileged, driver (its process may be replaced; a PV guest has a PCI bus)",
        "first order: what the domain is",
    ),
    OrderKind(
        "extent",
        False,
        "domid, base (MFN), ram_frames, frames, shared_info (MFN)",
        "the domain's own machine memory; its memfd travels along. The first ram_frames of the range are room "
        "for guest RAM, of which the domain owns what `memory` orders say; the others are Xen-heap frames",
    ),
    OrderKind(
        "build_extent",
        False,
        "as extent",
        "to the builder of a domain, or its device model: that domain's memory, with its memfd",
        to="builder",
    ),
    OrderKind(
        "drop_extent",
        False,
        "domid, base",
        "that domain is destroyed: unmap and close its memory",
        to="builder",
    ),
    OrderKind(
        "memory",
        False,
        "one of: added, removed: [[first MFN, count], ...]; m2p: [[pfn, mfn, count], ...]; p2m: [[gfn, mfn, "
        "count, type], ...], type as P2mType, 0 for unmapped",
        "what changed in the domain's memory; always before the reply to the call that changed it",
    ),
    OrderKind(
        "channels",
        False,
        "channels: [[port, EVTCHNSTAT_*, vcpu, remote domain, remote port, VIRQ or PIRQ, priority], ...]",
        "to a new process in place of one that ended: the event channels that its domain has",
    ),
    OrderKind(
        "start",
        False,
        "vcpus, online (list of vCPU numbers), memory_map (e820 entries of 20 bytes), time_offset "
        "(s), address_size",
        "first unpause: the domain is built",
    ),
    OrderKind(
        "pause",
        True,
        "paused (bool)",
        "true: stop all vCPUs, then answer (late: the domain is crashed); false: they may run; not "
        "answered then",
    ),
    OrderKind(
        "stop",
        True,
        "reason (SHUTDOWN_*)",
        "somebody else shut the domain down: stop all vCPUs for good, then answer (late: its "
        "process is killed)",
    ),
    OrderKind("resume", False, "", "XEN_DOMCTL_resumedomain: the shutdown is undone, vCPUs may run again"),
    OrderKind(
        "set_vcpu_context",
        True,
        "vcpu, context (struct vcpu_guest_context)",
        "the vCPU's first state; answer 0, or the negative errno of what is wrong with it",
    ),
    OrderKind("get_vcpu_context", True, "vcpu", "answer 0 and a struct vcpu_guest_context; vCPUs are paused"),
    OrderKind("set_hvm_context", True, "context (records of hvm/save.h)", "as set_vcpu_context", to="hvm"),
    OrderKind("get_hvm_context", True, "", "answer 0 and the records", to="hvm"),
    OrderKind("hypercall_page", True, "mfn", "write the hypercall page into the frame, then answer 0"),
    OrderKind("trigger", False, "trigger (XEN_DOMCTL_SENDTRIGGER_*), vcpu", "an NMI, or a button"),
    OrderKind("time_offset", False, "seconds", "of the domain's wall clock"),
    OrderKind("wallclock", False, "ns_at_system_time_0", "Dom0 set the wall clock: ns since 1970"),
    OrderKind(
        "hvm_param", False, "index, value", "somebody else set an HVM parameter of the domain", to="hvm"
    ),
    OrderKind(
        "msi",
        False,
        "bdf, entry",
        "a device of an HVM guest raised that MSI-X vector: deliver its message",
        to="hvm",
    ),
    OrderKind(
        "ioreq_area",
        False,
        "id, guest (domid)",
        "to a guest's process and to its device model: they have an ioreq server; its memory and the doorbells request, "
        "response, note, done travel along (bus.ioreq_area)",
        to="hvm",
    ),
    OrderKind(
        "ioreq_server",
        True,
        "id, and one of: add, remove: [XEN_DMOP_IO_RANGE_*, first, last]; enabled; gone (not answered then)",
        "to a guest's process: an ioreq server changed; answer when that is in effect",
        to="hvm",
    ),
    OrderKind(
        "model_interrupt",
        False,
        "pci (device << 2 | pin) or isa, and level; link and isa; or address and data",
        "the device model drives an interrupt line, routes a PCI link, or sends an interrupt message",
        to="hvm",
    ),
    OrderKind(
        "drop_code",
        False,
        "frames (MFNs)",
        "the hypervisor wrote to them: translated code is stale. Told by the lease page (bus.lease_page), not by a message",
        to="page",
    ),
)

ORDERS = {kind.name: kind for kind in _KINDS}
"""By name."""
