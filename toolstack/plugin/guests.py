"""What the fixtures give: a machine, its guests, their consoles, and disks."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from toolstack.cli.images import Images, make_config, name_of
from toolstack.errors import MachineError
from toolstack.machine import Machine
from toolstack.plugin.network import BRIDGE, Network
from toolstack.xlcfg.devices import parse_vif

if TYPE_CHECKING:
    from toolstack.faults import Faults

TIMEOUT_S: Final = 60.0
"""Of `expect` and `wait_end` where nothing else is asked for."""
TAIL: Final = 2000
"""Characters of the console in a failure."""
MAX_TEXT: Final = 16 << 20
"""Characters of a console that are kept; what is older is cut off."""
ESCAPES: Final = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Za-z0-9]|[=>78])")


class ConsoleFailure(AssertionError):
    """What was expected did not come. The text has the pattern, why the wait ended, and the console's tail."""


class Console:
    """A guest's console, as an expect-like object."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.raw = ""
        """All output so far (at most MAX_TEXT), one character a byte, with terminal escapes."""
        self._seen = 0
        self.match: re.Match[str] | None = None
        """Of the last `expect`."""

    @property
    def text(self) -> str:
        """All output so far, without terminal escapes and carriage returns."""
        return ESCAPES.sub("", self.raw).replace("\r", "")

    @property
    def tail(self) -> str:
        """The end of `text`, for failures."""
        return self.text[-TAIL:]

    def feed(self, data: bytes) -> None:
        """Output has come."""
        self.raw += data.decode("latin1")
        cut = len(self.raw) - MAX_TEXT
        if cut > 0:
            self.raw = self.raw[cut:]
            self._seen = max(0, self._seen - cut)

    def expect(self, pattern: str | re.Pattern[str], timeout: float = TIMEOUT_S) -> re.Match[str]:
        """Wait for a regular expression in what came since the last `expect`; what follows the match is kept for the next one.

        Matched against the text without terminal escapes. ConsoleFailure after `timeout` seconds, or if the guest ends before.
        """
        compiled = re.compile(pattern) if isinstance(pattern, str) else pattern
        deadline = time.monotonic() + timeout
        while True:
            text = self.text
            # `text` only grows, but for an escape whose end is still to come: its start stands there until then.
            found = compiled.search(text, min(self._seen, len(text)))
            if found is not None:
                self._seen, self.match = found.end(), found
                return found
            left = deadline - time.monotonic()
            if self._domain.ended is not None or left <= 0:
                how = f"nothing like it within {timeout:g} s"
                if self._domain.ended is not None:
                    how = f"the guest ended: {self._domain.ended}"
                raise ConsoleFailure(
                    f"{self._domain.name}: expected {compiled.pattern!r}: {how}\n{self._report()}"
                )
            self._domain.machine.poll(min(left, 0.5))

    def send(self, text: str | bytes) -> None:
        """Type. A terminal's Enter is `\\r`. MachineError if the guest has ended."""
        data = text.encode() if isinstance(text, str) else text
        self._domain.machine.request("type", {"domain": self._domain.name, "data": data})

    def sendline(self, text: str = "", end: str = "\r") -> None:
        """Type a line."""
        self.send(text + end)

    def _report(self) -> str:
        parts = [f"--- the end of {self._domain.name}'s console ---", self.tail or "(it printed nothing)"]
        if self._domain.details:
            parts += ["--- details ---", self._domain.details[-TAIL:]]
        return "\n".join(parts)


@dataclass(eq=False)
class Domain:
    """A guest that was started."""

    machine: GuestMachine
    name: str
    domid: int = -1
    type: str = "pv"
    ended: str | None = None
    """Why it ended: poweroff, reboot, crash, watchdog, destroyed ...; None while it runs."""
    details: str = ""
    """What the hypervisor says about a crash: registers, stack."""
    reboots: int = 0
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        self.console = Console(self)

    @property
    def running(self) -> bool:
        """It has not ended."""
        self.machine.drain()
        return self.ended is None

    def wait_end(self, timeout: float = TIMEOUT_S) -> str:
        """The reason for which it ended. ConsoleFailure if it does not."""
        deadline = time.monotonic() + timeout
        while self.ended is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConsoleFailure(f"{self.name}: still runs after {timeout:g} s\n{self.console._report()}")
            self.machine.poll(min(left, 0.5))
        return self.ended

    def shutdown(self) -> None:
        """Ask the guest to power off, by control/shutdown in xenstore."""
        self.machine.request("shutdown", {"domain": self.name})

    def pause(self) -> None:
        """Stop its vCPUs."""
        self.machine.request("pause", {"domain": self.name})

    def unpause(self) -> None:
        """Let them go on."""
        self.machine.request("unpause", {"domain": self.name})

    def destroy(self) -> None:
        """End it at once; nothing happens if it has ended."""
        self.machine.drain()
        if self.ended is None:
            self.machine.request("destroy", {"domain": self.name})
            self.wait_end()

    def screenshot(self) -> bytes:
        """A full HVM guest's screen as it is now, as PNG. MachineError: it has none, or has ended."""
        from toolstack.screenshot import take

        return take(self.machine.machine.client, self.name).png()

    def stats(self) -> dict[str, Any]:
        """Counters of the domain, as `domicile run --json` has them."""
        result: dict[str, Any] = self.machine.request("stats", {"domain": self.name})
        return result

    def registers(self) -> list[dict[str, Any]]:
        """Of each vCPU that was started, while the guest runs: `vcpu`, `state`, `mode`, and numbers by name, as `domicile registers
        --json` has them."""
        result: list[dict[str, Any]] = self.machine.request("registers", {"domain": self.name})
        return result


class GuestMachine:
    """A running machine and the guests that tests started on it."""

    def __init__(self, *, faulty: bool = False, **settings: Any) -> None:
        """Starts it: `memory_mb`, `cpus`; `faulty`: with a fault plan, `faults`. MachineError if it does not come up."""
        name = f"test-{os.getpid()}-{secrets.token_hex(3)}"
        self.faults: Faults | None = None
        if faulty:
            from toolstack.faults import FaultyMachine

            self.machine: Machine = FaultyMachine(name, **settings)
            self.faults = self.machine.faults
        else:
            self.machine = Machine(name, **settings)
        self.domains: dict[str, Domain] = {}
        self.networks: list[Network] = []
        """Ports of its bridges that tests have."""
        self._serial = 0

    def request(self, verb: str, args: dict[str, Any] | None = None) -> Any:
        """A verb of the toolstack. MachineError with its own words if it fails."""
        return self.machine.client.request(verb, args)

    def start(
        self,
        kernel: str | os.PathLike[str],
        *,
        name: str = "",
        ramdisk: str | os.PathLike[str] | None = None,
        cmdline: str = "",
        memory_mb: int = 64,
        vcpus: int = 1,
        type: str = "pv",
        disks: tuple[Path | str | dict[str, Any], ...] | list[Path | str | dict[str, Any]] = (),
        vifs: Sequence[str | dict[str, Any]] = (),
        **more: Any,
    ) -> Domain:
        """Build and start a guest. `disks`: paths of raw images (xvda, xvdb ...), or maps as `toolstack.xlcfg.devices` makes them.
        `vifs`: network interfaces, each as in xl.cfg ("mac=00:16:3e:00:00:01,bridge=xenbr0", or "" for one with nothing special).
        InputError for a file or value that does not do; MachineError with the builder's verdict."""
        self._serial += 1
        wanted = name or f"{name_of(os.fspath(kernel))[:40]}-{self._serial}"
        fields = {
            "name": wanted, "kernel": os.fspath(kernel), "ramdisk": os.fspath(ramdisk) if ramdisk else "",
            "cmdline": cmdline, "memory_mb": memory_mb, "vcpus": vcpus, "type": type,
            "on_reboot": "destroy",
            "disks": [disk_fields(disk, number) for number, disk in enumerate(disks)],
            "vifs": [parse_vif(vif, "vif") if isinstance(vif, str) else vif for vif in vifs], **more,
        }  # fmt: skip
        domain = Domain(self, wanted, type=type)
        before = self.domains.get(wanted)
        self.domains[wanted] = domain
        try:
            with Images() as images:
                config = make_config(fields, images)
                arguments = {"config": config, "attach": True}
                domain.domid = int(self.machine.client.request("create", arguments, images.descriptors))
        except MachineError:
            del self.domains[wanted]
            if before is not None:
                self.domains[wanted] = before
            raise
        return domain

    def poll(self, timeout: float) -> bool:
        """Take one notice; whether there was one. MachineGone."""
        notice = self.machine.client.notice(timeout)
        if notice is None:
            return False
        domain = self.domains.get(str(notice.body.get("name")))
        if domain is None:
            return True
        if notice.what == "console":
            domain.console.feed(notice.body["data"])
        elif notice.what == "ended":
            if notice.body["reason"] == "restarted":
                domain.reboots += 1
            else:
                domain.ended, domain.details = notice.body["reason"], notice.body["details"]
        return True

    def drain(self) -> None:
        """Take what has come."""
        while self.poll(0):
            pass

    def dmesg(self) -> str:
        """The hypervisor's log."""
        text: bytes = self.request("dmesg")
        return text.decode("utf-8", "replace")

    def logs(self) -> dict[str, str]:
        """What the machine's processes logged, by file name."""
        return {
            path.name: path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(self.machine.runtime.logs.glob("*.log"))
        }

    def network(self, bridge: str = BRIDGE, *, mirror: bool = False) -> Network:
        """A port of a bridge, which is made if there is none of that name. `mirror`: it also sees what goes from one guest to another.
        MachineError."""
        network = Network(self, bridge, mirror=mirror)
        self.networks.append(network)
        return network

    def close_networks(self) -> None:
        """Leave all bridges."""
        for network in self.networks:
            network.close()
        self.networks.clear()

    def close(self) -> None:
        """Take it down."""
        self.close_networks()
        self.machine.close()


def disk_fields(disk: Path | str | dict[str, Any], number: int) -> dict[str, Any]:
    """A raw image becomes xvda, xvdb ...; a map stays."""
    if isinstance(disk, dict):
        return disk
    vdev = f"xvd{chr(ord('a') + number)}"
    return {"vdev": vdev, "format": "raw", "readonly": False, "target": os.fspath(disk)}
