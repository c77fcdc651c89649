"""Processes of domains, through the warden: who runs, under which process id, and what follows when one starts or ends."""

from __future__ import annotations

import itertools
import secrets
import socket
from dataclasses import dataclass
from typing import Any

from bus import credentials, trace_page
from bus.addresses import DomId
from bus.messages.device import FROM_ANY_DOMAIN
from bus.messages.envelope import BadMessage, Registry
from bus.messages.warden import FROM_WARDEN, Ended, Halt, Signal, Spawn, Started
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, pair
from bus.process_view import ProcessView
from hypervisor.shell.heartbeat import is_stopped
from hypervisor.shell.leases import cpu_clock
from hypervisor.shell.peers import Peer


class WardenGone(ConnectionError):
    """The warden does not answer: the machine cannot go on."""


@dataclass(slots=True)
class Running:
    """The process of one domain."""

    domain: DomId
    role: str
    process: int
    pid: int = 0
    uid: int = 0
    view: ProcessView | None = None
    """Where it runs in another pid namespace: what there is to see of it from here."""
    started: bool = False
    """The warden has started it (in containers it may wait for one that is free)."""

    def cpu_ns(self) -> int | None:
        """CPU time of all its threads; None before it is known to run."""
        if self.view is not None:
            return self.view.cpu_ns()
        return cpu_clock(self.pid) if self.pid else None

    def stopped(self) -> bool:
        """It is stopped by a signal."""
        return self.view.stopped() if self.view is not None else is_stopped(self.pid)


class Processes:
    """Starts domains' processes and follows them."""

    def __init__(self, warden: socket.socket, bus_directory: str, transport: str = "ipc") -> None:
        """`transport`: 'ipc' (sockets in `bus_directory`) or 'tcp' (loopback)."""
        self._link = PacketLink(warden, FROM_WARDEN)
        self._directory = bus_directory
        self._transport = transport
        self._ids = itertools.count(1)
        self._by_domain: dict[DomId, Running] = {}
        self._by_id: dict[int, Running] = {}

    def fileno(self) -> int:
        """For poll."""
        return self._link.fileno()

    def of(self, domain: DomId) -> Running | None:
        """The running processes of a domain."""
        return self._by_domain.get(domain)

    def started(self, domain: DomId) -> bool:
        """The warden has started its process (in containers it may wait for one that is free)."""
        running = self._by_domain.get(domain)
        return running is not None and running.started

    def start(
        self,
        domain: DomId,
        role: str,
        settings: dict[str, Any],
        name: str = "",
        kinds: Registry = FROM_ANY_DOMAIN,
        trace: int | None = None,
        kind: str = "",
    ) -> Peer:
        """Start its process; the returned peer queues until the process says hello. WardenGone.

        `trace`: the descriptor of its trace page, which stays the caller's.
        Over ipc its listening socket comes with `Started`; over tcp this process listens itself."""
        ours, theirs = pair()
        endpoint, listener = f"{domain}-{secrets.token_hex(4)}", None
        if self._transport == "tcp":
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(4)
            server, client = credentials.make(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        else:
            server, client = credentials.make(f"ipc://{self._directory}/{endpoint}")
        keys = credentials.to_descriptor(client)
        running = Running(domain, role, next(self._ids))
        given = {"keys": keys, "descriptors": theirs.fileno()}
        if trace is not None:
            given[trace_page.NAME] = trace
        try:
            self._send(
                Spawn(
                    id=running.process,
                    role=role,
                    name=name or f"d{domain}",
                    domain=domain,
                    fds=list(given),
                    settings=settings,
                    endpoint="" if listener else endpoint,
                    kind=kind,
                ),
                list(given.values()),
            )
        finally:
            close_all([keys])
            theirs.close()
        self._by_domain[domain] = running
        self._by_id[running.process] = running
        peer = Peer(domain, server, ours, kinds)
        if listener is not None:
            peer.listen(listener)
        return peer

    def signal(self, domain: DomId, what: str) -> None:
        """Stop, continue or kill a domain's process."""
        running = self._by_domain.get(domain)
        if running is not None:
            self._send(Signal(id=running.process, what=what))  # type: ignore[arg-type]  # validated by the model

    def halt(self, reason: str) -> None:
        """End the machine."""
        self._send(Halt(reason=reason[:400]))

    def receive(self) -> tuple[Running, Ended | None, socket.socket | None] | None:
        """The next process that ended (with how), or started (with its listening socket, if the warden made one); None if
        nothing waits. WardenGone."""
        while True:
            try:
                packet = self._link.receive()
            except (LinkClosed, BadMessage) as error:
                raise WardenGone(str(error)) from None
            if packet is None:
                return None
            message, fds = packet
            if isinstance(message, Started) and message.id in self._by_id:
                running = self._by_id[message.id]
                running.pid, running.uid, running.started = message.pid, message.uid, True
                return running, None, self._take(running, dict(zip(message.fds, fds, strict=False)), fds)
            close_all(fds)
            if isinstance(message, Ended) and message.id in self._by_id:
                running = self._by_id.pop(message.id)
                if running.view is not None:
                    running.view.close()
                if self._by_domain.get(running.domain) is running:
                    del self._by_domain[running.domain]
                return running, message, None

    def _take(self, running: Running, named: dict[str, int], fds: list[int]) -> socket.socket | None:
        """The descriptors that came with `Started`: its listening socket, and what shows the process."""
        listener = socket.socket(fileno=named["listener"]) if "listener" in named else None
        if "stat" in named and "schedstat" in named and running.view is None:
            try:
                running.view = ProcessView(named["stat"], named["schedstat"])
            except ValueError:  # its number means nothing here: nothing is known of it
                running.pid = 0
        else:
            close_all([fd for fd in fds if listener is None or fd != listener.fileno()])
        return listener

    def _send(self, message: Spawn | Signal | Halt, fds: list[int] | None = None) -> None:
        try:
            self._link.send(message, fds or [])
        except (LinkClosed, LinkFull) as error:
            raise WardenGone(str(error)) from None
