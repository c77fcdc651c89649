"""The table's part on domctl: every command, for the control domain only."""

from __future__ import annotations

from typing import Any, Final

from bus.abi import domctl, errno, xen
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT
from bus.abi.hypercalls_control import UNKNOWN_DOMAIN, VERSION_MISMATCH
from bus.abi.hypercalls_model import (
    ArrayArg,
    Command,
    Direction,
    Error,
    Form,
    Hypercall,
    Privilege,
    State,
    Where,
)
from bus.abi.layout import Layout

_NO_VCPU: Final = Error(errno.XEN_EINVAL, "no such vCPU")
_RUNNING: Final = Error(errno.XEN_EINVAL, "the domain is the caller itself")


def _domctl(name: str, payload: Layout[Any] | None, *more: Error | ArrayArg | str) -> Command:
    """`more`: errors, arrays and one note, in any order."""
    return Command(
        number=getattr(domctl, f"XEN_DOMCTL_{name}"),
        name=f"XEN_DOMCTL_{name}",
        where=Where.HYPERVISOR,
        argument=domctl.XEN_DOMCTL,
        form=Form.STRUCT,
        payload=payload,
        privilege=Privilege.CONTROL,
        arrays=tuple(m for m in more if isinstance(m, ArrayArg)),
        errors=(VERSION_MISMATCH, UNKNOWN_DOMAIN, *(m for m in more if isinstance(m, Error))),
        note=next((m for m in more if isinstance(m, str)), ""),
    )


def _refused(name: str, refusal: int, note: str) -> Command:
    return Command(
        number=getattr(domctl, f"XEN_DOMCTL_{name}"),
        name=f"XEN_DOMCTL_{name}",
        where=Where.HYPERVISOR,
        argument=domctl.XEN_DOMCTL,
        form=Form.STRUCT,
        privilege=Privilege.CONTROL,
        state=State.REFUSED,
        refusal=refusal,
        errors=(VERSION_MISMATCH, UNKNOWN_DOMAIN),
        note=note,
    )


_MAX_CONTEXT: Final = 48 * 1024
_MAX_BITS: Final = 8192

_SERVED: Final = (
    _domctl(
        "createdomain",
        domctl.XEN_DOMCTL_CREATEDOMAIN,
        Error(errno.XEN_EEXIST, "the domain id is in use"),
        Error(errno.XEN_EINVAL, "flags, limits or emulation that do not go together"),
        Error(errno.XEN_ENOMEM, "not so much memory, or no free id"),
        "domain: the id wanted, or DOMID_FIRST_RESERVED and up for any; the reply has the id",
    ),
    _domctl(
        "destroydomain",
        None,
        _RUNNING,
        "the domain is dying at once; frames that others map come back when they unmap them",
    ),
    _domctl("pausedomain", None, _RUNNING),
    _domctl("unpausedomain", None),
    _domctl("resumedomain", None, Error(errno.XEN_EINVAL, "the domain is not shut down"), "after a suspend"),
    _domctl(
        "getdomaininfo",
        domctl.XEN_DOMCTL_GETDOMAININFO,
        "of the first domain whose id is at least `domain`: compare `domain` in the reply",
    ),
    _domctl(
        "max_mem",
        domctl.XEN_DOMCTL_MAX_MEM,
        Error(errno.XEN_EINVAL, "more than the domain's machine memory was made for"),
        "KiB",
    ),
    _domctl(
        "max_vcpus",
        domctl.XEN_DOMCTL_MAX_VCPUS,
        Error(errno.XEN_EINVAL, "not the number of createdomain, or set already"),
    ),
    _domctl("getvcpuinfo", domctl.XEN_DOMCTL_GETVCPUINFO, Error(errno.XEN_ESRCH, "no such vCPU")),
    _domctl(
        "getvcpucontext",
        domctl.XEN_DOMCTL_VCPUCONTEXT,
        ArrayArg("ctxt", VCPU_GUEST_CONTEXT, 1, Direction.OUT, 1),
        _NO_VCPU,
        Error(errno.XEN_ENODATA, "the vCPU is not initialised"),
        "the vCPU must be paused: its process is asked for the registers",
    ),
    _domctl(
        "setvcpucontext",
        domctl.XEN_DOMCTL_VCPUCONTEXT,
        ArrayArg("ctxt", VCPU_GUEST_CONTEXT, 1, Direction.IN, 1),
        _NO_VCPU,
        Error(errno.XEN_EBUSY, "the domain is not paused"),
        "a null handle resets the vCPU: refused with -EINVAL",
    ),
    _domctl(
        "setvcpuaffinity",
        domctl.XEN_DOMCTL_VCPUAFFINITY,
        ArrayArg("cpumap_hard.bitmap", 1, "cpumap_hard.nr_bits", Direction.BOTH, _MAX_BITS, bits=True),
        ArrayArg("cpumap_soft.bitmap", 1, "cpumap_soft.nr_bits", Direction.BOTH, _MAX_BITS, bits=True),
        _NO_VCPU,
        Error(errno.XEN_EINVAL, "no flag, or no CPU left"),
        "nr_bits of each map, rounded up to bytes; the reply has the map in force",
    ),
    _domctl(
        "getvcpuaffinity",
        domctl.XEN_DOMCTL_VCPUAFFINITY,
        ArrayArg("cpumap_hard.bitmap", 1, "cpumap_hard.nr_bits", Direction.OUT, _MAX_BITS, bits=True),
        ArrayArg("cpumap_soft.bitmap", 1, "cpumap_soft.nr_bits", Direction.OUT, _MAX_BITS, bits=True),
        _NO_VCPU,
    ),
    _domctl(
        "scheduler_op",
        domctl.XEN_DOMCTL_SCHEDULER_OP,
        Error(errno.XEN_EINVAL, "another scheduler, weight 0, or per-vCPU parameters"),
        "credit2: weight and cap, putinfo and getinfo",
    ),
    _domctl("setdomainhandle", domctl.XEN_DOMCTL_SETDOMAINHANDLE, "the UUID"),
    _domctl("settimeoffset", domctl.XEN_DOMCTL_SETTIMEOFFSET, "seconds, of the wall clock"),
    _domctl(
        "hypercall_init",
        domctl.XEN_DOMCTL_HYPERCALL_INIT,
        Error(errno.XEN_EACCES, "no such frame"),
        "writes the hypercall page: the builder may do it by itself",
    ),
    _domctl("sendtrigger", domctl.XEN_DOMCTL_SENDTRIGGER, _NO_VCPU, "NMI; POWER and SLEEP for HVM"),
    _domctl("irq_permission", domctl.XEN_DOMCTL_IRQ_PERMISSION, Error(errno.XEN_EINVAL, "no such interrupt")),
    _domctl(
        "iomem_permission", domctl.XEN_DOMCTL_IOMEM_PERMISSION, Error(errno.XEN_EINVAL, "a range that wraps")
    ),
    _domctl(
        "ioport_permission",
        domctl.XEN_DOMCTL_IOPORT_PERMISSION,
        Error(errno.XEN_EINVAL, "over 65536 ports"),
        "kept; no device has ports that a guest could reach by it",
    ),
    _domctl(
        "memory_mapping",
        domctl.XEN_DOMCTL_MEMORY_MAPPING,
        Error(errno.XEN_EINVAL, "a range that wraps"),
        Error(errno.XEN_E2BIG, "over 64 frames"),
        Error(errno.XEN_EPERM, "no permission for the range"),
        "a device's registers in the p2m",
    ),
    _domctl(
        "assign_device",
        domctl.XEN_DOMCTL_ASSIGN_DEVICE,
        Error(errno.XEN_ENODEV, "no such device"),
        Error(errno.XEN_EBUSY, "another domain has it"),
        "PCI; the IOMMU's tables for it are the domain's own",
    ),
    _domctl(
        "test_assign_device",
        domctl.XEN_DOMCTL_ASSIGN_DEVICE,
        Error(errno.XEN_EINVAL, "another domain has it, or there is none"),
    ),
    _domctl(
        "deassign_device",
        domctl.XEN_DOMCTL_ASSIGN_DEVICE,
        Error(errno.XEN_ENODEV, "not this domain's device"),
    ),
    _domctl(
        "set_target",
        domctl.XEN_DOMCTL_SET_TARGET,
        Error(errno.XEN_EINVAL, "the domain has a target already, or is its own"),
        "`domain` becomes the device model of `target`",
    ),
    _domctl(
        "set_virq_handler", domctl.XEN_DOMCTL_SET_VIRQ_HANDLER, Error(errno.XEN_EINVAL, "not a global VIRQ")
    ),
    _domctl(
        "getpageframeinfo3",
        domctl.XEN_DOMCTL_GETPAGEFRAMEINFO3,
        ArrayArg("array", 8, "num", Direction.BOTH, 1024),
        Error(errno.XEN_E2BIG, "over 1024 frames"),
        "XEN_DOMCTL_PFINFO_* in the top bits of each",
    ),
    _domctl("get_address_size", domctl.XEN_DOMCTL_ADDRESS_SIZE, "64"),
    _domctl(
        "set_address_size",
        domctl.XEN_DOMCTL_ADDRESS_SIZE,
        Error(errno.XEN_EINVAL, "other than 64: no 32-bit PV"),
    ),
    _domctl(
        "gethvmcontext",
        domctl.XEN_DOMCTL_HVMCONTEXT,
        ArrayArg("buffer", 1, "size", Direction.OUT, _MAX_CONTEXT, optional=True),
        Error(errno.XEN_EINVAL, "not an HVM domain"),
        Error(errno.XEN_ENOSPC, "the buffer is too short"),
        "records of hvm/save.h; a null buffer asks for the size",
    ),
    _domctl(
        "sethvmcontext",
        domctl.XEN_DOMCTL_HVMCONTEXT,
        ArrayArg("buffer", 1, "size", Direction.IN, _MAX_CONTEXT),
        Error(errno.XEN_EINVAL, "not an HVM domain, or records that do not parse"),
    ),
)

_REFUSED: Final = (
    ("shadow_op", errno.XEN_EINVAL, "no shadow page tables: no dirty log, no migration of a running domain"),
    ("real_mode_area", errno.XEN_ENOSYS, "of another processor"),
    ("set_opt_feature", errno.XEN_ENOSYS, "of another processor"),
    ("subscribe", errno.XEN_EOPNOTSUPP, "use VIRQ_DOM_EXC"),
    ("bind_pt_irq", errno.XEN_ENOSYS, "no interrupts of a real machine"),
    ("unbind_pt_irq", errno.XEN_ENOSYS, "no interrupts of a real machine"),
    ("ioport_mapping", errno.XEN_ENOSYS, "no I/O ports of a real machine"),
    ("set_ext_vcpucontext", errno.XEN_EOPNOTSUPP, "SYSENTER and MCE state goes with the vCPU"),
    ("get_ext_vcpucontext", errno.XEN_EOPNOTSUPP, "SYSENTER and MCE state goes with the vCPU"),
    ("get_device_group", errno.XEN_ENOSYS, "each device is a group of its own"),
    ("debug_op", errno.XEN_EOPNOTSUPP, "no single step from outside"),
    ("gethvmcontext_partial", errno.XEN_ENOSYS, "use gethvmcontext"),
    ("get_cpu_policy", errno.XEN_EOPNOTSUPP, "features follow from the vCPU model"),
    ("set_cpu_policy", errno.XEN_EOPNOTSUPP, "features follow from the vCPU model"),
    ("setdebugging", errno.XEN_EOPNOTSUPP, "no debugger attaches to a domain (gdbsx)"),
    ("vm_event_op", errno.XEN_ENOSYS, "no monitor"),
    ("mem_sharing_op", errno.XEN_ENOSYS, "no memory sharing"),
    ("gettscinfo", errno.XEN_EOPNOTSUPP, "the time stamp counter has one mode"),
    ("settscinfo", errno.XEN_EOPNOTSUPP, "the time stamp counter has one mode"),
    ("setvcpuextstate", errno.XEN_EINVAL, "the vCPU has no XSAVE"),
    ("getvcpuextstate", errno.XEN_EINVAL, "the vCPU has no XSAVE"),
    ("set_access_required", errno.XEN_EPERM, "no memory-access monitor"),
    ("audit_p2m", errno.XEN_ENOSYS, "a debugging aid"),
    ("set_broken_page_p2m", errno.XEN_EINVAL, "frames do not go bad"),
    ("setnodeaffinity", errno.XEN_EOPNOTSUPP, "one node"),
    ("getnodeaffinity", errno.XEN_EOPNOTSUPP, "one node"),
    ("cacheflush", errno.XEN_ENOSYS, "of another processor"),
    ("get_vcpu_msrs", errno.XEN_EOPNOTSUPP, "no migration of a running domain"),
    ("set_vcpu_msrs", errno.XEN_EOPNOTSUPP, "no migration of a running domain"),
    ("setvnumainfo", errno.XEN_EOPNOTSUPP, "no virtual NUMA"),
    ("psr_cmt_op", errno.XEN_ENODEV, "no platform shared resources"),
    ("monitor_op", errno.XEN_EOPNOTSUPP, "no monitor"),
    ("psr_alloc", errno.XEN_ENODEV, "no platform shared resources"),
    ("soft_reset", errno.XEN_ENOSYS, "destroy and create instead"),
    ("vuart_op", errno.XEN_ENOSYS, "of another processor"),
    ("vmtrace_op", errno.XEN_EOPNOTSUPP, "no processor trace"),
    ("get_paging_mempool_size", errno.XEN_EOPNOTSUPP, "no shadow or nested page tables"),
    ("set_paging_mempool_size", errno.XEN_EOPNOTSUPP, "no shadow or nested page tables"),
    ("gdbsx_guestmemio", errno.XEN_ENOSYS, "use the project's own debugger"),
    ("gdbsx_pausevcpu", errno.XEN_ENOSYS, "use the project's own debugger"),
    ("gdbsx_unpausevcpu", errno.XEN_ENOSYS, "use the project's own debugger"),
    ("gdbsx_domstatus", errno.XEN_ENOSYS, "use the project's own debugger"),
)

DOMCTL: Final = Hypercall(
    number=xen.HYPERVISOR_domctl,
    name="domctl",
    arguments=("op",),
    command_argument=-2,
    commands=(*_SERVED, *(_refused(*entry) for entry in _REFUSED)),
    unknown=errno.XEN_ENOSYS,
    note="interface version first (-EACCES), then the domain (-ESRCH), then privilege (-EPERM)",
)
