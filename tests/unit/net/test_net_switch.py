"""The bridge: who gets which frames, what is bounded, and links that lose, repeat, delay and reorder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.net.frames import Frame
from drivers.net.switch import (
    AGE_NS,
    MAX_ADDRESSES,
    MAX_DELAYED,
    MAX_PORT_ADDRESSES,
    Link,
    Port,
    Switch,
)


class Station:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    def deliver(self, frames: Sequence[Frame]) -> None:
        self.got += [frame.data for frame in frames]

    def take(self) -> list[bytes]:
        got, self.got = self.got, []
        return got


class Net:
    def __init__(self, ports: int = 3, seed: int = 0) -> None:
        self.now = 0
        self.timers: list[tuple[int, int, Callable[[], None]]] = []
        self.switch = Switch("br", lambda: self.now, self.later, seed)
        self.stations = [Station() for _ in range(ports)]
        self.ports: list[Port] = [self.switch.add(f"p{n}", one) for n, one in enumerate(self.stations)]

    def later(self, ns: int, what: Callable[[], None]) -> None:
        self.timers.append((self.now + ns, len(self.timers), what))

    def run(self) -> None:
        while self.timers:
            self.timers.sort(key=lambda timer: timer[:2])
            when, _, what = self.timers.pop(0)
            self.now = max(self.now, when)
            what()

    def send(self, port: int, to: bytes, source: bytes, payload: bytes = b"") -> bytes:
        data = to + source + b"\x88\xb5" + payload
        self.switch.forward(self.ports[port], [Frame(data)])
        return data


def mac(number: int) -> bytes:
    return b"\x02\0" + number.to_bytes(4, "big")


ALL = b"\xff" * 6


def test_unknown_addresses_are_flooded_and_known_ones_are_not() -> None:
    net = Net()
    data = net.send(0, mac(1), mac(0))
    assert [one.take() for one in net.stations] == [[], [data], [data]]
    data = net.send(1, mac(0), mac(1))
    assert [one.take() for one in net.stations] == [[data], [], []]
    data = net.send(0, mac(1), mac(0))
    assert [one.take() for one in net.stations] == [[], [data], []]
    data = net.send(1, ALL, mac(1))
    assert [one.take() for one in net.stations] == [[data], [], [data]]
    net.send(0, mac(0), mac(5))  # to an address behind the same port
    assert [one.take() for one in net.stations] == [[], [], []]


def test_an_address_moves_ages_and_goes_with_its_port() -> None:
    net = Net()
    net.send(0, ALL, mac(7))
    net.send(2, ALL, mac(7))
    assert net.switch.where(mac(7)) is net.ports[2]
    assert [port.addresses for port in net.ports] == [0, 0, 1]
    net.now += AGE_NS + 1
    [one.take() for one in net.stations]
    data = net.send(0, mac(7), mac(1))
    assert net.stations[1].take() == [data]  # flooded
    net.send(2, ALL, mac(7))
    net.switch.remove(net.ports[2])
    assert net.switch.where(mac(7)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(13),
        mac(1) + b"\x01\0\0\0\0\1" + bytes(10),
        bytes.fromhex("0180c2000000") + mac(1) + bytes(10),
    ],
)
def test_what_no_bridge_forwards(data: bytes) -> None:
    """Too short; from a group address; to the bridge itself."""
    net = Net()
    net.switch.forward(net.ports[0], [Frame(data)])
    assert [one.take() for one in net.stations] == [[], [], []]
    assert net.switch.counters.dropped == 1


def test_a_port_fills_its_own_part_of_the_table_and_no_more() -> None:
    net = Net(ports=MAX_ADDRESSES // MAX_PORT_ADDRESSES + 3)
    for number in range(3 * MAX_PORT_ADDRESSES):
        net.send(0, ALL, mac(number))
    assert net.ports[0].addresses == MAX_PORT_ADDRESSES
    net.send(1, ALL, mac(1 << 20))
    assert net.switch.where(mac(1 << 20)) is net.ports[1]
    for port in range(len(net.ports)):
        for number in range(MAX_PORT_ADDRESSES):
            net.send(port, ALL, mac((port + 2) << 21 | number))
    assert sum(port.addresses for port in net.ports) == len(net.switch._table) <= MAX_ADDRESSES
    net.now += AGE_NS + 1
    net.send(len(net.ports) - 1, ALL, mac(5 << 24))
    assert net.switch.where(mac(5 << 24)) is not None  # old ones made room


def test_a_mirror_sees_all() -> None:
    net = Net(ports=2)
    mirror = Station()
    port = net.switch.add("mirror", mirror, mirror=True)
    net.send(0, ALL, mac(0))
    net.send(1, ALL, mac(1))
    mirror.take()
    data = net.send(0, mac(1), mac(0))
    assert net.stations[1].take()[-1] == data
    assert mirror.take() == [data]
    net.switch.remove(port)
    net.send(0, mac(1), mac(0))
    assert mirror.take() == []


def through(link: Link, seed: int = 1, count: int = 2000) -> tuple[Net, list[int]]:
    net = Net(ports=2, seed=seed)
    net.switch.set_link(net.ports[1], link)
    for number in range(count):
        net.send(0, mac(1), mac(0), number.to_bytes(4, "big"))
    net.run()
    return net, [int.from_bytes(data[14:18], "big") for data in net.stations[1].take()]


def test_a_link_loses_repeats_and_reorders_as_often_as_it_is_told_and_the_same_with_the_same_seed() -> None:
    _, got = through(Link(loss=0.25))
    assert 0.2 < 1 - len(got) / 2000 < 0.3
    assert got == sorted(set(got))
    assert through(Link(loss=0.25))[1] == got
    assert through(Link(loss=0.25), seed=2)[1] != got
    _, got = through(Link(duplicate=0.1))
    assert 100 < len(got) - 2000 < 300
    _, got = through(Link(reorder=0.1))
    assert sorted(got) == list(range(2000))
    assert 100 < sum(later < before for before, later in itertools.pairwise(got)) < 300
    net, got = through(Link(up=False))
    assert got == []
    net.switch.forward(net.ports[1], [Frame(mac(0) + mac(1) + bytes(10))])
    assert net.stations[0].take() == []  # neither way
    net, got = through(Link(corrupt=1.0))
    assert got != list(range(2000))
    assert len(got) == 2000


def test_a_delay_is_kept_and_what_waits_is_bounded() -> None:
    net = Net(ports=2)
    net.switch.set_link(net.ports[1], Link(delay_ms=5, jitter_ms=2))
    for number in range(MAX_DELAYED + 50):
        net.send(0, mac(1), mac(0), number.to_bytes(4, "big"))
    assert net.stations[1].take() == []
    net.run()
    assert 5_000_000 <= net.now <= 7_000_000
    assert len(net.stations[1].take()) == MAX_DELAYED
    assert net.ports[1].lost == 50
    net.send(0, mac(1), mac(0))
    net.switch.remove(net.ports[1])
    net.run()  # to nobody


def test_a_frame_that_is_held_goes_on_when_the_link_is_mended() -> None:
    net = Net(ports=2)
    net.switch.set_link(net.ports[1], Link(reorder=1.0))
    data = net.send(0, mac(1), mac(0))
    assert net.stations[1].take() == []
    net.switch.set_link(net.ports[1], Link())
    assert net.stations[1].take() == [data]


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_no_frame_comes_back_and_none_reaches_a_port_twice(seed: int) -> None:
    luck = random.Random(seed)
    net = Net(ports=5)
    for _ in range(200):
        port = luck.randrange(5)
        data = net.send(
            port, luck.choice([ALL, mac(luck.randrange(8))]), mac(luck.randrange(8)), luck.randbytes(8)
        )
        got = [one.take() for one in net.stations]
        assert got[port] == []
        assert all(one in ([], [data]) for one in got)
