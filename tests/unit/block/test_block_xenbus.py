"""Virtual disks over a real xenstore core: up, down, again, with every parameter; nodes that make no sense."""

from __future__ import annotations

import itertools

import pytest

from drivers.block.frontend import Features
from drivers.block.nodes import FrontLink, QueueLink
from drivers.block.requests import Disk
from drivers.block.wire import X86_32, X86_64
from drivers.block.xenbus_back import BackDevice
from drivers.block.xenbus_front import FrontDevice, Wish
from drivers.xenbus import client as xb
from drivers.xenbus.back import ConnectError
from drivers.xenbus.client import Procedure
from drivers.xenbus.states import XenbusState as S
from tests.support.xenbus_world import XenbusWorld

BACK, FRONT = "/local/domain/0/backend/vbd/1/51712", "/local/domain/1/device/vbd/51712"


class Back:
    def __init__(self) -> None:
        self.link: FrontLink | None = None
        self.disk: Disk | None = None
        self.refuse = ""
        self.slow = False
        self.gone = False
        self.connects = 0

    def connect(self, link: FrontLink, disk: Disk) -> None:
        if self.refuse:
            raise ConnectError(self.refuse)
        self.link, self.disk = link, disk
        self.connects += 1

    def disconnect(self) -> bool:
        if self.slow:
            return False
        self.link = None
        return True

    def removed(self) -> None:
        self.gone = True


class Front:
    def __init__(self) -> None:
        self.features: Features | None = None
        self.numbers = itertools.count(8)
        self.gone = False

    def publish(self, queues: int, pages: int) -> list[QueueLink]:
        return [
            QueueLink(tuple(next(self.numbers) for _ in range(pages)), next(self.numbers))
            for _ in range(queues)
        ]

    def connected(self, features: Features) -> None:
        self.features = features

    def disconnect(self) -> None:
        self.features = None

    def removed(self) -> None:
        self.gone = True


class World(XenbusWorld):
    front_port: Front

    def __init__(self, wish: Wish | None = None, disk: Disk | None = None, block_size: int = 512) -> None:
        super().__init__(BACK, FRONT)
        self.back_port, self.front_port = Back(), Front()
        self.disk = disk if disk is not None else Disk(8000, discard=True)
        self.back = BackDevice(BACK, FRONT, self.disk, self.back_port, block_size=block_size)
        self.front = FrontDevice(FRONT, BACK, self.front_port, wish)
        self.run(self.back.start())


def test_an_event_without_a_change_publishes_nothing_anew() -> None:
    """Watches fire more often than states change. The back end may have taken the rings that were published first; one that went
    away and came back gets new ones."""
    world = World()
    world.run(world.back.changed())
    first = next(world.front_port.numbers)
    for _ in range(3):
        world.run(world.front.changed())
    assert world.front.state == S.Initialised
    assert (
        next(world.front_port.numbers) == first + 3
    )  # one ring page, one channel, and the number taken here
    assert world.settle() == (S.Connected, S.Connected)
    world.write(f"{BACK}/state", "5")
    world.run(world.front.changed())
    assert world.front.state == S.Closed


@pytest.mark.parametrize("queues", [1, 2, 4, 9])
@pytest.mark.parametrize("order", [0, 1, 4])
@pytest.mark.parametrize("abi", [X86_64, X86_32])
def test_up(queues: int, order: int, abi: object) -> None:
    wish = Wish(queues=queues, order=order, abi=X86_32 if abi is X86_32 else X86_64)
    world = World(wish)
    assert world.settle() == (S.Connected, S.Connected)
    link, features = world.back_port.link, world.front_port.features
    assert link is not None
    assert len(link.queues) == min(queues, 4)
    assert {len(queue.ring_refs) for queue in link.queues} == {1 << order}
    assert link.abi is wish.abi
    assert link.persistent
    assert features == Features(8000, 512, False, True, True, True, False, 256, True)
    assert (world.read(f"{FRONT}/ring-ref") is None) == (order > 0 or queues > 1)


def test_nodes_of_a_cdrom() -> None:
    world = World(disk=Disk(8000, read_only=True, cdrom=True, removable=True))
    world.settle()
    assert [world.read(f"{BACK}/{n}") for n in ("info", "sectors", "sector-size")] == ["7", "8000", "512"]
    assert world.front_port.features is not None
    assert world.front_port.features.read_only


def test_large_sectors_only_for_a_frontend_that_says_so() -> None:
    world = World(Wish(large_sectors=True), block_size=4096)
    assert world.settle() == (S.Connected, S.Connected)
    assert (world.read(f"{BACK}/sectors"), world.read(f"{BACK}/sector-size")) == ("1000", "4096")
    assert world.back_port.disk is not None
    assert world.back_port.disk.sector_size == 4096
    world = World(Wish(large_sectors=False), block_size=4096)
    assert world.settle() == (S.Closed, S.Closed)
    assert "feature-large-sector-size" in (
        world.read("/local/domain/0/error/backend/vbd/1/51712/error") or ""
    ) or (world.back.error)


def test_a_frontend_that_does_not_wait() -> None:
    """GRUB and mini-os publish their ring while the back end is still Initialising."""
    world = World()
    for name, value in (("ring-ref", "8"), ("event-channel", "5"), ("state", "3")):
        world.write(f"{FRONT}/{name}", value)
    world.run(world.back.changed())
    assert world.back.state == S.Connected
    assert world.back_port.link == FrontLink((QueueLink((8,), 5),), X86_64, False, False)
    assert world.read(f"{BACK}/feature-flush-cache") == "1"


def test_a_frontend_comes_back_before_the_back_end_has_closed() -> None:
    world = World()
    world.settle()
    world.run(world.front.close())
    world.run(world.back.changed())
    world.run(world.front.restart())
    assert world.settle() == (S.Connected, S.Connected)


def test_closing_by_the_frontend_and_coming_back() -> None:
    world = World()
    world.settle()
    world.run(world.front.close())
    world.settle()
    assert (world.front.state, world.back.state) == (S.Closed, S.Closed)
    assert world.back_port.link is None
    world.run(world.front.restart())
    assert world.settle() == (S.Connected, S.Connected)
    assert world.back_port.connects == 2


def test_resume_of_the_frontends_domain_with_fewer_queues() -> None:
    world = World(Wish(queues=3, order=2))
    world.settle()
    world.front.wish = Wish(queues=1, order=0)  # another kernel in the same domain
    world.run(world.front.restart())
    assert world.settle() == (S.Connected, S.Connected)
    assert world.back_port.link is not None
    assert [len(queue.ring_refs) for queue in world.back_port.link.queues] == [1]


def test_the_back_end_does_not_close_before_requests_are_done() -> None:
    world = World()
    world.settle()
    world.back_port.slow = True
    world.write(f"{FRONT}/state", "6")
    world.run(world.back.changed())
    world.run(world.back.changed())
    assert world.back.state == S.Closing
    world.back_port.slow = False
    world.run(world.back.changed())
    assert world.read(f"{BACK}/state") == "6"
    assert not world.back_port.gone


def test_a_frontend_that_starts_anew_waits_for_the_old_requests() -> None:
    world = World()
    world.settle()
    world.back_port.slow = True
    world.run(world.front.restart())
    world.run(world.back.changed())
    assert world.back.state != S.InitWait
    world.back_port.slow = False
    assert world.settle() == (S.Connected, S.Connected)


def test_detach_by_the_toolstack() -> None:
    """xl block-detach: online is 0 and the back end's state Closing; the frontend follows, the device goes."""
    world = World()
    world.settle()
    world.write(f"{BACK}/online", "0")
    world.write(f"{BACK}/state", "5")
    world.settle()
    assert world.front.state == S.Closed
    assert world.back_port.gone
    assert world.back.removed
    assert world.read(f"{BACK}/state") == "6"


def test_the_frontends_domain_dies() -> None:
    world = World()
    world.settle()

    def gone() -> Procedure[bytes]:
        answer: bytes = yield xb.remove(FRONT)
        return answer

    world.run(gone())
    world.run(world.back.changed())
    assert world.back_port.gone
    assert world.back_port.link is None


@pytest.mark.parametrize(
    "nodes",
    [
        {"ring-ref": None},
        {"event-channel": None},
        {"event-channel": "0"},
        {"event-channel": "-1"},
        {"event-channel": "4294967296"},
        {"ring-ref": "x"},
        {"ring-ref": "9" * 30},
        {"protocol": "arm-abi"},
        {"ring-page-order": "5"},
        {"ring-page-order": "1"},
        {"num-ring-pages": "3"},
        {"multi-queue-num-queues": "0"},
        {"multi-queue-num-queues": "5"},
        {"multi-queue-num-queues": "2"},
        {"feature-persistent": "yes"},
        {"ring-page-order": "1", "ring-ref0": "4", "ring-ref1": "4"},
    ],
)
def test_nodes_that_make_no_sense_close_the_device(nodes: dict[str, str | None]) -> None:
    world = World()
    good: dict[str, str | None] = {"ring-ref": "8", "event-channel": "5"}
    for name, value in {**good, **nodes, "state": "3"}.items():
        if value is not None:
            world.write(f"{FRONT}/{name}", value)
    world.run(world.back.changed())
    assert world.back.state == S.Closing
    assert world.back.error
    assert world.back_port.link is None
    assert world.read(f"{BACK}/state") == "5"


def test_rings_that_cannot_be_mapped() -> None:
    world = World()
    world.back_port.refuse = "grant 8: bad reference"
    world.settle()
    assert world.back.error == "grant 8: bad reference"
    assert world.front.state == S.Closed


def test_a_process_that_takes_over_finds_the_state() -> None:
    world = World()
    world.settle()
    after = BackDevice(BACK, FRONT, world.disk, world.back_port)
    assert world.run(after.start()) == S.Connected
    world.run(after.changed())
    assert (after.state, world.back_port.connects) == (S.Connected, 1)


def test_features_that_make_no_sense_close_the_frontend() -> None:
    world = World()
    world.run(world.back.changed())
    world.run(world.front.changed())
    world.run(world.back.changed())
    world.write(f"{BACK}/sectors", "many")
    world.run(world.front.changed())
    assert world.front.state == S.Closing
    assert "sectors" in world.front.error
