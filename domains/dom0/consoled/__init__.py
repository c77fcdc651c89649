"""consoled: each guest console to a pseudo-terminal, a log file, and whoever attached to it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import tty
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bus.addresses import DomId, Port
from domains.native.domain import GrantMapping, HypercallError, NativeDomain
from domains.native.reactor import Reactor
from drivers.console.ring import BackendRing

SCROLLBACK: Final = 256 * 1024
"""Bytes of a console that somebody who attaches later is shown."""
LOG_LIMIT: Final = 64 << 20
"""Bytes after which a console's log file starts anew (the old one is kept as .1)."""
INPUT_LIMIT: Final = 1 << 20
TAKES_AT_ONCE: Final = 16
"""Rings full of output that are taken before others get their turn: a guest can put more in as fast as it is taken out."""
Listener = Callable[[bytes], None]


class Terminal(ABC):
    """A line of a domain: a pseudo-terminal, a log file, and listeners."""

    def __init__(self, reactor: Reactor, name: str, log_path: Path) -> None:
        """Opens the pseudo-terminal and the log."""
        self._reactor = reactor
        self.name = name
        self._input = bytearray()
        self._listeners: list[Listener] = []
        self.scrollback = bytearray()
        self.bytes_out = 0
        self._closed = False
        self._master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        os.set_blocking(self._master, False)
        self.tty = os.ttyname(self.slave)
        self._log_path = log_path
        self._log = os.open(self._log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o640)
        reactor.reader(self._master, self._from_pty)

    @abstractmethod
    def poll(self) -> None:
        """Move bytes both ways."""

    @abstractmethod
    def disconnect(self) -> None:
        """The domain is gone, or starts anew."""

    def output(self, data: bytes) -> None:
        """The guest wrote this."""
        self.bytes_out += len(data)
        self.scrollback += data
        if len(self.scrollback) > 2 * SCROLLBACK:
            del self.scrollback[:-SCROLLBACK]
        with contextlib.suppress(OSError):  # a full disk loses log lines, never the guest
            os.write(self._log, data)
            if os.fstat(self._log).st_size > LOG_LIMIT:
                os.replace(self._log_path, str(self._log_path) + ".1")
                os.close(self._log)
                self._log = os.open(
                    self._log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o640
                )
        for listener in list(self._listeners):
            listener(data)
        # The pseudo-terminal keeps what it has room for; nobody may be reading it.
        with contextlib.suppress(OSError):
            os.write(self._master, data)

    def _from_pty(self) -> None:
        try:
            data = os.read(self._master, 4096)
        except OSError:
            return
        self.type(data)

    def type(self, data: bytes) -> int:
        """Input for the guest; how many bytes were taken (the rest finds no room)."""
        count = min(len(data), INPUT_LIMIT - len(self._input))
        self._input += data[:count]
        self.poll()
        return count

    def attach(self, listener: Listener) -> None:
        """Give `listener` everything from now on."""
        self._listeners.append(listener)

    def detach(self, listener: Listener) -> None:
        """No more."""
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def close(self) -> None:
        """Disconnect and close the pseudo-terminal and the log. Once: the numbers of closed descriptors are soon others'."""
        if self._closed:
            return
        self._closed = True
        try:
            self.disconnect()
        finally:
            self._reactor.forget(self._master)
            for fd in (self._master, self.slave, self._log):
                os.close(fd)


class Console(Terminal):
    """One domain's PV console."""

    def __init__(self, host: NativeDomain, domid: DomId, name: str, directory: Path) -> None:
        """The ring comes with `connect`."""
        super().__init__(host.reactor, name, directory / f"guest-{file_name(name)}.log")
        self._host = host
        self.domid = domid
        self._ring: BackendRing | None = None
        self._mapping: GrantMapping | None = None
        self._port: Port | None = None
        self.broken = False

    def connect(self, mapping: GrantMapping, remote_port: Port) -> None:
        """The guest's ring page and event channel."""
        self._mapping = mapping
        self._ring = BackendRing(mapping.pages[0])
        self._port = self._host.bind_interdomain(self.domid, remote_port, self.poll)
        self.poll()

    def poll(self) -> None:
        """Move bytes both ways."""
        ring = self._ring
        if ring is None or self.broken:
            return
        notify = False
        for _ in range(TAKES_AT_ONCE):
            taken = ring.take()
            if taken.broken:
                self.broken = True
                return
            if not taken.data:
                break
            notify = True
            self.output(taken.data)
        else:
            self._host.reactor.soon(self.poll)
        if self._input:
            put = ring.put(bytes(self._input[:4096]))
            del self._input[: put.taken]
            notify = notify or put.notify
        if notify and self._port is not None:
            self._host.notify(self._port)

    def disconnect(self) -> None:
        """The domain is gone, or starts anew: take what is left in the ring, then give it back. A domain that died while its ring was
        being given back is no error."""
        self.poll()
        ring, port, mapping = self._ring, self._port, self._mapping
        self._ring = self._port = self._mapping = None
        self.broken = False
        if ring is not None:
            ring.release()
        if port is not None:
            self._host.close_port(port)
        if mapping is not None:
            with contextlib.suppress(HypercallError):
                self._host.unmap_grants(mapping)


class SerialLine(Terminal):
    """The serial line of a domain with a device model, which is at the other end of `send`."""

    def __init__(self, reactor: Reactor, name: str, directory: Path) -> None:
        """Input waits until `send` is set."""
        super().__init__(reactor, name, directory / f"guest-{file_name(name)}-serial.log")
        self.send: Callable[[bytes], bool] | None = None
        """Takes input for the guest; False: not now, and `poll` is called when it can."""

    def poll(self) -> None:
        """See Terminal."""
        while self._input and self.send is not None:
            chunk = bytes(self._input[:4096])
            if not self.send(chunk):
                return
            del self._input[: len(chunk)]

    def disconnect(self) -> None:
        """See Terminal."""
        self.send = None


def file_name(name: str) -> str:
    """A domain's name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
