"""Starting, stopping and ending processes on the hypervisor's order, and reporting their ends.

The warden is small and looks at no guest's data. It alone may signal the others where each has a uid of its own. It ends with
its owner (the command, for `domicile run`) or on `Halt`, and takes every process with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bus.log import Logger
from bus.messages.envelope import BadMessage
from bus.messages.warden import (
    FROM_DOM0,
    TO_WARDEN,
    Begin,
    Deposit,
    Deposited,
    Ended,
    Halt,
    Signal,
    Spawn,
    Started,
)
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, pair
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.uids import UidBlock

LOG: Final = Logger("warden")
MODULES: Final = {
    "hypervisor": "hypervisor",
    "dom0": "domains.dom0",
    "domio": "domains.domio",
    "domu": "domains.domu",
    "nvme": "domains.devices.nvme",
}
"""Python module of each role that can be started."""

PRESTARTED: Final = {"dom0": 1, "domu": 1}
"""How many processes of a role load their code before anybody asks for them: what `domicile run` will need."""

KILL_WAIT_S: Final = 5.0
MAX_DEPOSITS: Final = 256
UID_LOCKS: Final = Path("/run/domicile/.uids")
"""Blocks of user ids are locked here, in one place for all machines of the host, wherever their directories are."""


@dataclass(slots=True)
class Child:
    """A process, waiting for `Begin` or running."""

    role: str
    process: subprocess.Popen[bytes]
    link: PacketLink
    uid: int | None
    pidfd: int
    log: str
    id: int | None = None
    domain: int = -1


class Warden:
    """The machine's process table."""

    def __init__(
        self, runtime: RuntimeDirectory, *, own_uids: bool, listeners: dict[str, socket.socket]
    ) -> None:
        """`own_uids`: give each process a uid of its own (needs root). `listeners` go to Dom0."""
        self.runtime = runtime
        self._uids = UidBlock(UID_LOCKS) if own_uids else None
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._ready: dict[str, list[Child]] = {}
        self._children: dict[int, Child] = {}
        self._hypervisor: PacketLink | None = None
        self._hypervisor_child: Child | None = None
        self._serial = 0
        self._deposits: dict[str, tuple[Deposit, list[int]]] = {}
        self.ending: str | None = None

    # ------------------------------------------------------------------ processes

    def _start(self, role: str) -> Child:
        """A process of that role that will wait for its `Begin`."""
        ours, theirs = pair()
        uid = self._uids.take() if self._uids else None
        self._serial += 1
        log_path = str(self.runtime.logs / f"{role}-{self._serial}.log")
        log = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        command = [sys.executable, "-P", "-m", MODULES[role], f"domicile-{role}", str(theirs.fileno())]
        if uid is not None:
            command.append(str(uid))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=_environment(),
                start_new_session=True,
            )
        finally:
            os.close(log)
            theirs.close()
        child = Child(role, process, PacketLink(ours, {}), uid, os.pidfd_open(process.pid), log_path)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        return child

    def prestart(self) -> None:
        """Have the usual processes load their code now."""
        for role, count in PRESTARTED.items():
            waiting = self._ready.setdefault(role, [])
            while len(waiting) < count:
                waiting.append(self._start(role))

    def spawn(self, order: Spawn, descriptors: Sequence[int]) -> Child:
        """Start (or wake) a process and send it its `Begin`. The descriptors stay the caller's."""
        if order.role not in MODULES:
            raise BadMessage(f"no such role: {order.role}")
        if order.id in self._children:
            raise BadMessage(f"process id {order.id} is in use")
        waiting = self._ready.get(order.role, [])
        child = waiting.pop(0) if waiting else self._start(order.role)
        child.id, child.domain = order.id, order.domain
        self._children[order.id] = child
        settings = dict(order.settings)
        names, fds = list(order.fds), list(descriptors)
        if order.name in self._deposits:
            deposit, deposited = self._deposits[order.name]
            names += deposit.fds
            fds += deposited
            settings = {**settings, **deposit.settings}
        if order.role == "dom0":
            child.link = PacketLink(child.link.detach(), FROM_DOM0)
            self._selector.register(child.link, selectors.EVENT_READ, ("dom0", child))
            for name, listener in self._listeners.items():
                names.append(name)
                fds.append(listener.fileno())
            settings["consoles"] = str(self.runtime.consoles)
            settings["state"] = str(self.runtime.state)
            if child.uid is not None:
                for path in (self.runtime.consoles, self.runtime.state):
                    os.chown(path, child.uid, child.uid)
        begin = Begin(role=order.role, name=order.name, domain=order.domain, fds=names, settings=settings)
        with contextlib.suppress(LinkClosed):  # it died at once: its end is reported like any other
            child.link.send(begin, fds)
        return child

    def start_hypervisor(self, settings: dict[str, Any]) -> None:
        """The first process of a machine."""
        ours, theirs = pair()
        self._hypervisor = PacketLink(ours, TO_WARDEN)
        order = Spawn(
            id=0, role="hypervisor", name="hypervisor", domain=0xFFFFFFFF, fds=["warden"], settings=settings
        )
        self._hypervisor_child = self.spawn(order, [theirs.fileno()])
        theirs.close()
        self._selector.register(self._hypervisor, selectors.EVENT_READ, "hypervisor")

    def watch(self, fd: int) -> None:
        """End the machine when this descriptor reports an end: the owner went away."""
        self._selector.register(fd, selectors.EVENT_READ, "owner")

    # ------------------------------------------------------------------ events

    def run(self) -> str:
        """Serve until the machine ends; why it ended. All processes are gone then."""
        try:
            while self.ending is None:
                for key, _ in self._selector.select(60.0):
                    if isinstance(key.data, Child):
                        self._ended(key.data)
                    elif isinstance(key.data, tuple):
                        self._deposit(key.data[1])
                    elif key.data == "owner":
                        self.ending = "the owner went away"
                    else:
                        self._serve()
        finally:
            self._end_all()
        return self.ending

    def _deposit(self, dom0: Child) -> None:
        """Keep what Dom0 gives for a device's process."""
        try:
            packet = dom0.link.receive()
        except BadMessage as error:
            LOG.warning(f"refused: {error}")
            return
        except LinkClosed:
            self._selector.unregister(dom0.link)
            return
        if packet is None:
            return
        message, fds = packet
        assert isinstance(message, Deposit)
        if len(fds) != len(message.fds) or (
            message.name not in self._deposits and len(self._deposits) >= MAX_DEPOSITS
        ):
            close_all(fds)
            return
        close_all(self._deposits.pop(message.name, (message, []))[1])
        if fds:
            self._deposits[message.name] = (message, fds)
        with contextlib.suppress(LinkClosed, LinkFull):
            dom0.link.send(Deposited(name=message.name))

    def _serve(self) -> None:
        assert self._hypervisor is not None
        for _ in range(64):
            try:
                packet = self._hypervisor.receive()
            except BadMessage as error:
                LOG.warning(f"refused: {error}")
                continue
            except LinkClosed:
                self._selector.unregister(self._hypervisor)
                return  # its pidfd tells the rest
            if packet is None:
                return
            message, fds = packet
            try:
                self._obey(message, fds)
            except BadMessage as error:
                LOG.warning(f"refused: {error}")
            finally:
                close_all(fds)

    def _obey(self, message: object, fds: list[int]) -> None:
        if isinstance(message, Spawn):
            child = self.spawn(message, fds)
            uid = os.getuid() if child.uid is None else child.uid
            listener = self._listen(message.endpoint, uid) if message.endpoint else None
            self._tell(
                Started(id=message.id, pid=child.process.pid, uid=uid),
                [listener.fileno()] if listener is not None else [],
            )
            if listener is not None:
                listener.close()
        elif isinstance(message, Signal):
            child_or_none = self._children.get(message.id)
            if child_or_none is not None and child_or_none.process.returncode is None:
                number = {"stop": signal.SIGSTOP, "cont": signal.SIGCONT, "kill": signal.SIGKILL}[
                    message.what
                ]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child_or_none.process.pid, number)
        elif isinstance(message, Halt):
            self.ending = message.reason or "halt"

    def _ended(self, child: Child) -> None:
        status = child.process.wait()
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.link)
        child.link.close()
        if child.uid is not None and self._uids is not None:
            self._uids.give_back(child.uid)
        if child is self._hypervisor_child:
            tail = _tail(child.log)
            self.ending = f"the hypervisor ended with status {status}" + (f": {tail}" if tail else "")
        elif child.id is None:
            self._ready[child.role].remove(child)
            if self.ending is None:
                self.ending = (
                    f"a {child.role} process ended before it began (status {status}): {_tail(child.log)}"
                )
        else:
            del self._children[child.id]
            self._tell(Ended(id=child.id, status=status, text=_tail(child.log)))

    def _listen(self, endpoint: str, uid: int) -> socket.socket:
        """The listening socket of a domain's endpoint, which that domain's uid alone can reach."""
        path = self.runtime.bus / endpoint
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(0o600)
        if uid != os.getuid():
            os.chown(path, uid, uid)
        listener.listen(4)
        return listener

    def _tell(self, message: Started | Ended, descriptors: Sequence[int] = ()) -> None:
        assert self._hypervisor is not None
        try:
            self._hypervisor.send(message, descriptors)
        except LinkClosed:
            return
        except LinkFull:
            self.ending = "the hypervisor does not listen"

    def _end_all(self) -> None:
        every = [*self._children.values(), *(child for waiting in self._ready.values() for child in waiting)]
        # The hypervisor goes first: nothing then reacts to the others' ends.
        every.sort(key=lambda child: child is not self._hypervisor_child)
        for child in every:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_WAIT_S
        for child in every:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            child.link.close()
        for listener in self._listeners.values():
            listener.close()
        for _, fds in self._deposits.values():
            close_all(fds)
        if self._uids:
            self._uids.close()
        self._selector.close()


def _environment() -> dict[str, str]:
    """What a process of the machine sees of its starter's environment."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("DOMICILE_")}
    return {**kept, "PATH": os.defpath, "LANG": "C.UTF-8", "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}


def _tail(path: str, size: int = 3000) -> str:
    """The end of a process's log."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
