"""Machines whose processes are started by agents, as in containers, but on plain processes: a warden and agents that this starts."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.machines import BOUND_S, Consoles
from toolstack.client import ControlClient
from toolstack.errors import MachineError
from toolstack.machine import settings_from_environment
from toolstack.warden.operator import Operator
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.uids import UidBlock
from toolstack.warden.warden import UID_LOCKS

START_S = 60.0
"""Longest wait for a machine: seven Python processes and as many children load their code at once."""
CONTAINERS = {
    "hypervisor": "hypervisor",
    "dom0": "dom0",
    "nvme": "nvme",
    "domio": "domio",
    "netio": "netio",
    "domio-guest": "domu=driver",
    "domu-pv": "domu=pv",
    "domu-pvh": "domu=hvm",
}


class AgentMachine(Consoles):
    """A running machine: `operator`, and what RunningMachine has."""

    def __init__(self, containers: dict[str, str], modules: dict[str, str], settings: dict[str, Any]) -> None:
        self.runtime = RuntimeDirectory(f"agents-{os.getpid()}-{secrets.token_hex(3)}")
        self._uids = UidBlock(UID_LOCKS) if os.getuid() == 0 else None
        self._modules = modules
        self._containers = containers
        self.uids = {name: self._uids.take() if self._uids else os.getuid() for name in containers}
        self.logs: dict[str, Any] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        machine = settings_from_environment(memory_mb=1024, cpus=2, **settings)
        command = ["toolstack.warden.central", "domicile-warden", self.runtime.name]
        command += ["--settings", json.dumps(machine), "--scratch", self._scratch()]
        for name, role in containers.items():
            command += ["--agent", f"{name}:{os.getuid()}:{self.uids[name]}:{role}"]
        self._warden_command = command
        self.start_warden()
        for name in containers:
            self.start_agent(name)

    def _scratch(self) -> str:
        path = Path(tempfile.mkdtemp(prefix="dt-scratch-"))
        os.chown(path, self.uids["dom0"], self.uids["dom0"])
        self._scratch_path = path
        return str(path)

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        log = self.logs.setdefault(name, tempfile.TemporaryFile())  # noqa: SIM115 (closed by `close`)
        # -P, as everywhere: but tests' own agents are found below the repository.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def start_warden(self) -> None:
        """The machine's warden comes up (again)."""
        self._start("warden", self._warden_command)

    def start_agent(self, name: str) -> None:
        """The container of that name comes up (again)."""
        role = self._containers[name].partition("=")[0]
        command = [
            self._modules.get(name, "toolstack.warden.agent"),
            "domicile-agent",
            self.runtime.name,
            name,
            role,
        ]
        command += ["--with-parent"]
        command += ["--child-uid", str(self.uids[name])] if self._uids else ["--shared-uid"]
        self._start(name, command)

    def kill_container(self, name: str) -> None:
        """SIGKILL to its agent (or to the warden), as `docker kill` does it."""
        self.processes[name].kill()
        self.processes[name].wait(BOUND_S)

    def said(self, name: str) -> str:
        """What the warden, or an agent, has said so far."""
        log = self.logs[name]
        log.flush()
        log.seek(0)
        text: str = log.read().decode("utf-8", "replace")
        return text

    def connect(self) -> None:
        """Wait for the machine. AssertionError with what was said."""
        deadline = time.monotonic() + START_S
        while True:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended: {self.said(name)[-2000:]}"
            with contextlib.suppress(MachineError):
                super().__init__(ControlClient(self.runtime.control))
                self.client.request("follow", timeout=BOUND_S)
                self.operator = Operator(self.runtime.root / "warden")
                return
            assert time.monotonic() < deadline, "".join(f"== {n}\n{self.said(n)[-1500:]}" for n in self.logs)
            select.select([], [], [], 0.05)

    def wait(self, done: Any, what: str, timeout: float = BOUND_S) -> None:
        """Take notices until `done()`. AssertionError with what was said."""
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"{what}: not in time\n{self.said('warden')[-3000:]}"
            self.poll(0.05)

    def check(self) -> dict[str, Any]:
        """The hypervisor's counters; AssertionError if any invariant does not hold."""
        result = self.client.request("check")
        assert result["problems"] == [], "\n".join(result["problems"])
        counters: dict[str, Any] = result["counters"]
        return counters

    def close(self) -> None:
        """Everything goes."""
        for name in ("client", "operator"):
            if hasattr(self, name):
                getattr(self, name).close()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(BOUND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(BOUND_S)
        for log in self.logs.values():
            log.close()
        if self._uids:
            self._uids.close()
        for path in sorted(self._scratch_path.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        self._scratch_path.rmdir()


@contextmanager
def agent_machine(
    containers: dict[str, str] | None = None, modules: dict[str, str] | None = None, **settings: Any
) -> Iterator[AgentMachine]:
    """A machine of agents, which is down when the block ends."""
    machine = AgentMachine(containers or CONTAINERS, modules or {}, settings)
    try:
        machine.connect()
        yield machine
    finally:
        machine.close()
