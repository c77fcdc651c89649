"""A domain that the toolstack made: its lines and files, what its process said of it, and xl's view of its state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Final

from bus.abi import domctl as dc
from bus.abi import sched
from bus.addresses import DomId, Port
from bus.messages.control import DomainConfig
from bus.packets import close_all
from domains.dom0.consoled import Console, SerialLine, Terminal
from domains.dom0.toolstack.models import DeviceModel

COUNTERS: Final = ("hypercalls", "exceptions", "events", "exits")
MAX_COUNTED: Final = 256
"""Names in one of a guest's counters: there are 64 hypercalls and 32 exceptions."""


class ToolstackError(Exception):
    """Told to the user: one line that names the thing, and the mend where there is one."""


@dataclass(slots=True)
class Guest:
    """A domain that this toolstack made."""

    domid: DomId
    config: DomainConfig
    files: dict[int, int]
    """Descriptors of its files, kept for a restart: index in the configuration -> descriptor."""
    console: Console
    uuid: bytes
    started: float = field(default_factory=time.monotonic)
    serial: SerialLine | None = None
    """Of a full HVM guest, also of one whose serial line is joined to nothing."""
    model: DeviceModel | None = None
    xenstore_port: Port | None = None
    ending: bool = False
    unfinished: tuple[str, str] | None = None
    """Its end (reason, details), begun: what is left of that is done at the next look."""
    finishing: bool = False
    """Its end is being seen to, and others are served meanwhile: who looks again has nothing to do."""
    counters: dict[str, Any] = field(default_factory=dict)
    """Its process's last words: what the guest did (not trusted: for show)."""

    @property
    def terminal(self) -> Terminal:
        """Its first console: of a full HVM guest the serial line, if it has one."""
        if self.serial is None or not self.config.serial:
            return self.console
        return self.serial

    def disconnect(self) -> None:
        """Its lines are joined to nothing any more."""
        self.console.disconnect()
        if self.serial is not None:
            self.serial.disconnect()

    def close(self) -> None:
        """Close its lines and files."""
        self.console.close()
        if self.serial is not None:
            self.serial.close()
        close_all(list(self.files.values()))


def counters_of(said: Any) -> dict[str, Any]:
    """A process's last words, as far as they are what they should be: numbers, or numbers by name."""
    out: dict[str, Any] = {}
    for name in COUNTERS if isinstance(said, dict) else ():
        value = said.get(name)
        by_name = value if isinstance(value, dict) and len(value) <= MAX_COUNTED else {"": None}
        if _is_count(value) or all(len(str(key)) <= 40 and _is_count(n) for key, n in by_name.items()):
            out[name] = value
    return out


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def state_of(info: dc.xen_domctl_getdomaininfo) -> str:
    """xl's state column: r b p s c d."""
    code = info.flags >> dc.XEN_DOMINF_shutdownshift & dc.XEN_DOMINF_shutdownmask
    shut = bool(info.flags & dc.XEN_DOMINF_shutdown)
    marks = (
        ("r", bool(info.flags & dc.XEN_DOMINF_running)),
        ("b", bool(info.flags & dc.XEN_DOMINF_blocked)),
        ("p", bool(info.flags & dc.XEN_DOMINF_paused)),
        ("s", shut and code != sched.SHUTDOWN_crash),
        ("c", shut and code == sched.SHUTDOWN_crash),
        ("d", bool(info.flags & dc.XEN_DOMINF_dying)),
    )
    return "".join(mark if holds else "-" for mark, holds in marks)
