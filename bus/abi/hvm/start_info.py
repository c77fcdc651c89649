"""Start info of a PVH guest, to which EBX points at its entry (arch-x86/hvm/start_info.h)."""

from typing import Final, NamedTuple

from bus.abi.layout import Layout, u32, u64

XEN_HVM_START_MAGIC_VALUE: Final = 0x336EC578
XEN_HVM_MEMMAP_TYPE_RAM: Final = 1
XEN_HVM_MEMMAP_TYPE_RESERVED: Final = 2
XEN_HVM_MEMMAP_TYPE_ACPI: Final = 3
XEN_HVM_MEMMAP_TYPE_NVS: Final = 4
XEN_HVM_MEMMAP_TYPE_UNUSABLE: Final = 5
XEN_HVM_MEMMAP_TYPE_DISABLED: Final = 6
XEN_HVM_MEMMAP_TYPE_PMEM: Final = 7


class hvm_start_info(NamedTuple):
    """Addresses are physical. version 1 has the memory map."""

    magic: u32
    version: u32
    flags: u32
    nr_modules: u32
    modlist_paddr: u64
    cmdline_paddr: u64
    rsdp_paddr: u64
    memmap_paddr: u64
    memmap_entries: u32
    reserved: u32


HVM_START_INFO: Final = Layout(hvm_start_info)


class hvm_modlist_entry(NamedTuple):
    paddr: u64
    size: u64
    cmdline_paddr: u64
    reserved: u64


HVM_MODLIST_ENTRY: Final = Layout(hvm_modlist_entry)


class hvm_memmap_table_entry(NamedTuple):
    """type: XEN_HVM_MEMMAP_TYPE_*."""

    addr: u64
    size: u64
    type: u32
    reserved: u32


HVM_MEMMAP_TABLE_ENTRY: Final = Layout(hvm_memmap_table_entry)
