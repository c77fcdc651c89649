"""64-bit x86: segments, address ranges, iret frame, user registers (arch-x86/xen-x86_64.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Bytes, Layout, u8, u16, u32, u64

FLAT_RING3_CS32: Final = 0xE023
FLAT_RING3_CS64: Final = 0xE033
FLAT_RING3_DS32: Final = 0xE02B
FLAT_RING3_DS64: Final = 0x0000
FLAT_RING3_SS32: Final = 0xE02B
FLAT_RING3_SS64: Final = 0xE02B
FLAT_KERNEL_DS64: Final = FLAT_RING3_DS64
FLAT_KERNEL_DS32: Final = FLAT_RING3_DS32
FLAT_KERNEL_DS: Final = FLAT_KERNEL_DS64
FLAT_KERNEL_CS64: Final = FLAT_RING3_CS64
FLAT_KERNEL_CS32: Final = FLAT_RING3_CS32
FLAT_KERNEL_CS: Final = FLAT_KERNEL_CS64
FLAT_KERNEL_SS64: Final = FLAT_RING3_SS64
FLAT_KERNEL_SS32: Final = FLAT_RING3_SS32
FLAT_KERNEL_SS: Final = FLAT_KERNEL_SS64
FLAT_USER_DS64: Final = FLAT_RING3_DS64
FLAT_USER_DS32: Final = FLAT_RING3_DS32
FLAT_USER_DS: Final = FLAT_USER_DS64
FLAT_USER_CS64: Final = FLAT_RING3_CS64
FLAT_USER_CS32: Final = FLAT_RING3_CS32
FLAT_USER_CS: Final = FLAT_USER_CS64
FLAT_USER_SS64: Final = FLAT_RING3_SS64
FLAT_USER_SS32: Final = FLAT_RING3_SS32
FLAT_USER_SS: Final = FLAT_USER_SS64

HYPERVISOR_VIRT_START: Final = 0xFFFF800000000000
HYPERVISOR_VIRT_END: Final = 0xFFFF880000000000

MACH2PHYS_VIRT_START: Final = 0xFFFF800000000000
MACH2PHYS_VIRT_END: Final = 0xFFFF804000000000
MACH2PHYS_NR_ENTRIES: Final = (MACH2PHYS_VIRT_END - MACH2PHYS_VIRT_START) >> 3

SEGBASE_FS: Final = 0
SEGBASE_GS_USER: Final = 1
SEGBASE_GS_KERNEL: Final = 2
SEGBASE_GS_USER_SEL: Final = 3

VGCF_in_syscall: Final = 256
VGCF_IN_SYSCALL: Final = VGCF_in_syscall


class iret_context(NamedTuple):
    """The frame that HYPERVISOR_iret finds at the guest's RSP."""

    rax: u64
    r11: u64
    rcx: u64
    flags: u64
    rip: u64
    cs: u64
    rflags: u64
    rsp: u64
    ss: u64


IRET_CONTEXT: Final = Layout(iret_context)


class cpu_user_regs(NamedTuple):
    """Registers as Xen keeps them. `entry_vector` and `error_code` are of the last entry; cs to gs are
    selectors."""

    r15: u64
    r14: u64
    r13: u64
    r12: u64
    rbp: u64
    rbx: u64
    r11: u64
    r10: u64
    r9: u64
    r8: u64
    rax: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    error_code: u32
    entry_vector: u32
    rip: u64
    cs: u16
    pad0: Annotated[tuple[int, ...], Array(u16, 1)]
    saved_upcall_mask: u8
    pad1: Annotated[bytes, Bytes(3)]
    rflags: u64
    rsp: u64
    ss: u16
    pad2: Annotated[tuple[int, ...], Array(u16, 3)]
    es: u16
    pad3: Annotated[tuple[int, ...], Array(u16, 3)]
    ds: u16
    pad4: Annotated[tuple[int, ...], Array(u16, 3)]
    fs: u16
    pad5: Annotated[tuple[int, ...], Array(u16, 3)]
    gs: u16
    pad6: Annotated[tuple[int, ...], Array(u16, 3)]


CPU_USER_REGS: Final = Layout(
    cpu_user_regs,
    c_fields={
        "pad0": "_pad0",
        "pad1": "_pad1",
        "pad2": "_pad2",
        "pad3": "_pad3",
        "pad4": "_pad4",
        "pad5": "_pad5",
        "pad6": "_pad6",
    },
)


class arch_vcpu_info(NamedTuple):
    """cr2: the faulting address of the last page fault, written by Xen."""

    cr2: u64
    pad: u64


ARCH_VCPU_INFO: Final = Layout(arch_vcpu_info)
