"""Carries out faults on real processes: a thread that processes with an observer wake when a fault is due.

While the observer waits for the answer nothing of it goes on, so a kill strikes at the very event. Signals are sent by this process,
which started the machine: as root, or as the user whose processes they are."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from simulation.live.edge import HELLO, TIMED, Board
from simulation.live.plan import HYPERVISORS, PASSIVE, Fault, What

SIGNALS: Final = {What.KILL: signal.SIGKILL, What.SEGFAULT: signal.SIGSEGV, What.FREEZE: signal.SIGSTOP}
SLICE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that happened."""

    fault: Fault
    at: float
    """time.monotonic()"""
    pids: tuple[int, ...]
    """Processes that it hit; none for a fault of a message, and none if there was no such process."""


class Faults:
    """One machine's plan: `add` at any time; `struck` says what happened. Made before the machine, closed after it."""

    def __init__(self) -> None:
        self.directory: Final = tempfile.mkdtemp(prefix="domicile-faults-")
        Board.create(self.directory)
        self.board: Final = Board(self.directory)
        self._faults: list[Fault] = []
        self.struck: list[Struck] = []
        self._frozen: set[int] = set()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(Path(self.directory) / "control"))
        self._listener.listen(64)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._woken, selectors.EVENT_READ, "wake")
        self._hypervisor: socket.socket | None = None
        """Its observer's connection."""
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What the machine's processes must see."""
        return {"DOMICILE_FAULTS": self.directory}

    # ------------------------------------------------------------------ plans

    def add(self, what: What | str, **fields: Any) -> Fault:
        """One more fault, from now on: `add("kill", target="domio", event="grant:map", n=3)`. Events that happened before do not
        count. ValueError (pydantic's) names what does not fit."""
        fault = Fault(what=What(what), **fields)
        with self._lock:
            self._faults.append(fault)
            self.board.write_plan(self._faults)
            index = len(self._faults) - 1
        if fault.at_ms is not None:
            self._later(fault.at_ms / 1000, lambda: self._timed(index))
        return fault

    def hit(self, fault: Fault) -> bool:
        """Whether it struck, at its event and not later."""
        return any(one.fault is fault for one in self.struck) and not self.missed(fault)

    def missed(self, fault: Fault) -> bool:
        """Its event came, and it was not carried out in time (simulation.live.edge.ANSWER_S: a very busy host)."""
        return self.board.missed(self._index(fault))

    def counted(self, fault: Fault) -> int:
        """How often its event was seen."""
        return self.board.counts(self._index(fault))[0]

    def _index(self, fault: Fault) -> int:
        return next(at for at, one in enumerate(self._faults) if one is fault)

    def wait(
        self, fault: Fault, poll: Callable[[float], object] = time.sleep, timeout: float = 30.0
    ) -> Struck:
        """Until it struck; `poll` is called meanwhile. AssertionError."""
        deadline = time.monotonic() + timeout
        while not self.hit(fault):
            if self.missed(fault):
                raise AssertionError(
                    f"{fault.what} at {fault.event}: not carried out in time: the host is too busy"
                )
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{fault.what} at {fault.event or fault.at_ms}: not within {timeout:g} s "
                    f"(its event was seen {self.counted(fault)} times)"
                )
            poll(0.02)
        return next(one for one in self.struck if one.fault is fault)

    def pids(self, target: str) -> list[int]:
        """Processes of a role, or the one that `ROLE:NUMBER` names."""
        table = self.board.read_table()
        return [pid for name, (role, pid) in sorted(table.items()) if target in (role, name)]

    def thaw(self) -> None:
        """SIGCONT to all that are frozen."""
        for pid in list(self._frozen):
            self._signal(pid, signal.SIGCONT)
        self._frozen.clear()

    def _thaw_one(self, pid: int) -> None:
        self._frozen.discard(pid)
        self._signal(pid, signal.SIGCONT)

    # ------------------------------------------------------------------ the thread

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), action))
        with contextlib.suppress(OSError):
            self._wake.send(b"w")

    def _run(self) -> None:
        while not self._ending:
            with self._lock:
                due = self._timers[0][0] if self._timers else None
            timeout = None if due is None else max(0.0, due - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.data == "listener":
                    connection, _ = self._listener.accept()
                    self._selector.register(connection, selectors.EVENT_READ, "observer")
                elif key.data == "wake":
                    self._woken.recv(64)
                else:
                    self._heard(key.fileobj)  # type: ignore[arg-type]  # a socket
            while True:
                with self._lock:
                    if not self._timers or self._timers[0][0] > time.monotonic():
                        break
                    action = heapq.heappop(self._timers)[2]
                action()

    def _heard(self, connection: socket.socket) -> None:
        try:
            packet = connection.recv(16)
        except OSError:
            packet = b""
        if len(packet) != 8:
            self._selector.unregister(connection)
            connection.close()
            if connection is self._hypervisor:
                self._hypervisor = None
            return
        index, pid = struct.unpack("<II", packet)
        if index == HELLO:
            self._hypervisor = connection
            return
        if index & TIMED:  # the hypervisor has done what its time had come for
            self._done(index & ~TIMED)
            return
        if index < len(self._faults) and not self.board.missed(index):  # else the event is long over
            self._strike(self._faults[index], pid)
        with contextlib.suppress(OSError):
            connection.send(struct.pack("<I", index))

    def _timed(self, index: int) -> None:
        fault = self._faults[index]
        if fault.what not in HYPERVISORS:
            self.board.mark(index)
            self._strike(fault, 0)
            return
        try:
            if self._hypervisor is None:
                raise OSError("no hypervisor runs")
            self._hypervisor.send(struct.pack("<I", index | TIMED))
        except OSError:
            self.board.miss(index)

    def _done(self, index: int) -> None:
        if index < len(self._faults) and not self.board.counts(index)[1]:
            self.board.mark(index)
            self._strike(self._faults[index], 0)

    def _strike(self, fault: Fault, observer: int) -> None:
        pids: list[int] = []
        if fault.what not in PASSIVE and fault.what not in HYPERVISORS:
            pids = self._hit(fault, observer)
        self.struck.append(Struck(fault, time.monotonic(), tuple(pids)))

    def _hit(self, fault: Fault, observer: int) -> list[int]:
        if fault.what is What.DEVICE_ERROR:
            self.board.fail += fault.count
            return []
        pids = self.pids(fault.target)
        for pid in pids:
            if fault.what is What.POWER_CUT:
                if pid != observer:  # the device itself does it as soon as it has the answer
                    self._signal(pid, signal.SIGUSR1)
            elif fault.what is What.SLOW:
                self._slow(pid, fault, time.monotonic() + fault.for_ms / 1000)
            else:
                self._signal(pid, SIGNALS[fault.what])
                if fault.what is What.FREEZE:
                    self._frozen.add(pid)
                    if fault.for_ms:
                        self._later(fault.for_ms / 1000, partial(self._thaw_one, pid))
        return pids

    def _slow(self, pid: int, fault: Fault, end: float) -> None:
        """Stopped, but for one slice in `factor`."""
        if time.monotonic() >= end or not self._signal(pid, signal.SIGSTOP):
            self._signal(pid, signal.SIGCONT)
            return

        def run() -> None:
            self._signal(pid, signal.SIGCONT)
            self._later(SLICE_S, lambda: self._slow(pid, fault, end))

        self._later(SLICE_S * (fault.factor - 1), run)

    @staticmethod
    def _signal(pid: int, number: int) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """After the machine."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._wake.send(b"w")
        self._thread.join(5.0)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
        self._selector.close()
        self._wake.close()
        self.board.close()
        shutil.rmtree(self.directory, ignore_errors=True)
