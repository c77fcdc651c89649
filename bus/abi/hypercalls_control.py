"""The table's part on the machine and its control: version, console, physdev, platform, sysctl, HVM, device
models."""

from __future__ import annotations

from typing import Any, Final

from bus.abi import errno, physdev, platform, sysctl, version, xen
from bus.abi.domctl import XEN_DOMCTL_GETDOMAININFO
from bus.abi.hvm import dm_op, hvm_op
from bus.abi.hypercalls_cpu import FAULT, PV, local, refused
from bus.abi.hypercalls_model import (
    CONSOLE_IO_ARG,
    DM_OP_ARG,
    ArrayArg,
    Command,
    Direction,
    Error,
    Form,
    Guests,
    Hypercall,
    Privilege,
    State,
    Where,
)
from bus.abi.hypercalls_shared import NO_DOMAIN, NOT_ALLOWED, remote
from bus.abi.layout import Layout

MAX_CONSOLE: Final = 16384
"""Most bytes of one console_io call, or of one piece of the hypervisor's log."""
VERSION_MISMATCH: Final = Error(
    errno.XEN_EACCES, "`interface_version` is not that of Xen 4.17; checked first"
)
UNKNOWN_DOMAIN: Final = Error(errno.XEN_ESRCH, "no such domain; checked before the privilege")

# ------------------------------------------------------------------------------------------------ xen_version

_NO_RIGHT_DENIED: Final = 'a domain that may not know gets "<denied>"'
_VERSION: Final = (
    local(version.XENVER_version, "XENVER_version", note="returns 4 << 16 | 17"),
    local(version.XENVER_extraversion, "XENVER_extraversion", FAULT, note="16 bytes"),
    local(version.XENVER_compile_info, "XENVER_compile_info", FAULT, argument=version.XEN_COMPILE_INFO),
    local(
        version.XENVER_capabilities,
        "XENVER_capabilities",
        FAULT,
        note="1024 bytes: xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64",
    ),
    local(version.XENVER_changeset, "XENVER_changeset", FAULT, note="64 bytes; " + _NO_RIGHT_DENIED),
    local(
        version.XENVER_platform_parameters,
        "XENVER_platform_parameters",
        FAULT,
        argument=version.XEN_PLATFORM_PARAMETERS,
    ),
    local(
        version.XENVER_get_features,
        "XENVER_get_features",
        Error(errno.XEN_EINVAL, "submap_idx is not 0"),
        FAULT,
        argument=version.XEN_FEATURE_INFO,
    ),
    local(version.XENVER_pagesize, "XENVER_pagesize", note="returns 4096"),
    local(
        version.XENVER_guest_handle, "XENVER_guest_handle", FAULT, note="the 16 bytes of the domain's UUID"
    ),
    local(version.XENVER_commandline, "XENVER_commandline", FAULT, note="1024 bytes; " + _NO_RIGHT_DENIED),
    refused(version.XENVER_build_id, "XENVER_build_id", errno.XEN_ENODATA, "no build id"),
)

# ------------------------------------------------------------------------------------------------ console_io

_CONSOLE: Final = (
    remote(
        xen.CONSOLEIO_write,
        "CONSOLEIO_write",
        CONSOLE_IO_ARG,
        Error(errno.XEN_EINVAL, "a negative count"),
        arrays=(ArrayArg("buffer", 1, "length", Direction.IN, MAX_CONSOLE),),
        note="to the hypervisor's log; any domain may, as with a Xen of verbose debugging",
    ),
    remote(
        xen.CONSOLEIO_read,
        "CONSOLEIO_read",
        CONSOLE_IO_ARG,
        arrays=(ArrayArg("buffer", 1, "length", Direction.OUT, MAX_CONSOLE),),
        privilege=Privilege.CONTROL,
        state=State.PARTLY,
        note="returns 0: nobody types at the hypervisor's console",
    ),
)

# ------------------------------------------------------------------------------------------------ physdev_op


def _physdev(
    name: str,
    argument: Layout[Any] | None,
    note: str,
    *errors: Error,
    privilege: Privilege = Privilege.HARDWARE,
) -> Command:
    if privilege is Privilege.HARDWARE:
        errors = (Error(errno.XEN_EPERM, "the domain owns no such device"), *errors)
    return remote(
        getattr(physdev, f"PHYSDEVOP_{name}"),
        f"PHYSDEVOP_{name}",
        argument,
        *errors,
        privilege=privilege,
        note=note,
    )


_NO_IRQ: Final = Error(errno.XEN_EINVAL, "no such interrupt")
_NO_DEVICE: Final = Error(errno.XEN_ENODEV, "no such device")

_PHYSDEV: Final = (
    _physdev(
        "eoi",
        physdev.PHYSDEV_EOI,
        "end of interrupt; a line that is still high fires again",
        _NO_IRQ,
        privilege=Privilege.PIRQ,
    ),
    refused(
        physdev.PHYSDEVOP_pirq_eoi_gmfn_v1,
        "PHYSDEVOP_pirq_eoi_gmfn_v1",
        errno.XEN_ENOSYS,
        "use PHYSDEVOP_irq_status_query",
    ),
    refused(
        physdev.PHYSDEVOP_pirq_eoi_gmfn_v2,
        "PHYSDEVOP_pirq_eoi_gmfn_v2",
        errno.XEN_ENOSYS,
        "use PHYSDEVOP_irq_status_query",
    ),
    _physdev(
        "irq_status_query",
        physdev.PHYSDEV_IRQ_STATUS_QUERY,
        "XENIRQSTAT_*",
        _NO_IRQ,
        privilege=Privilege.PIRQ,
    ),
    local(
        physdev.PHYSDEVOP_set_iopl,
        "PHYSDEVOP_set_iopl",
        Error(errno.XEN_EINVAL, "an IOPL over 3"),
        FAULT,
        argument=physdev.PHYSDEV_SET_IOPL,
        guests=PV,
    ),
    local(
        physdev.PHYSDEVOP_set_iobitmap,
        "PHYSDEVOP_set_iobitmap",
        Error(errno.XEN_EINVAL, "a null bitmap with ports, or over 65536 ports"),
        FAULT,
        argument=physdev.PHYSDEV_SET_IOBITMAP,
        guests=PV,
    ),
    *(
        refused(getattr(physdev, f"PHYSDEVOP_{name}"), f"PHYSDEVOP_{name}", number, note, privilege=privilege)
        for name, number, note, privilege in (
            ("apic_read", errno.XEN_EINVAL, "no I/O APIC at that address", Privilege.CONTROL),
            ("apic_write", errno.XEN_EINVAL, "no I/O APIC at that address", Privilege.CONTROL),
            ("alloc_irq_vector", errno.XEN_EINVAL, "no I/O APIC", Privilege.CONTROL),
            ("free_irq_vector", errno.XEN_ENOSYS, "", Privilege.ANY),
            ("manage_pci_add", errno.XEN_ENOSYS, "use PHYSDEVOP_pci_device_add", Privilege.CONTROL),
            ("manage_pci_remove", errno.XEN_ENOSYS, "use PHYSDEVOP_pci_device_remove", Privilege.CONTROL),
            ("manage_pci_add_ext", errno.XEN_ENOSYS, "use PHYSDEVOP_pci_device_add", Privilege.CONTROL),
            ("restore_msi", errno.XEN_ENOSYS, "no suspend of the machine", Privilege.CONTROL),
            ("restore_msi_ext", errno.XEN_ENOSYS, "no suspend of the machine", Privilege.CONTROL),
            ("prepare_msix", errno.XEN_ENOSYS, "MSI-X is set up through the device", Privilege.CONTROL),
            ("release_msix", errno.XEN_ENOSYS, "MSI-X is set up through the device", Privilege.CONTROL),
            ("dbgp_op", errno.XEN_ENOSYS, "no debug port", Privilege.CONTROL),
            ("IRQ_UNMASK_NOTIFY", errno.XEN_ENOSYS, "of Xen 3.0", Privilege.ANY),
        )
    ),
    _physdev(
        "map_pirq", physdev.PHYSDEV_MAP_PIRQ, "GSI, MSI, MSI_SEG, MULTI_MSI", NO_DOMAIN, _NO_IRQ, _NO_DEVICE
    ),
    _physdev("unmap_pirq", physdev.PHYSDEV_UNMAP_PIRQ, "", NO_DOMAIN, _NO_IRQ),
    _physdev("setup_gsi", physdev.PHYSDEV_SETUP_GSI, "trigger and polarity", _NO_IRQ),
    _physdev(
        "get_free_pirq",
        physdev.PHYSDEV_GET_FREE_PIRQ,
        "",
        Error(errno.XEN_ENOSPC, "none is free"),
        privilege=Privilege.PIRQ,
    ),
    _physdev("pci_mmcfg_reserved", physdev.PHYSDEV_PCI_MMCFG_RESERVED, "", _NO_DEVICE),
    _physdev(
        "pci_device_add", physdev.PHYSDEV_PCI_DEVICE_ADD, "the control domain found a device", _NO_DEVICE
    ),
    _physdev("pci_device_remove", physdev.PHYSDEV_PCI_DEVICE, "", _NO_DEVICE),
)

# ------------------------------------------------------------------------------------------------ platform_op


def _platform_refused(name: str, refusal: int, note: str) -> Command:
    return Command(
        number=getattr(platform, f"XENPF_{name}"),
        name=f"XENPF_{name}",
        where=Where.HYPERVISOR,
        argument=platform.XEN_PLATFORM_OP,
        form=Form.STRUCT,
        privilege=Privilege.CONTROL,
        state=State.REFUSED,
        refusal=refusal,
        errors=(VERSION_MISMATCH,),
        note=note,
    )


def _platform(name: str, payload: Layout[Any], note: str, *errors: Error) -> Command:
    return remote(
        getattr(platform, f"XENPF_{name}"),
        f"XENPF_{name}",
        platform.XEN_PLATFORM_OP,
        VERSION_MISMATCH,
        *errors,
        payload=payload,
        privilege=Privilege.CONTROL,
        note=note,
    )


_NO_CPU: Final = Error(errno.XEN_EINVAL, "no such CPU")
_PLATFORM: Final = (
    _platform("settime32", platform.XENPF_SETTIME32, "sets the wall clock of all domains"),
    _platform("settime64", platform.XENPF_SETTIME64, "sets the wall clock of all domains", _NO_CPU),
    _platform("get_cpuinfo", platform.XENPF_PCPUINFO, "", _NO_CPU),
    _platform("get_cpu_version", platform.XENPF_PCPU_VERSION, "", _NO_CPU),
    *(
        _platform_refused(name, number, note)
        for name, number, note in (
            ("add_memtype", errno.XEN_ENOSYS, "no MTRRs to manage"),
            ("del_memtype", errno.XEN_ENOSYS, "no MTRRs to manage"),
            ("read_memtype", errno.XEN_ENOSYS, "no MTRRs to manage"),
            ("microcode_update", errno.XEN_ENODEV, "no microcode"),
            ("platform_quirk", errno.XEN_EINVAL, "no quirk is known"),
            ("efi_runtime_call", errno.XEN_ENOSYS, "no EFI"),
            ("firmware_info", errno.XEN_ESRCH, "no disks of a BIOS, no VESA data, no EFI tables"),
            ("enter_acpi_sleep", errno.XEN_ENOSYS, "the machine does not sleep"),
            ("change_freq", errno.XEN_ENOSYS, "one frequency"),
            ("getidletime", errno.XEN_ENOSYS, "no dom0-driven frequency control"),
            ("set_processor_pminfo", errno.XEN_EINVAL, "no power management of CPUs"),
            ("cpu_online", errno.XEN_EOPNOTSUPP, "the number of CPUs is fixed"),
            ("cpu_offline", errno.XEN_EOPNOTSUPP, "the number of CPUs is fixed"),
            ("cpu_hotadd", errno.XEN_EOPNOTSUPP, "the number of CPUs is fixed"),
            ("mem_hotadd", errno.XEN_EOPNOTSUPP, "the size of memory is fixed"),
            ("core_parking", errno.XEN_EOPNOTSUPP, "no power management of CPUs"),
            ("resource_op", errno.XEN_EOPNOTSUPP, "no model-specific registers of a real CPU"),
            ("get_symbol", errno.XEN_ENOSYS, "the hypervisor has no symbol table"),
        )
    ),
)

# ------------------------------------------------------------------------------------------------ sysctl


def _sysctl(name: str, payload: Layout[Any] | None, *arrays: ArrayArg, note: str = "") -> Command:
    return remote(
        getattr(sysctl, f"XEN_SYSCTL_{name}"),
        f"XEN_SYSCTL_{name}",
        sysctl.XEN_SYSCTL,
        VERSION_MISMATCH,
        payload=payload,
        arrays=arrays,
        privilege=Privilege.CONTROL,
        note=note,
    )


def _sysctl_refused(name: str, refusal: int, note: str) -> Command:
    return Command(
        number=getattr(sysctl, f"XEN_SYSCTL_{name}"),
        name=f"XEN_SYSCTL_{name}",
        where=Where.HYPERVISOR,
        argument=sysctl.XEN_SYSCTL,
        form=Form.STRUCT,
        privilege=Privilege.CONTROL,
        state=State.REFUSED,
        refusal=refusal,
        errors=(VERSION_MISMATCH,),
        note=note,
    )


MAX_DOMAINS: Final = 256
"""Most entries of one getdomaininfolist message."""
MAX_CPUS: Final = 1024

_SYSCTL: Final = (
    _sysctl(
        "readconsole",
        sysctl.XEN_SYSCTL_READCONSOLE,
        ArrayArg("buffer", 1, "count_", Direction.OUT, MAX_CONSOLE),
        note="the reply's `count` bytes follow it; `incremental` starts at `index`",
    ),
    _sysctl("physinfo", sysctl.XEN_SYSCTL_PHYSINFO),
    _sysctl("sched_id", sysctl.XEN_SYSCTL_SCHED_ID, note="XEN_SCHEDULER_CREDIT2"),
    _sysctl(
        "getdomaininfolist",
        sysctl.XEN_SYSCTL_GETDOMAININFOLIST,
        ArrayArg(
            "buffer", XEN_DOMCTL_GETDOMAININFO, "max_domains", Direction.OUT, MAX_DOMAINS, "num_domains"
        ),
        note="domains from first_domain on, in order",
    ),
    _sysctl(
        "debug_keys",
        sysctl.XEN_SYSCTL_DEBUG_KEYS,
        ArrayArg("keys", 1, "nr_keys", Direction.IN, 64),
        note="prints to the log",
    ),
    _sysctl(
        "getcpuinfo",
        sysctl.XEN_SYSCTL_GETCPUINFO,
        ArrayArg("info", 8, "max_cpus", Direction.OUT, MAX_CPUS, "nr_cpus"),
        note="idle time of each CPU in ns, 64 bits",
    ),
    _sysctl("availheap", sysctl.XEN_SYSCTL_AVAILHEAP, note="bytes free"),
    _sysctl(
        "cputopoinfo",
        sysctl.XEN_SYSCTL_CPUTOPOINFO,
        ArrayArg("cputopo", sysctl.XEN_SYSCTL_CPUTOPO, "num_cpus", Direction.OUT, MAX_CPUS, optional=True),
    ),
    _sysctl(
        "numainfo",
        sysctl.XEN_SYSCTL_NUMAINFO,
        ArrayArg("meminfo", sysctl.XEN_SYSCTL_MEMINFO, "num_nodes", Direction.OUT, 64, optional=True),
        ArrayArg("distance", 4, "num_nodes", Direction.OUT, 64, optional=True),
        note="one node, so that the distance table is one word",
    ),
    _sysctl(
        "scheduler_op",
        sysctl.XEN_SYSCTL_SCHEDULER_OP,
        note="credit2's rate limit; -EINVAL for other schedulers",
    ),
    _sysctl("get_cpu_levelling_caps", sysctl.XEN_SYSCTL_CPU_LEVELLING_CAPS),
    *(
        _sysctl_refused(name, number, note)
        for name, number, note in (
            ("tbuf_op", errno.XEN_ENOSYS, "traces go through the project's own trace"),
            ("perfc_op", errno.XEN_ENOSYS, "built without performance counters"),
            ("get_pmstat", errno.XEN_ENODEV, "no power management of CPUs"),
            ("pm_op", errno.XEN_ENODEV, "no power management of CPUs"),
            ("cpu_hotplug", errno.XEN_EOPNOTSUPP, "the number of CPUs is fixed"),
            ("page_offline_op", errno.XEN_ENOSYS, "frames do not go bad"),
            ("lockprof_op", errno.XEN_ENOSYS, "built without lock profiles"),
            ("cpupool_op", errno.XEN_ENOSYS, "one pool, with all CPUs"),
            ("coverage_op", errno.XEN_EOPNOTSUPP, "built without coverage"),
            ("psr_cmt_op", errno.XEN_ENODEV, "no platform shared resources"),
            ("pcitopoinfo", errno.XEN_ENODEV, "one node"),
            ("psr_alloc", errno.XEN_ENODEV, "no platform shared resources"),
            ("get_cpu_featureset", errno.XEN_EOPNOTSUPP, "features follow from the vCPU model"),
            ("get_cpu_policy", errno.XEN_EOPNOTSUPP, "features follow from the vCPU model"),
            ("livepatch_op", errno.XEN_EOPNOTSUPP, "built without live patches"),
        )
    ),
)

# ------------------------------------------------------------------------------------------------ HVM

_HVM_TARGET: Final = (
    NO_DOMAIN,
    NOT_ALLOWED,
    Error(errno.XEN_EINVAL, "not an HVM domain, or no such parameter"),
)
_PARAM: Final = "HVM_PARAM_* of hvm/params.h; some can be written only by the control domain, some only once"

_HVM: Final = (
    remote(
        hvm_op.HVMOP_set_param,
        "HVMOP_set_param",
        hvm_op.XEN_HVM_PARAM,
        *_HVM_TARGET,
        Error(errno.XEN_EEXIST, "the parameter has another value already and can be set once"),
        privilege=Privilege.TARGET,
        note=_PARAM,
    ),
    remote(
        hvm_op.HVMOP_get_param,
        "HVMOP_get_param",
        hvm_op.XEN_HVM_PARAM,
        *_HVM_TARGET,
        privilege=Privilege.TARGET,
        note=_PARAM,
    ),
    local(
        hvm_op.HVMOP_flush_tlbs,
        "HVMOP_flush_tlbs",
        Error(errno.XEN_EINVAL, "an argument is given"),
        guests=Guests.TRANSLATED,
    ),
    local(hvm_op.HVMOP_get_time, "HVMOP_get_time", FAULT, argument=hvm_op.XEN_HVM_GET_TIME),
    local(
        hvm_op.HVMOP_pagetable_dying,
        "HVMOP_pagetable_dying",
        FAULT,
        argument=hvm_op.XEN_HVM_PAGETABLE_DYING,
        guests=Guests.TRANSLATED,
        note="a hint, without effect",
    ),
    local(
        hvm_op.HVMOP_set_evtchn_upcall_vector,
        "HVMOP_set_evtchn_upcall_vector",
        Error(errno.XEN_EINVAL, "a vector under 16"),
        Error(errno.XEN_ENOENT, "no such vCPU"),
        FAULT,
        argument=hvm_op.XEN_HVM_EVTCHN_UPCALL_VECTOR,
        guests=Guests.TRANSLATED,
    ),
    remote(
        hvm_op.HVMOP_get_mem_type,
        "HVMOP_get_mem_type",
        hvm_op.XEN_HVM_GET_MEM_TYPE,
        *_HVM_TARGET,
        privilege=Privilege.TARGET,
        note="HVMMEM_ram_rw, HVMMEM_ram_ro or HVMMEM_mmio_dm",
    ),
    local(
        hvm_op.HVMOP_xentrace,
        "HVMOP_xentrace",
        Error(errno.XEN_EINVAL, "over 28 bytes, or an event of over 12 bits"),
        FAULT,
        argument=hvm_op.XEN_HVM_XENTRACE,
        note="checked and dropped, as while no trace runs",
    ),
    local(
        hvm_op.HVMOP_guest_request_vm_event,
        "HVMOP_guest_request_vm_event",
        Error(errno.XEN_EINVAL, "an argument is given"),
        note="without effect, as while no monitor listens",
    ),
    *(
        refused(getattr(hvm_op, f"HVMOP_{name}"), f"HVMOP_{name}", number, note)
        for name, number, note in (
            ("set_mem_access", errno.XEN_ENOSYS, "moved to memory_op long ago"),
            ("get_mem_access", errno.XEN_ENOSYS, "moved to memory_op long ago"),
            ("altp2m", errno.XEN_EOPNOTSUPP, "no alternate p2m"),
        )
    ),
)


def _dm(
    name: str,
    payload: Layout[Any],
    *arrays: ArrayArg,
    note: str = "",
    state: State = State.SERVED,
) -> Command:
    return remote(
        getattr(dm_op, f"XEN_DMOP_{name}"),
        f"XEN_DMOP_{name}",
        DM_OP_ARG,
        NO_DOMAIN,
        Error(errno.XEN_EINVAL, "not an HVM domain, a pad field set, or a value out of range"),
        payload=payload,
        payload_field="op.u",
        arrays=arrays,
        privilege=Privilege.DEVICE_MODEL,
        note=note,
        state=state,
    )


_NO_SERVER: Final = "-ENOENT for an unknown server"
_DM: Final = (
    _dm(
        "create_ioreq_server",
        dm_op.XEN_DM_OP_CREATE_IOREQ_SERVER,
        note="-ENOSPC: 8 servers a domain, 32 in its life",
    ),
    _dm("get_ioreq_server_info", dm_op.XEN_DM_OP_GET_IOREQ_SERVER_INFO, note=_NO_SERVER),
    _dm("map_io_range_to_ioreq_server", dm_op.XEN_DM_OP_IOREQ_SERVER_RANGE, note=_NO_SERVER + ", -EEXIST"),
    _dm("unmap_io_range_from_ioreq_server", dm_op.XEN_DM_OP_IOREQ_SERVER_RANGE, note=_NO_SERVER),
    _dm("set_ioreq_server_state", dm_op.XEN_DM_OP_SET_IOREQ_SERVER_STATE, note=_NO_SERVER),
    _dm("destroy_ioreq_server", dm_op.XEN_DM_OP_DESTROY_IOREQ_SERVER, note=_NO_SERVER),
    _dm("set_pci_intx_level", dm_op.XEN_DM_OP_SET_PCI_INTX_LEVEL),
    _dm("set_isa_irq_level", dm_op.XEN_DM_OP_SET_ISA_IRQ_LEVEL),
    _dm("set_pci_link_route", dm_op.XEN_DM_OP_SET_PCI_LINK_ROUTE),
    _dm("inject_msi", dm_op.XEN_DM_OP_INJECT_MSI),
    _dm("inject_event", dm_op.XEN_DM_OP_INJECT_EVENT),
    _dm("remote_shutdown", dm_op.XEN_DM_OP_REMOTE_SHUTDOWN),
    _dm("nr_vcpus", dm_op.XEN_DM_OP_NR_VCPUS),
    *(
        Command(
            number=getattr(dm_op, f"XEN_DMOP_{name}"),
            name=f"XEN_DMOP_{name}",
            where=Where.HYPERVISOR,
            argument=DM_OP_ARG,
            form=Form.STRUCT,
            privilege=Privilege.DEVICE_MODEL,
            state=State.REFUSED,
            refusal=errno.XEN_EOPNOTSUPP,
            note=note,
        )
        for name, note in (
            ("track_dirty_vram", "no log of dirty frames"),
            ("modified_memory", "no log of dirty frames"),
            ("set_mem_type", "types follow from the memory map"),
            ("map_mem_type_to_ioreq_server", "no memory of type HVMMEM_ioreq_server"),
            ("relocate_memory", "use XENMEM_add_to_physmap"),
            ("pin_memory_cacheattr", "memory has one cache attribute"),
            ("set_irq_level", "for other processors"),
        )
    ),
)

CONTROL_HYPERCALLS: Final = (
    Hypercall(
        number=xen.HYPERVISOR_xen_version,
        name="xen_version",
        arguments=("cmd", "buffer"),
        command_argument=0,
        commands=_VERSION,
        unknown=errno.XEN_ENOSYS,
        note="served from what the hypervisor told the domain's process at its start",
    ),
    Hypercall(
        number=xen.HYPERVISOR_console_io,
        name="console_io",
        arguments=("cmd", "count", "buffer"),
        command_argument=0,
        commands=_CONSOLE,
        unknown=errno.XEN_ENOSYS,
    ),
    Hypercall(
        number=xen.HYPERVISOR_physdev_op,
        name="physdev_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        commands=_PHYSDEV,
        unknown=errno.XEN_ENOSYS,
        note="HVM and PVH guests without a device: -ENOSYS for all",
    ),
    Hypercall(
        number=xen.HYPERVISOR_platform_op,
        name="platform_op",
        arguments=("platform_op",),
        command_argument=-2,
        commands=_PLATFORM,
        unknown=errno.XEN_ENOSYS,
        note="interface version first (-EACCES), then privilege (-EPERM)",
    ),
    Hypercall(
        number=xen.HYPERVISOR_sysctl,
        name="sysctl",
        arguments=("op",),
        command_argument=-2,
        commands=_SYSCTL,
        unknown=errno.XEN_ENOSYS,
        note="interface version first (-EACCES), then privilege (-EPERM)",
    ),
    Hypercall(
        number=xen.HYPERVISOR_hvm_op,
        name="hvm_op",
        arguments=("op", "arg"),
        command_argument=0,
        commands=_HVM,
        unknown=errno.XEN_ENOSYS,
    ),
    Hypercall(
        number=xen.HYPERVISOR_dm_op,
        name="dm_op",
        arguments=("domid", "nr_bufs", "bufs"),
        command_argument=-2,
        commands=_DM,
        unknown=errno.XEN_EOPNOTSUPP,
    ),
)
