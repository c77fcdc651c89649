"""What is changed of a running guest: memory target, vCPUs, name; keys and triggers sent to it. As libxl does it.

Sources: xenstore-paths (memory/target, cpu/N/availability, control/sysrq), domctl.h (XEN_DOMCTL_sendtrigger, _max_mem), and libxl's
order of checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bus.abi import domctl as dc
from domains.dom0.toolstack.guest import Guest, ToolstackError
from domains.dom0.toolstack.pvh import slack_kib

if TYPE_CHECKING:
    from domains.dom0.toolstack.manager import Manager

TRIGGERS: Final = {
    "nmi": dc.XEN_DOMCTL_SENDTRIGGER_NMI,
    "reset": dc.XEN_DOMCTL_SENDTRIGGER_RESET,
    "init": dc.XEN_DOMCTL_SENDTRIGGER_INIT,
    "power": dc.XEN_DOMCTL_SENDTRIGGER_POWER,
    "sleep": dc.XEN_DOMCTL_SENDTRIGGER_SLEEP,
}
MIN_KIB: Final = 1024


class Adjustments:
    """Of the guests of one manager. All raise ToolstackError."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def set_memory(self, name: str | int, kib: int) -> int:
        """The memory that the guest's balloon is to come to (memory/target), and with it the most that it may own. The old target in
        KiB."""
        guest = self._manager.find(name)
        base = f"/local/domain/{guest.domid}/memory"
        most = self._number(f"{base}/static-max")
        if kib < MIN_KIB or kib > most:
            raise ToolstackError(
                f"mem-set {name}: {kib} KiB: between {MIN_KIB} KiB and the {most} KiB that it was created for (maxmem= in its file)"
            )
        before = self._number(f"{base}/target")
        self._limit(guest, kib)
        self._manager.store.write(f"{base}/target", str(kib))
        return before

    def limit_memory(self, name: str | int, kib: int) -> None:
        """The most that the guest may own; not below its target."""
        guest = self._manager.find(name)
        base = f"/local/domain/{guest.domid}/memory"
        target, most = self._number(f"{base}/target"), self._number(f"{base}/static-max")
        if kib < target or kib > most:
            raise ToolstackError(
                f"mem-max {name}: {kib} KiB: between its target of {target} KiB (mem-set) and the {most} KiB that it was created for"
            )
        self._limit(guest, kib)

    def _limit(self, guest: Guest, kib: int) -> None:
        """The hypervisor's limit is libxl's: a MiB above the user's."""
        config = guest.config
        extra = slack_kib(config.maxvcpus or config.vcpus, pv=config.type == "pv")
        self._manager.xc.max_mem(guest.domid, kib + extra)

    def set_vcpus(self, name: str | int, count: int) -> int:
        """How many vCPUs are to be online (cpu/N/availability); the guest's kernel does it. How many there can be."""
        guest = self._manager.find(name)
        most = guest.config.maxvcpus or guest.config.vcpus
        if guest.model is not None:
            raise ToolstackError(
                f"vcpu-set {name}: a full HVM guest is told of vCPUs by ACPI, which is not built: give vcpus= in its file"
            )
        if not 1 <= count <= most:
            raise ToolstackError(
                f"vcpu-set {name}: {count} vCPUs: from 1 to the {most} that it was created with (maxvcpus= in its file)"
            )
        for vcpu in range(most):
            state = "online" if vcpu < count else "offline"
            self._manager.store.write(f"/local/domain/{guest.domid}/cpu/{vcpu}/availability", state)
        return most

    def sysrq(self, name: str | int, key: str) -> None:
        """A "magic" key for a guest's kernel (control/sysrq)."""
        guest = self._manager.find(name)
        if len(key) != 1 or not key.isascii() or not key.isprintable():
            raise ToolstackError(f"sysrq {name}: {key!r}: one character, such as h for Linux's help")
        self._manager.store.write(f"/local/domain/{guest.domid}/control/sysrq", key)

    def trigger(self, name: str | int, what: str, vcpu: int) -> None:
        """An NMI for a vCPU; a full HVM guest's power button."""
        guest = self._manager.find(name)
        code = TRIGGERS.get(what)
        if code is None:
            raise ToolstackError(f"trigger {name}: {what!r}: there are {', '.join(TRIGGERS)}")
        if what != "nmi" and (what != "power" or guest.model is None):
            raise ToolstackError(
                f"trigger {name}: {what} is not built for {'full HVM' if guest.model is not None else guest.config.type.upper()} guests:"
                f" {'nmi and power are' if guest.model is not None else 'nmi is'}"
            )
        if vcpu >= (guest.config.maxvcpus or guest.config.vcpus):
            raise ToolstackError(f"trigger {name}: it has no vCPU {vcpu}")
        self._manager.xc.trigger(guest.domid, code, vcpu)

    def rename(self, name: str | int, new: str) -> None:
        """Another name, in the toolstack and in the store."""
        manager = self._manager
        guest = manager.find(name)
        if any(other.config.name == new and other is not guest for other in manager.guests.values()):
            raise ToolstackError(f"rename {name}: a domain {new!r} exists already")
        try:
            config = type(guest.config).model_validate({**guest.config.model_dump(), "name": new})
        except ValueError:
            raise ToolstackError(
                f"rename {name}: {new!r}: letters, digits and _.+- alone, at most 64"
            ) from None
        guest.config = config
        guest.console.name = new
        if guest.serial is not None:
            guest.serial.name = new
        base = f"/local/domain/{guest.domid}"
        manager.store.write(f"{base}/name", new)
        vm = manager.store.read(f"{base}/vm")
        if vm:
            manager.store.write(f"{vm}/name", new)

    def _number(self, path: str) -> int:
        text = self._manager.store.read(path)
        if text is None or not text.isdigit():
            raise ToolstackError(f"{path}: {text!r} in xenstore is no number of KiB")
        return int(text)


def as_number(args: dict[str, object], key: str, default: int | None = None) -> int:
    """A number of a request's arguments. ToolstackError, KeyError."""
    value = args[key] if default is None else args.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ToolstackError(f"{key} must be a number")
    return value
