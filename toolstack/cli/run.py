"""`domicile run`: one machine, one guest, its console on standard output, an exit status for CI."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from toolstack.cli.images import Images, elsewhere, make_config, open_image
from toolstack.cli.registers import place
from toolstack.cli.script import ConsoleScript
from toolstack.cli.terminal import WRITE_S, EscapeKeys, RawTerminal, write_all
from toolstack.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TIMEOUT,
    InputError,
    MachineError,
    MachineGone,
)

if TYPE_CHECKING:
    from toolstack.machine import JoinedMachine, Machine
    from toolstack.trace.recorder import Recorder

MACHINE_SPARE_MB: Final = 256
COLLECT_S: Final = 3.0
"""How long a guest that is ended at its timeout, or matched, is asked for its counters and registers, each."""
"""Machine memory beside the guest's."""
MACHINE_MEMORY_MB: Final = 4096
COUNTERS: Final = ("hypercalls", "exceptions", "events")
"""Of the record: by name, from the domain's process."""
RECORD_VERSION: Final = 1
STUCK: Final = "nobody takes what is on standard output"


class Stopped(BaseException):
    """A signal asks this process to end: SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(slots=True)
class RunRequest:
    """What to run, checked as far as that goes without a machine."""

    domain: dict[str, Any]
    """Fields of DomainConfig; `kernel` and `ramdisk` are paths."""
    script: ConsoleScript
    timeout: float = 0.0
    """Seconds for all of it; 0: none."""
    reboot: bool = True
    """Start a guest that reboots again; False: its first reboot is its end."""
    quiet: bool = False
    """No console on standard output."""
    json: bool = False
    json_file: str = ""
    cpus: int = 0
    join: bool = False
    """On the machine that `--machine` names, and that runs already."""
    hardware: list[dict[str, Any]] = field(default_factory=list)
    """Devices to plug in (toolstack.xlcfg.pci.parse_nvme); without a `pci` of the domain's all are its own."""
    trace: str = ""
    """A file for the timeline."""
    net_host: str = ""
    """Address and prefix of a helper host on xenbr0."""
    domio: str = "native"
    """Which DomIO (toolstack.domio)."""


@dataclass(slots=True)
class Outcome:
    """How it ended."""

    reason: str = "unknown"
    status: int = EXIT_FAILED
    details: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    reboots: int = 0
    domid: int = -1


class Run:
    """One run."""

    def __init__(self, request: RunRequest) -> None:
        self.request = request
        self.outcome = Outcome()
        self._start = time.monotonic()
        self._machine_up = 0.0
        self._guest_end = 0.0
        self._keys = EscapeKeys()
        self._name = str(request.domain["name"])
        self._last_byte = b"\n"

    # ------------------------------------------------------------------ the whole

    def execute(self) -> int:
        """The exit status. InputError before anything was started; MachineError if the machine did not come up."""
        from toolstack.cli.state import state
        from toolstack.machine import JoinedMachine, Machine

        request = self.request
        with Images() as images, _signals():
            try:
                # Files are opened before anything is started: what is missing is told at once.
                for key in ("kernel", "ramdisk"):
                    if request.domain.get(key):
                        os.close(open_image(request.domain[key], key))
                for disk in request.domain.get("disks", ()):
                    if disk["target"] and not elsewhere(disk):
                        os.close(open_image(disk["target"], "disk", writable=not disk["readonly"]))
                for device in request.hardware:
                    os.close(open_image(device["target"], "disk", writable=not device["readonly"]))
                recorder = _recorder(request.trace)
                memory = max(MACHINE_MEMORY_MB, request.domain["memory_mb"] + MACHINE_SPARE_MB)
                machine: Machine | JoinedMachine
                if request.join:
                    machine = JoinedMachine(state.machine, domio=request.domio)
                else:
                    machine = Machine(memory_mb=memory, cpus=request.cpus, domio=request.domio)
                try:
                    self._machine_up = time.monotonic()
                    if recorder is not None:
                        recorder.start(machine.runtime.control)
                    config = make_config(request.domain, images)
                    self._guest(machine, config, images)
                finally:
                    self._guest_end = self._guest_end or time.monotonic()
                    if recorder is not None:
                        _say(f"domicile: trace: {recorder.stop()}")
                    machine.close()
            except Stopped as stopped:
                self.outcome.reason = signal.Signals(stopped.number).name.lower()
                self.outcome.status = 128 + stopped.number
        self._tell()
        return self.outcome.status

    def _guest(self, machine: Machine | JoinedMachine, config: Any, images: Images) -> None:
        outcome = self.outcome
        try:
            if self.request.net_host:
                host = {"bridge": "xenbr0", "address": self.request.net_host}
                machine.client.request("network-host", host)
            plugged = [self._plug(machine, device) for device in self.request.hardware]
            if plugged and not config.pci:
                config = config.model_copy(update={"pci": plugged})
            arguments = {"config": config, "attach": True}
            outcome.domid = machine.client.request("create", arguments, images.descriptors)
            machine.owns(self._name)
            if config.vnc:
                where = machine.client.request("vnc", {"domain": self._name})
                _say(f"domicile: {self._name}: vnc {where['address']}::{where['port']}")
        except MachineGone:
            outcome.reason, outcome.details = "machine", machine.errors()
            return
        except MachineError as error:
            # The builder's verdict on the files that the user gave.
            raise InputError(str(error)) from None
        try:
            with RawTerminal() as terminal:
                self._attend(machine, terminal)
        except MachineGone:
            outcome.reason, outcome.details = "machine", machine.errors()
        except BrokenPipeError:
            outcome.reason, outcome.status = "nobody reads standard output", 128 + signal.SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        except TimeoutError as error:
            if self._left() == 0.0:
                outcome.reason, outcome.status = "timeout", EXIT_TIMEOUT
            else:
                outcome.reason = STUCK
            outcome.details = str(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._guest_end = time.monotonic()

    @staticmethod
    def _plug(machine: Machine | JoinedMachine, device: dict[str, Any]) -> int:
        fd = open_image(device["target"], "disk", writable=not device["readonly"])
        try:
            arguments = {"kind": "nvme", "config": device, "bdf": device["bdf"]}
            return int(machine.client.request("device-plug", arguments, [fd]))
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ while it runs

    def _attend(self, machine: Machine | JoinedMachine, terminal: RawTerminal) -> None:
        client, request = machine.client, self.request
        poller = select.poll()
        poller.register(client.fileno(), select.POLLIN)
        if terminal.active:
            poller.register(0, select.POLLIN)
        while True:
            while (notice := client.notice(0)) is not None:
                if notice.what == "console":
                    self._output(machine, notice.body["data"])
                elif notice.what == "ended" and self._ended(notice.body):
                    return None
                if request.script.matched is not None:
                    self.outcome.reason, self.outcome.status = "matched", EXIT_OK
                    return self._collect(machine)
            left = self._left()
            if left == 0.0:
                self.outcome.reason, self.outcome.status = "timeout", EXIT_TIMEOUT
                return self._collect(machine)
            for fd, _ in poller.poll(None if left is None else left * 1000):
                if fd == 0 and not self._input(machine, terminal, poller):
                    self.outcome.reason, self.outcome.status = "interrupted", EXIT_INTERRUPTED
                    return self._collect(machine)

    def _left(self) -> float | None:
        """Seconds of --timeout that are left; None: there is none."""
        if not self.request.timeout:
            return None
        return max(0.0, self._start + self.request.timeout - time.monotonic())

    def _output(self, machine: Machine | JoinedMachine, data: bytes) -> None:
        if not self.request.quiet:
            left = self._left()
            write_all(data, timeout=WRITE_S if left is None else min(WRITE_S, left))
        self._last_byte = data[-1:] or self._last_byte
        typed = self.request.script.feed(data)
        if typed:
            self._type(machine, typed)

    def _type(self, machine: Machine | JoinedMachine, data: bytes) -> None:
        try:
            machine.client.request("type", {"domain": self._name, "data": data})
        except MachineGone:
            raise
        except MachineError:
            pass  # the guest ended meanwhile: its notice says so

    def _input(self, machine: Machine | JoinedMachine, terminal: RawTerminal, poller: select.poll) -> bool:
        """Keys of the user; False if they want out."""
        keys = terminal.read()
        if not keys:
            poller.unregister(0)
            return True
        data, leave = self._keys.feed(keys, time.monotonic())
        if data and not leave:
            self._type(machine, data)
        return not leave

    def _ended(self, body: dict[str, Any]) -> bool:
        """A notice about a domain's end; True if that ends the run."""
        if body["name"] != self._name:  # somebody else's guest, on a machine that was joined
            return False
        outcome, reason = self.outcome, body["reason"]
        outcome.details, outcome.stats = body["details"], body.get("stats") or {}
        if reason == "restarted":
            outcome.reboots += 1
            return False
        outcome.reason = reason
        if reason == "poweroff" or (reason == "reboot" and not self.request.reboot):
            outcome.status = EXIT_OK
        return True

    def _collect(self, machine: Machine | JoinedMachine) -> None:
        """The counters of a guest that still runs, and will not when this is over; where it was, if that is why it is ended."""
        about = {"domain": self._name}
        try:
            if self.outcome.status == EXIT_TIMEOUT:
                rows = machine.client.request("registers", about, timeout=COLLECT_S)
                self.outcome.details = "\n".join(place(row) for row in rows)
            if self.request.json or self.request.json_file:
                self.outcome.stats = machine.client.request(
                    "stats", {**about, "fresh": True}, timeout=COLLECT_S
                )
        except MachineError as error:  # its process does not answer: that is what there is to tell
            self.outcome.details = self.outcome.details or str(error)

    # ------------------------------------------------------------------ what is told

    def _tell(self) -> None:
        request, outcome = self.request, self.outcome
        if self._last_byte != b"\n" and not request.quiet and sys.stdout.isatty():
            write_all(b"\n")
        if outcome.status == EXIT_TIMEOUT:
            wanted = request.script.waits_for
            missing = f" ({wanted!r} was not seen)" if wanted is not None else ""
            _say(f"domicile: {self._name}: timeout after {request.timeout:g} s{missing}")
            if outcome.details:
                _say(outcome.details)
        elif outcome.status != EXIT_OK:
            if outcome.details:
                _say(outcome.details)
            _say(f"domicile: {self._name}: {self._verdict()}")
        if request.json or request.json_file:
            text = json.dumps(self.record())
            if request.json_file:
                try:
                    with open(request.json_file, "w", encoding="utf-8") as file:
                        file.write(text + "\n")
                except OSError as error:
                    raise InputError(
                        f"--json-file {request.json_file}: {os.strerror(error.errno or 0)}"
                    ) from None
            else:
                start = b"" if self._last_byte == b"\n" or request.quiet else b"\n"
                write_all(start + text.encode() + b"\n")

    def _verdict(self) -> str:
        reason = self.outcome.reason
        known = {
            "crash": "the guest crashed",
            "watchdog": "the guest's watchdog ran out",
            "reboot": "the guest rebooted at once and was not started again",
            "suspend": "the guest suspended itself, and nobody will resume it",
            "destroyed": "the domain was destroyed",
            "machine": "the machine went down",
            "interrupted": "ended from the keyboard",
        }
        return known.get(reason, f"ended: {reason}")

    def record(self) -> dict[str, Any]:
        """What --json prints. Counters that this machine does not have are null, and named in `not_counted`."""
        outcome, now = self.outcome, time.monotonic()
        counters = {name: outcome.stats.get(name) for name in COUNTERS}
        machine_up = self._machine_up or now
        return {
            "version": RECORD_VERSION,
            "name": self._name,
            "kernel": self.request.domain.get("kernel"),
            "reason": outcome.reason,
            "exit_status": outcome.status,
            "matched": self.request.script.matched,
            "reboots": outcome.reboots,
            "seconds": round(now - self._start, 4),
            "seconds_machine_start": round(machine_up - self._start, 4),
            "seconds_guest": round(max(0.0, self._guest_end - machine_up), 4),
            "console_bytes": self.request.script.written,
            **counters,
            "not_counted": [name for name, value in counters.items() if value is None],
            "details": outcome.details,
        }


def _recorder(path: str) -> Recorder | None:
    if not path:
        return None
    from toolstack.trace.recorder import Recorder

    return Recorder(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _signals:
    """SIGINT, SIGTERM and SIGHUP end the run in order: the machine is taken down first."""

    def __enter__(self) -> None:
        self._before = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # nohup, or a shell's background job
        }

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        for later in self._before:  # once is enough: the way down is not to be cut short
            signal.signal(later, signal.SIG_IGN)
        raise Stopped(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
