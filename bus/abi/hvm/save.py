"""HVM context records, as XEN_DOMCTL_sethvmcontext takes them (hvm/save.h, arch-x86/hvm/save.h).

A context is a sequence of records, each a descriptor and its structure: HEADER first, END last.
"""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, u16, u32, u64

HVM_FILE_MAGIC: Final = 0x54381286
HVM_FILE_VERSION: Final = 0x00000001
TYPECODES: Final = {"END": 0, "HEADER": 1, "CPU": 2}
"""Of the records that are known here (DECLARE_HVM_SAVE_TYPE)."""


class hvm_save_descriptor(NamedTuple):
    """typecode: of TYPECODES; instance: the vCPU; length: of what follows, in bytes."""

    typecode: u16
    instance: u16
    length: u32


HVM_SAVE_DESCRIPTOR: Final = Layout(hvm_save_descriptor)


class hvm_save_header(NamedTuple):
    """magic: HVM_FILE_MAGIC; cpuid: CPUID[1].EAX where it was saved."""

    magic: u32
    version: u32
    changeset: u64
    cpuid: u32
    gtsc_khz: u32


HVM_SAVE_HEADER: Final = Layout(hvm_save_header)


class hvm_hw_cpu(NamedTuple):
    """A vCPU's registers. *_arbytes: type 0..3, S 4, DPL 5..6, P 7, AVL 8, L 9, D/B 10, G 11."""

    fpu_regs: Annotated[bytes, Bytes(512)]
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rbp: u64
    rsi: u64
    rdi: u64
    rsp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    dr0: u64
    dr1: u64
    dr2: u64
    dr3: u64
    dr6: u64
    dr7: u64
    cs_sel: u32
    ds_sel: u32
    es_sel: u32
    fs_sel: u32
    gs_sel: u32
    ss_sel: u32
    tr_sel: u32
    ldtr_sel: u32
    cs_limit: u32
    ds_limit: u32
    es_limit: u32
    fs_limit: u32
    gs_limit: u32
    ss_limit: u32
    tr_limit: u32
    ldtr_limit: u32
    idtr_limit: u32
    gdtr_limit: u32
    cs_base: u64
    ds_base: u64
    es_base: u64
    fs_base: u64
    gs_base: u64
    ss_base: u64
    tr_base: u64
    ldtr_base: u64
    idtr_base: u64
    gdtr_base: u64
    cs_arbytes: u32
    ds_arbytes: u32
    es_arbytes: u32
    fs_arbytes: u32
    gs_arbytes: u32
    ss_arbytes: u32
    tr_arbytes: u32
    ldtr_arbytes: u32
    sysenter_cs: u64
    sysenter_esp: u64
    sysenter_eip: u64
    shadow_gs: u64
    msr_flags: u64
    msr_lstar: u64
    msr_star: u64
    msr_cstar: u64
    msr_syscall_mask: u64
    msr_efer: u64
    msr_tsc_aux: u64
    tsc: u64
    pending_event: u32
    error_code: u32
    flags: u32
    pad0: u32


HVM_HW_CPU: Final = Layout(hvm_hw_cpu)
