"""Virtual interfaces over a real xenstore core: up, down, again, with every parameter; nodes that make no sense."""

from __future__ import annotations

import itertools

import pytest

from drivers.net.nodes import FrontLink, QueueLink
from drivers.net.receive import Abilities
from drivers.net.xenbus_back import BackDevice
from drivers.net.xenbus_front import FrontDevice, Wish
from drivers.xenbus.back import ConnectError
from drivers.xenbus.states import XenbusState as S
from tests.support.xenbus_world import XenbusWorld

BACK, FRONT = "/local/domain/16128/backend/vif/1/0", "/local/domain/1/device/vif/0"


class Back:
    def __init__(self) -> None:
        self.link: FrontLink | None = None
        self.refuse = ""
        self.gone = False

    def connect(self, link: FrontLink) -> None:
        if self.refuse:
            raise ConnectError(self.refuse)
        self.link = link

    def disconnect(self) -> bool:
        self.link = None
        return True

    def removed(self) -> None:
        self.gone = True


class Front:
    def __init__(self) -> None:
        self.numbers = itertools.count(8)
        self.up = False
        self.gone = False
        self.links: list[QueueLink] = []

    def publish(self, queues: int, split: bool) -> list[QueueLink]:
        self.links = []
        for _ in range(queues):
            tx, rx, first, second = (next(self.numbers) for _ in range(4))
            self.links.append(QueueLink(tx, rx, first, second if split else first))
        return self.links

    def connected(self) -> None:
        self.up = True

    def disconnect(self) -> None:
        self.up = False

    def removed(self) -> None:
        self.gone = True


class World(XenbusWorld):
    front_port: Front

    def __init__(self, wish: Wish | None = None, max_queues: int = 4) -> None:
        super().__init__(BACK, FRONT)
        self.back_port, self.front_port = Back(), Front()
        self.back = BackDevice(BACK, FRONT, self.back_port, max_queues=max_queues)
        self.front = FrontDevice(FRONT, BACK, self.front_port, wish)
        self.run(self.back.start())


ABILITIES = (
    Abilities(),
    Abilities(notify=False, blank_v4=False),
    Abilities(True, True, True, True, True, True, True),
)


@pytest.mark.parametrize("abilities", ABILITIES)
@pytest.mark.parametrize("queues", [1, 2, 4, 9])
@pytest.mark.parametrize("split", [True, False])
def test_both_ends_agree(queues: int, split: bool, abilities: Abilities) -> None:
    world = World(Wish(queues, split, abilities))
    assert world.settle() == (S.Connected, S.Connected)
    link = world.back_port.link
    assert link is not None
    assert link.abilities == abilities
    assert list(link.queues) == world.front_port.links
    assert len(link.queues) == min(queues, 4)
    assert world.front_port.up


def test_down_by_either_end_and_up_again() -> None:
    world = World()
    assert world.settle() == (S.Connected, S.Connected)
    world.run(world.front.close())
    assert world.settle() == (S.Closed, S.Closed)
    assert world.back_port.link is None
    assert not world.back_port.gone
    for queues in (
        2,
        1,
        4,
    ):  # with other numbers of rings each time: what is left of the last ones is not read
        world.front = FrontDevice(FRONT, BACK, world.front_port, Wish(queues))
        world.run(world.front.restart())
        assert world.settle() == (S.Connected, S.Connected)
        assert world.back_port.link is not None
        assert len(world.back_port.link.queues) == queues
        world.run(world.front.close())
        assert world.settle() == (S.Closed, S.Closed)
    world.run(world.front.restart())
    assert world.settle() == (S.Connected, S.Connected)
    world.write(f"{BACK}/online", "0")
    world.write(f"{BACK}/state", "5")
    world.back.state = S.Closing  # libxl wrote it
    world.settle()
    assert (world.front.state, world.back_port.gone) == (S.Closed, True)


def test_a_frontend_that_starts_anew_gets_new_rings() -> None:
    """Kexec, or a driver that was bound again: Initialising out of Connected."""
    world = World()
    world.settle()
    old = world.back_port.link
    world.run(world.front.restart())
    assert world.settle() == (S.Connected, S.Connected)
    assert world.back_port.link not in (old, None)


def test_linuxs_way_up_without_initialised() -> None:
    """netfront writes its nodes and goes from Initialising to Connected."""
    world = World()
    world.run(world.back.changed())
    for name, value in (
        ("tx-ring-ref", "8"),
        ("rx-ring-ref", "9"),
        ("event-channel-tx", "5"),
        ("event-channel-rx", "6"),
        ("request-rx-copy", "1"),
        ("state", "4"),
    ):
        world.write(f"{FRONT}/{name}", value)
    world.run(world.back.changed())
    assert world.back.state == S.Connected
    assert world.back_port.link is not None
    assert world.back_port.link.queues == (QueueLink(8, 9, 5, 6),)


@pytest.mark.parametrize(
    ("node", "value", "why"),
    [
        ("request-rx-copy", None, "request-rx-copy"),
        ("request-rx-copy", "2", "within"),
        ("tx-ring-ref", None, "missing"),
        ("rx-ring-ref", "x", "not a number"),
        ("rx-ring-ref", "8", "same grant"),
        ("event-channel", None, "missing"),
        ("event-channel", "0", "within"),
        ("event-channel-tx", "7", "missing"),
        ("feature-sg", "yes", "not a number"),
        ("multi-queue-num-queues", "0", "within"),
        ("multi-queue-num-queues", "5", "within"),
        ("multi-queue-num-queues", "2", "missing"),
        ("tx-ring-ref", "9" * 40, "not a number"),
        ("tx-ring-ref", str(1 << 32), "within"),
    ],
)
def test_nodes_that_make_no_sense_close_the_device_with_a_reason(
    node: str, value: str | None, why: str
) -> None:
    world = World()
    world.run(world.back.changed())
    nodes = {
        "tx-ring-ref": "8",
        "rx-ring-ref": "9",
        "event-channel": "5",
        "request-rx-copy": "1",
        "state": "4",
    }
    if value is None:
        del nodes[node]
    else:
        nodes[node] = value
    for name, text in nodes.items():
        world.write(f"{FRONT}/{name}", text)
    world.run(world.back.changed())
    assert world.back.state == S.Closing
    assert why in world.back.error
    assert why in (world.read("error/backend/vif/1/0/error") or "")
    assert world.back_port.link is None
    world.write(f"{FRONT}/state", "6")
    world.run(world.back.changed())
    assert world.back.state == S.Closed
    world.write(f"{FRONT}/state", "1")
    world.run(world.back.changed())
    assert world.back.state == S.InitWait


def test_two_queues_with_one_channel_are_refused() -> None:
    world = World()
    world.run(world.back.changed())
    for queue in (0, 1):
        for name, value in (("tx-ring-ref", 10 + queue), ("rx-ring-ref", 20 + queue), ("event-channel", 5)):
            world.write(f"{FRONT}/queue-{queue}/{name}", str(value))
    for name, text in (("multi-queue-num-queues", "2"), ("request-rx-copy", "1"), ("state", "4")):
        world.write(f"{FRONT}/{name}", text)
    world.run(world.back.changed())
    assert "same event channel" in world.back.error


def test_a_ring_that_cannot_be_mapped_is_told() -> None:
    world = World()
    world.back_port.refuse = "map of 2 frames: grant status -3"
    world.settle()
    assert "grant status -3" in world.back.error
    assert world.front.state == S.Closed
