"""Starting and stopping a machine: the warden, and through it everything else."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from toolstack.domio import check_kind, open_program, use_program
from toolstack.errors import InputError, MachineError, MachineGone
from toolstack.warden.ended import ended_within
from toolstack.warden.runtime import RuntimeDirectory

if TYPE_CHECKING:
    from toolstack.client import ControlClient

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0


def settings_from_environment(**more: Any) -> dict[str, Any]:
    """What the hypervisor is told: machine size and transport (DOMICILE_DOORBELLS, DOMICILE_BUS)."""
    return {
        "doorbells": os.environ.get("DOMICILE_DOORBELLS", "on").lower() not in ("off", "0", "no"),
        "transport": os.environ.get("DOMICILE_BUS", "ipc"),
        **more,
    }


def runtime_directory(name: str) -> RuntimeDirectory:
    """Of the machine with that name. InputError for a name that cannot be one."""
    try:
        return RuntimeDirectory(name)
    except ValueError as error:
        raise InputError(str(error)) from None


def answers(runtime: RuntimeDirectory) -> bool:
    """Whether a machine runs there: its control socket may be left from one that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(runtime.control))
        except PermissionError:
            return True
        except OSError:
            return False
    return True


class Machine:
    """A machine that lives as long as this object (or for itself, if `detached`)."""

    def __init__(
        self,
        name: str = "",
        *,
        memory_mb: int = 4096,
        cpus: int = 0,
        detached: bool = False,
        warden: str = "toolstack.warden",
        environment: dict[str, str] | None = None,
        domio: str = "native",
        **more: Any,
    ) -> None:
        """Starts it. MachineError with the log's end if it does not come up. `domio`: the kind of DomIO (toolstack.domio), InputError if
        that is not to be had. `warden`: the module of its warden, which says what
        programs its processes are; `environment`: added to theirs (names from DOMICILE_ on)."""
        self.runtime = runtime_directory(name or f"run-{os.getpid()}-{secrets.token_hex(3)}")
        if answers(self.runtime):
            raise MachineError(
                f"machine {self.runtime.name!r} runs already: `domicile down`, or give another --machine"
            )
        program = open_program() if check_kind(domio, "domio") == "guest" else None
        settings = settings_from_environment(memory_mb=memory_mb, cpus=cpus or os.cpu_count() or 1, **more)
        # A file, not a pipe: the warden of a detached machine outlives whoever would read it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        watched, self._owner = os.pipe()
        command = [sys.executable, "-P", "-m", warden, "domicile-warden", self.runtime.name]
        command += [json.dumps(settings), "none" if detached else str(watched)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=() if detached else (watched,),
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        finally:
            os.close(watched)
        self._detached = detached
        try:
            self.client = self._connect()
            if program is not None:
                use_program(self.client, *program)
        except BaseException:
            self._detached = False
            self._process.terminate()
            self.close()
            raise
        finally:
            if program is not None:
                os.close(program[0])

    def _connect(self) -> ControlClient:
        # Its code is loaded here, while the machine's processes load theirs.
        from toolstack.client import ControlClient

        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._process.poll() is not None:
                raise MachineError(
                    f"the machine did not start: {self.errors() or 'its warden ended without a word'}"
                )
            if self.runtime.control.exists():
                try:
                    client = ControlClient(self.runtime.control)
                    client.request("follow", timeout=START_TIMEOUT_S)
                    return client
                except MachineGone:
                    pass
                except MachineError as error:
                    if "no machine" not in str(error):
                        raise
            if time.monotonic() > deadline:
                raise MachineError(
                    f"the machine did not start within {START_TIMEOUT_S:.0f} s: {self.errors()}"
                )
            select.select(
                [], [], [], 0.005
            )  # its socket appears within some 100 ms; there is nothing to wait on before

    def errors(self) -> str:
        """What the warden said on standard error, in one line."""
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        # The last line of a traceback says what went wrong.
        said = [line.strip() for line in lines if line.strip() and not line.startswith(("  ", "Traceback"))]
        return said[-1] if said else ""

    def owns(self, guest: str) -> None:
        """This guest goes with the machine, as all do."""

    def close(self) -> None:
        """Take the machine down and wait until every process of it is gone. A detached one goes on."""
        if hasattr(self, "client"):
            self.client.close()
        if self._owner >= 0:
            os.close(self._owner)
            self._owner = -1
        if not self._detached and not ended_within(self._process, STOP_TIMEOUT_S):
            self._process.kill()  # its children die with it (PR_SET_PDEATHSIG)
            self._process.wait(STOP_TIMEOUT_S)
            self.runtime.remove()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JoinedMachine:
    """A machine that somebody else started: `close` takes down what is one's own on it."""

    def __init__(self, name: str, *, domio: str = "native") -> None:
        """MachineError if it does not run, or if `domio` is not native and it has a DomIO already; InputError if that program is not to
        be had."""
        from toolstack.client import ControlClient

        self.runtime = runtime_directory(name)
        program = open_program() if check_kind(domio, "domio") == "guest" else None
        self._guests: list[str] = []
        try:
            self.client = ControlClient(self.runtime.control)
            try:
                self.client.request("follow")
                if program is not None:
                    use_program(self.client, *program)
            except MachineError:
                self.client.close()
                raise
        finally:
            if program is not None:
                os.close(program[0])

    def owns(self, guest: str) -> None:
        """A guest to end in `close`, if it has not ended by then."""
        self._guests.append(guest)

    def errors(self) -> str:
        """Its warden belongs to somebody else."""
        return ""

    def close(self) -> None:
        """End the guests, leave the machine."""
        for guest in self._guests:
            with contextlib.suppress(MachineError):
                self.client.request("destroy", {"domain": guest})
        self.client.close()


def warden_pidfd(runtime: RuntimeDirectory) -> int | None:
    """A pidfd of the machine's warden; None if it does not run (its number may belong to somebody else by now)."""
    try:
        pid = int(runtime.pid.read_text(encoding="ascii"))
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        words = []
    if b"domicile-warden" in words and runtime.name.encode() in words:
        return pidfd
    os.close(pidfd)
    return None
