"""Dom0 against device models, and against guests that do things while it waits for one: no descriptor is lost, nothing is done twice,
and what goes wrong with one guest ends nobody else."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus import sealed
from bus.addresses import DomId, Port
from bus.messages.control import DomainConfig
from bus.messages.model import TO_MODEL, ModelDone, ModelInput, ModelPicture, ModelReady, ModelUnplugged
from bus.packets import PacketLink
from domains.dom0.consoled import Console, SerialLine
from domains.dom0.toolstack import models
from domains.dom0.toolstack.disks import DiskError, Disks
from domains.dom0.toolstack.guest import Guest, ToolstackError
from domains.dom0.toolstack.manager import Manager
from domains.dom0.toolstack.models import DeviceModel, ModelError
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import HypercallError
from domains.native.reactor import Reactor

GUEST = DomId(3)


class Xc:
    """The hypervisor's answers; `refuse` names what it refuses."""

    def __init__(self) -> None:
        self.refuse: set[str] = set()
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.refuse:
            raise HypercallError(19, name)

    def create_domain(self, **given: Any) -> DomId:
        self._call("create")
        return DomId(given.get("domid") or GUEST)

    def destroy(self, domid: DomId) -> None:
        self._call(f"destroy {domid}")

    def unpause(self, domid: DomId) -> None:
        self._call("unpause")

    def domain_info(self, domid: DomId) -> None:
        return None

    def plug(self, bdf: int, role: str, name: str, *, present: bool = True) -> None:
        self._call("plug" if present else "pull out")

    def assign_device(self, domid: DomId, bdf: int) -> None:
        self._call("assign")


class Rig:
    """A manager with a warden that takes everything, and a device model whose end is in the test's hands."""

    def __init__(self, directory: Path) -> None:
        self.reactor, self.xc = Reactor(), Xc()
        self.directory = directory
        self.deposits: dict[str, list[str]] = {}
        self.theirs: PacketLink | None = None
        host = cast(
            Any,
            SimpleNamespace(
                reactor=self.reactor,
                on_order={},
                bind_virq=lambda virq, callback: Port(1),
                foreign_extents={},
            ),
        )
        self.store = XenstoreService(host)
        self.disks = Disks(host, self.store, cast(Any, self.xc), cast(Any, None), self._log)
        self.disks.deposit = self.deposit  # the warden
        self.disks.driver.domid = DomId(1)
        self.manager = Manager(host, self.store, cast(Any, self.xc), self.disks, directory)
        self.ended: list[str] = []
        self.manager.on_end.append(lambda domid, name, reason, details: self.ended.append(reason))
        self.lines: list[str] = []
        self._open: list[Guest] = []

    def _log(self, text: str) -> None:
        self.lines.append(text)

    def deposit(self, name: str, fds: list[str], descriptors: list[int], settings: dict[str, Any]) -> None:
        if "deposit" in self.xc.refuse:
            raise DiskError("the warden did not take its files")
        self.deposits[name] = fds
        if "control" in fds:
            sock = socket.socket(fileno=os.dup(descriptors[fds.index("control")]))
            self.theirs = PacketLink(sock, TO_MODEL)

    def guest(self) -> Guest:
        config = DomainConfig(name="pc", uuid=bytes(16), type="hvm")
        host = cast(Any, SimpleNamespace(reactor=self.reactor))
        guest = Guest(GUEST, config, {}, Console(host, GUEST, "pc", self.directory), bytes(16))
        guest.serial = SerialLine(self.reactor, "pc", self.directory)
        self.manager._model(guest)
        self.manager.guests[GUEST] = guest
        self._open.append(guest)
        return guest

    def model(self) -> DeviceModel:
        model = self.guest().model
        assert model is not None
        return model

    def close(self) -> None:
        for guest in self._open:
            if guest.model is not None:
                guest.model._lost("over")
            guest.close()
        if self.theirs is not None:
            self.theirs.close()
        self.reactor.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    it = Rig(tmp_path)
    yield it
    it.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def picture(fd: int, token: int = 1, size: int = 4) -> tuple[ModelPicture, tuple[int]]:
    return ModelPicture(token=token, width=size, height=size), (fd,)


def test_a_second_answer_to_one_request_costs_no_descriptor(rig: Rig) -> None:
    model, fd = rig.model(), sealed.create("picture", 48)
    assert rig.theirs is not None
    before = descriptors()
    for _ in range(20):
        rig.theirs.send(*picture(fd))
    width, height, taken = model.screen()
    assert (width, height) == (4, 4)
    os.close(taken)
    assert descriptors() == before
    for _ in range(20):
        rig.theirs.send(*picture(fd, token=2))
    model.drain()
    assert descriptors() == before
    os.close(fd)


def test_what_is_typed_while_a_device_model_does_not_read_comes_to_it_later(rig: Rig) -> None:
    """Nobody types anything further that would send it: the link does, when there is room."""
    guest = rig.guest()
    serial, theirs = guest.serial, rig.theirs
    assert serial is not None
    assert theirs is not None
    assert guest.model is not None
    early, late = b"typed before it was up;", bytes(range(256)) * 3072
    serial.type(early)
    rig.xc.set_target = lambda domid, guest: None  # type: ignore[attr-defined]
    theirs.send(ModelReady())
    guest.model.start()
    assert serial.type(late) == len(late)
    assert serial._input, "the link is full"
    got = b""
    deadline = time.monotonic() + 20.0
    while len(got) < len(early + late) and time.monotonic() < deadline:
        while (packet := theirs.receive()) is not None:
            got += packet[0].data if isinstance(packet[0], ModelInput) else b""
        rig.reactor.once(0.05)
    assert got == early + late
    assert not rig.reactor._writers


@pytest.mark.parametrize("kind", ["pipe", "file", "short", "open to change"])
def test_a_picture_that_is_none_is_refused(rig: Rig, tmp_path: Path, kind: str) -> None:
    """Whoever asked for the picture reads it: it is a sealed memfd of the right size, or there is none."""
    model = rig.model()
    assert rig.theirs is not None
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "file":
        (tmp_path / "file").write_bytes(bytes(48))
        fd = os.open(tmp_path / "file", os.O_RDONLY)
    elif kind == "short":
        fd = sealed.create("picture", 47)
    else:
        fd = os.memfd_create("picture")
        os.ftruncate(fd, 48)
    before = descriptors()
    rig.theirs.send(*picture(fd))
    with pytest.raises(ModelError, match="something else than a picture"):
        model.screen()
    assert descriptors() == before
    os.close(fd)


@pytest.mark.parametrize("refused", ["plug", "assign", "deposit"])
def test_a_disk_that_cannot_be_handed_over_is_no_matter_of_dom0s(rig: Rig, refused: str) -> None:
    """The guest unplugs its emulated disk when it likes: what then goes wrong is logged."""
    guest = rig.guest()
    fd = os.open(os.devnull, os.O_RDONLY)
    guest.files[0] = fd
    guest.config = guest.config.model_copy(update={"disks": [{"vdev": "hda", "file": 0}]})
    rig.disks.wait_offered = lambda domid: None  # no back end runs here
    rig.manager._attach_disks(guest)
    rig.xc.refuse.add(refused)
    assert rig.theirs is not None
    rig.theirs.send(ModelUnplugged(slots=["hda"]))
    rig.reactor.once(1.0)
    assert "hda of domain 3" in rig.lines[-1]
    rig.xc.refuse = {"pull out"}
    rig.disks.domain_died(GUEST)
    assert rig.disks.disks == {}


@pytest.mark.parametrize("refused", ["plug", "assign"])
def test_a_disk_whose_device_is_refused_leaves_nothing_behind(rig: Rig, refused: str) -> None:
    rig.xc.refuse.add(refused)
    disk = {"vdev": "xvda", "target": "x"}
    with pytest.raises(HypercallError):
        rig.disks.attach(GUEST, disk, 0)
    assert rig.xc.calls[-1] == "pull out"
    assert rig.deposits == {"disk1": []}
    rig.xc.refuse.clear()
    assert rig.disks.attach(GUEST, disk, 0).name == "disk2", "and it can be tried again"


def test_disks_that_come_and_go_use_up_no_places(rig: Rig) -> None:
    """A guest that reboots all day takes nobody's disks away: DomIO serves controllers at 00:01.0 to 00:1f.0."""
    disk = {"vdev": "xvda", "target": "x"}
    rig.disks.others = lambda bdf: ("nvme", "hw1") if bdf == 5 << 3 else None
    rig.disks.attach(DomId(7), disk, 0)
    places = []
    for _ in range(100):
        places.append(rig.disks.attach(GUEST, disk, 0).bdf)
        rig.disks.domain_died(GUEST)
    assert set(places) == {number << 3 for number in range(2, 32) if number != 5}
    assert all(one != other for one, other in pairwise(places)), "one that became free rests"
    for number in range(28):
        rig.disks.attach(DomId(10 + number), disk, 0)
    assert len({each.bdf for each in rig.disks.disks.values()}) == 29
    rig.disks.attach(DomId(40), disk, 0)
    with pytest.raises(DiskError, match="31 disks"):
        rig.disks.attach(GUEST, disk, 0)
    rig.disks.domain_died(DomId(12))
    assert rig.disks.attach(GUEST, disk, 0).bdf not in (0, 5 << 3)


def test_a_guest_is_ended_once_whoever_looks_while_its_device_model_is_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device model does not answer the last request; others' ends are told meanwhile, and somebody destroys it again."""
    monkeypatch.setattr(models, "DRAIN_S", 0.2)
    guest = rig.guest()
    guest.files[0] = os.open(os.devnull, os.O_RDONLY)
    others: list[int] = []

    def look() -> None:
        rig.manager.check()
        if GUEST in rig.manager.guests:
            rig.manager.destroy("pc")
        others.append(os.open(os.devnull, os.O_RDONLY))

    for delay in (0.02, 0.06):
        rig.reactor.after(delay, look)
    rig.manager.destroy("pc")
    assert rig.ended == ["destroyed"]
    assert rig.xc.calls.count("destroy 3") == 1
    assert rig.manager.guests == {}
    for fd in others:
        os.close(fd)  # OSError if the guest's end closed the number a second time


def test_a_name_is_taken_while_its_domain_is_being_built(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building waits for others (a device model, back ends), and requests are served meanwhile."""
    config = DomainConfig(name="pc", uuid=bytes(16), type="hvm")
    refused: list[str] = []

    def build(*given: Any) -> Guest:
        with pytest.raises(ToolstackError, match="exists already") as error:
            rig.manager.create(config, [])
        refused.append(str(error.value))
        raise ValueError("not this time")

    monkeypatch.setattr(rig.manager, "_build", build)
    for _ in range(2):
        with pytest.raises(ToolstackError, match="not this time"):
            rig.manager.create(config, [])
    assert len(refused) == 2


def make_create(rig: Rig) -> Callable[[], None]:
    disks: list[dict[str, Any]] = [
        {"vdev": "hda", "cdrom": True, "format": "empty"},
        {"vdev": "xvda", "format": "raw"},
    ]
    config = DomainConfig(name="pc", uuid=bytes(16), type="hvm", disks=disks)

    def create() -> None:
        with pytest.raises(ToolstackError, match="two disks want to be hda"):
            rig.manager.create(config, [])

    return create


def test_a_guest_whose_disks_make_no_sense_costs_no_descriptor(rig: Rig) -> None:
    create = make_create(rig)
    create()
    before = descriptors()
    for _ in range(5):
        create()
    assert descriptors() == before


def test_a_guest_that_cannot_be_started_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ended while its last parts were put together, say."""
    monkeypatch.setattr(rig.manager, "_fill", lambda guest, images: None)
    config = DomainConfig(name="pc", uuid=bytes(16), type="hvm")
    rig.xc.refuse.add("unpause")
    counts = []
    for _ in range(3):
        with pytest.raises(ToolstackError, match="unpause"):
            rig.manager.create(config, [])
        assert rig.manager.guests == {}
        assert "destroy 3" in rig.xc.calls
        assert rig.theirs is not None
        rig.theirs.close()
        rig.theirs = None
        counts.append(descriptors())
    assert counts[0] == counts[2]


def test_files_of_a_device_model_that_does_not_come_to_be_are_given_back(rig: Rig) -> None:
    rig.xc.refuse.add("create")
    with pytest.raises(HypercallError):
        rig.guest()
    assert rig.deposits == {"d16387": []}


def test_a_device_model_that_answers_in_time_is_believed(rig: Rig) -> None:
    model = rig.model()
    assert rig.theirs is not None
    rig.theirs.send(ModelDone(token=1, error="no such key"))
    with pytest.raises(ModelError, match="no such key"):
        model.keys(["x"])
    began = time.monotonic()
    rig.theirs.send(ModelDone(token=2))
    model.drain()
    assert time.monotonic() - began < models.DRAIN_S / 2
