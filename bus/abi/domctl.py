"""HYPERVISOR_domctl: build, control and examine domains; for the control domain only (domctl.h).

All commands; the structures are those that a toolstack needs.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.arch_x86 import xen_arch_domainconfig
from bus.abi.layout import Array, Bytes, Layout, Union, handle, i32, i64, u8, u16, u32, u64

XEN_DOMCTL_INTERFACE_VERSION: Final = 0x00000015
XEN_DOMCTL_CDF_hvm: Final = 1
XEN_DOMCTL_CDF_hap: Final = 2
XEN_DOMCTL_CDF_s3_integrity: Final = 4
XEN_DOMCTL_CDF_oos_off: Final = 8
XEN_DOMCTL_CDF_xs_domain: Final = 16
XEN_DOMCTL_CDF_iommu: Final = 32
XEN_DOMCTL_CDF_nested_virt: Final = 64
XEN_DOMCTL_CDF_vpmu: Final = 1 << 7
XEN_DOMCTL_CDF_MAX: Final = XEN_DOMCTL_CDF_vpmu
XEN_DOMCTL_IOMMU_no_sharept: Final = 1
XEN_DOMCTL_IOMMU_MAX: Final = XEN_DOMCTL_IOMMU_no_sharept
XEN_DOMCTL_GRANT_version_mask: Final = 0xF

XEN_DOMINF_dying: Final = 1
XEN_DOMINF_hvm_guest: Final = 2
XEN_DOMINF_shutdown: Final = 4
XEN_DOMINF_paused: Final = 8
XEN_DOMINF_blocked: Final = 16
XEN_DOMINF_running: Final = 32
XEN_DOMINF_debugged: Final = 64
XEN_DOMINF_xs_domain: Final = 128
XEN_DOMINF_hap: Final = 256
XEN_DOMINF_shutdownmask: Final = 255
XEN_DOMINF_shutdownshift: Final = 16

XEN_DOMCTL_PFINFO_LTAB_SHIFT: Final = 28
XEN_DOMCTL_PFINFO_NOTAB: Final = 0
XEN_DOMCTL_PFINFO_L1TAB: Final = 0x10000000
XEN_DOMCTL_PFINFO_L2TAB: Final = 0x20000000
XEN_DOMCTL_PFINFO_L3TAB: Final = 0x30000000
XEN_DOMCTL_PFINFO_L4TAB: Final = 0x40000000
XEN_DOMCTL_PFINFO_LTABTYPE_MASK: Final = 0x70000000
XEN_DOMCTL_PFINFO_LPINTAB: Final = 0x80000000
XEN_DOMCTL_PFINFO_XTAB: Final = 0xF0000000
XEN_DOMCTL_PFINFO_XALLOC: Final = 0xE0000000
XEN_DOMCTL_PFINFO_BROKEN: Final = 0xD0000000
XEN_DOMCTL_PFINFO_LTAB_MASK: Final = 0xF0000000
XEN_DOMCTL_SHADOW_OP_OFF: Final = 0
XEN_DOMCTL_SHADOW_OP_ENABLE: Final = 32
XEN_DOMCTL_SHADOW_OP_CLEAN: Final = 11
XEN_DOMCTL_SHADOW_OP_PEEK: Final = 12
XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION: Final = 30
XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION: Final = 31
XEN_DOMCTL_SHADOW_OP_ENABLE_TEST: Final = 1
XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY: Final = 2

XEN_VCPUAFFINITY_HARD: Final = 1
XEN_VCPUAFFINITY_SOFT: Final = 2
XEN_VCPUAFFINITY_FORCE: Final = 4

XEN_SCHEDULER_CREDIT: Final = 5
XEN_SCHEDULER_CREDIT2: Final = 6
XEN_SCHEDULER_ARINC653: Final = 7
XEN_SCHEDULER_RTDS: Final = 8
XEN_SCHEDULER_NULL: Final = 9

XEN_DOMCTL_SCHEDRT_extra: Final = 1
XEN_DOMCTL_SCHEDOP_putinfo: Final = 0
XEN_DOMCTL_SCHEDOP_getinfo: Final = 1
XEN_DOMCTL_SCHEDOP_putvcpuinfo: Final = 2
XEN_DOMCTL_SCHEDOP_getvcpuinfo: Final = 3
XEN_DOMCTL_SENDTRIGGER_NMI: Final = 0
XEN_DOMCTL_SENDTRIGGER_RESET: Final = 1
XEN_DOMCTL_SENDTRIGGER_INIT: Final = 2
XEN_DOMCTL_SENDTRIGGER_POWER: Final = 3
XEN_DOMCTL_SENDTRIGGER_SLEEP: Final = 4
XEN_DOMCTL_DEV_PCI: Final = 0
XEN_DOMCTL_DEV_DT: Final = 1
XEN_DOMCTL_DEV_RDM_RELAXED: Final = 1
XEN_DOMCTL_createdomain: Final = 1
XEN_DOMCTL_destroydomain: Final = 2
XEN_DOMCTL_pausedomain: Final = 3
XEN_DOMCTL_unpausedomain: Final = 4
XEN_DOMCTL_getdomaininfo: Final = 5
XEN_DOMCTL_setvcpuaffinity: Final = 9
XEN_DOMCTL_shadow_op: Final = 10
XEN_DOMCTL_max_mem: Final = 11
XEN_DOMCTL_setvcpucontext: Final = 12
XEN_DOMCTL_getvcpucontext: Final = 13
XEN_DOMCTL_getvcpuinfo: Final = 14
XEN_DOMCTL_max_vcpus: Final = 15
XEN_DOMCTL_scheduler_op: Final = 16
XEN_DOMCTL_setdomainhandle: Final = 17
XEN_DOMCTL_setdebugging: Final = 18
XEN_DOMCTL_irq_permission: Final = 19
XEN_DOMCTL_iomem_permission: Final = 20
XEN_DOMCTL_ioport_permission: Final = 21
XEN_DOMCTL_hypercall_init: Final = 22
XEN_DOMCTL_settimeoffset: Final = 24
XEN_DOMCTL_getvcpuaffinity: Final = 25
XEN_DOMCTL_real_mode_area: Final = 26
XEN_DOMCTL_resumedomain: Final = 27
XEN_DOMCTL_sendtrigger: Final = 28
XEN_DOMCTL_subscribe: Final = 29
XEN_DOMCTL_gethvmcontext: Final = 33
XEN_DOMCTL_sethvmcontext: Final = 34
XEN_DOMCTL_set_address_size: Final = 35
XEN_DOMCTL_get_address_size: Final = 36
XEN_DOMCTL_assign_device: Final = 37
XEN_DOMCTL_bind_pt_irq: Final = 38
XEN_DOMCTL_memory_mapping: Final = 39
XEN_DOMCTL_ioport_mapping: Final = 40
XEN_DOMCTL_set_ext_vcpucontext: Final = 42
XEN_DOMCTL_get_ext_vcpucontext: Final = 43
XEN_DOMCTL_set_opt_feature: Final = 44
XEN_DOMCTL_test_assign_device: Final = 45
XEN_DOMCTL_set_target: Final = 46
XEN_DOMCTL_deassign_device: Final = 47
XEN_DOMCTL_unbind_pt_irq: Final = 48
XEN_DOMCTL_get_device_group: Final = 50
XEN_DOMCTL_debug_op: Final = 54
XEN_DOMCTL_gethvmcontext_partial: Final = 55
XEN_DOMCTL_vm_event_op: Final = 56
XEN_DOMCTL_mem_sharing_op: Final = 57
XEN_DOMCTL_gettscinfo: Final = 59
XEN_DOMCTL_settscinfo: Final = 60
XEN_DOMCTL_getpageframeinfo3: Final = 61
XEN_DOMCTL_setvcpuextstate: Final = 62
XEN_DOMCTL_getvcpuextstate: Final = 63
XEN_DOMCTL_set_access_required: Final = 64
XEN_DOMCTL_audit_p2m: Final = 65
XEN_DOMCTL_set_virq_handler: Final = 66
XEN_DOMCTL_set_broken_page_p2m: Final = 67
XEN_DOMCTL_setnodeaffinity: Final = 68
XEN_DOMCTL_getnodeaffinity: Final = 69
XEN_DOMCTL_cacheflush: Final = 71
XEN_DOMCTL_get_vcpu_msrs: Final = 72
XEN_DOMCTL_set_vcpu_msrs: Final = 73
XEN_DOMCTL_setvnumainfo: Final = 74
XEN_DOMCTL_psr_cmt_op: Final = 75
XEN_DOMCTL_monitor_op: Final = 77
XEN_DOMCTL_psr_alloc: Final = 78
XEN_DOMCTL_soft_reset: Final = 79
XEN_DOMCTL_vuart_op: Final = 81
XEN_DOMCTL_get_cpu_policy: Final = 82
XEN_DOMCTL_set_cpu_policy: Final = 83
XEN_DOMCTL_vmtrace_op: Final = 84
XEN_DOMCTL_get_paging_mempool_size: Final = 85
XEN_DOMCTL_set_paging_mempool_size: Final = 86
XEN_DOMCTL_gdbsx_guestmemio: Final = 1000
XEN_DOMCTL_gdbsx_pausevcpu: Final = 1001
XEN_DOMCTL_gdbsx_unpausevcpu: Final = 1002
XEN_DOMCTL_gdbsx_domstatus: Final = 1003


class xen_domctl_createdomain(NamedTuple):
    """flags: XEN_DOMCTL_CDF_*. A negative limit asks for the default."""

    ssidref: u32
    handle: Annotated[bytes, Bytes(16)]
    flags: u32
    iommu_opts: u32
    max_vcpus: u32
    max_evtchn_port: u32
    max_grant_frames: i32
    max_maptrack_frames: i32
    grant_opts: u32
    vmtrace_size: u32
    cpupool_id: u32
    arch: xen_arch_domainconfig


XEN_DOMCTL_CREATEDOMAIN: Final = Layout(xen_domctl_createdomain)


class xen_domctl_getdomaininfo(NamedTuple):
    """flags: XEN_DOMINF_*, with the shutdown code in bits 16 to 23. cpu_time in ns."""

    domain: u16
    pad1: u16
    flags: u32
    tot_pages: u64
    max_pages: u64
    outstanding_pages: u64
    shr_pages: u64
    paged_pages: u64
    shared_info_frame: u64
    cpu_time: u64
    nr_online_vcpus: u32
    max_vcpu_id: u32
    ssidref: u32
    handle: Annotated[bytes, Bytes(16)]
    cpupool: u32
    gpaddr_bits: u8
    pad2: Annotated[bytes, Bytes(7)]
    arch_config: xen_arch_domainconfig


XEN_DOMCTL_GETDOMAININFO: Final = Layout(xen_domctl_getdomaininfo)


class xen_domctl_vcpucontext(NamedTuple):
    """ctxt: address of a vcpu_guest_context."""

    vcpu: u32
    ctxt: handle


XEN_DOMCTL_VCPUCONTEXT: Final = Layout(xen_domctl_vcpucontext)


class xen_domctl_max_mem(NamedTuple):
    """KiB."""

    max_memkb: u64


XEN_DOMCTL_MAX_MEM: Final = Layout(xen_domctl_max_mem)


class xen_domctl_max_vcpus(NamedTuple):
    max: u32


XEN_DOMCTL_MAX_VCPUS: Final = Layout(xen_domctl_max_vcpus)


class xen_domctl_getvcpuinfo(NamedTuple):
    vcpu: u32
    online: u8
    blocked: u8
    running: u8
    cpu_time: u64
    cpu: u32


XEN_DOMCTL_GETVCPUINFO: Final = Layout(xen_domctl_getvcpuinfo)


class xenctl_bitmap(NamedTuple):
    """bitmap: address of (nr_bits + 7) / 8 bytes, the lowest bit first."""

    bitmap: handle
    nr_bits: u32


XENCTL_BITMAP: Final = Layout(xenctl_bitmap)


class xen_domctl_vcpuaffinity(NamedTuple):
    vcpu: u32
    flags: u32
    cpumap_hard: xenctl_bitmap
    cpumap_soft: xenctl_bitmap


XEN_DOMCTL_VCPUAFFINITY: Final = Layout(xen_domctl_vcpuaffinity)


class xen_domctl_sched_credit(NamedTuple):
    weight: u16
    cap: u16


XEN_DOMCTL_SCHED_CREDIT: Final = Layout(xen_domctl_sched_credit)


class xen_domctl_sched_credit2(NamedTuple):
    weight: u16
    cap: u16


XEN_DOMCTL_SCHED_CREDIT2: Final = Layout(xen_domctl_sched_credit2)


class xen_domctl_sched_rtds(NamedTuple):
    period: u32
    budget: u32
    flags: u32


XEN_DOMCTL_SCHED_RTDS: Final = Layout(xen_domctl_sched_rtds)


class xen_domctl_scheduler_op_v(NamedTuple):
    vcpus: handle
    nr_vcpus: u32
    padding: u32


XEN_DOMCTL_SCHEDULER_OP_V: Final = Layout(
    xen_domctl_scheduler_op_v, c="__typeof__(((struct xen_domctl_scheduler_op *)0)->u.v)"
)


class xen_domctl_scheduler_op(NamedTuple):
    sched_id: u32
    cmd: u32
    u: Annotated[
        bytes,
        Union(
            credit=xen_domctl_sched_credit,
            credit2=xen_domctl_sched_credit2,
            rtds=xen_domctl_sched_rtds,
            v=xen_domctl_scheduler_op_v,
        ),
    ]


XEN_DOMCTL_SCHEDULER_OP: Final = Layout(xen_domctl_scheduler_op)


class xen_domctl_getpageframeinfo3(NamedTuple):
    num: u64
    array: handle


XEN_DOMCTL_GETPAGEFRAMEINFO3: Final = Layout(xen_domctl_getpageframeinfo3)


class xen_domctl_shadow_op_stats(NamedTuple):
    fault_count: u32
    dirty_count: u32


XEN_DOMCTL_SHADOW_OP_STATS: Final = Layout(xen_domctl_shadow_op_stats)


class xen_domctl_shadow_op(NamedTuple):
    op: u32
    mode: u32
    mb: u32
    dirty_bitmap: handle
    pages: u64
    stats: xen_domctl_shadow_op_stats


XEN_DOMCTL_SHADOW_OP: Final = Layout(xen_domctl_shadow_op)


class xen_domctl_setdomainhandle(NamedTuple):
    handle: Annotated[bytes, Bytes(16)]


XEN_DOMCTL_SETDOMAINHANDLE: Final = Layout(xen_domctl_setdomainhandle)


class xen_domctl_setdebugging(NamedTuple):
    enable: u8


XEN_DOMCTL_SETDEBUGGING: Final = Layout(xen_domctl_setdebugging)


class xen_domctl_irq_permission(NamedTuple):
    pirq: u32
    allow_access: u8
    pad: Annotated[bytes, Bytes(3)]


XEN_DOMCTL_IRQ_PERMISSION: Final = Layout(xen_domctl_irq_permission)


class xen_domctl_iomem_permission(NamedTuple):
    first_mfn: u64
    nr_mfns: u64
    allow_access: u8


XEN_DOMCTL_IOMEM_PERMISSION: Final = Layout(xen_domctl_iomem_permission)


class xen_domctl_ioport_permission(NamedTuple):
    first_port: u32
    nr_ports: u32
    allow_access: u8


XEN_DOMCTL_IOPORT_PERMISSION: Final = Layout(xen_domctl_ioport_permission)


class xen_domctl_hypercall_init(NamedTuple):
    gmfn: u64


XEN_DOMCTL_HYPERCALL_INIT: Final = Layout(xen_domctl_hypercall_init)


class xen_domctl_settimeoffset(NamedTuple):
    """Seconds."""

    time_offset_seconds: i64


XEN_DOMCTL_SETTIMEOFFSET: Final = Layout(xen_domctl_settimeoffset)


class xen_domctl_hvmcontext(NamedTuple):
    size: u32
    buffer: handle


XEN_DOMCTL_HVMCONTEXT: Final = Layout(xen_domctl_hvmcontext)


class xen_domctl_address_size(NamedTuple):
    size: u32


XEN_DOMCTL_ADDRESS_SIZE: Final = Layout(xen_domctl_address_size)


class xen_domctl_sendtrigger(NamedTuple):
    trigger: u32
    vcpu: u32


XEN_DOMCTL_SENDTRIGGER: Final = Layout(xen_domctl_sendtrigger)


class xen_domctl_assign_device_pci(NamedTuple):
    machine_sbdf: u32


XEN_DOMCTL_ASSIGN_DEVICE_PCI: Final = Layout(
    xen_domctl_assign_device_pci, c="__typeof__(((struct xen_domctl_assign_device *)0)->u.pci)"
)


class xen_domctl_assign_device_dt(NamedTuple):
    size: u32
    path: handle


XEN_DOMCTL_ASSIGN_DEVICE_DT: Final = Layout(
    xen_domctl_assign_device_dt, c="__typeof__(((struct xen_domctl_assign_device *)0)->u.dt)"
)


class xen_domctl_assign_device(NamedTuple):
    dev: u32
    flags: u32
    u: Annotated[bytes, Union(pci=xen_domctl_assign_device_pci, dt=xen_domctl_assign_device_dt)]


XEN_DOMCTL_ASSIGN_DEVICE: Final = Layout(xen_domctl_assign_device)


class xen_domctl_memory_mapping(NamedTuple):
    first_gfn: u64
    first_mfn: u64
    nr_mfns: u64
    add_mapping: u32
    padding: u32


XEN_DOMCTL_MEMORY_MAPPING: Final = Layout(xen_domctl_memory_mapping)


class xen_domctl_ioport_mapping(NamedTuple):
    first_gport: u32
    first_mport: u32
    nr_ports: u32
    add_mapping: u32


XEN_DOMCTL_IOPORT_MAPPING: Final = Layout(xen_domctl_ioport_mapping)


class xen_domctl_set_target(NamedTuple):
    target: u16


XEN_DOMCTL_SET_TARGET: Final = Layout(xen_domctl_set_target)


class xen_domctl_subscribe(NamedTuple):
    port: u32


XEN_DOMCTL_SUBSCRIBE: Final = Layout(xen_domctl_subscribe)


class xen_domctl_cpu_policy(NamedTuple):
    nr_leaves: u32
    nr_msrs: u32
    leaves: handle
    msrs: handle
    err_leaf: u32
    err_subleaf: u32
    err_msr: u32


XEN_DOMCTL_CPU_POLICY: Final = Layout(xen_domctl_cpu_policy)


class xen_domctl_set_virq_handler(NamedTuple):
    virq: u32


XEN_DOMCTL_SET_VIRQ_HANDLER: Final = Layout(xen_domctl_set_virq_handler)


class xen_domctl_paging_mempool(NamedTuple):
    size: u64


XEN_DOMCTL_PAGING_MEMPOOL: Final = Layout(xen_domctl_paging_mempool)


class xen_domctl(NamedTuple):
    """Envelope of every domctl: `u` is 128 bytes, of which the member that belongs to `cmd` is used."""

    cmd: u32
    interface_version: u32
    domain: u16
    pad: Annotated[tuple[int, ...], Array(u16, 3)]
    u: Annotated[
        bytes,
        Union(
            createdomain=xen_domctl_createdomain,
            getdomaininfo=xen_domctl_getdomaininfo,
            getpageframeinfo3=xen_domctl_getpageframeinfo3,
            vcpuaffinity=xen_domctl_vcpuaffinity,
            shadow_op=xen_domctl_shadow_op,
            max_mem=xen_domctl_max_mem,
            vcpucontext=xen_domctl_vcpucontext,
            getvcpuinfo=xen_domctl_getvcpuinfo,
            max_vcpus=xen_domctl_max_vcpus,
            scheduler_op=xen_domctl_scheduler_op,
            setdomainhandle=xen_domctl_setdomainhandle,
            setdebugging=xen_domctl_setdebugging,
            irq_permission=xen_domctl_irq_permission,
            iomem_permission=xen_domctl_iomem_permission,
            ioport_permission=xen_domctl_ioport_permission,
            hypercall_init=xen_domctl_hypercall_init,
            settimeoffset=xen_domctl_settimeoffset,
            hvmcontext=xen_domctl_hvmcontext,
            address_size=xen_domctl_address_size,
            sendtrigger=xen_domctl_sendtrigger,
            assign_device=xen_domctl_assign_device,
            memory_mapping=xen_domctl_memory_mapping,
            ioport_mapping=xen_domctl_ioport_mapping,
            set_target=xen_domctl_set_target,
            subscribe=xen_domctl_subscribe,
            cpu_policy=xen_domctl_cpu_policy,
            set_virq_handler=xen_domctl_set_virq_handler,
            paging_mempool=xen_domctl_paging_mempool,
            pad=Annotated[bytes, Bytes(128)],
        ),
    ]


XEN_DOMCTL: Final = Layout(xen_domctl, c_fields={"pad": "_pad"})
