"""Starting a vCPU from a vcpu_guest_context (VCPUOP_initialise, and vCPU 0 of a new domain), checked as Xen checks it."""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86 import (
    VGCF_I387_VALID,
    VGCF_IN_KERNEL,
    VGCF_failsafe_disables_events,
    VGCF_online,
    VGCF_syscall_disables_events,
    vcpu_guest_context,
)
from bus.abi.arch_x86_64 import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from bus.abi.errno import XEN_EINVAL
from bus.addresses import PAGE_MASK, PAGE_SHIFT, Mfn, VcpuId, canonical
from domains.pv.bounce import RFLAGS_IOPL
from domains.pv.calls_cpu import FIXED_CS, apply_assists, assists_valid
from domains.pv.cpu import Cpu
from domains.pv.debugreg import set_debugreg
from domains.pv.state import CR0_BASE, CR0_TS, CR4_BASE, CR4_GUEST_MASK, InitialRegisters, VcpuState

MAX_GDT_ENTRIES: Final = 16 * 512
MAX_LDT_ENTRIES: Final = 8192


def _check(context: vcpu_guest_context) -> bool:
    registers = context.user_regs
    addresses = [
        registers.rip, registers.rsp, context.kernel_sp, context.fs_base, context.gs_base_kernel, context.gs_base_user,
        context.event_callback_eip, context.syscall_callback_eip, context.failsafe_callback_eip, context.ldt_base,
    ]  # fmt: skip
    addresses += [trap.address for trap in context.trap_ctxt]
    if not all(canonical(address) for address in addresses):
        return False
    if context.debugreg[6] >> 32 or context.debugreg[7] >> 32:
        return False
    for address in context.debugreg[:4]:
        if not canonical(address) or HYPERVISOR_VIRT_START <= address < HYPERVISOR_VIRT_END:
            return False
    if (
        context.ldt_base & PAGE_MASK
        or context.ldt_ents > MAX_LDT_ENTRIES
        or context.gdt_ents > MAX_GDT_ENTRIES
    ):
        return False
    return bool(context.flags & VGCF_IN_KERNEL or context.ctrlreg[1])


def start_vcpu(cpu: Cpu, state: VcpuState, context: vcpu_guest_context, *, adopted: bool = False) -> int:
    """Set a vCPU up; it runs with these registers when its turn comes. 0, or a negative errno and nothing changed.

    `adopted`: the kernel root was taken already (`PagingApi.adopt_initial_tables`). An LDT in the context is refused with
    -EINVAL: it can be set by MMUEXT_SET_LDT once the vCPU runs.
    """
    if not _check(context) or context.ldt_ents:
        return -XEN_EINVAL
    if state.id == 0 and not assists_valid(context.vm_assist):
        return -XEN_EINVAL
    frames = tuple(context.gdt_frames[: -(-context.gdt_ents // 512)])
    vcpu = VcpuId(state.id)
    if context.gdt_ents:
        rc = cpu.mmu.install_gdt(vcpu, frames, context.gdt_ents)
        if rc:
            return rc
    root = Mfn(context.ctrlreg[3] >> PAGE_SHIFT)
    user = Mfn(context.ctrlreg[1] >> PAGE_SHIFT) if context.ctrlreg[1] else None
    rc = 0 if adopted else cpu.mmu.take_root(root)
    if rc == 0 and user is not None:
        rc = cpu.mmu.take_root(user)
        if rc and not adopted:
            cpu.mmu.drop_root(root)
    if rc:
        cpu.mmu.destroy_vcpu(vcpu)
        return rc
    state.kernel_root, state.user_root = root, user
    state.gdt_frames, state.gdt_entries = frames, context.gdt_ents
    _fill(state, context)
    if state.id == 0:
        cpu.assists = context.vm_assist
        apply_assists(cpu)
    state.initialised = True
    state.online = bool(context.flags & VGCF_online)
    return 0


def _fill(state: VcpuState, context: vcpu_guest_context) -> None:
    flags = context.flags
    state.kernel_mode = bool(flags & VGCF_IN_KERNEL)
    state.failsafe_masks = bool(flags & VGCF_failsafe_disables_events)
    state.syscall_masks = bool(flags & VGCF_syscall_disables_events)
    for vector, trap in enumerate(context.trap_ctxt):
        state.trap_address[vector] = trap.address
        state.trap_flags[vector] = trap.flags
        state.trap_cs[vector] = trap.cs | FIXED_CS
    state.kernel_ss = context.kernel_ss | FIXED_CS
    state.kernel_sp = context.kernel_sp
    state.event_callback = context.event_callback_eip
    state.failsafe_callback = context.failsafe_callback_eip
    state.syscall_callback = context.syscall_callback_eip
    state.cr0 = CR0_BASE | context.ctrlreg[0] & CR0_TS
    state.cr4 = CR4_BASE | context.ctrlreg[4] & CR4_GUEST_MASK
    registers = context.user_regs
    state.iopl = registers.rflags & RFLAGS_IOPL
    for number in (0, 1, 2, 3, 6, 7):
        set_debugreg(state, number, context.debugreg[number])
    state.initial = InitialRegisters(
        gpr=(
            registers.rax, registers.rcx, registers.rdx, registers.rbx, registers.rsp, registers.rbp, registers.rsi,
            registers.rdi, registers.r8, registers.r9, registers.r10, registers.r11, registers.r12, registers.r13,
            registers.r14, registers.r15,
        ),
        rip=registers.rip,
        rflags=registers.rflags,
        cs=registers.cs | FIXED_CS,
        ss=registers.ss | FIXED_CS,
        ds=registers.ds,
        es=registers.es,
        fs=registers.fs,
        gs=registers.gs,
        fs_base=context.fs_base,
        gs_base_kernel=context.gs_base_kernel,
        gs_base_user=context.gs_base_user,
        extended=context.fpu_ctxt.x if flags & VGCF_I387_VALID else None,
    )  # fmt: skip
