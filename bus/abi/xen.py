"""Hypercall numbers, MMU operations, start info, shared info, well-known domain ids (xen.h).

Hypercall numbers lack the header's leading underscores: `HYPERVISOR_memory_op` is `__HYPERVISOR_memory_op`.
Python would mangle that name in a class.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.arch_x86 import arch_shared_info
from bus.abi.arch_x86_64 import arch_vcpu_info
from bus.abi.layout import Array, Bytes, Layout, Union, i8, u8, u16, u32, u64

HYPERVISOR_set_trap_table: Final = 0
HYPERVISOR_mmu_update: Final = 1
HYPERVISOR_set_gdt: Final = 2
HYPERVISOR_stack_switch: Final = 3
HYPERVISOR_set_callbacks: Final = 4
HYPERVISOR_fpu_taskswitch: Final = 5
HYPERVISOR_sched_op_compat: Final = 6
HYPERVISOR_platform_op: Final = 7
HYPERVISOR_set_debugreg: Final = 8
HYPERVISOR_get_debugreg: Final = 9
HYPERVISOR_update_descriptor: Final = 10
HYPERVISOR_memory_op: Final = 12
HYPERVISOR_multicall: Final = 13
HYPERVISOR_update_va_mapping: Final = 14
HYPERVISOR_set_timer_op: Final = 15
HYPERVISOR_event_channel_op_compat: Final = 16
HYPERVISOR_xen_version: Final = 17
HYPERVISOR_console_io: Final = 18
HYPERVISOR_physdev_op_compat: Final = 19
HYPERVISOR_grant_table_op: Final = 20
HYPERVISOR_vm_assist: Final = 21
HYPERVISOR_update_va_mapping_otherdomain: Final = 22
HYPERVISOR_iret: Final = 23
HYPERVISOR_vcpu_op: Final = 24
HYPERVISOR_set_segment_base: Final = 25
HYPERVISOR_mmuext_op: Final = 26
HYPERVISOR_xsm_op: Final = 27
HYPERVISOR_nmi_op: Final = 28
HYPERVISOR_sched_op: Final = 29
HYPERVISOR_callback_op: Final = 30
HYPERVISOR_xenoprof_op: Final = 31
HYPERVISOR_event_channel_op: Final = 32
HYPERVISOR_physdev_op: Final = 33
HYPERVISOR_hvm_op: Final = 34
HYPERVISOR_sysctl: Final = 35
HYPERVISOR_domctl: Final = 36
HYPERVISOR_kexec_op: Final = 37
HYPERVISOR_tmem_op: Final = 38
HYPERVISOR_argo_op: Final = 39
HYPERVISOR_xenpmu_op: Final = 40
HYPERVISOR_dm_op: Final = 41
HYPERVISOR_hypfs_op: Final = 42
HYPERVISOR_arch_0: Final = 48
HYPERVISOR_arch_1: Final = 49
HYPERVISOR_arch_2: Final = 50
HYPERVISOR_arch_3: Final = 51
HYPERVISOR_arch_4: Final = 52
HYPERVISOR_arch_5: Final = 53
HYPERVISOR_arch_6: Final = 54
HYPERVISOR_arch_7: Final = 55

VIRQ_TIMER: Final = 0
VIRQ_DEBUG: Final = 1
VIRQ_CONSOLE: Final = 2
VIRQ_DOM_EXC: Final = 3
VIRQ_TBUF: Final = 4
VIRQ_DEBUGGER: Final = 6
VIRQ_XENOPROF: Final = 7
VIRQ_CON_RING: Final = 8
VIRQ_PCPU_STATE: Final = 9
VIRQ_MEM_EVENT: Final = 10
VIRQ_ARGO: Final = 11
VIRQ_ENOMEM: Final = 12
VIRQ_XENPMU: Final = 13
VIRQ_ARCH_0: Final = 16
VIRQ_ARCH_1: Final = 17
VIRQ_ARCH_2: Final = 18
VIRQ_ARCH_3: Final = 19
VIRQ_ARCH_4: Final = 20
VIRQ_ARCH_5: Final = 21
VIRQ_ARCH_6: Final = 22
VIRQ_ARCH_7: Final = 23

NR_VIRQS: Final = 24

MMU_NORMAL_PT_UPDATE: Final = 0
MMU_MACHPHYS_UPDATE: Final = 1
MMU_PT_UPDATE_PRESERVE_AD: Final = 2
MMU_PT_UPDATE_NO_TRANSLATE: Final = 3

MMUEXT_PIN_L1_TABLE: Final = 0
MMUEXT_PIN_L2_TABLE: Final = 1
MMUEXT_PIN_L3_TABLE: Final = 2
MMUEXT_PIN_L4_TABLE: Final = 3
MMUEXT_UNPIN_TABLE: Final = 4
MMUEXT_NEW_BASEPTR: Final = 5
MMUEXT_TLB_FLUSH_LOCAL: Final = 6
MMUEXT_INVLPG_LOCAL: Final = 7
MMUEXT_TLB_FLUSH_MULTI: Final = 8
MMUEXT_INVLPG_MULTI: Final = 9
MMUEXT_TLB_FLUSH_ALL: Final = 10
MMUEXT_INVLPG_ALL: Final = 11
MMUEXT_FLUSH_CACHE: Final = 12
MMUEXT_SET_LDT: Final = 13
MMUEXT_NEW_USER_BASEPTR: Final = 15
MMUEXT_CLEAR_PAGE: Final = 16
MMUEXT_COPY_PAGE: Final = 17
MMUEXT_FLUSH_CACHE_GLOBAL: Final = 18
MMUEXT_MARK_SUPER: Final = 19
MMUEXT_UNMARK_SUPER: Final = 20

UVMF_NONE: Final = 0
UVMF_TLB_FLUSH: Final = 1
UVMF_INVLPG: Final = 2
UVMF_FLUSHTYPE_MASK: Final = 3
UVMF_MULTI: Final = 0
UVMF_LOCAL: Final = 0
UVMF_ALL: Final = 4

CONSOLEIO_write: Final = 0
CONSOLEIO_read: Final = 1

VMASST_CMD_enable: Final = 0
VMASST_CMD_disable: Final = 1
VMASST_TYPE_4gb_segments: Final = 0
VMASST_TYPE_4gb_segments_notify: Final = 1
VMASST_TYPE_writable_pagetables: Final = 2
VMASST_TYPE_pae_extended_cr3: Final = 3
VMASST_TYPE_architectural_iopl: Final = 4
VMASST_TYPE_runstate_update_flag: Final = 5
VMASST_TYPE_m2p_strict: Final = 32

DOMID_FIRST_RESERVED: Final = 0x7FF0
DOMID_SELF: Final = 0x7FF0
DOMID_IO: Final = 0x7FF1
DOMID_XEN: Final = 0x7FF2
DOMID_COW: Final = 0x7FF3
DOMID_INVALID: Final = 0x7FF4
DOMID_IDLE: Final = 0x7FFF
DOMID_MASK: Final = 0x7FFF

XEN_PVCLOCK_TSC_STABLE_BIT: Final = 1 << 0
XEN_PVCLOCK_GUEST_STOPPED: Final = 1 << 1

MAX_GUEST_CMDLINE: Final = 1024

SIF_PRIVILEGED: Final = 1 << 0
SIF_INITDOMAIN: Final = 1 << 1
SIF_MULTIBOOT_MOD: Final = 1 << 2
SIF_MOD_START_PFN: Final = 1 << 3
SIF_VIRT_P2M_4TOOLS: Final = 1 << 4
SIF_PM_MASK: Final = 0xFF00

XEN_VGATYPE_TEXT_MODE_3: Final = 0x03
XEN_VGATYPE_VESA_LFB: Final = 0x23
XEN_VGATYPE_EFI_LFB: Final = 0x70


class mmuext_op(NamedTuple):
    """One extended MMU operation: `cmd` is MMUEXT_*; arg1 is `mfn` or `linear_addr`, arg2 `nr_ents`,
    `vcpumask` (a guest address) or `src_mfn`."""

    cmd: u32
    arg1: u64
    arg2: u64


MMUEXT_OP: Final = Layout(mmuext_op)


class mmu_update(NamedTuple):
    """One page-table update: `ptr` is the machine address of the entry, with the command MMU_* in its low
    two bits; `val` the new entry."""

    ptr: u64
    val: u64


MMU_UPDATE: Final = Layout(mmu_update)


class multicall_entry(NamedTuple):
    """One call of a multicall: `op` is the hypercall number; Xen writes `result`."""

    op: u64
    result: u64
    args: Annotated[tuple[int, ...], Array(u64, 6)]


MULTICALL_ENTRY: Final = Layout(multicall_entry)


class vcpu_time_info(NamedTuple):
    """Clock of a vCPU, written by Xen: system time in ns is system_time + ((TSC - tsc_timestamp) <<
    tsc_shift) * tsc_to_system_mul >> 32. `version` is odd while it is written."""

    version: u32
    pad0: u32
    tsc_timestamp: u64
    system_time: u64
    tsc_to_system_mul: u32
    tsc_shift: i8
    flags: u8
    pad1: Annotated[bytes, Bytes(2)]


VCPU_TIME_INFO: Final = Layout(vcpu_time_info)


class vcpu_info(NamedTuple):
    """Event delivery and time of one vCPU. Guest and Xen both write evtchn_upcall_pending and
    evtchn_pending_sel; the guest alone evtchn_upcall_mask."""

    evtchn_upcall_pending: u8
    evtchn_upcall_mask: u8
    evtchn_pending_sel: u64
    arch: arch_vcpu_info
    time: vcpu_time_info


VCPU_INFO: Final = Layout(vcpu_info)


class shared_info(NamedTuple):
    """The page that a domain shares with Xen. evtchn_pending and evtchn_mask: one bit a port (2-level
    format). wc_*: wall clock at system time 0, in seconds and ns since 1970; wc_version is odd while it is
    written."""

    vcpu_info: Annotated[tuple[vcpu_info, ...], Array(vcpu_info, 32)]
    evtchn_pending: Annotated[tuple[int, ...], Array(u64, 64)]
    evtchn_mask: Annotated[tuple[int, ...], Array(u64, 64)]
    wc_version: u32
    wc_sec: u32
    wc_nsec: u32
    wc_sec_hi: u32
    arch: arch_shared_info


SHARED_INFO: Final = Layout(shared_info)


class start_info(NamedTuple):
    """What a PV guest finds at RSI at its start. `magic` is "xen-3.0-x86_64"; shared_info is a machine
    address; mfn_list, pt_base, mod_start are virtual; the console is that of a domU (dom0 has a union
    here)."""

    magic: Annotated[bytes, Bytes(32)]
    nr_pages: u64
    shared_info: u64
    flags: u32
    store_mfn: u64
    store_evtchn: u32
    console_mfn: u64
    console_evtchn: u32
    pt_base: u64
    nr_pt_frames: u64
    mfn_list: u64
    mod_start: u64
    mod_len: u64
    cmd_line: Annotated[bytes, Bytes(1024)]
    first_p2m_pfn: u64
    nr_p2m_frames: u64


START_INFO: Final = Layout(
    start_info, c_fields={"console_mfn": "console.domU.mfn", "console_evtchn": "console.domU.evtchn"}
)


class xen_multiboot_mod_list(NamedTuple):
    """One module, where SIF_MULTIBOOT_MOD is set; addresses are pseudophysical."""

    mod_start: u32
    mod_end: u32
    cmdline: u32
    pad: u32


XEN_MULTIBOOT_MOD_LIST: Final = Layout(xen_multiboot_mod_list)


class dom0_vga_console_info_text_mode_3(NamedTuple):
    font_height: u16
    cursor_x: u16
    cursor_y: u16
    rows: u16
    columns: u16


DOM0_VGA_CONSOLE_INFO_TEXT_MODE_3: Final = Layout(
    dom0_vga_console_info_text_mode_3, c="__typeof__(((struct dom0_vga_console_info *)0)->u.text_mode_3)"
)


class dom0_vga_console_info_vesa_lfb(NamedTuple):
    width: u16
    height: u16
    bytes_per_line: u16
    bits_per_pixel: u16
    lfb_base: u32
    lfb_size: u32
    red_pos: u8
    red_size: u8
    green_pos: u8
    green_size: u8
    blue_pos: u8
    blue_size: u8
    rsvd_pos: u8
    rsvd_size: u8
    gbl_caps: u32
    mode_attrs: u16
    pad: u16
    ext_lfb_base: u32


DOM0_VGA_CONSOLE_INFO_VESA_LFB: Final = Layout(
    dom0_vga_console_info_vesa_lfb, c="__typeof__(((struct dom0_vga_console_info *)0)->u.vesa_lfb)"
)


class dom0_vga_console_info(NamedTuple):
    """The video mode, for the control domain."""

    video_type: u8
    u: Annotated[
        bytes, Union(text_mode_3=dom0_vga_console_info_text_mode_3, vesa_lfb=dom0_vga_console_info_vesa_lfb)
    ]


DOM0_VGA_CONSOLE_INFO: Final = Layout(dom0_vga_console_info)
