"""What a machine is made of: sizes and caps, fixed when the hypervisor starts. Frames are of 4 KiB."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """Limits of one machine. All counts are maxima that the core enforces."""

    total_pages: int = 1 << 18
    """Machine memory that all domains together may own (1 GiB)."""
    first_mfn: int = 0x1000
    """Lowest MFN handed out."""
    mfn_limit: int = 1 << 24
    """MFNs are below this (the m2p table's size follows from it)."""
    mfn_holes: tuple[tuple[int, int], ...] = ((0xC0000, 0x100000),)
    """[first, end) MFN ranges kept free of RAM: the PCI hole below 4 GiB (BARs, APICs)."""
    extent_alignment: int = 512
    """Each domain's MFN range begins on a multiple of this (2 MiB, one superpage)."""
    xenheap_frames: int = 256
    """Xen-heap frames of each domain: shared info, grant and status frames, ioreq pages."""
    max_domains: int = 128
    max_vcpus: int = 128
    """Most vCPUs of a domain (XEN_LEGACY_MAX_VCPUS, 32, have their vcpu_info in the shared info page)."""
    pcpus: int = 2
    cpu_khz: int = 1_000_000
    cpu_version: tuple[bytes, int, int, int] = (b"GenuineIntel", 6, 6, 3)
    """(vendor, family, model, stepping) as XENPF_get_cpu_version tells Dom0."""
    max_pirqs: int = 256
    """Per-domain number space of physical interrupts (PIRQs)."""
    console_ring_bytes: int = 1 << 17
    console_rate: int = 1 << 16
    """Bytes a second that one unprivileged domain may write to the hypervisor's console."""
    console_burst: int = 1 << 16
    max_domain_events: int = 4096
    order_timeout_ns: int = 1_000_000_000
    start_timeout_ns: int = 8_000_000_000
    """For orders that a process may get while it still starts up."""
    kill_timeout_ns: int = 5_000_000_000
    """How long the shell has to confirm that a killed process is gone before the killer is answered
    EAGAIN."""
    max_orders: int = 1024
    """Orders that one domain may have outstanding before it is held to be dead."""
    max_batch: int = 4096
    """Most list elements (extents, indexes, map entries) of one call."""
