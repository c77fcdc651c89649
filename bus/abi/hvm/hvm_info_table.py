"""The table by which the toolstack describes an HVM guest to its firmware (hvm/hvm_info_table.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, u8, u32

HVM_INFO_PFN: Final = 0x09F
HVM_INFO_OFFSET: Final = 0x800
HVM_INFO_PADDR: Final = (HVM_INFO_PFN << 12) + HVM_INFO_OFFSET
HVM_MAX_VCPUS: Final = 128


class hvm_info_table(NamedTuple):
    signature: Annotated[bytes, Bytes(8)]
    length: u32
    checksum: u8
    apic_mode: u8
    nr_vcpus: u32
    low_mem_pgend: u32
    reserved_mem_pgstart: u32
    high_mem_pgend: u32
    vcpu_online: Annotated[bytes, Bytes(16)]


HVM_INFO_TABLE: Final = Layout(hvm_info_table)
