"""Which disks DomIO serves: each once, also while it waits for the store and is told of others, and the one that is there now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from domains.domio import __main__ as domio
from domains.domio.__main__ import DomIo
from domains.domio.vbd import VbdServer
from domains.native.domain import HypercallError
from drivers.hw.nvme.driver import State
from drivers.xenbus.client import Procedure
from tests.support.procedures import reading

PATH = "/local/domain/2/backend/vbd/3/51712"


def test_interrupts_that_could_not_be_bound_are_bound_at_the_next_try() -> None:
    """Those that were bound the first time stay as they are: binding them again is EBUSY."""
    bound: list[int] = []

    def bind(bdf: int, vector: int, handler: Any) -> int:
        assert vector not in bound
        if vector == 1 and not refused:
            refused.append(vector)
            raise HypercallError(12, "bind_pirq")
        bound.append(vector)
        return 10 + vector

    refused: list[int] = []
    started: list[int] = []
    disk = SimpleNamespace(
        _port=SimpleNamespace(unmask=lambda count: True),
        _msi=[],
        bdf=8,
        closed=True,
        _log=lambda text: None,
        _look_soon=lambda: None,
        _host=SimpleNamespace(bind_msi=bind, reactor=SimpleNamespace(after=lambda seconds, call: None)),
        driver=SimpleNamespace(state=State.OFF, start=started.append, interrupt=lambda vector: None),
    )
    for expected in ([10], [10, 11]):
        VbdServer.device_attached(cast(VbdServer, disk))
        assert disk._msi == expected
    assert len(started) == 1


def test_one_look_at_a_time_waits_while_the_device_is_set_up() -> None:
    """Each look of the slower timer began another chain of quick ones: a device that took 15 s had DomIO look 375,000 times."""
    waiting: list[Any] = []
    disk = cast(Any, object.__new__(VbdServer))
    disk._host = SimpleNamespace(reactor=SimpleNamespace(after=lambda seconds, call: waiting.append(call)))
    disk._backend, disk.bdf, disk.closed, disk._looks_soon = None, 8, False, False
    disk.driver = SimpleNamespace(state=State.STARTING, poll=lambda now: None)
    disk._tick()
    for _ in range(20):
        calls, waiting[:] = waiting[:], []
        assert calls.count(disk._starting) == 1
        assert calls.count(disk._tick) == 1
        for call in calls:
            call()


class Store:
    """Nodes; whoever reads is told of a change meanwhile, the first times."""

    def __init__(self, disks: DomIo) -> None:
        self.disks = disks
        self.params = {PATH: b"nvme:8"}
        self.telling = 5

    def list(self, path: str) -> list[str]:
        names = {
            name[len(path) + 1 :].partition("/")[0] for name in self.params if name.startswith(path + "/")
        }
        return sorted(names)

    def run(self, procedure: Procedure[Any]) -> Any:
        return reading(procedure, self.read)

    def read(self, path: str) -> bytes | None:
        if self.telling:
            self.telling -= 1
            self.disks._scan(f"{PATH}/{domio.LAST_NODE}")
        base, _, node = path.rpartition("/")
        return self.params.get(base) if node == "params" else b"1" if base in self.params else None


class Server:
    """Of one disk."""

    def __init__(self, host: Any, store: Store, path: str, *rest: Any) -> None:
        store.telling += not made
        made.append(self)
        self.path, self.bdf, self.closed = path, int((store.read(f"{path}/params") or b":0")[5:], 16), False

    def device_attached(self) -> None:
        pass

    def close(self) -> None:
        assert not self.closed
        self.closed = True


made: list[Server] = []


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> DomIo:
    made.clear()
    monkeypatch.setattr(domio, "VbdServer", Server)
    host = cast(Any, SimpleNamespace(domid=2, reactor=None, devices=set(), pages=lambda first, count: None))
    found = DomIo(host)
    found.store, found.pages = cast(Any, Store(found)), cast(Any, None)
    return found


def test_a_disk_is_served_once_although_the_store_is_waited_for(disks: DomIo) -> None:
    disks._scan("backend/vbd")
    assert [server.bdf for server in made] == [8]
    disks._scan("backend/vbd")
    assert len(made) == 1


def test_another_disk_under_the_same_name_takes_the_first_ones_place(disks: DomIo) -> None:
    """It was taken away and another one attached before this process looked; the old one's last words do not end the new one."""
    disks._scan("backend/vbd")
    cast(Any, disks.store).params[PATH] = b"nvme:10"
    disks._scan("backend/vbd")
    assert [(server.bdf, server.closed) for server in made] == [(8, True), (16, False)]
    disks._forget(cast(Any, made[0]))
    assert list(cast(Any, disks.servers).values()) == [made[1]]
    cast(Any, disks.store).params.clear()
    disks._scan("backend/vbd")
    assert disks.servers == {}
    assert made[1].closed
