"""Memory management of a PV guest as Xen does it: page types, page tables, descriptor tables, grant
mappings."""

from domains.pv.mm.mmu import Mmu

__all__ = ["Mmu"]
