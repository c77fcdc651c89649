"""A xenstore client without I/O: requests in, bytes out; bytes in, replies and watch events out.

The transport is a `ring.ClientRing` or a socket: send `peek_output`, tell `output_taken`, and `feed` what
arrives. Requests are made one by one with a callback, or by a procedure: a generator that yields
`Request`s and gets each reply's payload sent in (an error reply is thrown into it as `XenstoreError`); or
a list of requests, which are sent together and cost one round trip: it gets a list of payloads and errors::

    def announce(state: bytes) -> Procedure[None]:
        yield write("device/vbd/0/state", state)

    client.start(transaction(lambda tx: announce_in(tx)), done=..., failed=...)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from bus.abi.io import xs_wire
from drivers.xenbus.wire import ERROR_NAMES, Framer, WireError, encode, split_strings

T = TypeVar("T")

PENDING_MAX: Final = 256
"""Requests that may wait for their reply at once."""
TOGETHER_MAX: Final = 64
"""Requests that `together` sends at once."""
TRANSACTION_TRIES: Final = 64
"""How often `transaction` tries again after EAGAIN."""


class XenstoreError(Exception):
    """xenstored refused a request. `name` is an error of xs_wire.h, or one of ours: ECONNRESET (the
    connection broke, or was reset, before the reply came)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name: Final = name


class Request(NamedTuple):
    """What a client asks."""

    type: int
    payload: bytes
    tx_id: int = 0


class WatchEvent(NamedTuple):
    """A watch fired: something changed at `path`, or below what the watch with this token is set on."""

    path: str
    token: str


Answer = bytes | XenstoreError
"""To one of several requests."""
Procedure = Generator[Request | list[Request], Any, T]
"""Several requests with a result. What is sent in: `bytes` for a request, a list of `Answer` for a list of them."""
Reply = Callable[[bytes], None]
Failure = Callable[[XenstoreError], None]


def _join(*parts: str) -> bytes:
    return b"".join(part.encode() + b"\0" for part in parts)


def read(path: str, tx: int = 0) -> Request:
    """The value at a path; the reply's payload is the value."""
    return Request(xs_wire.XS_READ, _join(path), tx)


def write(path: str, value: bytes, tx: int = 0) -> Request:
    """Store a value."""
    return Request(xs_wire.XS_WRITE, _join(path) + value, tx)


def mkdir(path: str, tx: int = 0) -> Request:
    """Make a node exist."""
    return Request(xs_wire.XS_MKDIR, _join(path), tx)


def remove(path: str, tx: int = 0) -> Request:
    """Remove a node and all below it."""
    return Request(xs_wire.XS_RM, _join(path), tx)


def directory(path: str, tx: int = 0) -> Request:
    """Names of the children; decode with `names`. Error E2BIG if they do not fit: use `list_directory`."""
    return Request(xs_wire.XS_DIRECTORY, _join(path), tx)


def get_perms(path: str, tx: int = 0) -> Request:
    """Permissions ("b0", "r3", ...); decode with `names`."""
    return Request(xs_wire.XS_GET_PERMS, _join(path), tx)


def set_perms(path: str, perms: list[str], tx: int = 0) -> Request:
    """Replace permissions; the first entry is the owner's."""
    return Request(xs_wire.XS_SET_PERMS, _join(path, *perms), tx)


def watch(path: str, token: str) -> Request:
    """Set a watch; it fires once at once."""
    return Request(xs_wire.XS_WATCH, _join(path, token))


def unwatch(path: str, token: str) -> Request:
    """Take a watch away. Events that are under way may still come."""
    return Request(xs_wire.XS_UNWATCH, _join(path, token))


def introduce(domid: int, gfn: int, port: int) -> Request:
    """Domain 0 only: serve a domain's ring."""
    return Request(xs_wire.XS_INTRODUCE, _join(str(domid), str(gfn), str(port)))


def release(domid: int) -> Request:
    """Domain 0 only: serve a domain no more."""
    return Request(xs_wire.XS_RELEASE, _join(str(domid)))


def domain_path(domid: int) -> Request:
    """A domain's base path, nul-terminated."""
    return Request(xs_wire.XS_GET_DOMAIN_PATH, _join(str(domid)))


def names(payload: bytes) -> list[str]:
    """The strings of a reply."""
    return [text.decode("utf-8", "replace") for text in split_strings(payload)]


def single(request: Request) -> Procedure[bytes]:
    """One request's reply."""
    reply: bytes = yield request
    return reply


def together(requests: Sequence[Request]) -> Procedure[list[Answer]]:
    """All of them, in this order, without waiting for one before the next is sent; what came of each."""
    answers: list[Answer] = []
    for start in range(0, len(requests), TOGETHER_MAX):
        answers += yield list(requests[start : start + TOGETHER_MAX])
    return answers


def list_directory(path: str, tx: int = 0) -> Procedure[list[str]]:
    """The children's names, however many. Starts again when the node changes meanwhile; EAGAIN if it does
    so for ever.
    """
    for _ in range(TRANSACTION_TRIES):
        data, generation = b"", b""
        while True:
            part = yield Request(xs_wire.XS_DIRECTORY_PART, _join(path, str(len(data))), tx)
            seen, _, rest = part.partition(b"\0")
            if generation and seen != generation:
                break
            generation = seen
            if not rest:
                raise XenstoreError(
                    "EIO"
                )  # neither a name nor the end: a broken daemon must not keep us for ever
            if rest == b"\0" or rest.endswith(b"\0\0"):
                return names((data + rest)[:-1])
            data += rest
    raise XenstoreError("EAGAIN")


def transaction(body: Callable[[int], Procedure[T]], tries: int = TRANSACTION_TRIES) -> Procedure[T]:
    """Run `body(tx_id)` in a transaction and commit; run it again as long as the commit says EAGAIN. If
    the body raises, the transaction is abandoned. XenstoreError EAGAIN after `tries`.
    """
    for _ in range(tries):
        started = yield Request(xs_wire.XS_TRANSACTION_START, b"\0")
        text = started.rstrip(b"\0")
        if not text.isdigit() or not 0 < int(text[:11]) < 1 << 32:
            raise XenstoreError("EIO")
        tx = int(text)
        try:
            result = yield from body(tx)
        except Exception:
            yield Request(xs_wire.XS_TRANSACTION_END, b"F\0", tx)
            raise
        try:
            yield Request(xs_wire.XS_TRANSACTION_END, b"T\0", tx)
        except XenstoreError as error:
            if error.name != "EAGAIN":
                raise
            continue
        return result
    raise XenstoreError("EAGAIN")


class _Pending(NamedTuple):
    type: int
    tx_id: int
    done: Reply
    failed: Failure


class Client:
    """One connection to xenstored."""

    def __init__(self) -> None:
        self._input: Final = Framer()
        self._output: Final[deque[bytes]] = deque()
        self._head = 0
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self.broken: str | None = None
        """Why the connection can no longer be used; None while it can."""
        self.strays = 0
        """Replies that answered nothing that was asked; they are dropped."""

    @property
    def pending(self) -> int:
        """Requests that wait for their reply."""
        return len(self._pending)

    def request(self, request: Request, done: Reply, failed: Failure) -> int:
        """Ask; `done` gets the reply's payload, or `failed` the error. Returns the request's number.
        XenstoreError EBUSY (too many wait), E2BIG (payload too long), ECONNRESET (broken).
        """
        if self.broken is not None:
            raise XenstoreError("ECONNRESET")
        if len(self._pending) >= PENDING_MAX:
            raise XenstoreError("EBUSY")
        if len(request.payload) > xs_wire.XENSTORE_PAYLOAD_MAX:
            raise XenstoreError("E2BIG")
        while self._next in self._pending or self._next == 0:  # 0 is the number of watch events
            self._next = (self._next + 1) & 0xFFFFFFFF
        number = self._next
        self._next = (number + 1) & 0xFFFFFFFF
        self._pending[number] = _Pending(request.type, request.tx_id, done, failed)
        self._output.append(encode(request.type, number, request.tx_id, request.payload))
        return number

    def start(self, procedure: Procedure[T], done: Callable[[T], None], failed: Failure) -> None:
        """Run a procedure; `done` gets its result, or `failed` the XenstoreError that it ended with."""
        self._step(procedure, done, failed, lambda: next(procedure))

    def _step(
        self,
        procedure: Procedure[T],
        done: Callable[[T], None],
        failed: Failure,
        resume: Callable[[], Request | list[Request]],
    ) -> None:
        while True:
            try:
                request = resume()
            except StopIteration as stop:
                done(stop.value)
                return
            except XenstoreError as error:
                failed(error)
                return

            if isinstance(request, list):
                self._ask_all(
                    request,
                    lambda answers: self._step(procedure, done, failed, lambda: procedure.send(answers)),
                )
                return

            def replied(payload: bytes) -> None:
                self._step(procedure, done, failed, lambda: procedure.send(payload))

            def refused(error: XenstoreError) -> None:
                self._step(procedure, done, failed, lambda: procedure.throw(error))

            try:
                self.request(request, replied, refused)
                return
            except XenstoreError as caught:
                resume = _thrower(procedure, caught)

    def _ask_all(self, requests: list[Request], done: Callable[[list[Answer]], None]) -> None:
        """`done` gets what came of each, when all are answered or refused."""
        answers: dict[int, Answer] = {}

        def answered(index: int, answer: Answer) -> None:
            answers[index] = answer
            if len(answers) == len(requests):
                done([answers[at] for at in range(len(requests))])

        if not requests:
            done([])
        for index, request in enumerate(requests):
            call = partial(answered, index)
            try:
                self.request(request, call, call)
            except XenstoreError as error:
                call(error)

    def feed(self, data: bytes) -> list[WatchEvent]:
        """Bytes from xenstored. Calls back for each reply; returns the watch events, in order."""
        events: list[WatchEvent] = []
        if self.broken is not None:
            return events
        self._input.feed(data)
        while True:
            try:
                message = self._input.take()
            except WireError as error:
                self.fail(str(error))
                return events
            if message is None:
                return events
            if message.type == xs_wire.XS_WATCH_EVENT:
                parts = names(message.payload)
                if len(parts) >= 2:
                    events.append(WatchEvent(parts[0], parts[1]))
                else:
                    self.strays += 1
                continue
            waiting = self._pending.get(message.req_id)
            if waiting is None or message.type not in (waiting.type, xs_wire.XS_ERROR):
                self.strays += 1
                continue
            del self._pending[message.req_id]
            if message.type == xs_wire.XS_ERROR:
                name = message.payload.rstrip(b"\0").decode("ascii", "replace")
                waiting.failed(XenstoreError(name if name in ERROR_NAMES else "EIO"))
            else:
                waiting.done(message.payload)

    def peek_output(self, limit: int = 65536) -> bytes:
        """The next bytes to send, at most `limit`; they stay queued until `output_taken`."""
        return b"".join(self._output)[self._head : self._head + limit]

    def output_taken(self, count: int) -> None:
        """The first `count` bytes of `peek_output` are sent."""
        self._head += count
        while self._output and self._head >= len(self._output[0]):
            self._head -= len(self._output.popleft())

    def fail(self, reason: str) -> None:
        """The connection is lost: everything that waits fails with ECONNRESET. `reset` makes the client
        usable again.
        """
        self.broken = reason
        self._output.clear()
        self._head = 0
        self._input.clear()
        waiting, self._pending = self._pending, {}
        for entry in waiting.values():
            entry.failed(XenstoreError("ECONNRESET"))

    def reset(self) -> None:
        """The connection is made anew: what waited fails with ECONNRESET; watches must be set again."""
        self.fail("reset")
        self.broken = None


def _thrower(procedure: Procedure[T], error: XenstoreError) -> Callable[[], Request | list[Request]]:
    return lambda: procedure.throw(error)
