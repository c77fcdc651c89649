"""A PV guest whose process is a program: it holds that domain's credentials and memory, and nothing else. For benchmarks that ask the
machine what a guest asks, without the guest's own time.

The other half (`machine_of`) starts a machine whose warden puts such a program in place of `domains.domu`. What the program tells on
standard output, a line `TOLD {json}` each, `told` gives back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import toolstack.machine
from bus import privileges
from bus.abi import xen
from bus.abi.hvm.params import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN
from bus.link import HypervisorGone
from bus.messages.domain import Order
from bus.process import begin
from domains.domu.lease import Lease
from domains.native.domain import NativeDomain
from domains.native.reactor import Reactor
from tests.support.machines import RunningMachine, running_machine
from toolstack.guestfetch import fetch

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = "DOMICILE_BENCHMARK_MODULE"

# ---------------------------------------------------------------------- in the guest's process


class PvNative(NativeDomain):
    """A PV domain as a program: machine frames are its own, in one row; start info tells of the store."""

    def __init__(self, start: object, reactor: Reactor) -> None:
        super().__init__(start, reactor)  # type: ignore[arg-type]  # a bus.process.Start
        self.lease = Lease(lambda: None)
        self.built = False
        self.on_order["lease_page"] = self._lease_page
        self.on_order["lease"] = lambda order, fds: b""
        self.on_order["set_vcpu_context"] = lambda order, fds: b""
        self.on_order["start"] = self._start

    def _lease_page(self, order: Order, fds: list[int]) -> bytes:
        self.lease.attach(fds)
        return b""

    def _start(self, order: Order, fds: list[int]) -> bytes:
        assert self.memory is not None
        self._p2m = {gfn: self.memory.base + gfn for gfn in range(self.ram_frames)}
        self.built = True
        return b""

    def _start_info(self) -> xen.start_info:
        assert self.memory is not None
        octets = self.memory.octets
        size = self.ram_frames << 12
        found = next(at for at in range(0, size, 4096) if bytes(octets[at : at + 8]) == b"xen-3.0-")
        return xen.START_INFO.unpack(bytes(octets[found : found + 4096]))

    def command_line(self) -> str:
        """What the guest's configuration says."""
        return bytes(self._start_info().cmd_line).partition(b"\0")[0].decode()

    def hvm_param(self, index: int) -> int:
        """From start info."""
        assert self.memory is not None
        info = self._start_info()
        if index == HVM_PARAM_STORE_PFN:
            return int(info.store_mfn) - self.memory.base
        assert index == HVM_PARAM_STORE_EVTCHN
        return int(info.store_evtchn)


def say(**what: object) -> None:
    """Tell the benchmark."""
    print("TOLD " + json.dumps(what), flush=True)


def serve(run: Callable[[PvNative], None]) -> None:
    """Entry point of the process: come up, get a lease, `run`."""
    start = begin(privileges.Limits(open_files=4096, processes=16))
    reactor = Reactor()
    try:
        host = PvNative(start, reactor)
        while not host.built:
            reactor.once(1.0)
        host.lease.ask()
        while not host.lease.may_run():
            reactor.once(0.01)
        host.lease.running()
        run(host)
        reactor.run()
    except HypervisorGone as gone:
        sys.exit(f"guest: {gone}")


# ---------------------------------------------------------------------- outside


class _Subprocess:
    """`subprocess` for `toolstack.machine`: the warden is this file."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def Popen(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        """Start it with this file in place of `-m toolstack.warden`."""
        at = command.index("-m")
        return subprocess.Popen([*command[:at], __file__, *command[at + 2 :]], **more)


@contextmanager
def machine_of(module: str) -> Iterator[RunningMachine]:
    """A machine whose guests' processes are the program `module`."""
    os.environ[MODULE] = module
    vars(toolstack.machine)["subprocess"] = _Subprocess  # all that it uses of it
    with running_machine() as machine:
        yield machine


def create(machine: RunningMachine, name: str, **more: Any) -> int:
    """Such a guest; its domid. Its kernel is built and never runs."""
    return machine.create(name, fetch("grub").kernel, memory_mb=96, **more)


def told(machine: RunningMachine) -> list[dict[str, Any]]:
    """What the programs told so far."""
    found = []
    for log in sorted(machine.machine.runtime.logs.glob("domu-*.log")):
        lines = log.read_text().splitlines()
        found += [json.loads(line[5:]) for line in lines if line.startswith("TOLD {") and line.endswith("}")]
    return found


def wait(machine: RunningMachine, count: int, timeout: float = 60.0) -> dict[str, Any]:
    """The count-th word, counted from 0. SystemExit if it does not come."""
    deadline = time.monotonic() + timeout
    while len(words := told(machine)) <= count:
        if time.monotonic() > deadline or machine.ended:
            logs = "\n".join(
                path.read_text()[-1500:] for path in machine.machine.runtime.logs.glob("dom*.log")
            )
            raise SystemExit(f"the guest stopped after {words[-1:]}: {machine.ended}\n{logs}")
        machine.poll(0.02)
    return words[count]


def processor_seconds(pid: int) -> float:
    """User and system time of all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _be_the_warden() -> None:
    from toolstack.warden import children
    from toolstack.warden.__main__ import main

    children.MODULES["domu"] = os.environ[MODULE]
    plain = children._environment
    mine = {name: value for name, value in os.environ.items() if name.startswith("DOMICILE_BENCHMARK")}
    children._environment = lambda: {**plain(), "PYTHONPATH": str(ROOT), **mine}
    main()


if __name__ == "__main__":
    _be_the_warden()
