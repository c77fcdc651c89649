"""Starting and stopping a machine: the warden, and through it everything else."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from toolstack.client import ControlClient, MachineError, MachineGone
from toolstack.warden.runtime import RuntimeDirectory

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0


def settings_from_environment(**more: Any) -> dict[str, Any]:
    """What the hypervisor is told: machine size and transport (DOMICILE_DOORBELLS, DOMICILE_BUS)."""
    return {
        "doorbells": os.environ.get("DOMICILE_DOORBELLS", "on").lower() not in ("off", "0", "no"),
        "transport": os.environ.get("DOMICILE_BUS", "ipc"),
        **more,
    }


class Machine:
    """A machine that lives as long as this object (or for itself, if `detached`)."""

    def __init__(
        self, name: str = "", *, memory_mb: int = 4096, cpus: int = 0, detached: bool = False, **more: Any
    ) -> None:
        """Starts it. MachineError with the log's end if it does not come up."""
        self.runtime = RuntimeDirectory(name or f"run-{os.getpid()}-{secrets.token_hex(3)}")
        if self.runtime.control.exists():
            raise MachineError(
                f"machine {self.runtime.name!r} runs already: `domicile down`, or give another --machine"
            )
        settings = settings_from_environment(memory_mb=memory_mb, cpus=cpus or os.cpu_count() or 1, **more)
        watched, owner = os.pipe()
        os.set_inheritable(watched, True)
        command = [sys.executable, "-P", "-m", "toolstack.warden", "domicile-warden", self.runtime.name]
        command += [json.dumps(settings), "none" if detached else str(watched)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if detached else None,
                stderr=subprocess.DEVNULL if detached else subprocess.PIPE,
                pass_fds=() if detached else (watched,),
                start_new_session=True,
            )
        finally:
            os.close(watched)
        self._owner = owner
        self._detached = detached
        self.client = self._connect()

    def _connect(self) -> ControlClient:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._process.poll() is not None:
                raise MachineError(f"the machine did not start: {self.errors() or 'see its log'}")
            if self.runtime.control.exists():
                try:
                    client = ControlClient(self.runtime.control)
                    client.request("follow", timeout=START_TIMEOUT_S)
                    return client
                except MachineGone:
                    pass
                except MachineError as error:
                    if "no machine" not in str(error):
                        self.close()
                        raise
            if time.monotonic() > deadline:
                self.close()
                raise MachineError(f"the machine did not start within {START_TIMEOUT_S:.0f} s")
            select.select(
                [], [], [], 0.01
            )  # its socket appears within some 100 ms; there is nothing to wait on before

    def errors(self) -> str:
        """What the warden said on standard error, once it has ended."""
        stream = self._process.stderr
        return stream.read().decode("utf-8", "replace").strip() if stream is not None else ""

    def close(self) -> None:
        """Take the machine down and wait until every process of it is gone."""
        if hasattr(self, "client"):
            self.client.close()
        if self._owner >= 0:
            os.close(self._owner)
            self._owner = -1
        if self._detached:
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(STOP_TIMEOUT_S)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
