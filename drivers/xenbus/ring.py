"""The xenstore ring page (`struct xenstore_domain_interface` in xs_wire.h), for both ends, over a buffer.

Two byte rings of 1024: `req` (client to daemon) and `rsp` (daemon to client). Producer and consumer
indexes run freely modulo 2^32; each is written by one side only. The other side may write anything at any
time: indexes are copied once, checked, and then only the copies are used; payload bytes are copied out
before they are looked at.

Who moved bytes notifies the other side. The daemon always: a guest may wait for more bytes than one (mini-os waits until the
producer index changes, with bytes unread) or for more room than one byte, so being "not empty before" or "full before" says
nothing about whether it sleeps. The client always for what it wrote; for room only if the ring was full, as Linux does: a
daemon writes whatever there is room for. The other side may be more sparing: Linux notifies the daemon only if it finds
all that it sent before taken. So who moved bytes looks at the ring once more before it sleeps.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.abi.io.ring import full_barrier
from bus.abi.io.xs_wire import (
    XENSTORE_CONNECTED,
    XENSTORE_DOMAIN_INTERFACE,
    XENSTORE_ERROR_NONE,
    XENSTORE_ERROR_RINGIDX,
    XENSTORE_RECONNECT,
    XENSTORE_RING_SIZE,
    XENSTORE_SERVER_FEATURE_ERROR,
    XENSTORE_SERVER_FEATURE_RECONNECTION,
)
from bus.addresses import PAGE_SIZE

FEATURES: Final = XENSTORE_SERVER_FEATURE_RECONNECTION | XENSTORE_SERVER_FEATURE_ERROR
"""What `ServerRing` offers."""

_U32: Final = 0xFFFFFFFF
_MASK: Final = XENSTORE_RING_SIZE - 1


def _word(field: str) -> int:
    return XENSTORE_DOMAIN_INTERFACE.offset(field) // 4


_REQ: Final = XENSTORE_DOMAIN_INTERFACE.offset("req")
_RSP: Final = XENSTORE_DOMAIN_INTERFACE.offset("rsp")
_REQ_CONS: Final = _word("req_cons")
_REQ_PROD: Final = _word("req_prod")
_RSP_CONS: Final = _word("rsp_cons")
_RSP_PROD: Final = _word("rsp_prod")
_FEATURES: Final = _word("server_features")
_CONNECTION: Final = _word("connection")
_ERROR: Final = _word("error")


class Received(NamedTuple):
    """Outcome of a read."""

    data: bytes
    notify: bool
    """The other end may wait for room."""
    error: int
    """XENSTORE_ERROR_NONE, or XENSTORE_ERROR_RINGIDX: the other side's indexes make no sense; nothing was
    moved.
    """


class Sent(NamedTuple):
    """Outcome of a write."""

    moved: int
    """How many of the bytes found room."""
    notify: bool
    error: int
    """As in `Received`."""


_NOTHING: Final = Received(b"", False, XENSTORE_ERROR_NONE)
_NONE_SENT: Final = Sent(0, False, XENSTORE_ERROR_NONE)


class _Ring:
    """One end. `page` is 4096 writable bytes shared with the other end."""

    _always = False
    """Each read is told to the other end."""

    def __init__(
        self, page: memoryview, incoming: tuple[int, int, int], outgoing: tuple[int, int, int]
    ) -> None:
        octets = page.cast("B")
        if len(octets) != PAGE_SIZE or octets.readonly:
            raise ValueError(f"a xenstore ring page is {PAGE_SIZE} writable bytes")
        self._octets: Final = octets
        self._words: Final = octets.cast("I")
        self._in: Final = incoming
        self._out: Final = outgoing

    def read(self, limit: int = XENSTORE_RING_SIZE) -> Received:
        """Take at most `limit` bytes that the other end sent."""
        base, cons_word, prod_word = self._in
        cons, prod = self._words[cons_word], self._words[prod_word]
        available = (prod - cons) & _U32
        if available > XENSTORE_RING_SIZE:
            return Received(b"", False, XENSTORE_ERROR_RINGIDX)
        count = min(available, max(0, limit))
        if not count:
            return _NOTHING
        start = cons & _MASK
        first = min(count, XENSTORE_RING_SIZE - start)
        data = bytes(self._octets[base + start : base + start + first])
        if first < count:
            data += bytes(self._octets[base : base + count - first])
        self._words[cons_word] = (cons + count) & _U32
        full_barrier()
        # Looked at after the store: the other end may have filled the ring and gone to sleep meanwhile.
        full = (self._words[prod_word] - cons) & _U32 >= XENSTORE_RING_SIZE
        return Received(data, full or self._always, XENSTORE_ERROR_NONE)

    def write(self, data: bytes) -> Sent:
        """Send as much of `data` as there is room for."""
        base, cons_word, prod_word = self._out
        cons, prod = self._words[cons_word], self._words[prod_word]
        used = (prod - cons) & _U32
        if used > XENSTORE_RING_SIZE:
            return Sent(0, False, XENSTORE_ERROR_RINGIDX)
        count = min(len(data), XENSTORE_RING_SIZE - used)
        if not count:
            return _NONE_SENT
        start = prod & _MASK
        first = min(count, XENSTORE_RING_SIZE - start)
        self._octets[base + start : base + start + first] = data[:first]
        self._octets[base : base + count - first] = data[first:count]
        self._words[prod_word] = (prod + count) & _U32  # after the bytes: it publishes them
        return Sent(count, True, XENSTORE_ERROR_NONE)

    @property
    def room(self) -> int:
        """Bytes that `write` would take now; 0 if the indexes make no sense."""
        _, cons_word, prod_word = self._out
        used = (self._words[prod_word] - self._words[cons_word]) & _U32
        return max(0, XENSTORE_RING_SIZE - used)

    def release(self) -> None:
        """Let go of the page (its memory may be unmapped afterwards)."""
        self._words.release()
        self._octets.release()


class ServerRing(_Ring):
    """The daemon's end."""

    _always = True

    def __init__(self, page: memoryview) -> None:
        super().__init__(page, (_REQ, _REQ_CONS, _REQ_PROD), (_RSP, _RSP_CONS, _RSP_PROD))

    def connect(self) -> None:
        """Offer `FEATURES` and declare the connection up, keeping what the client has sent already. Then
        notify.
        """
        self._words[_FEATURES] = FEATURES
        self._words[_ERROR] = XENSTORE_ERROR_NONE
        self._words[_CONNECTION] = XENSTORE_CONNECTED

    @property
    def reconnect_wanted(self) -> bool:
        """The client asks for a new start (docs/misc/xenstore-ring.txt): forget its state, then `reconnect`."""
        return self._words[_CONNECTION] == XENSTORE_RECONNECT

    def reconnect(self) -> None:
        """Empty both rings and declare the connection up. Then notify."""
        for word in (_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD):
            self._words[word] = 0
        self.connect()

    def set_error(self, error: int) -> None:
        """Tell the client why it is not served any more (XENSTORE_ERROR_*). Then notify."""
        self._words[_ERROR] = error


class ClientRing(_Ring):
    """The domain's end."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page, (_RSP, _RSP_CONS, _RSP_PROD), (_REQ, _REQ_CONS, _REQ_PROD))

    @property
    def connected(self) -> bool:
        """The daemon serves the ring. While this is false nothing may be written."""
        return self._words[_CONNECTION] == XENSTORE_CONNECTED

    @property
    def features(self) -> int:
        """XENSTORE_SERVER_FEATURE_* that the daemon offers."""
        return self._words[_FEATURES]

    @property
    def error(self) -> int:
        """Why the daemon does not serve the ring any more (XENSTORE_ERROR_*); NONE if it does not tell."""
        return self._words[_ERROR] if self.features & XENSTORE_SERVER_FEATURE_ERROR else XENSTORE_ERROR_NONE

    def ask_reconnect(self) -> bool:
        """Ask for a new start; False if the daemon does not offer that. Then notify, and wait for
        `connected`.
        """
        if not self.features & XENSTORE_SERVER_FEATURE_RECONNECTION:
            return False
        self._words[_CONNECTION] = XENSTORE_RECONNECT
        return True
