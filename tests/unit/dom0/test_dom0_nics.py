"""Network interfaces in Dom0: nodes as libxl writes them, rates, addresses, requests that make no sense, and the link to NetIO."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.addresses import DomId
from bus.messages.net import MAX_PORTS, TO_NETIO, NetHello, NetHost, NetLink, NetPort, NetPortGone
from bus.packets import PacketLink, close_all
from domains.dom0.toolstack.nics import FIRST_DOMID, NicError, Nics, random_mac, rate_of
from domains.dom0.xenstore_service import XenstoreService
from domains.native.reactor import Reactor

GUEST = DomId(3)


class Rig:
    """Nics with a store; the test is NetIO."""

    def __init__(self) -> None:
        self.host = cast(Any, SimpleNamespace(reactor=Reactor(), on_order={}))
        self.store = XenstoreService(self.host)
        self.deposits: list[str] = []
        self.theirs: PacketLink | None = None
        self.starts: list[DomId] = []
        self.log: list[str] = []
        self.nics = Nics(
            self.host,
            self.store,
            cast(Any, SimpleNamespace(destroy=lambda d: None)),
            self.deposit,
            self.log.append,
        )
        self.nics.driver.start = self.start  # the hypervisor's part

    def deposit(self, name: str, fds: list[str], descriptors: list[int], settings: dict[str, Any]) -> None:
        self.deposits.append(name)
        if descriptors:
            self.theirs = PacketLink(socket.socket(fileno=os.dup(descriptors[0])), TO_NETIO)

    def start(self, wanted: DomId = GUEST) -> DomId:
        self.starts.append(wanted)
        self.nics.driver.domid = wanted
        return wanted

    def hear(self) -> list[tuple[Any, list[int]]]:
        """What NetIO was told."""
        assert self.theirs is not None
        self.host.reactor.once(0.01)
        out = []
        while (packet := self.theirs.receive()) is not None:
            out.append(packet)
        return out

    def say(self, message: Any) -> None:
        assert self.theirs is not None
        self.theirs.send(message)
        self.host.reactor.once(0.5)

    def tree(self, base: str) -> dict[str, str | None]:
        return {name: self.store.read(f"{base}/{name}") for name in self.store.list(base)}


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    if rig.nics.driver.domid is not None:
        rig.nics.destroy_netio()
    if rig.theirs is not None:
        rig.theirs.close()
    rig.host.reactor.close()


def test_the_nodes_are_libxls(rig: Rig) -> None:
    config = {"mac": "00:16:3e:00:00:07", "bridge": "br7", "rate": "10Mb/s", "ip": "10.0.0.7", "mtu": 9000}
    nic = rig.nics.attach(GUEST, config, "pv")
    back, front = f"/local/domain/{FIRST_DOMID}/backend/vif/3/0", "/local/domain/3/device/vif/0"
    assert (nic.back, nic.front) == (back, front)
    assert rig.tree(back) == {
        "frontend": front, "frontend-id": "3", "online": "1", "state": "1", "script": "/etc/xen/scripts/vif-bridge",
        "mac": "00:16:3e:00:00:07", "ip": "10.0.0.7", "mtu": "9000", "rate": "62500,50000", "bridge": "br7", "handle": "0",
        "type": "vif", "trusted": "1",
    }  # fmt: skip
    assert rig.tree(front) == {
        "backend": back, "backend-id": str(FIRST_DOMID), "state": "1", "handle": "0", "mtu": "9000",
        "mac": "00:16:3e:00:00:07", "trusted": "1",
    }  # fmt: skip


def test_what_is_left_out_is_chosen_and_kept_for_a_reboot(rig: Rig) -> None:
    config: dict[str, Any] = {"trusted": False}
    first = rig.nics.attach(GUEST, config, "pv")
    assert re.fullmatch(r"00:16:3e:[0-7][0-9a-f](:[0-9a-f]{2}){2}", first.mac)
    assert (first.bridge, first.devid) == ("xenbr0", 0)
    assert rig.tree(first.back)["trusted"] == "0"
    assert "rate" not in rig.tree(first.back)
    assert rig.nics.attach(GUEST, {}, "pv").devid == 1
    rig.nics.domain_died(GUEST)
    assert rig.store.list(f"/local/domain/{FIRST_DOMID}/backend/vif/3") == []
    again = rig.nics.attach(DomId(4), config, "pv")  # the same guest after a reboot
    assert (again.mac, again.devid) == (first.mac, 0)
    assert len(rig.starts) == 1
    assert len({random_mac() for _ in range(50)}) > 45


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10Mb/s", (62500, 50000)),
        ("250KB/s", (12500, 50000)),
        ("1MB/s@20ms", (20000, 20000)),
        ("8b/s@1s", (1, 1000000)),
        ("1GB/s@500us", (500000, 500)),
    ],
)
def test_rates_are_xls(text: str, wanted: tuple[int, int]) -> None:
    assert rate_of(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "fast", "1b/s", "10Mb", "99999999GB/s", "1MB/s@0ms", "-1MB/s", "1MB/s@9999999s"]
)
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(NicError, match="rate"):
        rate_of(text)


@pytest.mark.parametrize(
    ("config", "kind", "why"),
    [
        ({"model": "e1000"}, "hvm", "emulated.*type=vif"),
        ({"type": "ioemu"}, "hvm", "emulated"),
        ({"type": "ioemu"}, "pv", "leave type="),
        ({"mac": "01:16:3e:00:00:01"}, "pv", "group address"),
        ({"mac": 7}, "pv", "mac"),
        ({"mac": "x"}, "pv", "mac"),
        ({"devid": 256}, "pv", "devid"),
        ({"devid": "0"}, "pv", "devid"),
        ({"devid": 0}, "pv", "already"),
        ({"bridge": "much-too-long-a-name"}, "pv", "bridge"),
        ({"bridge": "../x"}, "pv", "bridge"),
        ({"rate": "x"}, "pv", "rate"),
        ({"backend": "nobody"}, "pv", "no domain"),
    ],
)
def test_an_interface_that_makes_no_sense_is_refused_and_leaves_nothing(
    rig: Rig, config: dict[str, Any], kind: str, why: str
) -> None:
    rig.nics.attach(GUEST, {}, "pv")
    with pytest.raises(NicError, match=why):
        rig.nics.attach(GUEST, config, kind)
    assert len(rig.nics.nics) == 1
    assert rig.store.list("/local/domain/3/device/vif") == ["0"]


def test_a_guest_has_at_most_sixteen(rig: Rig) -> None:
    for _ in range(16):
        rig.nics.attach(GUEST, {}, "pv")
    with pytest.raises(NicError, match="16 already"):
        rig.nics.attach(GUEST, {}, "pv")


def test_one_waits_for_a_guest_and_another_takes_its_interface_away(rig: Rig) -> None:
    """Requests are served while one waits: the guest's end, and a second detach."""
    nic = rig.nics.attach(GUEST, {}, "pv")
    plain = rig.host.reactor.once

    def once(timeout: float) -> None:
        rig.host.reactor.once = plain
        rig.nics.domain_died(GUEST)

    rig.host.reactor.once = once
    rig.nics.detach(GUEST, nic.mac)
    assert rig.nics.nics == []


def test_whoever_needs_netio_while_it_is_started_is_told(rig: Rig) -> None:
    def start(wanted: DomId = GUEST) -> DomId:
        with pytest.raises(NicError, match="being started"):
            rig.nics.attach(GUEST, {}, "pv")
        return rig.start(wanted)

    rig.nics.driver.start = start  # the hypervisor's part
    rig.nics.attach(GUEST, {}, "pv")
    assert len(rig.starts) == len(rig.nics.nics) == 1


def test_another_driver_domain_may_serve(rig: Rig) -> None:
    rig.nics.find_domain = lambda name: {"drv": DomId(9), "self": GUEST, "Domain-0": DomId(0)}.get(name)
    nic = rig.nics.attach(GUEST, {"backend": "drv"}, "pv")
    assert nic.back == "/local/domain/9/backend/vif/3/0"
    assert rig.starts == []  # NetIO is not needed
    for name in ("self", "Domain-0"):
        with pytest.raises(NicError, match="cannot serve"):
            rig.nics.attach(GUEST, {"backend": name}, "pv")


def test_ports_and_links_are_told_when_netio_says_hello_and_again_to_its_successor(rig: Rig) -> None:
    number, fd = rig.nics.open_port("br1", mirror=True)
    rig.nics.set_link("br1", {"loss": 0.5, "seed": 3})
    assert rig.hear() == []  # it has not said hello
    for _ in range(2):
        rig.say(NetHello())
        told = rig.hear()
        assert [type(message) for message, _ in told] == [NetLink, NetPort]
        assert (told[0][0].loss, told[0][0].seed) == (0.5, 3)
        assert (told[1][0].port, told[1][0].bridge, told[1][0].mirror) == (number, "br1", True)
        end = socket.socket(fileno=told[1][1][0])
        end.send(b"x" * 60)
        assert os.read(fd, 100) == b"x" * 60
        end.close()
    second, other = rig.nics.open_port("br2")
    assert [message.port for message, fds in rig.hear() if not close_all(fds)] == [second]
    rig.say(NetPortGone(port=number))
    rig.say(NetPortGone(port=77))
    rig.say(NetHello())
    assert [m.port for m, fds in rig.hear() if isinstance(m, NetPort) and not close_all(fds)] == [second]
    close_all([fd, other])


def test_ports_are_bounded_and_end_with_netio(rig: Rig) -> None:
    fds = [rig.nics.open_port("br")[1] for _ in range(MAX_PORTS)]
    with pytest.raises(NicError, match="32 ports"):
        rig.nics.open_port("br")
    rig.nics.destroy_netio()
    assert os.read(fds[0], 10) == b""
    close_all(fds)
    with pytest.raises(NicError, match="no NetIO"):
        rig.nics.destroy_netio()
    close_all([rig.nics.open_port("br")[1]])
    assert rig.starts == [FIRST_DOMID, FIRST_DOMID + 1]


@pytest.mark.parametrize(
    "values", [{"loss": 2}, {"loss": "x"}, {"delay_ms": -1}, {"what": 1}, {"loss": float("nan")}, {"up": []}]
)
def test_links_that_make_no_sense_are_refused(rig: Rig, values: dict[str, Any]) -> None:
    with pytest.raises(NicError, match="link of br"):
        rig.nics.set_link("br", values)
    assert rig.nics._links == {}


def test_helper_hosts_are_told_and_checked(rig: Rig) -> None:
    for address in ("10.0.0.0/24", "x", "10.0.0.1", "1.2.3.4/33", "\u0661.2.3.4/8"):
        with pytest.raises(NicError, match="host of br"):
            rig.nics.set_host("br", address)
    with pytest.raises(NicError, match="no host"):
        rig.nics.set_host("br", "")
    rig.nics.set_host("br", "10.0.0.1/24", dhcp=False)
    rig.say(NetHello())
    rig.nics.set_host("br", "")
    told = [message for message, _ in rig.hear()]
    assert [(type(one), one.address, one.dhcp) for one in told] == [
        (NetHost, "10.0.0.1/24", False),
        (NetHost, "", True),
    ]


def test_nonsense_from_netio_is_logged(rig: Rig) -> None:
    _, fd = rig.nics.open_port("br")
    assert rig.theirs is not None
    rig.theirs.send_raw(b"\xff\xff")
    rig.host.reactor.once(0.5)
    assert "nonsense" in rig.log[-1]
    close_all([fd])
