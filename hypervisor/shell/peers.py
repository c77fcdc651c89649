"""The hypervisor's side of the link to one domain: its listening socket, connections, descriptor socket, and what waits to be sent."""

from __future__ import annotations

import fcntl
import itertools
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from bus.addresses import DomId
from bus.credentials import ServerCredentials
from bus.dma_lane import HypervisorEnd, LaneClosed
from bus.messages.device import FROM_ANY_DOMAIN, Attach, DmaRequest
from bus.messages.domain import DESCRIPTORS, Descriptors, HypercallReply, Order, Raised, Refused
from bus.messages.envelope import (
    MAX_ITEMS,
    MAX_MESSAGE,
    BadMessage,
    Message,
    Registry,
    decode,
    encode,
    encode_trusted,
)
from bus.packets import LinkClosed, LinkFull, PacketLink
from bus.zmtp import ProtocolError, ServerConnection

MAX_BACKLOG: Final = 512
"""Messages that may wait for a domain that does not read. One more, and the domain is crashed: it is not running."""
MAX_HANDSHAKES: Final = 4
"""Connections of one domain that may be in their handshake; further ones are closed at once."""
HANDSHAKE_S: Final = 2.0
DESCRIPTOR_BUFFER: Final = 256 << 10
PADDING: Final = 512
"""Bytes of the descriptor socket's buffer (which the kernel makes twice as large) that each descriptor under way takes."""
REPORT_BURST: Final = 16
REPORTS_A_SECOND: Final = 2
BEHIND_MESSAGES: Final = 256
BEHIND_BYTES: Final = 256 << 10
"""A peer that has more unread is behind: what it can do without (doorbells) is not sent. Descriptors lie on their own socket, which
a process reads when it takes the message that announces them."""
CHUNK: Final = MAX_MESSAGE
"""Bytes taken from one connection at a time."""


class PeerLost(ConnectionError):
    """The domain's process takes nothing any more."""


class Cork:
    """While it is in, what is sent to peers waits, so that messages to one of them go out by one system call."""

    def __init__(self) -> None:
        self.is_in = False
        self.waiting: dict[DomId, Peer] = {}
        """Peers with something to send, in the order in which it came."""

    def pull(self, peers: Mapping[DomId, Peer]) -> tuple[list[Peer], list[tuple[DomId, str]]]:
        """Send what waits, to the peer first that was the first to be sent something; who was sent to, and who is lost, and why. `peers`:
        those whose processes are there still."""
        self.is_in = False
        waiting, self.waiting = self.waiting, {}
        sent: list[Peer] = []
        lost: list[tuple[DomId, str]] = []
        for domain, peer in waiting.items():
            if peers.get(domain) is peer:
                try:
                    peer.flush()
                    sent.append(peer)
                except PeerLost as error:
                    lost.append((domain, str(error)))
        return sent, lost


class _Connection:
    def __init__(self, sock: socket.socket, keys: ServerCredentials) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.zmtp = ServerConnection(keys.secret, keys.client_public, MAX_MESSAGE)
        self.deadline = time.monotonic() + HANDSHAKE_S


class _Raised:
    """Events that wait to be told."""

    def __init__(self) -> None:
        self.events: dict[tuple[int, int], None] = {}


class _Look:
    """The order `lease`: look at the lease page."""


class Peer:
    """One domain's connection. It exists before the process does; what is sent meanwhile waits."""

    def __init__(
        self,
        domain: DomId,
        keys: ServerCredentials,
        descriptors: socket.socket,
        kinds: Registry = FROM_ANY_DOMAIN,
    ) -> None:
        """Takes over `descriptors`, the hypervisor's end of the descriptor socket. `kinds`: what the peer may send."""
        self.domain = domain
        self.cork = Cork()
        """The server has one for all its peers."""
        self._kinds = kinds
        self._keys = keys
        # The domain may send anything here; nothing is ever read, so its descriptors never arrive in this process.
        descriptors.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DESCRIPTOR_BUFFER)
        self._descriptors = PacketLink(descriptors, DESCRIPTORS, descriptors=False)
        self._bundles = itertools.count(1)
        self._backlog: deque[bytes | _Raised | _Look] = deque()
        self._telling: dict[tuple[int, int], _Raised] = {}
        """Events in the backlog: one that waits already is not queued again, whoever raises it how often."""
        self._looks = False
        """That order is in the backlog."""
        self._partial = b""
        self.listener: socket.socket | None = None
        self._connection: _Connection | None = None
        self._handshakes: dict[int, _Connection] = {}
        self.connected = False
        """Its process said hello."""
        self.bad = 0
        """Messages that did not validate."""
        self.received = 0
        self.lane: HypervisorEnd | None = None
        """Of a device: the DMA lane of its present epoch."""
        self.inbox: deque[Message | DmaRequest] = deque()
        """Messages that were received and wait for this peer's turn; nothing more is read from it meanwhile."""
        self._reports = float(REPORT_BURST)
        self._reported = time.monotonic()

    def may_report(self) -> bool:
        """Another of its reports may be logged, or passed on: a few at once, and then few a second."""
        now = time.monotonic()
        self._reports = min(float(REPORT_BURST), self._reports + (now - self._reported) * REPORTS_A_SECOND)
        self._reported = now
        if self._reports < 1:
            return False
        self._reports -= 1
        return True

    # ------------------------------------------------------------------ connections

    def listen(self, listener: socket.socket) -> None:
        """Take over the listening socket of this domain's endpoint."""
        listener.setblocking(False)
        self.listener = listener

    def accept(self) -> int | None:
        """Take one waiting connection; its descriptor to poll, or None if it was refused or none waits."""
        assert self.listener is not None
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return None
        now = time.monotonic()
        for fd, old in list(self._handshakes.items()):
            if now > old.deadline:
                self._forget(fd)
        if len(self._handshakes) >= MAX_HANDSHAKES:
            sock.close()
            return None
        connection = _Connection(sock, self._keys)
        self._handshakes[sock.fileno()] = connection
        self._put(connection)
        return sock.fileno()

    def _forget(self, fd: int) -> None:
        self._handshakes.pop(fd).socket.close()  # closing takes it out of epoll

    def _put(self, connection: _Connection) -> None:
        """Send handshake bytes. They are few: a peer whose socket is full of them is not one of ours."""
        output = connection.zmtp.output
        if output:
            try:
                connection.socket.send(output)
            except OSError:
                connection.deadline = 0.0
            output.clear()

    def receive(self, fd: int) -> list[Message | DmaRequest]:
        """What came on one of this peer's connections, validated. Bad messages are counted and refused."""
        connection = self._connection
        if self.lane is not None and fd == self.lane.fileno():
            return [] if self.inbox else self.drain_lane()
        if connection is None or connection.socket.fileno() != fd:
            connection = self._handshakes.get(fd)
            if connection is None:
                return []
        elif self.inbox:
            return []
        try:
            data = connection.socket.recv(CHUNK)
            if not data:
                raise ProtocolError("closed")
            raws = connection.zmtp.receive(data)
        except BlockingIOError:
            return []
        except (ProtocolError, OSError):
            self._close(connection, fd)
            return []
        if connection is not self._connection:
            self._put(connection)
            if not connection.zmtp.ready:
                return []
            del self._handshakes[fd]
            if self._connection is not None:  # the domain opened a second one: the newer is served
                self._connection.socket.close()
            self._connection = connection
            self._partial = b""
        # What a device sent on its lane before this is in the lane by now, and comes first.
        messages: list[Message | DmaRequest] = self.drain_lane()
        for raw in raws:
            try:
                messages.append(decode(raw, self._kinds))
            except BadMessage as error:
                self.bad += 1
                self.send(Refused(why=str(error)[:400], count=self.bad))
        if connection.zmtp.dropped:
            self.bad += connection.zmtp.dropped
            connection.zmtp.dropped = 0
            self.send(Refused(why="message of several frames", count=self.bad))
        self.received += len(messages)
        return messages

    def drain_lane(self) -> list[Message | DmaRequest]:
        """What waits in the DMA lane, if there is one."""
        found: list[Message | DmaRequest] = []
        if self.lane is not None:
            try:
                for request in self.lane.receive():
                    if isinstance(request, BadMessage):
                        self.bad += 1
                        self.send(Refused(why=str(request)[:400], count=self.bad))
                    else:
                        found.append(request)
            except LaneClosed:
                self.set_lane(None)
        return found

    def set_lane(self, lane: HypervisorEnd | None) -> None:
        """A new lane in place of the one of before, which is closed."""
        if self.lane is not None:
            self.lane.close()
        self.lane = lane

    def answer_dma(self, token: int, fault: int) -> None:
        """Answer a batch that came by the lane, as `send` does."""
        if self.lane is not None:
            self.lane.answer(token, fault)
            self._send()

    def _close(self, connection: _Connection, fd: int) -> None:
        if connection is self._connection:
            self._connection = None  # libzmq connects again; that the process said hello still holds
            self._partial = b""
            connection.socket.close()
        else:
            self._forget(fd)

    # ------------------------------------------------------------------ sending

    @property
    def write_fd(self) -> int | None:
        """The connection on which something waits to be sent."""
        if self.connected and self._connection is not None and (self._partial or self._backlog):
            return self._connection.socket.fileno()
        return None

    def send(self, message: Message) -> None:
        """Send, or queue if the domain is not there yet or slow, or the cork is in. PeerLost if it takes nothing any more."""
        self._backlog.append(encode(message))
        self._send()

    def reply(self, token: int, rc: int, data: bytes) -> None:
        """Send the answer to a hypercall (a `HypercallReply`), as `send` does."""
        self._backlog.append(encode_trusted(HypercallReply.KIND, {"token": token, "rc": rc, "data": data}))
        self._send()

    def _send(self) -> None:
        if self.cork.is_in:
            self.cork.waiting[self.domain] = self
        else:
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        if self.lane is not None:
            try:
                self.lane.flush()
            except LaneClosed as error:
                raise PeerLost(str(error)) from None
        connection = self._connection
        if not self.connected or connection is None:
            if len(self._backlog) > MAX_BACKLOG:
                raise PeerLost("too many messages for a process that does not come up")
            return
        while self._partial or self._backlog:
            if not self._partial:
                self._partial = connection.zmtp.encode(self._next())
                while self._backlog and len(self._partial) < CHUNK:
                    self._partial += connection.zmtp.encode(self._next())
            try:
                sent = connection.socket.send(self._partial)
            except BlockingIOError:
                if len(self._backlog) > MAX_BACKLOG:
                    raise PeerLost("its process does not read its messages") from None
                return
            except OSError:
                self._close(connection, connection.socket.fileno())
                return
            self._partial = self._partial[sent:]

    def order(self, number: int, what: str, body: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        """Send an order; descriptors go ahead on their own socket. They stay the caller's."""
        bundle = self._hand_over(descriptors)
        self.send(Order(order=number, what=what, body=body, descriptors=len(descriptors), bundle=bundle))

    def send_with(self, attach: Attach, descriptors: Sequence[int]) -> None:
        """Send a message that announces descriptors; they go ahead on their own socket, and stay the caller's."""
        self.send(attach.model_copy(update={"bundle": self._hand_over(descriptors)}))

    def _hand_over(self, descriptors: Sequence[int]) -> int:
        if not descriptors:
            return 0
        bundle = next(self._bundles)
        try:
            padding = bytes(PADDING * len(descriptors))
            self._descriptors.send(Descriptors(bundle=bundle, padding=padding), descriptors)
        except (LinkFull, LinkClosed) as error:
            raise PeerLost(f"descriptor socket: {error}") from None
        return bundle

    def _next(self) -> bytes:
        """The message that has waited longest."""
        item = self._backlog.popleft()
        if isinstance(item, _Raised):
            for event in item.events:
                del self._telling[event]
            return encode(Raised(events=list(item.events)))
        if isinstance(item, _Look):
            self._looks = False
            return encode(Order(order=0, what="lease"))
        return item

    def raised(self, events: list[tuple[int, int]]) -> None:
        """Tell of pending event channels. To a peer that is slow each is told once, so that nobody can fill its queue with them."""
        for event in events:
            if event in self._telling:
                continue
            last = self._backlog[-1] if self._backlog else None
            if not isinstance(last, _Raised) or len(last.events) >= MAX_ITEMS:
                last = _Raised()
                self._backlog.append(last)
            last.events[event] = None
            self._telling[event] = last
        self._send()

    def look_at_lease(self) -> None:
        """Order `lease`, where there is no doorbell for it: one that waits already says it as well."""
        if not self._looks:
            self._looks = True
            self._backlog.append(_Look())
        self._send()

    @property
    def behind(self) -> bool:
        """It has not read what it was sent some time ago."""
        if len(self._backlog) > BEHIND_MESSAGES:
            return True
        try:
            unread = fcntl.ioctl(self._descriptors.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:
            return True
        return bool(struct.unpack("i", unread)[0] > BEHIND_BYTES)

    def close(self) -> None:
        """Close every socket (which takes them out of epoll)."""
        for connection in [*self._handshakes.values(), *([self._connection] if self._connection else [])]:
            connection.socket.close()
        self._handshakes.clear()
        self._connection = None
        self.connected = False
        if self.listener is not None:
            self.listener.close()
        self.set_lane(None)
        self._descriptors.close()

    def descriptors(self) -> list[int]:
        """All descriptors that are polled for this peer."""
        fds = list(self._handshakes)
        if self._connection is not None:
            fds.append(self._connection.socket.fileno())
        if self.listener is not None:
            fds.append(self.listener.fileno())
        if self.lane is not None:
            fds.append(self.lane.fileno())
        return fds
