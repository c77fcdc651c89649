"""HVM contexts: records of hvm/save.h.

XEN_DOMCTL_sethvmcontext gives vCPU 0 its first state. Read: HEADER, the CPU record of instance 0, END; records of other types
(MTRR, local APIC ...) are skipped: their state is that after reset. XEN_DOMCTL_gethvmcontext shows the registers of every vCPU
that was started, and nothing else: it is for those who look at a guest, not for migration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bus.abi.arch_x86 import (
    VCPU_GUEST_CONTEXT,
    VGCF_I387_VALID,
    VGCF_online,
    vcpu_guest_context,
    vcpu_guest_context_fpu_ctxt,
)
from bus.abi.hvm import save
from bus.abi.hvm.save import HVM_HW_CPU, HVM_SAVE_DESCRIPTOR, HVM_SAVE_HEADER, TYPECODES, hvm_hw_cpu
from bus.abi.layout import LayoutError
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.state import EnvRegisters

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
    regs.cr2, regs.kernel_gs_base, regs.tsc_aux = cpu.cr2, cpu.shadow_gs, cpu.msr_tsc_aux
    regs.star, regs.lstar, regs.fmask = cpu.msr_star, cpu.msr_lstar, cpu.msr_syscall_mask
    regs.sysenter_cs, regs.sysenter_esp, regs.sysenter_eip = (
        cpu.sysenter_cs & 0xFFFFFFFF,
        cpu.sysenter_esp,
        cpu.sysenter_eip,
    )
    regs.gdtr_base, regs.gdtr_limit = cpu.gdtr_base, cpu.gdtr_limit
    regs.idtr_base, regs.idtr_limit = cpu.idtr_base, cpu.idtr_limit
    if cpu.flags & FPU_INITIALISED:
        vcpu.load_extended(cpu.fpu_regs)


class Readable(Protocol):
    """A vCPU's state: the vCPU, or a context of it that is held by a reader."""

    @property
    def regs(self) -> EnvRegisters:
        """General registers, control registers, MSRs."""

    def save_extended(self) -> bytes:
        """x87 and SSE, as FXSAVE64 has them."""

    def debug_registers(self) -> tuple[int, ...]:
        """DR0 to DR3, DR6, DR7."""


def save_cpu(vcpu: Readable, tsc: int) -> hvm_hw_cpu:
    """The state of the vCPU as a CPU record, with that time stamp counter."""
    regs = vcpu.regs
    fields: dict[str, int] = {name: getattr(regs, name) for name in REGISTERS}
    for name in SEGMENTS:
        segment = regs.segment(name)
        fields[f"{name}_sel"], fields[f"{name}_base"] = segment.selector, segment.base
        fields[f"{name}_limit"] = segment.limit
        fields[f"{name}_arbytes"] = segment.attributes & 0xFF | segment.attributes >> 4 & 0xF00
    for register, value in zip((0, 1, 2, 3, 6, 7), vcpu.debug_registers(), strict=True):
        fields[f"dr{register}"] = value
    return HVM_HW_CPU.zero()._replace(
        fpu_regs=vcpu.save_extended(),
        rflags=regs.rflags,
        cr0=regs.cr0,
        cr2=regs.cr2,
        cr3=regs.cr3,
        cr4=regs.cr4,
        idtr_base=regs.idtr_base,
        idtr_limit=regs.idtr_limit,
        gdtr_base=regs.gdtr_base,
        gdtr_limit=regs.gdtr_limit,
        sysenter_cs=regs.sysenter_cs,
        sysenter_esp=regs.sysenter_esp,
        sysenter_eip=regs.sysenter_eip,
        shadow_gs=regs.kernel_gs_base,
        msr_lstar=regs.lstar,
        msr_star=regs.star,
        msr_syscall_mask=regs.fmask,
        msr_efer=regs.efer,
        msr_tsc_aux=regs.tsc_aux,
        tsc=tsc,
        flags=FPU_INITIALISED,
        **fields,
    )


def as_vcpu_context(cpu: hvm_hw_cpu, *, online: bool) -> vcpu_guest_context:
    """What a vcpu_guest_context has room for, as Xen fills it for an HVM domain: registers, selectors, bases, control and debug
    registers, x87 and SSE."""
    empty = VCPU_GUEST_CONTEXT.zero()
    registers = {name: getattr(cpu, name) for name in REGISTERS}
    selectors = {name: getattr(cpu, f"{name}_sel") for name in ("cs", "ss", "ds", "es", "fs", "gs")}
    return empty._replace(
        fpu_ctxt=vcpu_guest_context_fpu_ctxt(bytes(cpu.fpu_regs)),
        flags=VGCF_I387_VALID | VGCF_online * online,
        user_regs=empty.user_regs._replace(rflags=cpu.rflags, **registers, **selectors),
        ctrlreg=(cpu.cr0, 0, cpu.cr2, cpu.cr3, cpu.cr4, 0, 0, 0),
        debugreg=(cpu.dr0, cpu.dr1, cpu.dr2, cpu.dr3, 0, 0, cpu.dr6, cpu.dr7),
        fs_base=cpu.fs_base,
        gs_base_kernel=cpu.gs_base,
        gs_base_user=cpu.shadow_gs,
    )


def record(kind: str, instance: int, body: bytes) -> bytes:
    """A record with its descriptor."""
    return HVM_SAVE_DESCRIPTOR.pack(save.hvm_save_descriptor(TYPECODES[kind], instance, len(body))) + body


def context_of(cpus: Iterable[tuple[int, hvm_hw_cpu]], signature: int, khz: int) -> bytes:
    """A whole context of CPU records by vCPU number. `signature`: CPUID leaf 1, EAX."""
    header = save.hvm_save_header(save.HVM_FILE_MAGIC, save.HVM_FILE_VERSION, 0, signature, khz)
    records = [record("HEADER", 0, HVM_SAVE_HEADER.pack(header))]
    records += [record("CPU", number, HVM_HW_CPU.pack(cpu)) for number, cpu in cpus]
    return b"".join((*records, record("END", 0, b"")))
