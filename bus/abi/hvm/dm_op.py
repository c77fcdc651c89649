"""HYPERVISOR_dm_op: what a device model may do to its own guest only (hvm/dm_op.h).

The first buffer is an `xen_dm_op`: `op`, then at offset 8 the command's own structure.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, Union, handle, u8, u16, u32, u64

XEN_DMOP_create_ioreq_server: Final = 1
XEN_DMOP_get_ioreq_server_info: Final = 2
XEN_DMOP_no_gfns: Final = 1
XEN_DMOP_map_io_range_to_ioreq_server: Final = 3
XEN_DMOP_unmap_io_range_from_ioreq_server: Final = 4
XEN_DMOP_IO_RANGE_PORT: Final = 0
XEN_DMOP_IO_RANGE_MEMORY: Final = 1
XEN_DMOP_IO_RANGE_PCI: Final = 2
XEN_DMOP_set_ioreq_server_state: Final = 5
XEN_DMOP_destroy_ioreq_server: Final = 6
XEN_DMOP_track_dirty_vram: Final = 7
XEN_DMOP_set_pci_intx_level: Final = 8
XEN_DMOP_set_isa_irq_level: Final = 9
XEN_DMOP_set_pci_link_route: Final = 10
XEN_DMOP_modified_memory: Final = 11
XEN_DMOP_set_mem_type: Final = 12
XEN_DMOP_inject_event: Final = 13
XEN_DMOP_EVENT_ext_int: Final = 0
XEN_DMOP_EVENT_nmi: Final = 2
XEN_DMOP_EVENT_hw_exc: Final = 3
XEN_DMOP_EVENT_sw_int: Final = 4
XEN_DMOP_EVENT_pri_sw_exc: Final = 5
XEN_DMOP_EVENT_sw_exc: Final = 6
XEN_DMOP_inject_msi: Final = 14
XEN_DMOP_map_mem_type_to_ioreq_server: Final = 15
XEN_DMOP_IOREQ_MEM_ACCESS_READ: Final = 1 << 0
XEN_DMOP_IOREQ_MEM_ACCESS_WRITE: Final = 1 << 1
XEN_DMOP_remote_shutdown: Final = 16
XEN_DMOP_relocate_memory: Final = 17
XEN_DMOP_pin_memory_cacheattr: Final = 18
XEN_DMOP_MEM_CACHEATTR_UC: Final = 0
XEN_DMOP_MEM_CACHEATTR_WC: Final = 1
XEN_DMOP_MEM_CACHEATTR_WT: Final = 4
XEN_DMOP_MEM_CACHEATTR_WP: Final = 5
XEN_DMOP_MEM_CACHEATTR_WB: Final = 6
XEN_DMOP_MEM_CACHEATTR_UCM: Final = 7
XEN_DMOP_DELETE_MEM_CACHEATTR: Final = 0xFFFFFFFF
XEN_DMOP_set_irq_level: Final = 19
XEN_DMOP_nr_vcpus: Final = 20


class xen_dm_op_buf(NamedTuple):
    h: handle
    size: u64


XEN_DM_OP_BUF: Final = Layout(xen_dm_op_buf)


class xen_dm_op_create_ioreq_server(NamedTuple):
    handle_bufioreq: u8
    pad: Annotated[bytes, Bytes(3)]
    id: u16


XEN_DM_OP_CREATE_IOREQ_SERVER: Final = Layout(xen_dm_op_create_ioreq_server)


class xen_dm_op_get_ioreq_server_info(NamedTuple):
    id: u16
    flags: u16
    bufioreq_port: u32
    ioreq_gfn: u64
    bufioreq_gfn: u64


XEN_DM_OP_GET_IOREQ_SERVER_INFO: Final = Layout(xen_dm_op_get_ioreq_server_info)


class xen_dm_op_ioreq_server_range(NamedTuple):
    id: u16
    pad: u16
    type: u32
    start: u64
    end: u64


XEN_DM_OP_IOREQ_SERVER_RANGE: Final = Layout(xen_dm_op_ioreq_server_range)


class xen_dm_op_set_ioreq_server_state(NamedTuple):
    id: u16
    enabled: u8
    pad: u8


XEN_DM_OP_SET_IOREQ_SERVER_STATE: Final = Layout(xen_dm_op_set_ioreq_server_state)


class xen_dm_op_destroy_ioreq_server(NamedTuple):
    id: u16
    pad: u16


XEN_DM_OP_DESTROY_IOREQ_SERVER: Final = Layout(xen_dm_op_destroy_ioreq_server)


class xen_dm_op_track_dirty_vram(NamedTuple):
    nr: u32
    pad: u32
    first_pfn: u64


XEN_DM_OP_TRACK_DIRTY_VRAM: Final = Layout(xen_dm_op_track_dirty_vram)


class xen_dm_op_set_pci_intx_level(NamedTuple):
    domain: u16
    bus: u8
    device: u8
    intx: u8
    level: u8


XEN_DM_OP_SET_PCI_INTX_LEVEL: Final = Layout(xen_dm_op_set_pci_intx_level)


class xen_dm_op_set_isa_irq_level(NamedTuple):
    isa_irq: u8
    level: u8


XEN_DM_OP_SET_ISA_IRQ_LEVEL: Final = Layout(xen_dm_op_set_isa_irq_level)


class xen_dm_op_set_irq_level(NamedTuple):
    irq: u32
    level: u8
    pad: Annotated[bytes, Bytes(3)]


XEN_DM_OP_SET_IRQ_LEVEL: Final = Layout(xen_dm_op_set_irq_level)


class xen_dm_op_set_pci_link_route(NamedTuple):
    link: u8
    isa_irq: u8


XEN_DM_OP_SET_PCI_LINK_ROUTE: Final = Layout(xen_dm_op_set_pci_link_route)


class xen_dm_op_modified_memory(NamedTuple):
    nr_extents: u32
    opaque: u32


XEN_DM_OP_MODIFIED_MEMORY: Final = Layout(xen_dm_op_modified_memory)


class xen_dm_op_set_mem_type(NamedTuple):
    nr: u32
    mem_type: u16
    pad: u16
    first_pfn: u64


XEN_DM_OP_SET_MEM_TYPE: Final = Layout(xen_dm_op_set_mem_type)


class xen_dm_op_inject_event(NamedTuple):
    vcpuid: u32
    vector: u8
    type: u8
    insn_len: u8
    pad0: u8
    error_code: u32
    pad1: u32
    cr2: u64


XEN_DM_OP_INJECT_EVENT: Final = Layout(xen_dm_op_inject_event)


class xen_dm_op_inject_msi(NamedTuple):
    data: u32
    pad: u32
    addr: u64


XEN_DM_OP_INJECT_MSI: Final = Layout(xen_dm_op_inject_msi)


class xen_dm_op_map_mem_type_to_ioreq_server(NamedTuple):
    id: u16
    type: u16
    flags: u32
    opaque: u64


XEN_DM_OP_MAP_MEM_TYPE_TO_IOREQ_SERVER: Final = Layout(xen_dm_op_map_mem_type_to_ioreq_server)


class xen_dm_op_remote_shutdown(NamedTuple):
    reason: u32


XEN_DM_OP_REMOTE_SHUTDOWN: Final = Layout(xen_dm_op_remote_shutdown)


class xen_dm_op_relocate_memory(NamedTuple):
    size: u32
    pad: u32
    src_gfn: u64
    dst_gfn: u64


XEN_DM_OP_RELOCATE_MEMORY: Final = Layout(xen_dm_op_relocate_memory)


class xen_dm_op_pin_memory_cacheattr(NamedTuple):
    start: u64
    end: u64
    type: u32
    pad: u32


XEN_DM_OP_PIN_MEMORY_CACHEATTR: Final = Layout(xen_dm_op_pin_memory_cacheattr)


class xen_dm_op_nr_vcpus(NamedTuple):
    vcpus: u32


XEN_DM_OP_NR_VCPUS: Final = Layout(xen_dm_op_nr_vcpus)


class xen_dm_op(NamedTuple):
    """`op` is XEN_DMOP_*; `u` its structure."""

    op: u32
    pad: u32
    u: Annotated[
        bytes,
        Union(
            create_ioreq_server=xen_dm_op_create_ioreq_server,
            get_ioreq_server_info=xen_dm_op_get_ioreq_server_info,
            map_io_range_to_ioreq_server=xen_dm_op_ioreq_server_range,
            unmap_io_range_from_ioreq_server=xen_dm_op_ioreq_server_range,
            set_ioreq_server_state=xen_dm_op_set_ioreq_server_state,
            destroy_ioreq_server=xen_dm_op_destroy_ioreq_server,
            track_dirty_vram=xen_dm_op_track_dirty_vram,
            set_pci_intx_level=xen_dm_op_set_pci_intx_level,
            set_isa_irq_level=xen_dm_op_set_isa_irq_level,
            set_irq_level=xen_dm_op_set_irq_level,
            set_pci_link_route=xen_dm_op_set_pci_link_route,
            modified_memory=xen_dm_op_modified_memory,
            set_mem_type=xen_dm_op_set_mem_type,
            inject_event=xen_dm_op_inject_event,
            inject_msi=xen_dm_op_inject_msi,
            map_mem_type_to_ioreq_server=xen_dm_op_map_mem_type_to_ioreq_server,
            remote_shutdown=xen_dm_op_remote_shutdown,
            relocate_memory=xen_dm_op_relocate_memory,
            pin_memory_cacheattr=xen_dm_op_pin_memory_cacheattr,
            nr_vcpus=xen_dm_op_nr_vcpus,
        ),
    ]


XEN_DM_OP: Final = Layout(xen_dm_op)
