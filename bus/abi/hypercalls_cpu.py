"""The table's part on processors, page tables, callbacks and timers: mostly served in the domain's own
process."""

from __future__ import annotations

from typing import Any, Final

from bus.abi import arch_x86_64, callback, errno, nmi, vcpu, xen
from bus.abi.arch_x86 import TRAP_INFO, VCPU_GUEST_CONTEXT
from bus.abi.hypercalls_model import VCPU_ARG, Command, Error, Form, Guests, Hypercall, State, Where
from bus.abi.layout import Layout

FAULT: Final = Error(errno.XEN_EFAULT, "a guest address does not lead to memory that may be read or written")
PV: Final = Guests.PV


def local(
    number: int, name: str, *errors: Error, argument: Layout[Any] | None = None, **more: Any
) -> Command:
    """A command that the domain's own process serves."""
    return Command(number=number, name=name, where=Where.LOCAL, argument=argument, errors=errors, **more)


def refused(number: int, name: str, refusal: int, note: str = "", **more: Any) -> Command:
    """A command that is known and not built; the domain's own process answers it."""
    return Command(
        number=number, name=name, where=Where.LOCAL, state=State.REFUSED, refusal=refusal, note=note, **more
    )


def single(
    number: int, name: str, arguments: str, *errors: Error, argument: Layout[Any] | None = None, **more: Any
) -> Hypercall:
    """A PV hypercall without sub-commands, served in the domain's own process."""
    more.setdefault("guests", PV)
    command = local(0, name, *errors, argument=argument, **more)
    return Hypercall(number=number, name=name, arguments=tuple(arguments.split()), commands=(command,))


PAGE_ERRORS: Final = (
    Error(
        errno.XEN_EINVAL, "a table entry or frame does not have the type that is asked for, or cannot get it"
    ),
    Error(
        errno.XEN_EPERM, "the frame is not the domain's own, or the foreign domain is not one it may act for"
    ),
    Error(errno.XEN_ESRCH, "no such foreign domain"),
    FAULT,
)

_MMUEXT: Final = (
    ("PIN_L1_TABLE", xen.MMUEXT_PIN_L1_TABLE, "arg1.mfn becomes a page table of level 1 and stays one"),
    ("PIN_L2_TABLE", xen.MMUEXT_PIN_L2_TABLE, "the same for level 2"),
    ("PIN_L3_TABLE", xen.MMUEXT_PIN_L3_TABLE, "the same for level 3"),
    ("PIN_L4_TABLE", xen.MMUEXT_PIN_L4_TABLE, "the same for level 4"),
    ("UNPIN_TABLE", xen.MMUEXT_UNPIN_TABLE, "give the pin of arg1.mfn up"),
    ("NEW_BASEPTR", xen.MMUEXT_NEW_BASEPTR, "arg1.mfn is the new kernel page-table root of this vCPU"),
    ("TLB_FLUSH_LOCAL", xen.MMUEXT_TLB_FLUSH_LOCAL, "this vCPU"),
    ("INVLPG_LOCAL", xen.MMUEXT_INVLPG_LOCAL, "one address, this vCPU"),
    ("TLB_FLUSH_MULTI", xen.MMUEXT_TLB_FLUSH_MULTI, "the vCPUs of the bitmap at arg2.vcpumask"),
    ("INVLPG_MULTI", xen.MMUEXT_INVLPG_MULTI, "one address, the vCPUs of the bitmap"),
    ("TLB_FLUSH_ALL", xen.MMUEXT_TLB_FLUSH_ALL, "all vCPUs of the domain"),
    ("INVLPG_ALL", xen.MMUEXT_INVLPG_ALL, "one address, all vCPUs"),
    ("FLUSH_CACHE", xen.MMUEXT_FLUSH_CACHE, "no effect; -EACCES for a domain without a device"),
    ("SET_LDT", xen.MMUEXT_SET_LDT, "arg1.linear_addr, arg2.nr_ents: at most 8192 entries, page-aligned"),
    ("NEW_USER_BASEPTR", xen.MMUEXT_NEW_USER_BASEPTR, "root for user mode; 0 for none"),
    ("CLEAR_PAGE", xen.MMUEXT_CLEAR_PAGE, "zero the frame arg1.mfn"),
    ("COPY_PAGE", xen.MMUEXT_COPY_PAGE, "copy the frame arg2.src_mfn to arg1.mfn"),
    ("FLUSH_CACHE_GLOBAL", xen.MMUEXT_FLUSH_CACHE_GLOBAL, "no effect; -EINVAL for a domain without a device"),
)


def _mmuext(entry: tuple[str, int, str]) -> Command:
    name, number, note = entry
    return local(number, f"MMUEXT_{name}", *PAGE_ERRORS, argument=xen.MMUEXT_OP, guests=PV, note=note)


_SEGBASE_ERRORS: Final = (
    Error(errno.XEN_EINVAL, "`which` is none of SEGBASE_*, or the base is not canonical"),
)

_VM_ASSIST_NOTE: Final = (
    "PV: 4gb_segments and its notification (no effect in 64-bit mode), writable_pagetables, architectural_iopl, "
    "runstate_update_flag, m2p_strict; HVM and PVH: runstate_update_flag"
)

_CALLBACKS: Final = (
    local(
        callback.CALLBACKOP_register,
        "CALLBACKOP_register",
        Error(errno.XEN_ENOSYS, "unknown type, or CALLBACKTYPE_sysenter_deprecated"),
        Error(errno.XEN_EINVAL, "the address is not canonical"),
        FAULT,
        argument=callback.CALLBACK_REGISTER,
        guests=PV,
        note="event, failsafe, syscall, syscall32, sysenter, nmi",
    ),
    local(
        callback.CALLBACKOP_unregister,
        "CALLBACKOP_unregister",
        Error(errno.XEN_EINVAL, "event, failsafe, syscall, sysenter cannot be taken back"),
        Error(errno.XEN_ENOSYS, "unknown type"),
        FAULT,
        argument=callback.CALLBACK_UNREGISTER,
        guests=PV,
        note="only nmi",
    ),
)

_NO_VCPU: Final = Error(errno.XEN_ENOENT, "the domain has no vCPU of that number")
_BAD_PERIOD: Final = Error(errno.XEN_EINVAL, "the period is under 1 ms or absurdly long")
_OTHER_VCPU: Final = Error(errno.XEN_EINVAL, "the vCPU is not the caller itself")

_VCPU: Final = (
    local(
        vcpu.VCPUOP_initialise,
        "VCPUOP_initialise",
        _NO_VCPU,
        Error(errno.XEN_EEXIST, "the vCPU is initialised already"),
        Error(errno.XEN_EINVAL, "the context is not one that a guest may have"),
        Error(errno.XEN_ENOMEM, "no memory for the vCPU"),
        FAULT,
        argument=VCPU_GUEST_CONTEXT,
        note="PV: vcpu_guest_context; HVM and PVH: vcpu_hvm_context (hvm/hvm_vcpu.h)",
    ),
    Command(
        number=vcpu.VCPUOP_up,
        name="VCPUOP_up",
        where=Where.HYPERVISOR,
        argument=VCPU_ARG,
        form=Form.STRUCT,
        errors=(_NO_VCPU, Error(errno.XEN_EINVAL, "the vCPU is not initialised")),
        note="crosses the bus because the scheduler must know; the process checks that it is initialised",
    ),
    Command(
        number=vcpu.VCPUOP_down,
        name="VCPUOP_down",
        where=Where.HYPERVISOR,
        argument=VCPU_ARG,
        form=Form.STRUCT,
        errors=(_NO_VCPU,),
        note="the last vCPU that goes down shuts the domain down with SHUTDOWN_poweroff",
    ),
    local(vcpu.VCPUOP_is_up, "VCPUOP_is_up", _NO_VCPU, note="1 or 0"),
    local(
        vcpu.VCPUOP_get_runstate_info,
        "VCPUOP_get_runstate_info",
        _NO_VCPU,
        FAULT,
        argument=vcpu.VCPU_RUNSTATE_INFO,
    ),
    local(
        vcpu.VCPUOP_register_runstate_memory_area,
        "VCPUOP_register_runstate_memory_area",
        _NO_VCPU,
        FAULT,
        argument=vcpu.VCPU_REGISTER_RUNSTATE_MEMORY_AREA,
    ),
    local(
        vcpu.VCPUOP_set_periodic_timer,
        "VCPUOP_set_periodic_timer",
        _NO_VCPU,
        _BAD_PERIOD,
        FAULT,
        argument=vcpu.VCPU_SET_PERIODIC_TIMER,
    ),
    local(vcpu.VCPUOP_stop_periodic_timer, "VCPUOP_stop_periodic_timer", _NO_VCPU),
    local(
        vcpu.VCPUOP_set_singleshot_timer,
        "VCPUOP_set_singleshot_timer",
        _NO_VCPU,
        _OTHER_VCPU,
        FAULT,
        argument=vcpu.VCPU_SET_SINGLESHOT_TIMER,
    ),
    local(vcpu.VCPUOP_stop_singleshot_timer, "VCPUOP_stop_singleshot_timer", _NO_VCPU, _OTHER_VCPU),
    local(
        vcpu.VCPUOP_register_vcpu_info,
        "VCPUOP_register_vcpu_info",
        _NO_VCPU,
        Error(errno.XEN_EINVAL, "placed already, crosses a page, or not the domain's own frame"),
        FAULT,
        argument=vcpu.VCPU_REGISTER_VCPU_INFO,
    ),
    local(vcpu.VCPUOP_send_nmi, "VCPUOP_send_nmi", _NO_VCPU),
    refused(vcpu.VCPUOP_get_physid, "VCPUOP_get_physid", errno.XEN_EINVAL, "no vCPU is pinned to a real CPU"),
    local(
        vcpu.VCPUOP_register_vcpu_time_memory_area,
        "VCPUOP_register_vcpu_time_memory_area",
        _NO_VCPU,
        FAULT,
        argument=vcpu.VCPU_REGISTER_TIME_MEMORY_AREA,
    ),
)

_VA_MAPPING_NOTE: Final = "flags: UVMF_*; the entry of level 1 that maps the address is replaced"

CPU_HYPERCALLS: Final = (
    single(
        xen.HYPERVISOR_set_trap_table,
        "set_trap_table",
        "traps",
        Error(errno.XEN_EINVAL, "an address is not canonical"),
        FAULT,
        argument=TRAP_INFO,
        note="a list that ends with address 0; a null handle clears the table",
    ),
    single(
        xen.HYPERVISOR_mmu_update,
        "mmu_update",
        "reqs count done_out foreigndom",
        *PAGE_ERRORS,
        Error(errno.XEN_ENOSYS, "the low bits of `ptr` are no command"),
        argument=xen.MMU_UPDATE,
        note="MMU_NORMAL_PT_UPDATE, MMU_MACHPHYS_UPDATE, MMU_PT_UPDATE_PRESERVE_AD, PT_UPDATE_NO_TRANSLATE; "
        "page tables of other domains: -EPERM (the domain builder maps what it builds by the bus)",
        state=State.PARTLY,
    ),
    single(
        xen.HYPERVISOR_set_gdt,
        "set_gdt",
        "frame_list entries",
        Error(errno.XEN_EINVAL, "over 7168 entries, a frame that is not the domain's, or is mapped writable"),
        FAULT,
    ),
    single(
        xen.HYPERVISOR_stack_switch,
        "stack_switch",
        "ss esp",
        note="kernel stack of the vCPU, for entries from user mode; the selector's RPL becomes 3",
    ),
    single(
        xen.HYPERVISOR_set_callbacks,
        "set_callbacks",
        "event_address failsafe_address syscall_address",
        note="an address that is not canonical is left out",
    ),
    single(xen.HYPERVISOR_fpu_taskswitch, "fpu_taskswitch", "set", note="sets or clears CR0.TS"),
    single(
        xen.HYPERVISOR_set_debugreg,
        "set_debugreg",
        "reg value",
        Error(
            errno.XEN_EPERM, "the value is one that a guest may not set (an address of the hypervisor, I/O)"
        ),
        Error(errno.XEN_ENODEV, "no such register; DR4 or DR5 while CR4.DE is set"),
        Error(errno.XEN_EINVAL, "over 32 bits for DR6 or DR7"),
    ),
    single(
        xen.HYPERVISOR_get_debugreg,
        "get_debugreg",
        "reg",
        Error(errno.XEN_ENODEV, "no such register; DR4 or DR5 while CR4.DE is set"),
        note="returns the value",
    ),
    single(
        xen.HYPERVISOR_update_descriptor,
        "update_descriptor",
        "pa desc",
        Error(
            errno.XEN_EINVAL, "not 8-byte aligned, no frame of the domain, or a descriptor it may not have"
        ),
        note="pa: machine address",
    ),
    single(
        xen.HYPERVISOR_multicall,
        "multicall",
        "call_list nr_calls",
        FAULT,
        argument=xen.MULTICALL_ENTRY,
        guests=Guests.ALL,
        note="each entry is done as its own call and may cross the bus; `result` gets its return value",
    ),
    single(
        xen.HYPERVISOR_update_va_mapping,
        "update_va_mapping",
        "va new_val flags",
        *PAGE_ERRORS,
        note=_VA_MAPPING_NOTE,
    ),
    single(
        xen.HYPERVISOR_set_timer_op,
        "set_timer_op",
        "timeout",
        note="single-shot timer of the vCPU, system time in ns; 0 stops it, a time gone by fires at once",
        guests=Guests.ALL,
    ),
    single(
        xen.HYPERVISOR_vm_assist,
        "vm_assist",
        "cmd type",
        Error(errno.XEN_EINVAL, "an assist that this kind of guest does not have"),
        Error(errno.XEN_ENOSYS, "`cmd` is neither enable nor disable"),
        guests=Guests.ALL,
        note=_VM_ASSIST_NOTE,
    ),
    single(
        xen.HYPERVISOR_update_va_mapping_otherdomain,
        "update_va_mapping_otherdomain",
        "va new_val flags domid",
        *PAGE_ERRORS,
        note=_VA_MAPPING_NOTE
        + "; only the frames of DOMID_SELF and of live grants can be mapped, others: -EPERM",
        state=State.PARTLY,
    ),
    single(
        xen.HYPERVISOR_iret,
        "iret",
        "",
        argument=arch_x86_64.IRET_CONTEXT,
        note="the frame is on the guest's kernel stack; a bad one crashes the domain, as on Xen",
    ),
    Hypercall(
        number=xen.HYPERVISOR_vcpu_op,
        name="vcpu_op",
        arguments=("cmd", "vcpuid", "extra_args"),
        command_argument=0,
        commands=_VCPU,
        unknown=errno.XEN_ENOSYS,
    ),
    Hypercall(
        number=xen.HYPERVISOR_set_segment_base,
        name="set_segment_base",
        arguments=("which", "base"),
        command_argument=0,
        unknown=errno.XEN_EINVAL,
        commands=(
            local(arch_x86_64.SEGBASE_FS, "SEGBASE_FS", *_SEGBASE_ERRORS, guests=PV),
            local(arch_x86_64.SEGBASE_GS_USER, "SEGBASE_GS_USER", *_SEGBASE_ERRORS, guests=PV),
            local(arch_x86_64.SEGBASE_GS_KERNEL, "SEGBASE_GS_KERNEL", *_SEGBASE_ERRORS, guests=PV),
            local(
                arch_x86_64.SEGBASE_GS_USER_SEL,
                "SEGBASE_GS_USER_SEL",
                guests=PV,
                note="base: a selector; one that does not load becomes the null selector",
            ),
        ),
    ),
    Hypercall(
        number=xen.HYPERVISOR_mmuext_op,
        name="mmuext_op",
        arguments=("op", "count", "pdone", "foreigndom"),
        command_argument=-2,
        unknown=errno.XEN_ENOSYS,
        commands=(
            *map(_mmuext, _MMUEXT),
            refused(
                xen.MMUEXT_MARK_SUPER, "MMUEXT_MARK_SUPER", errno.XEN_EOPNOTSUPP, "no superpages", guests=PV
            ),
            refused(
                xen.MMUEXT_UNMARK_SUPER,
                "MMUEXT_UNMARK_SUPER",
                errno.XEN_EOPNOTSUPP,
                "no superpages",
                guests=PV,
            ),
        ),
        note="a list; the commands before the failing one are done, their number goes to `pdone`",
    ),
    Hypercall(
        number=xen.HYPERVISOR_nmi_op,
        name="nmi_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        unknown=errno.XEN_ENOSYS,
        commands=(
            local(
                nmi.XENNMI_register_callback,
                "XENNMI_register_callback",
                Error(errno.XEN_EINVAL, "the address is not canonical, or the vCPU is not vCPU 0"),
                FAULT,
                argument=nmi.XENNMI_CALLBACK,
                guests=PV,
            ),
            local(nmi.XENNMI_unregister_callback, "XENNMI_unregister_callback", guests=PV),
        ),
    ),
    Hypercall(
        number=xen.HYPERVISOR_callback_op,
        name="callback_op",
        arguments=("cmd", "arg"),
        command_argument=0,
        commands=_CALLBACKS,
        unknown=errno.XEN_ENOSYS,
    ),
)
