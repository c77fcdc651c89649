"""The one table of hypercalls: number, commands, arguments, who may call, errors, where served, wire form,
state.

The dispatchers of the domain process and of the hypervisor, docs/abi.md and the fuzzers are derived from
it. The entries are in `hypercalls_cpu`, `hypercalls_shared`, `hypercalls_control` and `hypercalls_domctl`,
by subject; the types, and the wire codec (`encode`, `decode`), in `hypercalls_model`.

A dispatcher of the hypervisor goes through an entry in this order: `lookup` (none: `Hypercall.unknown`, or
-ENOSYS), the kind of guest (-ENOSYS), the privilege (-EPERM; for domctl, sysctl and platform_op after the
interface version, -EACCES, and the domain, -ESRCH), the refusal, the wire form (-EINVAL), and then the call
itself.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from bus.abi import errno, xen
from bus.abi.hypercalls_control import CONTROL_HYPERCALLS
from bus.abi.hypercalls_cpu import CPU_HYPERCALLS, FAULT
from bus.abi.hypercalls_domctl import DOMCTL
from bus.abi.hypercalls_model import (
    ArrayArg,
    Command,
    Direction,
    Error,
    Form,
    Guests,
    Hypercall,
    Message,
    Privilege,
    State,
    Where,
    WireError,
    check_counts,
    decode,
    encode,
)
from bus.abi.hypercalls_shared import SHARED_HYPERCALLS

__all__ = [
    "HYPERCALLS",
    "NR_HYPERCALLS",
    "ArrayArg",
    "Caller",
    "Command",
    "Direction",
    "Error",
    "Form",
    "Guests",
    "Hypercall",
    "Message",
    "Privilege",
    "State",
    "Where",
    "WireError",
    "check_counts",
    "decode",
    "encode",
    "lookup",
    "names",
    "verdict",
]

NR_HYPERCALLS: Final = 64


def _compat(number: int, name: str, arguments: str, note: str) -> Hypercall:
    """A hypercall of Xen before 3.0.2 that the domain's process turns into the present one."""
    command = Command(
        number=0,
        name=name,
        where=Where.LOCAL,
        guests=Guests.PV,
        errors=(FAULT,),
        note=note,
        state=State.SERVED,
    )
    return Hypercall(
        number=number, name=name, arguments=tuple(arguments.split()), commands=(command,), note=note
    )


def _absent(
    number: int, name: str, refusal: int, note: str, privilege: Privilege = Privilege.ANY
) -> Hypercall:
    """A hypercall that is refused whatever its arguments are."""
    command = Command(
        number=0,
        name=name,
        where=Where.LOCAL,
        state=State.REFUSED,
        refusal=refusal,
        privilege=privilege,
        note=note,
    )
    return Hypercall(number=number, name=name, commands=(command,), unknown=refusal, note=note)


_REST: Final = (
    _compat(
        xen.HYPERVISOR_sched_op_compat,
        "sched_op_compat",
        "cmd arg",
        "becomes sched_op: yield, block, and shutdown with the reason as argument; others -ENOSYS",
    ),
    _compat(
        xen.HYPERVISOR_event_channel_op_compat,
        "event_channel_op_compat",
        "op",
        "becomes event_channel_op: `cmd` and the structure come from one evtchn_op",
    ),
    _compat(
        xen.HYPERVISOR_physdev_op_compat,
        "physdev_op_compat",
        "op",
        "becomes physdev_op: `cmd` and the structure come from one physdev_op",
    ),
    _absent(xen.HYPERVISOR_xsm_op, "xsm_op", errno.XEN_ENOSYS, "built without a security module's policy"),
    _absent(xen.HYPERVISOR_xenoprof_op, "xenoprof_op", errno.XEN_ENOSYS, "built without Xenoprof"),
    _absent(xen.HYPERVISOR_kexec_op, "kexec_op", errno.XEN_ENOSYS, "no kexec of the host", Privilege.CONTROL),
    _absent(xen.HYPERVISOR_tmem_op, "tmem_op", errno.XEN_ENOSYS, "gone since Xen 4.13"),
    _absent(xen.HYPERVISOR_argo_op, "argo_op", errno.XEN_ENOSYS, "built without Argo"),
    _absent(xen.HYPERVISOR_xenpmu_op, "xenpmu_op", errno.XEN_EOPNOTSUPP, "no virtual performance counters"),
    _absent(xen.HYPERVISOR_hypfs_op, "hypfs_op", errno.XEN_ENOSYS, "built without hypfs", Privilege.CONTROL),
    _absent(
        xen.HYPERVISOR_arch_0,
        "mca",
        errno.XEN_ENOSYS,
        "arch_0: no machine check of a real CPU",
        Privilege.CONTROL,
    ),
    _absent(
        xen.HYPERVISOR_arch_1,
        "paging_domctl_cont",
        errno.XEN_ENOSYS,
        "arch_1: inside Xen only, to go on with a shadow_op",
    ),
    *(
        _absent(getattr(xen, f"HYPERVISOR_arch_{n}"), f"arch_{n}", errno.XEN_ENOSYS, "unused on x86")
        for n in range(2, 8)
    ),
)

_NAMED: Final = {
    h.number: h for h in (*CPU_HYPERCALLS, *SHARED_HYPERCALLS, *CONTROL_HYPERCALLS, DOMCTL, *_REST)
}

HYPERCALLS: Final[Mapping[int, Hypercall]] = {
    number: _NAMED.get(number)
    or _absent(number, f"unassigned_{number}", errno.XEN_ENOSYS, "no hypercall has this number")
    for number in range(NR_HYPERCALLS)
}
"""All 64 numbers."""

_COMMANDS: Final = {(h.number, c.number): c for h in HYPERCALLS.values() for c in h.commands}


def lookup(number: int, command: int) -> Command | None:
    """The entry of a hypercall's sub-command (0 for one without). None if there is no such sub-command or
    number.

    The command of memory_op is masked to its low six bits, as Xen does.
    """
    if number == xen.HYPERVISOR_memory_op:
        command &= 0x3F
    return _COMMANDS.get((number, command))


class Caller(NamedTuple):
    """What the dispatcher knows of the caller, for `verdict`."""

    kind: Guests
    """One flag."""
    is_control: bool
    """It is the control domain."""
    has_device: bool = False
    """It owns a PCI device."""
    is_device_model: bool = False
    """It is the device model of some domain; whether of the target, the call itself checks."""


def verdict(caller: Caller, number: int, command: int) -> int:
    """0 if the call may go on, else the negative errno that ends it.

    TARGET and DEVICE_MODEL depend on the target domain, which only the call itself knows: they pass here,
    except that DEVICE_MODEL needs a caller who can be one. The interface version of domctl, sysctl and
    platform_op, and the existence of their domain, come before (see the module's docstring).
    """
    entry = lookup(number, command)
    if entry is None:
        hypercall = HYPERCALLS.get(number)
        return -((hypercall.unknown if hypercall else 0) or errno.XEN_ENOSYS)
    if caller.kind not in entry.guests:
        return -errno.XEN_ENOSYS
    if not caller.is_control:
        if entry.privilege is Privilege.CONTROL:
            return -errno.XEN_EPERM
        if entry.privilege is Privilege.PIRQ and not caller.has_device and caller.kind is not Guests.PV:
            return -errno.XEN_ENOSYS
        if entry.privilege is Privilege.HARDWARE and not caller.has_device:
            absent = number == xen.HYPERVISOR_physdev_op and caller.kind is not Guests.PV
            return -(errno.XEN_ENOSYS if absent else errno.XEN_EPERM)
        if entry.privilege is Privilege.DEVICE_MODEL and not caller.is_device_model:
            return -errno.XEN_EPERM
    return -entry.refusal


def names() -> Mapping[int, str]:
    """The name of each number, for statistics."""
    return {number: hypercall.name for number, hypercall in HYPERCALLS.items()}
