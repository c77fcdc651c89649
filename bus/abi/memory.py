"""HYPERVISOR_memory_op: reservations, the guest's physical map, memory map, resources (memory.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Layout, Union, handle, u8, u16, u32, u64
from bus.abi.physdev import physdev_pci_device

XENMEM_increase_reservation: Final = 0
XENMEM_decrease_reservation: Final = 1
XENMEM_populate_physmap: Final = 6

XENMEMF_populate_on_demand: Final = 1 << 16
XENMEMF_exact_node_request: Final = 1 << 17
XENMEMF_vnode: Final = 1 << 18

XENMEM_exchange: Final = 11
XENMEM_maximum_ram_page: Final = 2
XENMEM_current_reservation: Final = 3
XENMEM_maximum_reservation: Final = 4
XENMEM_maximum_gpfn: Final = 14
XENMEM_machphys_mfn_list: Final = 5
XENMEM_machphys_compat_mfn_list: Final = 25
XENMEM_machphys_mapping: Final = 12

XENMAPSPACE_shared_info: Final = 0
XENMAPSPACE_grant_table: Final = 1
XENMAPSPACE_gmfn: Final = 2
XENMAPSPACE_gmfn_range: Final = 3
XENMAPSPACE_gmfn_foreign: Final = 4
XENMAPSPACE_dev_mmio: Final = 5

XENMEM_add_to_physmap: Final = 7

XENMAPIDX_grant_table_status: Final = 0x80000000

XENMEM_add_to_physmap_batch: Final = 23
XENMEM_remove_from_physmap: Final = 15
XENMEM_memory_map: Final = 9
XENMEM_machine_memory_map: Final = 10
XENMEM_set_memory_map: Final = 13
XENMEM_set_pod_target: Final = 16
XENMEM_get_pod_target: Final = 17
XENMEM_get_sharing_freed_pages: Final = 18
XENMEM_get_sharing_shared_pages: Final = 19
XENMEM_paging_op: Final = 20
XENMEM_paging_op_nominate: Final = 0
XENMEM_paging_op_evict: Final = 1
XENMEM_paging_op_prep: Final = 2
XENMEM_access_op: Final = 21
XENMEM_access_op_set_access: Final = 0
XENMEM_access_op_get_access: Final = 1
XENMEM_access_op_set_access_multi: Final = 4
XENMEM_sharing_op: Final = 22
XENMEM_sharing_op_nominate_gfn: Final = 0
XENMEM_sharing_op_nominate_gref: Final = 1
XENMEM_sharing_op_share: Final = 2
XENMEM_sharing_op_debug_gfn: Final = 3
XENMEM_sharing_op_debug_mfn: Final = 4
XENMEM_sharing_op_debug_gref: Final = 5
XENMEM_sharing_op_add_physmap: Final = 6
XENMEM_sharing_op_audit: Final = 7
XENMEM_sharing_op_range_share: Final = 8
XENMEM_sharing_op_fork: Final = 9
XENMEM_sharing_op_fork_reset: Final = 10
XENMEM_SHARING_OP_S_HANDLE_INVALID: Final = -10
XENMEM_SHARING_OP_C_HANDLE_INVALID: Final = -9
XENMEM_SHARING_OP_FIELD_IS_GREF_FLAG: Final = 0x4000000000000000
XENMEM_FORK_WITH_IOMMU_ALLOWED: Final = 1 << 0
XENMEM_FORK_BLOCK_INTERRUPTS: Final = 1 << 1
XENMEM_FORK_RESET_STATE: Final = 1 << 2
XENMEM_FORK_RESET_MEMORY: Final = 1 << 3
XENMEM_claim_pages: Final = 24
XENMEM_reserved_device_memory_map: Final = 27
XENMEM_RDM_ALL: Final = 1
XENMEM_acquire_resource: Final = 28
XENMEM_resource_ioreq_server: Final = 0
XENMEM_resource_grant_table: Final = 1
XENMEM_resource_vmtrace_buf: Final = 2
XENMEM_resource_grant_table_id_shared: Final = 0
XENMEM_resource_grant_table_id_status: Final = 1
XENMEM_resource_ioreq_server_frame_bufioreq: Final = 0
XENMEM_get_vnumainfo: Final = 26
XENMEM_access_n: Final = 0
XENMEM_access_r: Final = 1
XENMEM_access_w: Final = 2
XENMEM_access_rw: Final = 3
XENMEM_access_x: Final = 4
XENMEM_access_rx: Final = 5
XENMEM_access_wx: Final = 6
XENMEM_access_rwx: Final = 7
XENMEM_access_rx2rw: Final = 8
XENMEM_access_n2rwx: Final = 9
XENMEM_access_default: Final = 10


class xen_memory_reservation(NamedTuple):
    """extent_start: nr_extents frame numbers, each of 2^extent_order frames."""

    extent_start: handle
    nr_extents: u64
    extent_order: u32
    mem_flags: u32
    domid: u16


XEN_MEMORY_RESERVATION: Final = Layout(xen_memory_reservation)


class xen_memory_exchange(NamedTuple):
    """Out: nr_exchanged, of the extents of `in`."""

    in_: xen_memory_reservation
    out: xen_memory_reservation
    nr_exchanged: u64


XEN_MEMORY_EXCHANGE: Final = Layout(xen_memory_exchange, c_fields={"in_": "in"})


class xen_machphys_mfn_list(NamedTuple):
    max_extents: u32
    extent_start: handle
    nr_extents: u32


XEN_MACHPHYS_MFN_LIST: Final = Layout(xen_machphys_mfn_list)


class xen_machphys_mapping(NamedTuple):
    v_start: u64
    v_end: u64
    max_mfn: u64


XEN_MACHPHYS_MAPPING: Final = Layout(xen_machphys_mapping)


class xen_add_to_physmap(NamedTuple):
    """space: XENMAPSPACE_*; idx: index in it; gpfn: where it appears."""

    domid: u16
    size: u16
    space: u32
    idx: u64
    gpfn: u64


XEN_ADD_TO_PHYSMAP: Final = Layout(xen_add_to_physmap)


class xen_add_to_physmap_batch(NamedTuple):
    domid: u16
    space: u16
    size: u16
    u: u16
    idxs: handle
    gpfns: handle
    errs: handle


XEN_ADD_TO_PHYSMAP_BATCH: Final = Layout(xen_add_to_physmap_batch)


class xen_remove_from_physmap(NamedTuple):
    domid: u16
    gpfn: u64


XEN_REMOVE_FROM_PHYSMAP: Final = Layout(xen_remove_from_physmap)


class xen_memory_map(NamedTuple):
    """buffer: e820 entries of 20 bytes. In: room for nr_entries; out: their number."""

    nr_entries: u32
    buffer: handle


XEN_MEMORY_MAP: Final = Layout(xen_memory_map)


class xen_foreign_memory_map(NamedTuple):
    domid: u16
    map: xen_memory_map


XEN_FOREIGN_MEMORY_MAP: Final = Layout(xen_foreign_memory_map)


class xen_pod_target(NamedTuple):
    target_pages: u64
    tot_pages: u64
    pod_cache_pages: u64
    pod_entries: u64
    domid: u16


XEN_POD_TARGET: Final = Layout(xen_pod_target)


class xen_mem_access_op(NamedTuple):
    op: u8
    access: u8
    domid: u16
    nr: u32
    pfn: u64
    pfn_list: handle
    access_list: handle


XEN_MEM_ACCESS_OP: Final = Layout(xen_mem_access_op)


class xen_mem_paging_op(NamedTuple):
    op: u8
    domain: u16
    buffer: handle
    gfn: u64


XEN_MEM_PAGING_OP: Final = Layout(xen_mem_paging_op)


class xen_reserved_device_memory(NamedTuple):
    start_pfn: u64
    nr_pages: u64


XEN_RESERVED_DEVICE_MEMORY: Final = Layout(xen_reserved_device_memory)


class xen_reserved_device_memory_map(NamedTuple):
    flags: u32
    nr_entries: u32
    buffer: handle
    dev: Annotated[bytes, Union(pci=physdev_pci_device)]


XEN_RESERVED_DEVICE_MEMORY_MAP: Final = Layout(xen_reserved_device_memory_map)


class xen_mem_acquire_resource(NamedTuple):
    """type: XENMEM_resource_*; `frame`: the first frame of the resource. nr_frames 0 and a null frame_list
    ask for the number."""

    domid: u16
    type: u16
    id: u32
    nr_frames: u32
    pad: u32
    frame: u64
    frame_list: handle


XEN_MEM_ACQUIRE_RESOURCE: Final = Layout(xen_mem_acquire_resource)


class xen_vnuma_topology_info(NamedTuple):
    domid: u16
    pad: u16
    nr_vnodes: u32
    nr_vcpus: u32
    nr_vmemranges: u32
    vdistance: u64
    vcpu_to_vnode: u64
    vmemrange: u64


XEN_VNUMA_TOPOLOGY_INFO: Final = Layout(xen_vnuma_topology_info)


class xen_vmemrange(NamedTuple):
    start: u64
    end: u64
    flags: u32
    nid: u32


XEN_VMEMRANGE: Final = Layout(xen_vmemrange)
