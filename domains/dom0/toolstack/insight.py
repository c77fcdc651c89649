"""Looks into a guest that runs: what it has counted, and where its vCPUs are."""

from __future__ import annotations

from errno import EAGAIN, ENODATA
from typing import TYPE_CHECKING, Any, Final

from bus.abi.arch_x86 import VGCF_IN_KERNEL, vcpu_guest_context
from domains.dom0.toolstack.guest import COUNTERS, Guest, ToolstackError
from domains.native.domain import HypercallError

if TYPE_CHECKING:
    from domains.dom0.toolstack.manager import Manager

GENERAL: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
    "cs", "ss", "ds", "es", "fs", "gs",
)  # fmt: skip


def stats_of(guest: Guest) -> dict[str, Any]:
    """Counters of a domain for the record of a run. None: nobody counts that (yet); the command names it in `not_counted`."""
    return {
        "console_bytes": guest.terminal.bytes_out,
        **{name: guest.counters.get(name) for name in COUNTERS},
    }


def stats(manager: Manager, name: str | int, *, fresh: bool) -> dict[str, Any]:
    """The same of a guest by its name. `fresh`: as they are now, for which it is paused, and stays so: a guest's process tells its counters
    when it is paused and when it ends. ToolstackError."""
    guest = manager.find(name)
    if fresh:
        try:
            manager.xc.pause(guest.domid)
        except HypercallError as error:
            raise ToolstackError(f"domain {name}: its process does not answer ({error})") from None
    return stats_of(guest)


def registers(manager: Manager, name: str | int) -> list[dict[str, Any]]:
    """Registers of each vCPU that was started (XEN_DOMCTL_getvcpucontext), without stopping it for longer than that takes: numbers by
    name, and under `vcpu`, `state` and `mode` what they are of. ToolstackError."""
    guest = manager.find(name)
    rows = []
    for vcpu in range(guest.config.maxvcpus or guest.config.vcpus):
        try:
            context = manager.xc.vcpu_context(guest.domid, vcpu)
        except HypercallError as error:
            if error.errno == ENODATA:
                continue
            why = "its process does not answer" if error.errno == EAGAIN else str(error)
            raise ToolstackError(f"domain {name}, vCPU {vcpu}: {why}") from None
        info = manager.xc.vcpu_info(guest.domid, vcpu)
        state = "offline" if not info.online else "blocked" if info.blocked else "running"
        rows.append({"vcpu": vcpu, "state": state, **_row(context, pv=guest.config.type == "pv")})
    return rows


def _row(context: vcpu_guest_context, *, pv: bool) -> dict[str, Any]:
    user = context.user_regs
    kernel = bool(context.flags & VGCF_IN_KERNEL) if pv else user.cs & 3 == 0
    return {
        "mode": "kernel" if kernel else "user",
        **{name: getattr(user, name) for name in GENERAL},
        "fs_base": context.fs_base,
        "gs_base_kernel": context.gs_base_kernel,
        "gs_base_user": context.gs_base_user,
        "cr0": context.ctrlreg[0],
        "cr2": context.ctrlreg[2],
        "cr3": context.ctrlreg[1] if pv and not kernel else context.ctrlreg[3],
        "cr4": context.ctrlreg[4],
        **{f"dr{number}": context.debugreg[number] for number in (0, 1, 2, 3, 6, 7)},
    }
