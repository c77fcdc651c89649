"""HYPERVISOR_sysctl: the machine as a whole; for the control domain only (sysctl.h).

All commands; the structures are those that a toolstack needs.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.domctl import xenctl_bitmap
from bus.abi.layout import Array, Bytes, Layout, Union, handle, i32, u8, u16, u32, u64

XEN_SYSCTL_INTERFACE_VERSION: Final = 0x00000015
XEN_SYSCTL_PHYSCAP_hvm: Final = 1
XEN_SYSCTL_PHYSCAP_pv: Final = 2
XEN_SYSCTL_PHYSCAP_directio: Final = 4
XEN_SYSCTL_PHYSCAP_hap: Final = 8
XEN_SYSCTL_PHYSCAP_shadow: Final = 16
XEN_SYSCTL_PHYSCAP_iommu_hap_pt_share: Final = 32
XEN_SYSCTL_PHYSCAP_vmtrace: Final = 1 << 6
XEN_SYSCTL_PHYSCAP_vpmu: Final = 1 << 7
XEN_SYSCTL_PHYSCAP_gnttab_v1: Final = 1 << 8
XEN_SYSCTL_PHYSCAP_gnttab_v2: Final = 1 << 9
XEN_SYSCTL_PHYSCAP_MAX: Final = XEN_SYSCTL_PHYSCAP_gnttab_v2
XEN_SYSCTL_CPU_HOTPLUG_ONLINE: Final = 0
XEN_SYSCTL_CPU_HOTPLUG_OFFLINE: Final = 1
XEN_SYSCTL_CPU_HOTPLUG_SMT_ENABLE: Final = 2
XEN_SYSCTL_CPU_HOTPLUG_SMT_DISABLE: Final = 3
XEN_SYSCTL_pm_op_set_sched_opt_smt: Final = 0x21
XEN_SYSCTL_pm_op_get_max_cstate: Final = 0x22
XEN_SYSCTL_pm_op_set_max_cstate: Final = 0x23
XEN_SYSCTL_pm_op_set_vcpu_migration_delay: Final = 0x24
XEN_SYSCTL_pm_op_get_vcpu_migration_delay: Final = 0x25
XEN_SYSCTL_pm_op_enable_turbo: Final = 0x26
XEN_SYSCTL_pm_op_disable_turbo: Final = 0x27
XEN_SYSCTL_CX_UNLIMITED: Final = 0xFFFFFFFF

XEN_INVALID_CORE_ID: Final = 0xFFFFFFFF
XEN_INVALID_SOCKET_ID: Final = 0xFFFFFFFF
XEN_INVALID_NODE_ID: Final = 0xFFFFFFFF
XEN_INVALID_MEM_SZ: Final = 0xFFFFFFFF
XEN_INVALID_NODE_DIST: Final = 0xFFFFFFFF

XEN_SYSCTL_CPUPOOL_OP_CREATE: Final = 1
XEN_SYSCTL_CPUPOOL_OP_DESTROY: Final = 2
XEN_SYSCTL_CPUPOOL_OP_INFO: Final = 3
XEN_SYSCTL_CPUPOOL_OP_ADDCPU: Final = 4
XEN_SYSCTL_CPUPOOL_OP_RMCPU: Final = 5
XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN: Final = 6
XEN_SYSCTL_CPUPOOL_OP_FREEINFO: Final = 7
XEN_SYSCTL_CPUPOOL_PAR_ANY: Final = 0xFFFFFFFF
XEN_SYSCTL_SCHED_RATELIMIT_MAX: Final = 0x7A120
XEN_SYSCTL_SCHED_RATELIMIT_MIN: Final = 100
XEN_SYSCTL_CSCHED_TSLICE_MAX: Final = 1000
XEN_SYSCTL_CSCHED_TSLICE_MIN: Final = 1
XEN_SYSCTL_CSCHED_MGR_DLY_MAX_US: Final = 0x186A0
XEN_SYSCTL_SCHEDOP_putinfo: Final = 0
XEN_SYSCTL_SCHEDOP_getinfo: Final = 1

XEN_INVALID_DEV: Final = XEN_INVALID_NODE_ID - 1

XEN_SYSCTL_CPU_LEVELCAP_faulting: Final = 1 << 0
XEN_SYSCTL_CPU_LEVELCAP_ecx: Final = 1 << 1
XEN_SYSCTL_CPU_LEVELCAP_edx: Final = 1 << 2
XEN_SYSCTL_CPU_LEVELCAP_extd_ecx: Final = 1 << 3
XEN_SYSCTL_CPU_LEVELCAP_extd_edx: Final = 1 << 4
XEN_SYSCTL_CPU_LEVELCAP_xsave_eax: Final = 1 << 5
XEN_SYSCTL_CPU_LEVELCAP_thermal_ecx: Final = 1 << 6
XEN_SYSCTL_CPU_LEVELCAP_l7s0_eax: Final = 1 << 7
XEN_SYSCTL_CPU_LEVELCAP_l7s0_ebx: Final = 1 << 8
XEN_SYSCTL_cpu_featureset_raw: Final = 0
XEN_SYSCTL_cpu_featureset_host: Final = 1
XEN_SYSCTL_cpu_featureset_pv: Final = 2
XEN_SYSCTL_cpu_featureset_hvm: Final = 3
XEN_SYSCTL_cpu_featureset_pv_max: Final = 4
XEN_SYSCTL_cpu_featureset_hvm_max: Final = 5
XEN_SYSCTL_cpu_policy_raw: Final = 0
XEN_SYSCTL_cpu_policy_host: Final = 1
XEN_SYSCTL_cpu_policy_pv_max: Final = 2
XEN_SYSCTL_cpu_policy_hvm_max: Final = 3
XEN_SYSCTL_cpu_policy_pv_default: Final = 4
XEN_SYSCTL_cpu_policy_hvm_default: Final = 5
XEN_SYSCTL_readconsole: Final = 1
XEN_SYSCTL_tbuf_op: Final = 2
XEN_SYSCTL_physinfo: Final = 3
XEN_SYSCTL_sched_id: Final = 4
XEN_SYSCTL_perfc_op: Final = 5
XEN_SYSCTL_getdomaininfolist: Final = 6
XEN_SYSCTL_debug_keys: Final = 7
XEN_SYSCTL_getcpuinfo: Final = 8
XEN_SYSCTL_availheap: Final = 9
XEN_SYSCTL_get_pmstat: Final = 10
XEN_SYSCTL_cpu_hotplug: Final = 11
XEN_SYSCTL_pm_op: Final = 12
XEN_SYSCTL_page_offline_op: Final = 14
XEN_SYSCTL_lockprof_op: Final = 15
XEN_SYSCTL_cputopoinfo: Final = 16
XEN_SYSCTL_numainfo: Final = 17
XEN_SYSCTL_cpupool_op: Final = 18
XEN_SYSCTL_scheduler_op: Final = 19
XEN_SYSCTL_coverage_op: Final = 20
XEN_SYSCTL_psr_cmt_op: Final = 21
XEN_SYSCTL_pcitopoinfo: Final = 22
XEN_SYSCTL_psr_alloc: Final = 23
XEN_SYSCTL_get_cpu_levelling_caps: Final = 25
XEN_SYSCTL_get_cpu_featureset: Final = 26
XEN_SYSCTL_livepatch_op: Final = 27
XEN_SYSCTL_get_cpu_policy: Final = 29


class xen_sysctl_readconsole(NamedTuple):
    """In: clear, incremental, index, buffer, count (its size). Out: count (bytes copied), index."""

    clear: u8
    incremental: u8
    pad0: u8
    pad1: u8
    index_: u32
    buffer: handle
    count_: u32


XEN_SYSCTL_READCONSOLE: Final = Layout(
    xen_sysctl_readconsole, c_fields={"index_": "index", "count_": "count"}
)


class xen_sysctl_physinfo(NamedTuple):
    threads_per_core: u32
    cores_per_socket: u32
    nr_cpus: u32
    max_cpu_id: u32
    nr_nodes: u32
    max_node_id: u32
    cpu_khz: u32
    capabilities: u32
    arch_capabilities: u32
    pad: u32
    total_pages: u64
    free_pages: u64
    scrub_pages: u64
    outstanding_pages: u64
    max_mfn: u64
    hw_cap: Annotated[tuple[int, ...], Array(u32, 8)]


XEN_SYSCTL_PHYSINFO: Final = Layout(xen_sysctl_physinfo)


class xen_sysctl_sched_id(NamedTuple):
    sched_id: u32


XEN_SYSCTL_SCHED_ID: Final = Layout(xen_sysctl_sched_id)


class xen_sysctl_getdomaininfolist(NamedTuple):
    """buffer: max_domains entries of xen_domctl_getdomaininfo. Out: num_domains."""

    first_domain: u16
    max_domains: u32
    buffer: handle
    num_domains: u32


XEN_SYSCTL_GETDOMAININFOLIST: Final = Layout(xen_sysctl_getdomaininfolist)


class xen_sysctl_getcpuinfo(NamedTuple):
    max_cpus: u32
    info: handle
    nr_cpus: u32


XEN_SYSCTL_GETCPUINFO: Final = Layout(xen_sysctl_getcpuinfo)


class xen_sysctl_cputopo(NamedTuple):
    core: u32
    socket: u32
    node: u32


XEN_SYSCTL_CPUTOPO: Final = Layout(xen_sysctl_cputopo)


class xen_sysctl_cpuinfo(NamedTuple):
    idletime: u64


XEN_SYSCTL_CPUINFO: Final = Layout(xen_sysctl_cpuinfo)


class xen_sysctl_meminfo(NamedTuple):
    memsize: u64
    memfree: u64


XEN_SYSCTL_MEMINFO: Final = Layout(xen_sysctl_meminfo)


class xen_sysctl_cputopoinfo(NamedTuple):
    num_cpus: u32
    cputopo: handle


XEN_SYSCTL_CPUTOPOINFO: Final = Layout(xen_sysctl_cputopoinfo)


class xen_sysctl_numainfo(NamedTuple):
    num_nodes: u32
    meminfo: handle
    distance: handle


XEN_SYSCTL_NUMAINFO: Final = Layout(xen_sysctl_numainfo)


class xen_sysctl_debug_keys(NamedTuple):
    keys: handle
    nr_keys: u32


XEN_SYSCTL_DEBUG_KEYS: Final = Layout(xen_sysctl_debug_keys)


class xen_sysctl_availheap(NamedTuple):
    min_bitwidth: u32
    max_bitwidth: u32
    node: i32
    avail_bytes: u64


XEN_SYSCTL_AVAILHEAP: Final = Layout(xen_sysctl_availheap)


class xen_sysctl_cpupool_op(NamedTuple):
    op: u32
    cpupool_id: u32
    sched_id: u32
    domid: u32
    cpu: u32
    n_dom: u32
    cpumap: xenctl_bitmap


XEN_SYSCTL_CPUPOOL_OP: Final = Layout(xen_sysctl_cpupool_op)


class xen_sysctl_sched_arinc653(NamedTuple):
    schedule: handle


XEN_SYSCTL_SCHED_ARINC653: Final = Layout(xen_sysctl_sched_arinc653)


class xen_sysctl_credit_schedule(NamedTuple):
    tslice_ms: u32
    ratelimit_us: u32
    vcpu_migr_delay_us: u32


XEN_SYSCTL_CREDIT_SCHEDULE: Final = Layout(xen_sysctl_credit_schedule)


class xen_sysctl_credit2_schedule(NamedTuple):
    ratelimit_us: u32


XEN_SYSCTL_CREDIT2_SCHEDULE: Final = Layout(xen_sysctl_credit2_schedule)


class xen_sysctl_scheduler_op(NamedTuple):
    cpupool_id: u32
    sched_id: u32
    cmd: u32
    u: Annotated[
        bytes,
        Union(
            sched_arinc653=xen_sysctl_sched_arinc653,
            sched_credit=xen_sysctl_credit_schedule,
            sched_credit2=xen_sysctl_credit2_schedule,
        ),
    ]


XEN_SYSCTL_SCHEDULER_OP: Final = Layout(xen_sysctl_scheduler_op)


class xen_sysctl_cpu_levelling_caps(NamedTuple):
    caps: u32


XEN_SYSCTL_CPU_LEVELLING_CAPS: Final = Layout(xen_sysctl_cpu_levelling_caps)


class xen_sysctl_cpu_featureset(NamedTuple):
    index_: u32
    nr_features: u32
    features: handle


XEN_SYSCTL_CPU_FEATURESET: Final = Layout(xen_sysctl_cpu_featureset, c_fields={"index_": "index"})


class xen_sysctl_cpu_policy(NamedTuple):
    index_: u32
    nr_leaves: u32
    nr_msrs: u32
    rsvd: u32
    leaves: handle
    msrs: handle


XEN_SYSCTL_CPU_POLICY: Final = Layout(xen_sysctl_cpu_policy, c_fields={"index_": "index", "rsvd": "_rsvd"})


class xen_sysctl(NamedTuple):
    """Envelope of every sysctl: `u` is 128 bytes, of which the member that belongs to `cmd` is used."""

    cmd: u32
    interface_version: u32
    u: Annotated[
        bytes,
        Union(
            readconsole=xen_sysctl_readconsole,
            physinfo=xen_sysctl_physinfo,
            cputopoinfo=xen_sysctl_cputopoinfo,
            numainfo=xen_sysctl_numainfo,
            sched_id=xen_sysctl_sched_id,
            getdomaininfolist=xen_sysctl_getdomaininfolist,
            debug_keys=xen_sysctl_debug_keys,
            getcpuinfo=xen_sysctl_getcpuinfo,
            availheap=xen_sysctl_availheap,
            cpupool_op=xen_sysctl_cpupool_op,
            scheduler_op=xen_sysctl_scheduler_op,
            cpu_levelling_caps=xen_sysctl_cpu_levelling_caps,
            cpu_featureset=xen_sysctl_cpu_featureset,
            cpu_policy=xen_sysctl_cpu_policy,
            pad=Annotated[bytes, Bytes(128)],
        ),
    ]


XEN_SYSCTL: Final = Layout(xen_sysctl)
