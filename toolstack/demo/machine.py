"""The demo's machine, and its processes as the host sees them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from toolstack.machine import Machine, runtime_directory, settings_from_environment


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the machine."""

    role: str
    pid: int
    uid: int
    waits: bool = False
    """Started ahead of need: it has loaded its code, and belongs to no domain yet."""

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


class DemoMachine(Machine):
    """A machine whose warden is `toolstack.demo.warden`."""

    def __init__(self) -> None:
        """Starts it. MachineError with the log's end if it does not come up."""
        self.runtime = runtime_directory(f"demo-{os.getpid()}-{secrets.token_hex(3)}")
        settings = json.dumps(settings_from_environment(memory_mb=4096, cpus=os.cpu_count() or 1))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._detached = False
        watched, self._owner = os.pipe()
        command = [sys.executable, "-P", "-m", "toolstack.demo.warden", "domicile-warden"]
        try:
            self._process = subprocess.Popen(
                [*command, self.runtime.name, settings, str(watched)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(watched,),
                start_new_session=True,
            )
        finally:
            os.close(watched)
        try:
            self.client = self._connect()
        except BaseException:
            self._process.terminate()
            self.close()
            raise

    def processes(self) -> list[Process]:
        """The warden and its children, oldest first."""
        warden = self._process.pid
        domu = {row["pid"] for row in self.client.request("check")["counters"]["domains"].values()}
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
                role = next((word for word in words if word.startswith(b"domicile-")), None)
                pid = int(name)
                if role is None or state == "Z" or warden not in (pid, int(parent)):
                    continue
                word = role.decode("ascii", "replace").removeprefix("domicile-")
                # Not the owner of /proc/PID: that is root for a process that nobody may look into.
                with open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as file:
                    uid = next(int(line.split()[1]) for line in file if line.startswith("Uid:"))
                found.append(Process(word, pid, uid, word in ("domu", "dom0", "domio") and pid not in domu))
        return sorted(found, key=lambda process: process.pid)

    def process(self, role: str) -> Process | None:
        """The newest process of that role."""
        return next((one for one in reversed(self.processes()) if one.role == role and not one.waits), None)

    def said(self, role: str) -> str:
        """The logs of all processes of that role so far."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(self.runtime.logs.glob(f"{role}-*.log"))
        ]
        return "\n".join(texts)
