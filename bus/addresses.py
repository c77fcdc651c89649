"""Distinct types for addresses and names that must not be mixed (docs/architecture.md, section 7).

All are plain integers at run time; the type checker keeps them apart.
"""

from typing import Final, NewType

DomId = NewType("DomId", int)
"""Domain id, `domid_t` in xen.h: 0..0x7FEF, or one of the DOMID_* values of `bus.abi.xen`."""

VcpuId = NewType("VcpuId", int)
"""Index of a vCPU in its domain, from 0."""

Mfn = NewType("Mfn", int)
"""Machine frame number: index of a 4 KiB frame in the machine's one address space."""

Gfn = NewType("Gfn", int)
"""Guest frame number: of an auto-translated (HVM, PVH, native) domain's own address space."""

Pfn = NewType("Pfn", int)
"""Pseudophysical frame number: a PV guest's own numbering of its frames (index in its p2m)."""

MachineAddr = NewType("MachineAddr", int)
"""Byte address in machine memory: `mfn << 12 | offset`."""

VirtAddr = NewType("VirtAddr", int)
"""Guest-virtual (linear) address, 64 bits."""

Iova = NewType("Iova", int)
"""I/O virtual address: what a device puts in a DMA request."""

Bdf = NewType("Bdf", int)
"""PCI address: segment << 16 | bus << 8 | device << 3 | function (`machine_sbdf` in physdev.h)."""

Port = NewType("Port", int)
"""Event channel port, `evtchn_port_t`: local to one domain; 0 is never valid."""

GrantRef = NewType("GrantRef", int)
"""Grant reference, `grant_ref_t`: index in the granting domain's grant table."""

EVTCHNS_PER_BUCKET: Final = 64
"""Of Xen 4.17, in no header: a domain's event channels come so many at a time; a port of none of them is EINVAL."""
PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = PAGE_SIZE - 1


def canonical(address: int) -> bool:
    """A 48-bit canonical linear address."""
    return (address >> 47) in (0, 0x1FFFF)
