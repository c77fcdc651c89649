"""`DomainLink`, `DeviceLink`: a process's end of its link to the hypervisor. One thread owns it."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import zmq

from bus.credentials import ClientCredentials
from bus.messages.device import TO_DEVICE, Attach
from bus.messages.domain import (
    DESCRIPTORS,
    TO_DOMAIN,
    Descriptors,
    Hypercall,
    HypercallReply,
    Order,
    OrderDone,
    Raised,
    Refused,
)
from bus.messages.envelope import MAX_MESSAGE, BadMessage, Message, Registry, decode, encode
from bus.packets import LinkClosed, PacketLink, close_all
from bus.trace import Kind, Trace, off

CALL_TIMEOUT_S: Final = 30.0
"""Longest wait for the hypervisor's answer to a hypercall: longer than any that it waits for a third party itself (a domain that is
still being built, hypervisor.core.config.MachineConfig.start_timeout_ns)."""


_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)


class HypervisorGone(ConnectionError):
    """The hypervisor, or this domain's relay, does not answer any more: nothing is left to run for."""


class _Link:
    """Messages both ways, and descriptors beside those that come."""

    def __init__(self, keys: ClientCredentials, descriptors: socket.socket, kinds: Registry) -> None:
        """Connects to the endpoint of `keys`; `descriptors` is this process's end of its descriptor socket; `kinds` may come."""
        self._kinds = kinds
        self._context = zmq.Context(io_threads=1)
        sock = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 200),
            (zmq.MAXMSGSIZE, MAX_MESSAGE),
            (zmq.RECONNECT_IVL, 5),
            (zmq.RECONNECT_IVL_MAX, 100),
            (zmq.SNDTIMEO, int(CALL_TIMEOUT_S * 1000)),
            (zmq.RCVTIMEO, int(CALL_TIMEOUT_S * 1000)),
        ):
            sock.setsockopt(option, value)
        sock.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        sock.connect(keys.endpoint)
        self._socket = sock
        self._descriptors = PacketLink(descriptors, DESCRIPTORS)
        self._early: dict[int, list[int]] = {}
        self._pending: deque[Message] = deque()
        self.on_message: Callable[[Message], None] = self._pending.append
        """Takes what comes, also while a call waits for its reply."""
        self.refused = 0

    def fileno(self) -> int:
        """Readable when the socket may have something. Edge-triggered by nature: call `dispatch` until it returns 0."""
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        """Close sockets; unsent messages are given up after 200 ms."""
        self._socket.close()
        self._context.term()
        self._descriptors.close()
        for fds in self._early.values():
            close_all(fds)

    def send(self, message: Message) -> None:
        """Queue a message for the hypervisor. HypervisorGone if it takes none."""
        try:
            self._socket.send(encode(message))
        except zmq.Again:
            raise HypervisorGone("the hypervisor takes no more messages") from None

    def receive(self) -> Message | None:
        """The next message of any kind that waits, or None."""
        # Asked first: mostly there is none, and the exception for that takes four times as long as the question.
        if not int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            return None
        try:
            raw = self._socket.recv(_NOBLOCK)
        except zmq.Again:
            return None
        return decode(raw, self._kinds)

    def dispatch(self) -> int:
        """Give all waiting messages to `on_message`; how many there were."""
        count = 0
        while (message := self.receive()) is not None:
            count += 1
            self._dispatched(message)
        return count

    def _dispatched(self, message: Message) -> None:
        """One that `dispatch` took."""
        if isinstance(message, Refused):
            self.refused = message.count
        self.on_message(message)

    def _bundle(self, number: int, count: int, what: str, timeout: float) -> list[int]:
        """The descriptors of a bundle; the caller owns them. HypervisorGone if they do not come."""
        if not count:
            return []
        deadline = time.monotonic() + timeout
        while number not in self._early:
            try:
                packet = self._descriptors.receive()
            except LinkClosed as error:
                raise HypervisorGone(str(error)) from None
            if packet is None:
                poller = zmq.Poller()
                poller.register(self._descriptors.fileno(), zmq.POLLIN)
                left = deadline - time.monotonic()
                if left <= 0 or not poller.poll(int(left * 1000) + 1):
                    raise HypervisorGone(f"no descriptors for {what}")
                continue
            message, fds = packet
            assert isinstance(message, Descriptors)
            self._early.setdefault(message.bundle, []).extend(fds)
        fds = self._early.pop(number)
        if len(fds) != count:
            close_all(fds)
            raise HypervisorGone(f"{what}: {count} descriptors announced, {len(fds)} came")
        return fds


class DomainLink(_Link):
    """A domain's: hypercalls out, orders and events in; descriptors beside them."""

    def __init__(self, keys: ClientCredentials, descriptors: socket.socket) -> None:
        """Connects to the endpoint of `keys`; `descriptors` is this domain's end of its descriptor socket."""
        super().__init__(keys, descriptors, TO_DOMAIN)
        self._token = 0
        self._waiting: set[int] = set()
        """Tokens whose answers are waited for: more than one, where a handler makes an exchange while another one waits."""
        self._answers: dict[int, HypercallReply] = {}
        """Answers that an inner exchange, or a `dispatch` within a handler, took for an outer one. At most one for each of `_waiting`."""
        self.calls = 0
        self.before_return: Callable[[], None] = lambda: None
        """Called before an answer is given to who waited for it."""
        self.trace: Trace = off()
        """Of a native domain: a guest's process notes its guest's hypercalls itself."""

    def call(self, nr: int, cmd: int, data: bytes = b"", vcpu: int = 0) -> tuple[int, bytes]:
        """A hypercall and its answer: (return value, updated structures). Orders and events that come meanwhile go to
        `on_message` at once. HypervisorGone after CALL_TIMEOUT_S."""
        token = self.next_token()
        self.calls += 1
        message = Hypercall(token=token, vcpu=vcpu, nr=nr, cmd=cmd, data=data)
        if not self.trace.on[0]:
            return self.exchange(message, token)
        began = self.trace.now()
        rc, answer = self.exchange(message, token)
        self.trace.add(Kind.CALL, vcpu, 0, nr, cmd, self.trace.now() - began, rc, time=began)
        return rc, answer

    def next_token(self) -> int:
        """A number for a request of this link's."""
        self._token += 1
        return self._token

    def exchange(self, message: Message, token: int) -> tuple[int, bytes]:
        """Send a request that carries `token`, and wait for its answer as `call` does. `on_message` may make exchanges of its own
        meanwhile; the answers find those who wait for them, in whatever order they come. BadMessage: the hypervisor refused a message."""
        self._waiting.add(token)
        try:
            self.send(message)
            deadline = time.monotonic() + CALL_TIMEOUT_S
            while (found := self._answers.pop(token, None)) is None:
                if time.monotonic() > deadline:  # others keep sending, and it is not among them
                    raise zmq.Again
                self._take(decode(self._socket.recv(), self._kinds))
        except zmq.Again:
            raise HypervisorGone(f"no answer to {message.KIND} within {CALL_TIMEOUT_S:.0f} s") from None
        finally:
            self._waiting.discard(token)
            self._answers.pop(token, None)
        self.before_return()
        return found.rc, found.data

    def _dispatched(self, message: Message) -> None:
        if isinstance(message, HypercallReply) and message.token in self._waiting:
            self._answers[message.token] = message  # a handler looks, while an exchange waits
        else:
            super()._dispatched(message)

    def _take(self, message: Message) -> None:
        """One that came while an exchange waits."""
        if isinstance(message, HypercallReply):
            if message.token in self._waiting:  # else it is late: who asked has given up
                self._answers[message.token] = message
        elif isinstance(message, Refused):
            self.refused = message.count
            raise BadMessage(f"the hypervisor refused a message: {message.why}")
        else:
            self.on_message(message)

    def answer(self, order: Order, rc: int = 0, data: bytes = b"") -> None:
        """Report an order done (those of number 0 want no answer)."""
        if not order.order:
            return
        self.send(OrderDone(order=order.order, rc=rc, data=data))

    def descriptors_of(self, order: Order, timeout: float = 1.0) -> list[int]:
        """The descriptors that came with an order; the caller owns them. HypervisorGone if they do not come."""
        return self._bundle(order.bundle, order.descriptors, f"order {order.what}", timeout)


class DeviceLink(_Link):
    """A device's: DMA out, register accesses in."""

    def __init__(self, keys: ClientCredentials, descriptors: socket.socket) -> None:
        """Connects to the endpoint of `keys`; `descriptors` is this device's end of its descriptor socket."""
        super().__init__(keys, descriptors, TO_DEVICE)

    def descriptors_of(self, attach: Attach, timeout: float = 1.0) -> list[int]:
        """Staging memory, then a page and a doorbell for each doorbell range. HypervisorGone if they do not come."""
        return self._bundle(attach.bundle, attach.descriptors, "attach", timeout)


__all__ = ["DeviceLink", "DomainLink", "HypervisorGone", "Raised"]
