"""Real machines for tests: start, create guests, expect text on their consoles, see that everything is given back."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bus.packets import close_all
from toolstack.client import ControlClient
from toolstack.machine import Machine

BOUND_S = 30.0
"""Longest wait for anything; what is waited for takes a small part of it."""


class Expected(AssertionError):
    """What was expected did not come: the text says what came instead."""


class Consoles:
    """Consoles and ends of the guests of one machine, as one client of its toolstack sees them."""

    def __init__(self, client: ControlClient) -> None:
        self.client = client
        self.text: dict[str, str] = defaultdict(str)
        """All output by guest."""
        self.ended: dict[str, tuple[str, str]] = {}
        """(reason, details) by guest: the last end that was told."""
        self.restarts: dict[str, int] = defaultdict(int)
        self._seen: dict[str, int] = defaultdict(int)

    def create(
        self,
        name: str,
        kernel: Path | str,
        *,
        ramdisk: Path | str | None = None,
        memory_mb: int = 32,
        attach: bool = True,
        **more: Any,
    ) -> int:
        """Build and start a guest; its domid."""
        config: dict[str, Any] = {
            "name": name,
            "memory_mb": memory_mb,
            "uuid": uuid.uuid4().bytes,
            "kernel": 0,
            "kernel_path": str(kernel),
            **more,
        }
        fds = [os.open(kernel, os.O_RDONLY)]
        try:
            if ramdisk is not None:
                fds.append(os.open(ramdisk, os.O_RDONLY))
                config |= {"ramdisk": 1, "ramdisk_path": str(ramdisk)}
            self.ended.pop(name, None)
            return int(self.client.request("create", {"config": config, "attach": attach}, fds))
        finally:
            close_all(fds)

    def poll(self, timeout: float) -> bool:
        """Take one notice; whether there was one."""
        notice = self.client.notice(timeout)
        if notice is None:
            return False
        body = notice.body
        if notice.what == "console":
            self.text[body["name"]] += body["data"].decode("latin1")
        elif notice.what == "ended":
            if body["reason"] == "restarted":
                self.restarts[body["name"]] += 1
            else:
                self.ended[body["name"]] = (body["reason"], body["details"])
        return True

    def expect(self, name: str, pattern: str, timeout: float = BOUND_S) -> re.Match[str]:
        """Wait for a regular expression in the output that was not expected before; what follows it is kept. Expected."""
        deadline = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.text[name][self._seen[name] :])
            if found is not None:
                self._seen[name] += found.end()
                return found
            left = deadline - time.monotonic()
            if name in self.ended or left <= 0:
                how = f"it ended: {self.ended[name]}" if name in self.ended else f"not within {timeout:.0f} s"
                raise Expected(
                    f"{name}: {pattern!r}: {how}; the end of its console:\n{self.text[name][-2000:]}"
                )
            self.poll(min(left, 1.0))

    def forget(self, name: str) -> None:
        """What came so far is not expected any more."""
        self._seen[name] = len(self.text[name])

    def type(self, name: str, text: str) -> None:
        """Type on its console."""
        self.client.request("type", {"domain": name, "data": text.encode()})

    def wait_end(self, name: str, timeout: float = BOUND_S) -> str:
        """The reason for which it ended. Expected if it does not."""
        deadline = time.monotonic() + timeout
        while name not in self.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Expected(
                    f"{name} goes on after {timeout:.0f} s; its console:\n{self.text[name][-2000:]}"
                )
            self.poll(min(left, 1.0))
        return self.ended[name][0]

    def wait_restart(self, name: str, count: int = 1, timeout: float = BOUND_S) -> None:
        """Until it was built again so many times in all. Expected."""
        deadline = time.monotonic() + timeout
        while self.restarts[name] < count:
            left = deadline - time.monotonic()
            if left <= 0 or name in self.ended:
                raise Expected(f"{name}: {self.restarts[name]} restarts, ended: {self.ended.get(name)}")
            self.poll(min(left, 1.0))

    def domains(self) -> dict[str, dict[str, Any]]:
        """Rows of `domicile list` by name."""
        return {row["name"]: row for row in self.client.request("list")}


class RunningMachine(Consoles):
    """A machine and its consoles."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.client)
        self.machine = machine

    def check(self) -> dict[str, Any]:
        """The hypervisor's counters; AssertionError if any invariant does not hold."""
        result = self.client.request("check")
        assert result["problems"] == [], "\n".join(result["problems"])
        counters: dict[str, Any] = result["counters"]
        return counters

    def settled(self, timeout: float = 10.0) -> dict[str, Any]:
        """Counters once there is no domain but Dom0 and no grant work any more: everything is back. AssertionError."""
        deadline = time.monotonic() + timeout
        while True:
            counters = self.check()
            if list(counters["domains"]) == ["0"] and not counters["grant_jobs"]:
                return counters
            assert time.monotonic() < deadline, f"not everything is given back: {counters}"
            self.poll(0.02)

    def processes(self, role: str = "", started: bool = True) -> list[int]:
        """Process ids of this machine's processes of a role, oldest first; with `started`, only those that have begun."""
        found = []
        warden = self.machine.runtime.pid.read_text(encoding="ascii").strip()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if parent == warden and any(word.startswith(f"domicile-{role}".encode()) for word in words):
                found.append(int(entry.name))
        return sorted(found)

    def watched(self, timeout: float = BOUND_S) -> None:
        """Until somebody traces the machine. AssertionError."""
        deadline = time.monotonic() + timeout
        while not self.client.request("tracing"):
            assert time.monotonic() < deadline, "nobody traces"
            self.poll(0.02)

    def process_of(self, domid: int) -> int:
        """The process id of a domain's process. KeyError if there is no such domain."""
        return int(self.check()["domains"][str(domid)]["pid"])


@contextmanager
def running_machine(name: str = "", **more: Any) -> Iterator[RunningMachine]:
    """A machine, which is down when the block ends."""
    with Machine(name, **more) as machine:
        yield RunningMachine(machine)
