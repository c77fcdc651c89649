"""Starting, stopping and ending processes on the hypervisor's order, and reporting their ends.

The warden is small and looks at no guest's data. `Warden` is what it does for the hypervisor and for Dom0, wherever processes run;
`LocalWarden` is their parent and alone may signal them, where each has a uid of its own; `toolstack.warden.central` has them run in
containers. It ends with its owner (the command, for `domicile run`) or on `Halt`, and takes every process with it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bus.log import Logger
from bus.messages.envelope import BadMessage, Message
from bus.messages.warden import (
    FROM_DOM0,
    TO_WARDEN,
    Deposit,
    Deposited,
    Ended,
    Halt,
    Signal,
    Spawn,
    Started,
)
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, pair
from toolstack.warden import children
from toolstack.warden.children import MODULES, Child
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.uids import UidBlock, end_all

LOG: Final = Logger("warden")
PRESTARTED: Final = {"dom0": 1, "domu": 1}
"""How many processes of a role load their code before anybody asks for them: what `domicile run` will need."""

MAX_DEPOSITS: Final = 256
BURST: Final = 64
"""Messages taken from one link at a time."""
UID_LOCKS: Final = Path("/run/domicile/.uids")
"""Blocks of user ids are locked here, in one place for all machines of the host, wherever their directories are."""
LOOK_S: Final = 0.5
LOG_LIMIT: Final = 64 << 20
"""Bytes after which a process's log begins anew."""
HYPERVISOR_ID: Final = 0


class Warden(ABC):
    """The machine's process table, as the hypervisor and Dom0 see it."""

    def __init__(self, runtime: RuntimeDirectory, listeners: dict[str, socket.socket]) -> None:
        """`listeners` go to Dom0."""
        self.runtime = runtime
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._hypervisor: PacketLink | None = None
        self._dom0: PacketLink | None = None
        self._deposits: dict[str, tuple[Deposit, list[int]]] = {}
        self.ending: str | None = None

    # ------------------------------------------------------------------ where processes run

    @abstractmethod
    def _spawn(self, order: Spawn, descriptors: Sequence[int]) -> None:
        """Have that process run; the descriptors stay the caller's. `_started` and `_ended` tell of it. BadMessage."""

    @abstractmethod
    def _signal(self, order: Signal) -> None:
        """Send a signal to a process, if it runs."""

    @abstractmethod
    def _admit(self, path: Path, owner: int) -> None:
        """Have that process's uid, and nobody else but this one, reach a socket."""

    @abstractmethod
    def _dom0_directories(self) -> dict[str, str]:
        """Directories that Dom0's process may write: 'consoles' and 'state'."""

    @abstractmethod
    def _end_all(self) -> None:
        """End every process, within a bound."""

    def _idle(self) -> float:
        """Do what is due; seconds until something may be due again."""
        return 60.0

    # ------------------------------------------------------------------ what the hypervisor wants

    def start_hypervisor(self, settings: dict[str, Any]) -> None:
        """The first process of a machine."""
        ours, theirs = pair()
        self._hypervisor = PacketLink(ours, TO_WARDEN)
        order = Spawn(
            id=HYPERVISOR_ID,
            role="hypervisor",
            name="hypervisor",
            domain=0xFFFFFFFF,
            fds=["warden"],
            settings=settings,
        )
        self._spawn(order, [theirs.fileno()])
        theirs.close()
        self._register(self._hypervisor, self._serve)

    def watch(self, fd: int) -> None:
        """End the machine when this descriptor reports an end: the owner went away."""

        def gone() -> None:
            self.ending = "the owner went away"

        self._register(fd, gone)

    def _register(self, fd: int | PacketLink | socket.socket, handler: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def run(self) -> str:
        """Serve until the machine ends; why it ended. All processes are gone then."""
        try:
            while self.ending is None:
                for key, _ in self._selector.select(self._idle()):
                    if key.fd in self._selector.get_map():  # not taken out by a handler before
                        key.data()
        finally:
            self._end_all()
            for listener in self._listeners.values():
                listener.close()
            for _, fds in self._deposits.values():
                close_all(fds)
            self._selector.close()
        return self.ending

    def complete(self, order: Spawn, descriptors: Sequence[int]) -> tuple[Spawn, list[int], list[int]]:
        """The order with all that this process is to be given: (order, descriptors, those of them to close afterwards)."""
        settings = dict(order.settings)
        names, fds = list(order.fds), list(descriptors)
        own: list[int] = []
        if order.name in self._deposits:
            deposit, deposited = self._deposits[order.name]
            names += deposit.fds
            fds += deposited
            settings = {**settings, **deposit.settings}
        if order.role == "dom0":
            ours, theirs = pair()
            self._close_dom0()
            self._dom0 = PacketLink(ours, FROM_DOM0)
            self._register(self._dom0, self._deposit)
            own.append(theirs.detach())
            names.append("warden")
            fds += own
            for name, listener in self._listeners.items():
                names.append(name)
                fds.append(listener.fileno())
            settings |= self._dom0_directories()
        return order.model_copy(update={"fds": names, "settings": settings}), fds, own

    def _close_dom0(self) -> None:
        if self._dom0 is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._dom0)
            self._dom0.close()
            self._dom0 = None

    def _deposit(self) -> None:
        """Keep what Dom0 gives for a device's process."""
        assert self._dom0 is not None
        try:
            packet = self._dom0.receive()
        except BadMessage as error:
            LOG.warning(f"refused: {error}")
            return
        except LinkClosed:
            self._close_dom0()
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
            self._dom0.send(Deposited(name=message.name))

    def _serve(self) -> None:
        assert self._hypervisor is not None
        for _ in range(BURST):
            try:
                packet = self._hypervisor.receive()
            except BadMessage as error:
                LOG.warning(f"refused: {error}")
                continue
            except LinkClosed:
                self._selector.unregister(self._hypervisor)
                return  # that its process ended is told otherwise
            if packet is None:
                return
            message, fds = packet
            try:
                self._obey(message, fds)
            except BadMessage as error:
                LOG.warning(f"refused: {error}")
            finally:
                close_all(fds)

    def _obey(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Spawn):
            self._spawn(message, fds)
        elif isinstance(message, Signal):
            self._signal(message)
        elif isinstance(message, Halt):
            self.ending = message.reason or "halt"

    # ------------------------------------------------------------------ what the hypervisor is told

    def listen(self, endpoint: str, owner: int) -> socket.socket:
        """The listening socket of a domain's endpoint, which that domain's process alone can reach."""
        path = self.runtime.bus / endpoint
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(0o600)
        self._admit(path, owner)
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


class LocalWarden(Warden):
    """All processes are children of this one."""

    def __init__(
        self, runtime: RuntimeDirectory, *, own_uids: bool, listeners: dict[str, socket.socket]
    ) -> None:
        """`own_uids`: give each process a uid of its own (needs root)."""
        super().__init__(runtime, listeners)
        self._uids = UidBlock(UID_LOCKS) if own_uids else None
        self._ready: dict[str, list[Child]] = {}
        self._children: dict[int, Child] = {}
        self._serial = 0
        self._dom0_uid: int | None = None
        self._looked = 0.0

    def _start(self, role: str) -> Child:
        """A process of that role that will wait for its `Begin`."""
        uid = self._uids.take() if self._uids else None
        self._serial += 1
        child = children.start(role, str(self.runtime.logs / f"{role}-{self._serial}.log"), uid)
        self._register(child.pidfd, lambda: self._ended(child))
        return child

    def prestart(self) -> None:
        """Have the usual processes load their code now."""
        for role, count in PRESTARTED.items():
            waiting = self._ready.setdefault(role, [])
            while len(waiting) < count:
                waiting.append(self._start(role))

    def _spawn(self, order: Spawn, descriptors: Sequence[int]) -> None:
        if order.role not in MODULES:
            raise BadMessage(f"no such role: {order.role}")
        if order.id in self._children:
            raise BadMessage(f"process id {order.id} is in use")
        waiting = self._ready.get(order.role, [])
        child = waiting.pop(0) if waiting else self._start(order.role)
        self._children[order.id] = child
        if order.role == "dom0":
            self._dom0_uid = child.uid
        full, fds, own = self.complete(order, descriptors)
        child.begin(full, full.settings, fds)
        close_all(own)
        if order.id == HYPERVISOR_ID:
            return
        uid = os.getuid() if child.uid is None else child.uid
        listener = self.listen(order.endpoint, uid) if order.endpoint else None
        child.endpoint = self.runtime.bus / order.endpoint if order.endpoint else None
        started = Started(
            id=order.id, pid=child.process.pid, uid=uid, fds=["listener"] if listener is not None else []
        )
        self._tell(started, [listener.fileno()] if listener is not None else [])
        if listener is not None:
            listener.close()

    def _signal(self, order: Signal) -> None:
        child = self._children.get(order.id)
        if child is not None:
            child.signal(order.what)

    def _admit(self, path: Path, owner: int) -> None:
        if owner != os.getuid():
            os.chown(path, owner, owner)

    def _dom0_directories(self) -> dict[str, str]:
        for path in (self.runtime.consoles, self.runtime.state):
            if self._dom0_uid is not None:
                os.chown(path, self._dom0_uid, self._dom0_uid)
        return {"consoles": str(self.runtime.consoles), "state": str(self.runtime.state)}

    def _idle(self) -> float:
        """Empty the logs that have grown too long, a few times a second at the most: a domain writes to its own what it likes, and they
        are on the host's /run. (They are opened for appending.)"""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return LOOK_S
        self._looked = now
        for child in [*self._children.values(), *(c for waiting in self._ready.values() for c in waiting)]:
            with contextlib.suppress(OSError):
                if os.stat(child.log).st_size > LOG_LIMIT:
                    os.truncate(child.log, 0)
        return LOOK_S

    def _ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        status, tail = child.reap()
        if child.endpoint is not None:
            with contextlib.suppress(OSError):
                child.endpoint.unlink()
        if child.uid is not None and self._uids is not None:
            if end_all({child.uid}):  # whatever it forked goes with it
                self._uids.give_back(child.uid)
            else:
                LOG.warning("processes do not end: their uid is not used again", uid=child.uid)
        if child.id == HYPERVISOR_ID:
            self.ending = f"the hypervisor ended with status {status}" + (f": {tail}" if tail else "")
            del self._children[HYPERVISOR_ID]
        elif child.id is None:
            self._ready[child.role].remove(child)
            if self.ending is None:
                self.ending = f"a {child.role} process ended before it began (status {status}): {tail}"
        else:
            del self._children[child.id]
            self._tell(Ended(id=child.id, status=status, text=tail))

    def _end_all(self) -> None:
        every = [*self._children.values(), *(child for waiting in self._ready.values() for child in waiting)]
        # The hypervisor goes first: nothing then reacts to the others' ends.
        every.sort(key=lambda child: child.id != HYPERVISOR_ID)
        children.end_all(every)
        if self._uids:
            end_all({child.uid for child in every if child.uid is not None})
            self._uids.close()
