"""vCPU 0's first state as a `vcpu_guest_context`, the form in which XEN_DOMCTL_setvcpucontext takes it."""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, VGCF_in_kernel, VGCF_online, vcpu_guest_context
from bus.addresses import PAGE_SHIFT

from .pv import PvContext

_DR6_RESET: Final = 0xFFFF0FF0
_DR7_RESET: Final = 0x00000400


def guest_context(context: PvContext) -> vcpu_guest_context:
    """All registers, tables and callbacks that are not named in `context` are zero; the vCPU is online, in
    kernel mode."""
    empty = VCPU_GUEST_CONTEXT.unpack(bytes(VCPU_GUEST_CONTEXT.size))
    registers = empty.user_regs._replace(
        rip=context.rip,
        rsp=context.rsp,
        rsi=context.rsi,
        rflags=context.rflags,
        cs=context.cs,
        ss=context.ss,
    )
    control = list(empty.ctrlreg)
    control[3] = context.cr3 << PAGE_SHIFT
    debug = list(empty.debugreg)
    debug[6:8] = [_DR6_RESET, _DR7_RESET]
    return empty._replace(
        flags=VGCF_in_kernel | VGCF_online,
        user_regs=registers,
        kernel_ss=context.ss,
        kernel_sp=context.rsp,
        ctrlreg=tuple(control),
        debugreg=tuple(debug),
    )
