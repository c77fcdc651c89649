"""x86: trap table, vCPU context, arch parts of the shared info, domain configuration (arch-x86/xen.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.arch_x86_64 import cpu_user_regs
from bus.abi.layout import Array, Bytes, Layout, u8, u16, u32, u64

XEN_HAVE_PV_GUEST_ENTRY: Final = 1
XEN_HAVE_PV_UPCALL_MASK: Final = 1

FIRST_RESERVED_GDT_PAGE: Final = 14
FIRST_RESERVED_GDT_BYTE: Final = FIRST_RESERVED_GDT_PAGE * 4096
FIRST_RESERVED_GDT_ENTRY: Final = 7168

XEN_LEGACY_MAX_VCPUS: Final = 32

VGCF_I387_VALID: Final = 1 << 0
VGCF_IN_KERNEL: Final = 1 << 2
VGCF_i387_valid: Final = 1
VGCF_in_kernel: Final = 4
VGCF_failsafe_disables_events: Final = 8
VGCF_syscall_disables_events: Final = 16
VGCF_online: Final = 32

XEN_X86_EMU_LAPIC: Final = 1
XEN_X86_EMU_HPET: Final = 2
XEN_X86_EMU_PM: Final = 4
XEN_X86_EMU_RTC: Final = 8
XEN_X86_EMU_IOAPIC: Final = 16
XEN_X86_EMU_PIC: Final = 32
XEN_X86_EMU_VGA: Final = 64
XEN_X86_EMU_IOMMU: Final = 128
XEN_X86_EMU_PIT: Final = 256
XEN_X86_EMU_USE_PIRQ: Final = 512
XEN_X86_EMU_VPCI: Final = 1024
XEN_X86_EMU_ALL: Final = (
    XEN_X86_EMU_LAPIC
    | XEN_X86_EMU_HPET
    | XEN_X86_EMU_PM
    | XEN_X86_EMU_RTC
    | XEN_X86_EMU_IOAPIC
    | XEN_X86_EMU_PIC
    | XEN_X86_EMU_VGA
    | XEN_X86_EMU_IOMMU
    | XEN_X86_EMU_PIT
    | XEN_X86_EMU_USE_PIRQ
    | XEN_X86_EMU_VPCI
)
XEN_X86_MSR_RELAXED: Final = 1 << 0
XEN_X86_MISC_FLAGS_MAX: Final = XEN_X86_MSR_RELAXED

XEN_CPUID_NO_SUBLEAF: Final = 0xFFFFFFFF

XEN_HVM_DEBUGCONS_IOPORT: Final = 0xE9


class trap_info(NamedTuple):
    """One exception handler: low two bits of `flags` are the lowest privilege that may use the vector, bit
    2 masks events on entry."""

    vector: u8
    flags: u8
    cs: u16
    address: u64


TRAP_INFO: Final = Layout(trap_info)


class vcpu_guest_context_fpu_ctxt(NamedTuple):
    x: Annotated[bytes, Bytes(512)]


VCPU_GUEST_CONTEXT_FPU_CTXT: Final = Layout(
    vcpu_guest_context_fpu_ctxt, c="__typeof__(((struct vcpu_guest_context *)0)->fpu_ctxt)"
)


class vcpu_guest_context(NamedTuple):
    """State of a PV vCPU: VCPUOP_initialise and the domctls get and setvcpucontext. ctrlreg[3] and [1]:
    kernel and user page-table roots as cr3 values; gdt_frames: machine frames."""

    fpu_ctxt: vcpu_guest_context_fpu_ctxt
    flags: u64
    user_regs: cpu_user_regs
    trap_ctxt: Annotated[tuple[trap_info, ...], Array(trap_info, 256)]
    ldt_base: u64
    ldt_ents: u64
    gdt_frames: Annotated[tuple[int, ...], Array(u64, 16)]
    gdt_ents: u64
    kernel_ss: u64
    kernel_sp: u64
    ctrlreg: Annotated[tuple[int, ...], Array(u64, 8)]
    debugreg: Annotated[tuple[int, ...], Array(u64, 8)]
    event_callback_eip: u64
    failsafe_callback_eip: u64
    syscall_callback_eip: u64
    vm_assist: u64
    fs_base: u64
    gs_base_kernel: u64
    gs_base_user: u64


VCPU_GUEST_CONTEXT: Final = Layout(vcpu_guest_context)


class arch_shared_info(NamedTuple):
    """max_pfn, p2m_*: written by the guest, for the toolstack; nmi_reason by Xen."""

    max_pfn: u64
    pfn_to_mfn_frame_list_list: u64
    nmi_reason: u64
    p2m_cr3: u64
    p2m_vaddr: u64
    p2m_generation: u64


ARCH_SHARED_INFO: Final = Layout(arch_shared_info)


class xen_arch_domainconfig(NamedTuple):
    """emulation_flags: XEN_X86_EMU_*; misc_flags: XEN_X86_MSR_RELAXED."""

    emulation_flags: u32
    misc_flags: u32


XEN_ARCH_DOMAINCONFIG: Final = Layout(xen_arch_domainconfig)


class xen_cpuid_leaf(NamedTuple):
    leaf: u32
    subleaf: u32
    a: u32
    b: u32
    c: u32
    d: u32


XEN_CPUID_LEAF: Final = Layout(xen_cpuid_leaf)


class xen_msr_entry(NamedTuple):
    idx: u32
    flags: u32
    val: u64


XEN_MSR_ENTRY: Final = Layout(xen_msr_entry)
