"""The hypervisor's links to processes that read nothing, or go away at the worst moment. The other end is a raw ZMTP client."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus import credentials, packets
from bus.addresses import DomId, Port, VcpuId
from bus.doorbell import Doorbell
from bus.messages.domain import Hello, Hypercall, HypercallReply, Report
from bus.messages.envelope import encode
from hypervisor.core import effects as fx
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.domains import DomainSpec, Kind
from hypervisor.shell import peers as module
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.peers import Peer, PeerLost
from hypervisor.shell.server import Server
from hypervisor.shell.trace_pages import TracePages
from tests.support.raw_zmtp import RawClient

FLOOD = 5000
GUEST, OTHER = DomId(1), DomId(2)


class Link:
    """A peer, and the process at its other end."""

    def __init__(self, directory: Path, domain: DomId) -> None:
        endpoint = directory / f"e{domain}"
        server, self.keys = credentials.make(f"ipc://{endpoint}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(endpoint))
        listener.listen(4)
        ours, self.descriptors = packets.pair()
        self.peer = Peer(domain, server, ours)
        self.peer.listen(listener)
        self.client: RawClient | None = None

    def connect(self) -> RawClient:
        """Shake hands and say hello."""
        found: list[RawClient] = []
        thread = threading.Thread(target=lambda: found.append(RawClient(self.keys)))
        thread.start()
        while thread.is_alive() or not found:
            ready = select.select(self.peer.descriptors(), [], [], 0.1)[0]
            for fd in ready:
                listener = self.peer.listener
                assert listener is not None
                if fd == listener.fileno():
                    self.peer.accept()
                else:
                    self.peer.receive(fd)
        thread.join()
        self.client = found[0]
        self.peer.connected = True
        return self.client

    def close(self) -> None:
        self.peer.close()
        self.descriptors.close()
        if self.client is not None:
            self.client.close()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    it = Link(tmp_path, GUEST)
    yield it
    it.close()


class FakeProcesses:
    """Nobody is started; what is signalled is noted."""

    def __init__(self) -> None:
        self.signals: list[tuple[DomId, str]] = []
        self._ends = socket.socketpair()

    def fileno(self) -> int:
        return self._ends[0].fileno()

    def of(self, domain: DomId) -> None:
        return None

    def signal(self, domain: DomId, what: str) -> None:
        self.signals.append((domain, what))

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A hypervisor whose domains have no processes of their own: the test is at the other end of their links."""
    memory, processes = MemfdMemory(), FakeProcesses()
    core = HypervisorCore(memory, MachineConfig())
    devices = SimpleNamespace(next_deadline=lambda: None, tick=lambda now: None)
    scheduler = SimpleNamespace(scheduler=SimpleNamespace(dirty=False))
    traces = TracePages()
    it = Server(
        core, memory, cast(Any, processes), cast(Any, devices), cast(Any, scheduler), traces, doorbells=True
    )
    for _ in range(2):
        core.lifecycle.create(0, SimpleNamespace(domid=DomId(0)), DomainSpec(Kind.NATIVE))  # type: ignore[arg-type]  # only its number is asked
    core.take_effects()
    yield it
    for peer in list(it.peers.values()):
        peer.close()
    memory.close()
    traces.close()
    processes.close()


def poll(server: Server) -> None:
    """What `run` does with what epoll says now."""
    for fd, events in server._epoll.poll(0):
        peer = server._by_fd.get(fd)
        if peer is not None:
            server._serve(peer, fd, events)


def add(server: Server, link: Link) -> RawClient:
    """The server serves this link, connected."""
    client = link.connect()
    server._add_peer(link.peer)
    for fd in link.peer.descriptors():
        if fd not in server._by_fd:
            server._by_fd[fd] = link.peer
            server._epoll.register(fd, select.EPOLLIN)
    return client


def test_events_of_a_flood_wait_once_each(link: Link) -> None:
    """A process that reads nothing for a while (Dom0 that unpacks a kernel) is not lost because another raises its ports all the time."""
    link.connect()
    for number in range(FLOOD):
        link.peer.raised([(number % 7, 0)])
        link.peer.look_at_lease()
    link.peer.raised([(port, 0) for port in range(FLOOD)])  # one batch of more events than a message may have
    for number in range(100):
        link.peer.send(HypercallReply(token=number, rc=0))


def test_messages_that_cannot_be_merged_are_still_bounded(link: Link) -> None:
    """A process that reads nothing is lost when too much waits."""
    link.connect()

    def flood() -> None:
        for number in range(20 * module.MAX_BACKLOG):
            link.peer.send(HypercallReply(token=number, rc=0))

    with pytest.raises(PeerLost):
        flood()


def test_descriptors_that_are_not_read_are_few(link: Link) -> None:
    """The kernel lets one user have so many descriptors under way as it may have open: a process that reads none of its own is lost
    long before it has used up what the hypervisor may send to all."""
    link.connect()
    fd = os.open("/dev/null", os.O_RDONLY)
    sent = 0

    def flood() -> None:
        nonlocal sent
        for _ in range(1000):
            link.peer.order(0, "grant_attach", {}, [fd] * 60)
            sent += 60

    with pytest.raises(PeerLost):
        flood()
    os.close(fd)
    assert 60 <= sent < 1500


def test_events_that_waited_are_all_told_in_order(link: Link) -> None:
    """Merged or not: each port at least once, and an event that was raised before a reply was sent comes before it."""
    link.peer.raised([(5, 0)])
    link.peer.send(HypercallReply(token=1, rc=0))
    link.peer.raised([(6, 1), (5, 0)])
    link.peer.raised([(7, 0)])
    link.peer.look_at_lease()
    link.peer.look_at_lease()
    waiting = []
    while link.peer._backlog:
        waiting.append(link.peer._next())
    texts = [raw.split(b"\xa6events")[-1] if b"raised" in raw else raw for raw in waiting]
    assert len(waiting) == 4
    assert b"hypercall_reply" in waiting[1]
    assert texts[0].endswith(b"\x91\x92\x05\x00")
    assert texts[2].endswith(b"\x92\x92\x06\x01\x92\x07\x00")
    assert b"lease" in waiting[3]
    link.peer.raised([(5, 0)])
    link.peer.look_at_lease()
    assert len(link.peer._backlog) == 2, "what was sent may be raised anew"


def test_a_process_that_goes_while_much_waits_for_it(server: Server, link: Link) -> None:
    """It reads nothing until the hypervisor waits for room, and then closes: its own end, not the hypervisor's."""
    client = add(server, link)
    while link.peer.write_fd is None:
        link.peer.send(HypercallReply(token=1, rc=0, data=bytes(20000)))
    server._watch(link.peer)
    client.close()
    for _ in range(10):
        poll(server)
    assert link.peer.write_fd is None


def test_binding_and_closing_all_the_time_does_not_fill_the_other_sides_sockets(
    server: Server, tmp_path: Path
) -> None:
    """The victim reads nothing meanwhile; it is still there, and the attacker's later channels go without doorbells."""
    victim, attacker = Link(tmp_path, GUEST), Link(tmp_path, OTHER)
    for one in (victim, attacker):
        add(server, one)
    for _ in range(2000):
        server.core.outbox.emit(fx.Bind(OTHER, Port(1), GUEST, Port(1)))
        server.core.outbox.emit(fx.Unbind(OTHER, Port(1)))
        server.core.outbox.emit(fx.Unbind(GUEST, Port(1)))
        server.core.outbox.emit(fx.Raise(GUEST, Port(1), VcpuId(0)))
        server._apply()
        attacker.descriptors.setblocking(False)
        while True:  # the attacker reads what it gets
            try:
                attacker.descriptors.recv(65536)
            except BlockingIOError:
                break
        assert attacker.client is not None
        attacker.client.socket.settimeout(0)
        while True:
            try:
                attacker.client.socket.recv(65536)
            except BlockingIOError:
                break
    assert GUEST in server.peers
    for one in (victim, attacker):
        one.close()


def test_no_descriptor_left_is_no_end_of_the_hypervisor(
    server: Server, link: Link, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A channel that gets no doorbell, or a process that cannot be started, costs those that it is about."""
    other = Link(tmp_path, OTHER)
    add(server, link)
    add(server, other)

    def none_left() -> tuple[Doorbell, Doorbell]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Doorbell, "pair", none_left)
    server.core.outbox.emit(fx.Bind(OTHER, Port(1), GUEST, Port(1)))
    server.core.outbox.emit(fx.StartProcess(GUEST, "domu"))
    server._apply()
    other.close()


def test_reports_are_limited(server: Server, link: Link, capfd: pytest.CaptureFixture[str]) -> None:
    """A process that reports without end fills neither the log nor Dom0's queue."""
    add(server, link)
    for number in range(2000):
        server._take(link.peer, Report(what="x", body={"number": number}))
    assert capfd.readouterr().err.count("\n") < 50
    server._take(link.peer, Hello(pid=1, role="domu"))


def test_a_peer_whose_calls_take_long_does_not_hold_the_others(
    server: Server, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends many at once, each of which costs the hypervisor much: they are served a few a turn, in their order, and all of them."""
    other = Link(tmp_path, OTHER)
    slow, fast = add(server, link), add(server, other)
    served: list[tuple[DomId, int]] = []

    def obey(peer: Peer, message: Any) -> None:
        served.append((peer.domain, message.token))
        if peer.domain == GUEST:
            time.sleep(0.003)

    monkeypatch.setattr(server, "_obey", obey)
    calls = [Hypercall(token=token, vcpu=0, nr=1, cmd=0) for token in range(100)]
    slow.socket.sendall(b"".join(slow.message(encode(call)) for call in calls))
    fast.socket.sendall(fast.message(encode(Hypercall(token=1, vcpu=0, nr=1, cmd=0))))
    poll(server)
    assert (OTHER, 1) in served
    assert len(served) < 20
    for _ in range(100):
        server._turns()
        poll(server)
    assert [token for domain, token in served if domain == GUEST] == list(range(100))
    other.close()
