"""The state of a vCPU as a vcpu_guest_context (XEN_DOMCTL_getvcpucontext), as Xen's arch_get_info_guest gives it. Nothing is touched: the
vCPU that is asked for may be one that waits for its turn."""

from __future__ import annotations

from typing import Final, Protocol

from bus.abi.arch_x86 import (
    VCPU_GUEST_CONTEXT,
    VGCF_I387_VALID,
    VGCF_IN_KERNEL,
    VGCF_failsafe_disables_events,
    VGCF_online,
    VGCF_syscall_disables_events,
    trap_info,
    vcpu_guest_context,
    vcpu_guest_context_fpu_ctxt,
)
from bus.addresses import PAGE_SHIFT, VcpuId
from domains.pv.cpu import Cpu
from domains.pv.state import InitialRegisters, VcpuState
from domains.vcpu.api import Registers
from domains.vcpu.context_reader import ContextReader

GPRS: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""In the processor's numbering."""
SELECTORS: Final = ("cs", "ss", "ds", "es", "fs", "gs")


class _Readable(Protocol):
    """A vCPU, or the reader that holds the state of one."""

    @property
    def regs(self) -> Registers:
        """General registers, segment bases."""

    def save_extended(self) -> bytes:
        """FXSAVE image."""


class Capture:
    """For one domain: makes its reader of put-away states when it is first needed."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._reader: ContextReader | None = None

    def context(self, state: VcpuState) -> vcpu_guest_context:
        """Of a vCPU that was initialised, between two runs of the vCPU."""
        if state.initial is not None:
            return self._from_initial(state, state.initial)
        if state.context is None:  # it is the current one
            return self._from_vcpu(state, self._cpu.vcpu)
        if self._reader is None:
            self._reader = ContextReader()
        with self._reader.holding(state.context) as held:
            return self._from_vcpu(state, held)

    def _from_initial(self, state: VcpuState, initial: InitialRegisters) -> vcpu_guest_context:
        registers = dict(zip(GPRS, initial.gpr, strict=True))
        registers |= {name: getattr(initial, name) for name in (*SELECTORS, "rip", "rflags")}
        kernel, user = initial.gs_base_kernel, initial.gs_base_user
        return self._made(state, registers, initial.fs_base, kernel, user, initial.extended)

    def _from_vcpu(self, state: VcpuState, vcpu: _Readable) -> vcpu_guest_context:
        regs = vcpu.regs
        registers = {name: int(getattr(regs, name)) for name in (*GPRS, *SELECTORS, "rip", "rflags")}
        kernel, user = regs.gs_base, regs.kernel_gs_base
        if not state.kernel_mode:
            kernel, user = user, kernel
        return self._made(state, registers, regs.fs_base, kernel, user, vcpu.save_extended())

    def _made(
        self,
        state: VcpuState,
        registers: dict[str, int],
        fs_base: int,
        gs_kernel: int,
        gs_user: int,
        extended: bytes | None,
    ) -> vcpu_guest_context:
        mmu, vcpu = self._cpu.mmu, VcpuId(state.id)
        flags = VGCF_IN_KERNEL * state.kernel_mode | VGCF_online * state.online
        flags |= VGCF_failsafe_disables_events * state.failsafe_masks
        flags |= VGCF_syscall_disables_events * state.syscall_masks
        flags |= VGCF_I387_VALID * (extended is not None)
        registers["rflags"] |= state.iopl
        empty = VCPU_GUEST_CONTEXT.zero()
        entries = mmu.ldt_entries(vcpu)
        frames = tuple(state.gdt_frames)
        traps = zip(state.trap_flags, state.trap_cs, state.trap_address, strict=True)
        return empty._replace(
            fpu_ctxt=vcpu_guest_context_fpu_ctxt(extended) if extended is not None else empty.fpu_ctxt,
            flags=flags,
            user_regs=empty.user_regs._replace(**registers),  # type: ignore[arg-type]  # no arrays are among them
            trap_ctxt=tuple(trap_info(vector, *trap) for vector, trap in enumerate(traps)),
            ldt_base=mmu.ldt_address(vcpu) if entries else 0,
            ldt_ents=entries,
            gdt_frames=frames + (0,) * (len(empty.gdt_frames) - len(frames)),
            gdt_ents=state.gdt_entries,
            kernel_ss=state.kernel_ss,
            kernel_sp=state.kernel_sp,
            ctrlreg=(
                state.cr0,
                (state.user_root or 0) << PAGE_SHIFT,
                state.cr2,
                state.kernel_root << PAGE_SHIFT,
                state.cr4,
                0,
                0,
                0,
            ),
            debugreg=(*state.dr, 0, 0, state.dr6, state.dr7 | state.dr7_io),
            event_callback_eip=state.event_callback,
            failsafe_callback_eip=state.failsafe_callback,
            syscall_callback_eip=state.syscall_callback,
            vm_assist=self._cpu.assists,
            fs_base=fs_base,
            gs_base_kernel=gs_kernel,
            gs_base_user=gs_user,
        )
