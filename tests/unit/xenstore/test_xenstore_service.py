"""The service's end of a ring: no request and no response is left lying because the domain was sparing with its notifications."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import cast

import pytest

from bus.abi.io import xs_wire as xs
from bus.addresses import DomId, GrantRef, Port
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import NativeDomain
from drivers.xenbus.ring import ClientRing
from drivers.xenbus.wire import encode

GUEST = DomId(5)
_CONS = xs.XENSTORE_DOMAIN_INTERFACE.offset("req_cons")


class Reactor:
    """Work for later, in order."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []

    def soon(self, callback: Callable[[], None]) -> None:
        self.later.append(callback)

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later.append(callback)


class Mapping:
    """One page."""

    def __init__(self, page: memoryview) -> None:
        self.pages = [page]


class Host:
    """Dom0 as far as the service sees it. `on_notify` is what the guest does when it is told, before the service does more."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.page = memoryview(bytearray(4096))
        self.event: Callable[[], None] = lambda: None
        self.on_notify: Callable[[], None] = lambda: None

    def map_grants(self, domid: DomId, refs: list[GrantRef]) -> Mapping:
        return Mapping(self.page)

    def bind_interdomain(self, domid: DomId, port: Port, callback: Callable[[], None]) -> Port:
        self.event = callback
        return Port(9)

    def notify(self, port: Port) -> None:
        self.on_notify()

    def settle(self) -> None:
        """Until there is nothing more to do. An endless round is a failure."""
        for _ in range(1000):
            if not self.reactor.later:
                return
            self.reactor.later.pop(0)()
        raise AssertionError("the service never comes to rest")


@pytest.fixture
def host() -> Host:
    """With the guest's ring served."""
    host = Host()
    service = XenstoreService(cast(NativeDomain, host))
    service.introduce(GUEST, Port(1))
    host.settle()
    return host


def responses(client: ClientRing) -> bytes:
    """All there is, taken."""
    got = bytearray()
    while data := client.read().data:
        got += data
    return bytes(got)


def request(number: int) -> bytes:
    return encode(xs.XS_GET_DOMAIN_PATH, number, 0, b"5\0")


def test_a_request_without_a_notification_behind_one_with_it_is_answered(host: Host) -> None:
    """Linux's xb_write: it tells the daemon only if the daemon had taken all that was sent before. The second request comes after the
    daemon read the producer index, and before it published its consumer index."""
    client = ClientRing(host.page)
    words = host.page.cast("I")
    second = request(2)
    original = words[_CONS // 4]
    assert client.write(request(1)).moved
    published: list[int] = []

    def sneak() -> None:
        host.on_notify = lambda: None
        # It ran beside the service: as it looked, the first request was not taken yet, so it does not notify.
        published.append(words[_CONS // 4] - original)
        assert client.write(second).moved == len(second)

    host.on_notify = sneak
    host.event()
    host.settle()
    assert published == [len(request(1))]
    answers = responses(client)
    numbers = [struct.unpack_from("<IIII", answers, at)[1] for at in starts(answers)]
    assert numbers == [1, 2]


def starts(stream: bytes) -> list[int]:
    """Where messages begin."""
    found, at = [], 0
    while at < len(stream):
        found.append(at)
        at += 16 + struct.unpack_from("<IIII", stream, at)[3]
    return found


def test_output_that_found_no_room_goes_on_when_the_guest_made_room_without_a_word(host: Host) -> None:
    """Linux's xb_read tells the daemon only if it found the response ring full: what it took while the daemon was writing does not
    count."""
    client = ClientRing(host.page)
    count = 50
    assert client.write(b"".join(request(number) for number in range(count))).moved == 18 * count
    got = bytearray()
    host.on_notify = lambda: got.extend(client.read().data)
    host.event()
    host.settle()
    assert len(got) == 32 * count > xs.XENSTORE_RING_SIZE
    assert starts(bytes(got)) == list(range(0, 32 * count, 32))
