"""The first state of an HVM domain's vCPU 0 from its HVM context (XEN_DOMCTL_sethvmcontext): records of hvm/save.h.

Read: HEADER, the CPU record of instance 0, END. Records of other types (MTRR, local APIC ...) are skipped: their state is
that after reset. Contexts of running domains (migration) are not built: get_hvm_context is refused.
"""

from __future__ import annotations

from bus.abi.hvm import save
from bus.abi.hvm.save import HVM_HW_CPU, HVM_SAVE_DESCRIPTOR, HVM_SAVE_HEADER, TYPECODES, hvm_hw_cpu
from bus.abi.layout import LayoutError
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")
REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
)  # fmt: skip
FPU_INITIALISED = 1
PAGING = 1 << 31
RECORDS = 1024


class BadContext(ValueError):
    """What is wrong with an HVM context."""


def first_cpu(data: bytes) -> hvm_hw_cpu:
    """The CPU record of vCPU 0. BadContext."""
    position, found, headed = 0, None, False
    try:
        for _ in range(RECORDS):
            descriptor = HVM_SAVE_DESCRIPTOR.unpack(data, position)
            position += HVM_SAVE_DESCRIPTOR.size
            body = data[position : position + descriptor.length]
            if len(body) != descriptor.length:
                raise BadContext("a record is cut off")
            position += descriptor.length
            if descriptor.typecode == TYPECODES["END"]:
                break
            if descriptor.typecode == TYPECODES["HEADER"]:
                header = HVM_SAVE_HEADER.unpack(body)
                if header.magic != save.HVM_FILE_MAGIC or header.version != save.HVM_FILE_VERSION:
                    raise BadContext("not an HVM context of this version")
                headed = True
            elif descriptor.typecode == TYPECODES["CPU"] and descriptor.instance == 0:
                found = HVM_HW_CPU.unpack(body)
        else:
            raise BadContext("too many records")
    except LayoutError as error:
        raise BadContext(str(error)) from None
    if not headed or found is None:
        raise BadContext("no header, or no CPU record of vCPU 0")
    return found


def load_cpu(vcpu: UnicornHvmVcpu, cpu: hvm_hw_cpu) -> None:
    """Make it the state of the vCPU, which was reset. BadContext: paging with a mode that cannot be entered."""
    if cpu.cr0 & PAGING and not cpu.cr0 & 1:
        raise BadContext("CR0: paging without protection")
    regs = vcpu.regs
    regs.efer = cpu.msr_efer
    vcpu.set_control(4, cpu.cr4 & 0xFFFFFFFF)
    vcpu.set_control(3, cpu.cr3)
    vcpu.set_control(0, cpu.cr0 & 0xFFFFFFFF)
    for name in SEGMENTS:
        rights = getattr(cpu, f"{name}_arbytes")
        attributes = rights & 0xFF | (rights & 0xF00) << 4
        vcpu.load_segment(
            name,
            getattr(cpu, f"{name}_sel") & 0xFFFF,
            getattr(cpu, f"{name}_base"),
            getattr(cpu, f"{name}_limit"),
            attributes,
        )
    for name in REGISTERS:
        setattr(regs, name, getattr(cpu, name))
    regs.rflags = cpu.rflags | 2
    regs.gdtr_base, regs.gdtr_limit = cpu.gdtr_base, cpu.gdtr_limit
    regs.idtr_base, regs.idtr_limit = cpu.idtr_base, cpu.idtr_limit
    if cpu.flags & FPU_INITIALISED:
        vcpu.load_extended(cpu.fpu_regs)
