"""HYPERVISOR_hvm_op (hvm/hvm_op.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Bytes, Layout, u8, u16, u32, u64

HVMOP_set_param: Final = 0
HVMOP_get_param: Final = 1
HVMOP_flush_tlbs: Final = 5
HVMOP_pagetable_dying: Final = 9
HVMOP_get_time: Final = 10
HVMOP_xentrace: Final = 11
HVMOP_set_mem_access: Final = 12
HVMOP_get_mem_access: Final = 13
HVMOP_get_mem_type: Final = 15

HVM_IOREQSRV_BUFIOREQ_OFF: Final = 0
HVM_IOREQSRV_BUFIOREQ_LEGACY: Final = 1
HVM_IOREQSRV_BUFIOREQ_ATOMIC: Final = 2

HVMOP_set_evtchn_upcall_vector: Final = 23
HVMOP_guest_request_vm_event: Final = 24
HVMOP_altp2m: Final = 25
HVMOP_ALTP2M_INTERFACE_VERSION: Final = 0x00000001
HVMOP_altp2m_get_domain_state: Final = 1
HVMOP_altp2m_set_domain_state: Final = 2
HVMOP_altp2m_vcpu_enable_notify: Final = 3
HVMOP_altp2m_create_p2m: Final = 4
HVMOP_altp2m_destroy_p2m: Final = 5
HVMOP_altp2m_switch_p2m: Final = 6
HVMOP_altp2m_set_mem_access: Final = 7
HVMOP_altp2m_change_gfn: Final = 8
HVMOP_altp2m_set_mem_access_multi: Final = 9
HVMOP_altp2m_set_suppress_ve: Final = 10
HVMOP_altp2m_get_suppress_ve: Final = 11
HVMOP_altp2m_get_mem_access: Final = 12
HVMOP_altp2m_vcpu_disable_notify: Final = 13
HVMOP_altp2m_get_p2m_idx: Final = 14
HVMOP_altp2m_set_suppress_ve_multi: Final = 15
HVMOP_altp2m_set_visibility: Final = 16

HVMMEM_ram_rw: Final = 0
HVMMEM_ram_ro: Final = 1
HVMMEM_mmio_dm: Final = 2
HVMMEM_unused: Final = 3
HVMMEM_ioreq_server: Final = 4


class xen_hvm_param(NamedTuple):
    """index: HVM_PARAM_*."""

    domid: u16
    pad: u16
    index_: u32
    value: u64


XEN_HVM_PARAM: Final = Layout(xen_hvm_param, c_fields={"index_": "index"})


class xen_hvm_pagetable_dying(NamedTuple):
    domid: u16
    pad: Annotated[tuple[int, ...], Array(u16, 3)]
    gpa: u64


XEN_HVM_PAGETABLE_DYING: Final = Layout(xen_hvm_pagetable_dying)


class xen_hvm_get_time(NamedTuple):
    now: u64


XEN_HVM_GET_TIME: Final = Layout(xen_hvm_get_time)


class xen_hvm_xentrace(NamedTuple):
    event: u16
    extra_bytes: u16
    extra: Annotated[bytes, Bytes(28)]


XEN_HVM_XENTRACE: Final = Layout(xen_hvm_xentrace)


class xen_hvm_get_mem_type(NamedTuple):
    domid: u16
    mem_type: u16
    pad: Annotated[tuple[int, ...], Array(u16, 2)]
    pfn: u64


XEN_HVM_GET_MEM_TYPE: Final = Layout(xen_hvm_get_mem_type)


class xen_hvm_evtchn_upcall_vector(NamedTuple):
    vcpu: u32
    vector: u8


XEN_HVM_EVTCHN_UPCALL_VECTOR: Final = Layout(xen_hvm_evtchn_upcall_vector)
