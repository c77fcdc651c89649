"""Dom0's toolstack and consoled against guests, and against files and requests that make no sense: a request fails, a guest is
shut out; Dom0, and with it the machine, goes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.abi import domctl as dc
from bus.abi.io.console import XENCONS_INTERFACE
from bus.addresses import DomId, Port
from bus.messages.control import FROM_TOOLSTACK, DomainConfig, Notice, Request, Response
from bus.messages.domain import Order
from bus.packets import PacketLink
from domains.dom0.consoled import Console
from domains.dom0.toolstack import kernels
from domains.dom0.toolstack.disks import Disk, Disks
from domains.dom0.toolstack.guest import Guest
from domains.dom0.toolstack.manager import Manager
from domains.dom0.toolstack.server import ToolstackServer
from domains.dom0.toolstack.traces import Traces
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import HypercallError
from domains.native.reactor import Reactor

GUEST = DomId(3)


class Host:
    """As much of a NativeDomain as is used: nobody is at the other end."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.on_order: dict[str, Any] = {}
        self.notified = 0

    def bind_virq(self, virq: int, callback: Any) -> Port:
        return Port(1)

    def bind_interdomain(self, remote: DomId, port: Port, callback: Any) -> Port:
        return Port(2)

    def notify(self, port: Port) -> None:
        self.notified += 1

    def close_port(self, port: Port) -> None:
        pass

    def unmap_grants(self, mapping: Any) -> None:
        pass


class Xc:
    """The hypervisor's answers."""

    def __init__(self) -> None:
        self.log = b""
        self.flags: dict[DomId, int] = {}
        self.stubborn: list[DomId] = []
        self.destroyed: list[DomId] = []

    def read_console(self, *, clear: bool = False) -> bytes:
        return self.log

    def domain_info(self, domid: DomId) -> Any:
        return SimpleNamespace(flags=self.flags[domid]) if domid in self.flags else None

    def destroy(self, domid: DomId) -> None:
        if domid in self.stubborn:
            self.stubborn.remove(domid)
            raise HypercallError(85, "destroy")
        self.destroyed.append(domid)
        self.flags.pop(domid, None)


class Rig:
    """Toolstack, store and a client, in one process."""

    def __init__(self, directory: Path) -> None:
        self.host, self.xc = Host(), Xc()
        host = cast(Any, self.host)
        self.store = XenstoreService(host)
        self.warden = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        warden = cast(Any, SimpleNamespace(detach=lambda: self.warden[0]))
        self.disks = Disks(host, self.store, cast(Any, self.xc), warden, lambda text: None)
        self.directory = directory
        self.manager = Manager(host, self.store, cast(Any, self.xc), self.disks, directory)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(directory / "control"))
        listener.listen(4)
        self.server = ToolstackServer(host, self.manager, listener, {}, Traces(host))
        self._client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._client.connect(str(directory / "control"))
        self.client = PacketLink(self._client, FROM_TOOLSTACK)
        self._number = 0

    def guest(self, domid: DomId = GUEST, name: str = "guest") -> Guest:
        config = DomainConfig(name=name, uuid=bytes(16))
        console = Console(cast(Any, self.host), domid, name, self.directory)
        guest = self.manager.guests[domid] = Guest(domid, config, {}, console, bytes(16))
        self.xc.flags[domid] = 0
        return guest

    def next(self) -> Any:
        for _ in range(100):
            self.host.reactor.once(0.01)
            packet = self.client.receive()
            if packet is not None:
                return packet[0]
        raise TimeoutError("no answer")

    def ask(self, verb: str, fds: list[int] | None = None, **args: Any) -> Response:
        self._number += 1
        self.client.send(Request(id=self._number, verb=verb, args=args), fds or [])
        answer = self.next()
        assert isinstance(answer, Response)
        return answer

    def close(self) -> None:
        for guest in self.manager.guests.values():
            guest.console.close()
        self.server.close()
        self.client.close()
        self.host.reactor.close()
        for end in self.warden:
            end.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    it = Rig(tmp_path)
    yield it
    it.close()


def test_a_guest_that_fills_the_log_does_not_make_the_answer_too_long(rig: Rig) -> None:
    """`dmesg` shows the latest part of it."""
    rig.xc.log = b"(d3) x\n" * 20_000 + b"last\n"
    answer = rig.ask("dmesg")
    assert answer.ok
    assert answer.result.endswith(b"last\n")


def test_an_answer_that_no_message_can_carry_is_an_error(rig: Rig) -> None:
    """Many guests with long command lines, for one."""
    for number in range(3, 40):
        guest = rig.guest(DomId(number), f"g{number}")
        guest.config = guest.config.model_copy(update={"cmdline": "x" * 4096})
    rig.xc.domain_list = lambda: [  # type: ignore[attr-defined]  # of the fake
        dc.XEN_DOMCTL_GETDOMAININFO.zero()._replace(domain=number) for number in range(3, 40)
    ]
    answer = rig.ask("list")
    assert not answer.ok
    assert "too long" in answer.error
    assert rig.ask("dmesg").ok


HOSTILE_COUNTERS: list[Any] = [
    {"hypercalls": "x" * 50_000},
    {"hypercalls": {"x" * 50_000: 1}, "events": 7},
    {"exceptions": {str(n): n for n in range(4000)}},
    {"events": -1, "hypercalls": {"a": 1 << 64}, "more": "x" * 50_000},
    {"events": True, "hypercalls": {"a": []}},
    {"hypercalls": {"memory_op": 3}, "events": 9},
]


@pytest.mark.parametrize("counters", HOSTILE_COUNTERS)
def test_last_words_of_any_kind(rig: Rig, counters: Any) -> None:
    """A process says what it likes before it ends: the end is told all the same, to whoever follows it."""
    rig.guest()
    assert rig.ask("follow").ok
    handler = rig.host.on_order["counters"]
    handler(Order(order=0, what="counters", body={"domid": int(GUEST), "counters": counters}), [])
    assert rig.ask("stats", domain="guest").ok
    rig.xc.log = b"(d3) " + b"y" * 30_000
    rig.xc.flags[GUEST] = dc.XEN_DOMINF_shutdown | 3 << dc.XEN_DOMINF_shutdownshift
    rig.manager.check()
    notice = rig.next()
    assert isinstance(notice, Notice)
    assert notice.body["reason"] == "crash"
    if counters.get("events") == 9:
        assert notice.body["stats"]["hypercalls"] == {"memory_op": 3}


GARBAGE = ["", "abc", "-1", "9" * 20, "9" * 5000, "0x10", "\u0661", "4294967296", " 1"]


@pytest.mark.parametrize("text", GARBAGE)
def test_nodes_that_a_guest_wrote_are_shown_as_missing(rig: Rig, text: str) -> None:
    """`block-list` reads the frontend's own directory."""
    rig.guest()
    rig.disks.driver.domid = DomId(2)
    rig.disks.disks["disk1"] = Disk("disk1", 8, GUEST, "xvda", 51712, {}, {}, DomId(2))
    front = f"/local/domain/{GUEST}/device/vbd/51712"
    for node in ("event-channel", "ring-ref"):
        rig.store.write(f"{front}/{node}", text[:2000])
    rig.store.write("/local/domain/2/backend/vbd/3/51712/state", text[:2000])
    answer = rig.ask("block-list", domain="guest")
    assert answer.ok, answer.error
    assert (answer.result[0]["ring_ref"], answer.result[0]["state"]) == (-1, 0)


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("shutdown", {"domain": "guest", "how": ["x"]}),
    ("type", {"domain": "guest"}),
    ("destroy", {}),
    ("sched-credit2", {"domain": "guest", "weight": "much"}),
    ("block-attach", {"domain": "guest", "disk": {"vdev": {}, "file": []}}),
    ("block-detach", {"domain": "guest", "vdev": None}),
    ("iommu", {"iova": "x", "domain": {}}),
    ("create", {"config": 7}),
    ("create", {"config": {}}),
    ("create", {}),
    ("console", {"domain": [[[]]]}),
    ("check", {}),
    ("nothing of the kind", {}),
]


@pytest.mark.parametrize(("verb", "args"), REQUESTS)
def test_a_request_of_the_wrong_kind_fails_alone(rig: Rig, verb: str, args: dict[str, Any]) -> None:
    """And the next one is served."""
    rig.guest()
    answer = rig.ask(verb, **args)
    assert not answer.ok
    assert answer.error
    assert rig.ask("domid", domain="guest").result == int(GUEST)


def unreadable(kind: str, directory: Path) -> int:
    """A descriptor of a file that is none to read."""
    if kind == "directory":
        return os.open(directory, os.O_RDONLY)
    path = directory / "file"
    path.write_bytes(b"x")
    if kind == "huge":
        os.truncate(path, 2 << 30)
    return os.open(path, os.O_WRONLY if kind == "write-only" else os.O_RDONLY)


@pytest.mark.parametrize("kind", ["directory", "huge", "write-only"])
@pytest.mark.parametrize("what", ["kernel", "ramdisk"])
def test_files_that_cannot_be_read(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    """The creation fails in one line that names the file."""
    good = tmp_path / "good"
    good.write_bytes(b"\x7fELF" + bytes(100))
    fds = [os.open(good, os.O_RDONLY) if what == "ramdisk" else unreadable(kind, tmp_path)]
    fds.append(unreadable(kind, tmp_path))
    config = {
        "name": "new",
        "uuid": bytes(16),
        "kernel": 0,
        "kernel_path": "/the/kernel",
        "ramdisk": 1,
        "ramdisk_path": "/the/ramdisk",
    }
    if what == "ramdisk":
        monkeypatch.setattr(kernels, "load_kernel", lambda content: None)  # it is good
    answer = rig.ask("create", fds, config=config)
    for fd in fds:
        os.close(fd)
    assert not answer.ok
    assert f"/the/{what}" in answer.error, answer.error


def test_one_guest_that_cannot_be_ended_does_not_keep_the_others(rig: Rig) -> None:
    """XEN_DOMCTL_destroydomain says "again" while a process does not end: the others' ends are told, and it is tried again."""
    rig.guest(DomId(3), "stubborn")
    rig.guest(DomId(4), "other")
    rig.ask("follow")
    rig.xc.stubborn.append(DomId(3))
    for number in (3, 4):
        rig.xc.flags[DomId(number)] = dc.XEN_DOMINF_shutdown
    rig.manager.check()
    assert rig.next().body["name"] == "other"
    rig.manager.check()
    assert rig.next().body["name"] == "stubborn"
    assert rig.manager.guests == {}
    assert sorted(rig.xc.destroyed) == [3, 4]


def test_what_fails_while_a_domain_is_forgotten_does_not_keep_the_rest(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disks cannot be taken away: it is destroyed all the same, and the store forgets it; the error is told."""
    rig.guest(DomId(3), "mine")
    rig.manager.store.write("/local/domain/3/name", "mine")

    def fails(domid: DomId) -> None:
        raise HypercallError(12, "no memory")

    monkeypatch.setattr(rig.manager.disks, "domain_died", fails)
    with pytest.raises(HypercallError, match="no memory"):
        rig.manager._forget(DomId(3))
    assert rig.xc.destroyed == [3]
    assert rig.manager.store.read("/local/domain/3/name") is None


def test_a_console_ring_that_is_never_empty_does_not_hold_dom0(rig: Rig) -> None:
    """The guest puts bytes in as fast as they are taken out."""
    guest = rig.guest()
    page = memoryview(bytearray(4096))
    words = page[: XENCONS_INTERFACE.size & ~3].cast("I")
    cons, prod = (XENCONS_INTERFACE.offset(name) // 4 for name in ("out_cons", "out_prod"))
    taken = 0

    def refill(data: bytes) -> None:
        nonlocal taken
        taken += 1
        if taken > 1000:
            raise AssertionError("it is still being taken from")
        words[prod] = (words[cons] + 2048) & 0xFFFFFFFF

    guest.console.attach(refill)
    words[prod] = 5
    guest.console.connect(cast(Any, SimpleNamespace(pages=[page])), Port(5))
    before = taken
    assert 0 < before < 100
    rig.host.reactor.once(0.0)
    assert taken > before, "and later it goes on"
    guest.console.disconnect()
