"""Which interfaces NetIO serves: each once, also while it waits for the store and is told of others, and the one that is there now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.abi.event_channel import EVTCHNSTAT_interdomain, EVTCHNSTAT_virq
from domains.netio import __main__ as netio
from domains.netio import vif
from domains.netio.__main__ import NetIo
from drivers.xenbus.client import Procedure
from tests.support.procedures import reading

PATH = "/local/domain/2/backend/vif/3/0"


class Store:
    """Nodes; whoever reads is told of a change meanwhile, the first times."""

    def __init__(self, net: NetIo) -> None:
        self.net = net
        self.nodes: dict[str, dict[str, bytes]] = {
            PATH: {"mac": b"00:16:3e:00:00:01", "bridge": b"br", "trusted": b"1"}
        }
        self.telling = 5

    def list(self, path: str) -> list[str]:
        names = {
            name[len(path) + 1 :].partition("/")[0] for name in self.nodes if name.startswith(path + "/")
        }
        return sorted(names)

    def run(self, procedure: Procedure[Any]) -> Any:
        return reading(procedure, self.read)

    def read(self, path: str) -> bytes | None:
        if self.telling:
            self.telling -= 1
            self.net._scan(f"{PATH}/{netio.LAST_NODE}")
        base, _, node = path.rpartition("/")
        return self.nodes.get(base, {}).get(node)


class Server:
    """Of one interface."""

    def __init__(self, host: Any, store: Store, path: str, *rest: Any) -> None:
        store.telling += 3 * (not made)
        self.path, self.identity, self.closed = path, vif.identity(cast(Any, store), path), False
        self.channels = [11]
        made.append(self)

    def start(self) -> None:
        if self.identity[1] == "none":
            raise ValueError("bridge")

    def close(self) -> None:
        assert not self.closed
        self.closed = True


made: list[Server] = []


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> NetIo:
    made.clear()
    monkeypatch.setattr(netio, "VifServer", Server)
    closed: list[int] = []
    rows = [(9, EVTCHNSTAT_virq, 0, 0, 0), (10, EVTCHNSTAT_interdomain, 0, 0, 5), (11, EVTCHNSTAT_interdomain, 0, 3, 5),
            (12, EVTCHNSTAT_interdomain, 0, 3, 6), (13, EVTCHNSTAT_interdomain, 0, 4, 5)]  # fmt: skip
    host = SimpleNamespace(
        domid=2,
        reactor=SimpleNamespace(after=None),
        known_channels=rows,
        close_port=closed.append,
        closed=closed,
    )
    found = NetIo(cast(Any, host), None)
    found.store = cast(Any, Store(found))
    found.stage, found.journals = cast(Any, None), cast(Any, None)
    return found


def test_an_interface_is_served_once_although_the_store_is_waited_for(net: NetIo) -> None:
    net._scan("backend/vif")
    assert [server.path for server in made] == [PATH]
    net._scan("backend/vif")
    net._scan(f"{PATH}/state")
    assert len(made) == 1


def test_another_interface_under_the_same_number_takes_the_first_ones_place(net: NetIo) -> None:
    """It was taken away and another one attached before this process looked; the old one's last words do not end the new one."""
    net._scan("backend/vif")
    cast(Any, net.store).nodes[PATH]["mac"] = b"00:16:3e:00:00:02"
    net._scan("backend/vif")
    assert [(server.identity[0][-1], server.closed) for server in made] == [("1", True), ("2", False)]
    net._forget(cast(Any, made[0]))
    assert list(net.servers.values()) == [made[1]]
    cast(Any, net.store).nodes.clear()
    net._scan("backend/vif")
    assert net.servers == {}
    assert made[1].closed


def test_channels_that_a_process_before_this_one_left_are_closed(net: NetIo) -> None:
    """To frontends that are gone, or have others now; not the store's, and not those that are in use again."""
    net._scan("backend/vif")
    net._scan("backend/vif")
    assert cast(Any, net.host).closed == [12, 13]


def test_nodes_that_make_no_sense_cost_that_interface_alone(net: NetIo) -> None:
    nodes = cast(Any, net.store).nodes
    nodes["/local/domain/2/backend/vif/3/1"] = {"mac": b"x", "bridge": b"none", "trusted": b"1"}
    nodes["/local/domain/2/backend/vif/4/0"] = {"mac": b"00:16:3e:00:00:03", "bridge": b"br", "trusted": b"1"}
    nodes["/local/domain/2/backend/vif/4/1"] = {"mac": b"00:16:3e:00:00:04"}  # not complete yet
    net._scan("backend/vif")
    assert sorted(server.path[-3:] for server in made) == ["3/0", "3/1", "4/0"]
