"""Packets, sealed memory, doorbells, credentials: descriptors arrive, nothing leaks, nothing blocks."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from bus import credentials, link, sealed
from bus.doorbell import Doorbell
from bus.link import DomainLink
from bus.messages.domain import FROM_DOMAIN, Hypercall, HypercallReply, Raised
from bus.messages.envelope import MAX_MESSAGE, BadMessage, Message, decode, encode
from bus.messages.warden import TO_WARDEN, Halt, Signal, Spawn
from bus.packets import LinkClosed, LinkFull, PacketLink, pair


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def links() -> tuple[PacketLink, PacketLink]:
    left, right = pair()
    return PacketLink(left, TO_WARDEN), PacketLink(right, TO_WARDEN)


def test_message_and_descriptors_arrive() -> None:
    """A descriptor that was sent refers to the same memory at the other end."""
    left, right = links()
    fd = sealed.create("test", 4096)
    left.send(Spawn(id=1, role="domu", name="d1", domain=1, fds=["memory"]), [fd])
    os.pwrite(fd, b"seen", 0)
    packet = right.receive()
    assert packet is not None
    message, fds = packet
    assert isinstance(message, Spawn)
    assert message.fds == ["memory"]
    assert os.pread(fds[0], 4, 0) == b"seen"
    for each in (fd, *fds):
        os.close(each)
    left.close()
    right.close()


def test_descriptors_of_a_bad_message_are_closed() -> None:
    """A message that does not validate leaves no descriptor behind."""
    left, right = links()
    fd = sealed.create("test", 4096)
    before = descriptors()
    left.send_raw(b"\xc1 garbage", [fd, fd, fd])
    with pytest.raises(BadMessage):
        right.receive()
    assert descriptors() == before
    os.close(fd)
    left.close()
    right.close()


def test_link_without_descriptors_receives_none() -> None:
    """Where descriptors are not wanted, a peer cannot push any into this process."""
    a, b = pair()
    left, right = PacketLink(a, TO_WARDEN), PacketLink(b, TO_WARDEN, descriptors=False)
    fd = sealed.create("test", 4096)
    before = descriptors()
    left.send(Halt(reason="x"), [fd] * 60)
    packet = right.receive()
    assert packet == (Halt(reason="x"), [])
    assert descriptors() == before
    os.close(fd)
    left.close()
    right.close()


def fill(link: PacketLink) -> None:
    for _ in range(10_000):
        link.send_raw(b"x" * (MAX_MESSAGE // 2))


def test_full_link_says_so_and_does_not_block() -> None:
    """A peer that does not read is noticed, without waiting."""
    left, right = links()
    with pytest.raises(LinkFull):
        fill(left)
    left.close()
    right.close()


def test_closed_link_says_so() -> None:
    """Both directions report a peer that is gone."""
    left, right = links()
    right.close()
    with pytest.raises(LinkClosed):
        left.receive()
    with pytest.raises(LinkClosed):
        left.send(Signal(id=1, what="kill"))
    left.close()


def test_a_burst_is_bounded_and_ends_with_the_link() -> None:
    """Others have their turn; nonsense is told of and the rest is taken; whoever takes may close the link within."""
    left, right = links()
    told: list[str] = []

    def burst(most: int) -> list[int]:
        taken = right.burst(most, lambda error: told.append("refused"), lambda: told.append("closed"))
        return [message.id for message, _ in taken if isinstance(message, Signal)]

    for number in range(5):
        left.send(Signal(id=number, what="kill"))
    left.send_raw(b"\xc1")
    left.send(Signal(id=9, what="kill"))
    assert burst(3) == [0, 1, 2]
    assert burst(3) == [3, 4], "nonsense counts"
    assert told == ["refused"]
    for message, _ in right.burst(9, lambda error: None, lambda: told.append("closed")):
        assert message == Signal(id=9, what="kill")
        right.close()
    assert told == ["refused"]
    left, right = links()
    left.close()
    assert burst(3) == []
    assert told == ["refused", "closed"]
    right.close()


def test_sealed_memory_cannot_be_resized() -> None:
    """Neither shrunk (which would make holders of a mapping crash) nor grown, nor unsealed."""
    fd = sealed.create("test", 8192)
    for size in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, sealed.F_ADD_SEALS, 8)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    os.close(fd)


def test_read_only_descriptor_cannot_write() -> None:
    """Not by write, and not by a shared writable mapping."""
    fd = sealed.create("test", 4096)
    ro = sealed.read_only(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(ro, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(ro, 4096)
    os.close(fd)
    os.close(ro)


def test_check_refuses_what_could_fault_later(tmp_path: Path) -> None:
    """A plain file, an unsealed memfd and a wrong size are all refused before they are mapped."""
    plain = os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR)
    os.ftruncate(plain, 4096)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    good = sealed.create("good", 4096)
    for fd, size in ((plain, 4096), (loose, 4096), (good, 8192)):
        with pytest.raises(ValueError, match="memfd"):
            sealed.check(fd, size)
    sealed.check(good, 4096)
    for fd in (plain, loose, good):
        os.close(fd)


def test_doorbell_survives_a_peer_that_fills_it() -> None:
    """However often it was rung before, a ring neither blocks nor is lost, and a listener takes them all in a bounded number of looks."""
    ringer, listener = Doorbell.pair()
    for _ in range(10_000):
        ringer.ring()
    looks = 0
    while listener.take():
        looks += 1
    assert 0 < looks < 10
    ringer.ring()
    assert listener.take()
    assert not listener.take()
    ringer.close()
    listener.close()


@pytest.mark.parametrize("what", ["ring", "take"])
def test_a_peer_that_changes_flags_all_the_time_blocks_nobody(what: str) -> None:
    """The other side holds descriptors of the same bell: it makes them blocking, over and over, and fills or drains them. Whoever rings
    or takes on a thread that serves others is back at once each time."""
    ringer, listener = Doorbell.pair()
    child = os.fork()
    if not child:
        peer = [Doorbell(os.dup(bell.fd)) for bell in (ringer, listener)]
        while True:
            for bell in peer:
                os.set_blocking(bell.fd, True)
            if what == "ring":
                peer[0].ring()
            else:
                peer[1].take()
    try:
        signal.setitimer(signal.ITIMER_REAL, 20.0)  # its default action ends a test that hangs
        for _ in range(20_000):
            ringer.ring() if what == "ring" else listener.take()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ringer.close()
        listener.close()


def test_doorbell_of_a_peer_that_is_gone() -> None:
    """Its end is closed: ringing is no error, and the listener's descriptor does not become readable for ever."""
    ringer, listener = Doorbell.pair()
    ringer.close()
    assert select.select([listener.fd], [], [], 0)[0] == []
    assert not listener.take()
    listener.close()
    ringer, listener = Doorbell.pair()
    listener.close()
    ringer.ring()
    ringer.close()


def test_credentials_travel_in_a_sealed_descriptor() -> None:
    """What the domain reads is what was made, and nobody can change it in between."""
    server, client = credentials.make("ipc:///x")
    fd = credentials.to_descriptor(client)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert credentials.from_descriptor(fd) == client
    assert len(server.secret) == 32
    assert server.client_public != server.secret


class NestingHypervisor(threading.Thread):
    """Answers calls in the order in which they came, but only once `depth` of them wait, and tells of an event after each but the last."""

    def __init__(self, path: Path, depth: int) -> None:
        super().__init__(daemon=True)
        self.depth, self.waiting = depth, list[Hypercall]()
        server, self.keys = credentials.make(f"ipc://{path}")
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, zmq.utils.z85.encode(server.secret))
        self.socket.bind(f"ipc://{path}")

    def run(self) -> None:
        while len(self.waiting) < self.depth:
            message = decode(self.socket.recv(), FROM_DOMAIN)
            assert isinstance(message, Hypercall)
            self.waiting.append(message)
            if len(self.waiting) < self.depth:
                self.socket.send(encode(Raised(events=[(len(self.waiting), 0)])))
        for call in self.waiting:
            with contextlib.suppress(zmq.Again):  # it has what it waited for, and is gone
                self.socket.send(encode(HypercallReply(token=call.token, rc=call.cmd * 10)), zmq.NOBLOCK)
        self.socket.close()
        self.context.term()


@pytest.fixture
def nesting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[NestingHypervisor, DomainLink]]:
    monkeypatch.setattr(link, "CALL_TIMEOUT_S", 5.0)
    hypervisor = NestingHypervisor(tmp_path / "h", 3)
    mine, theirs = pair()
    domain = DomainLink(hypervisor.keys, mine)
    hypervisor.start()
    yield hypervisor, domain
    domain.close()
    theirs.close()
    hypervisor.join(15)
    assert not hypervisor.is_alive()


def test_calls_made_by_handlers_of_calls(nesting: tuple[NestingHypervisor, DomainLink]) -> None:
    """A handler makes a call while another one waits, whose answer comes first: each gets its own, and nothing is kept."""
    _, domain = nesting
    seen: list[int] = []

    def handle(message: Message) -> None:
        assert isinstance(message, Raised)
        inner = message.events[0][0] + 1
        seen.append(domain.call(1, inner)[0])

    domain.on_message = handle
    assert domain.call(1, 1) == (10, b"")
    assert seen == [30, 20]
    assert (domain._answers, domain._waiting) == ({}, set())


def test_a_handler_that_looks_for_messages_takes_no_answer_from_a_call(
    nesting: tuple[NestingHypervisor, DomainLink],
) -> None:
    """`dispatch` within a handler finds the answer of the call that waits: the call has it all the same."""
    _, domain = nesting
    events: list[int] = []

    def handle(message: Message) -> None:
        if not isinstance(message, Raised):
            return  # of a call that nobody waits for
        events.append(message.events[0][0])
        domain.send(Hypercall(token=100 + len(events), vcpu=0, nr=1, cmd=9))
        while not domain._answers:
            assert domain._socket.poll(5000)
            domain.dispatch()

    domain.on_message = handle
    assert domain.call(1, 1) == (10, b"")
    assert events == [1, 2]
