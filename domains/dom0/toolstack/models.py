"""Device models: a domain and process of its own for each full HVM guest, started before the guest runs and ended with it.

What a person does with the PC from outside (serial line, keys, a picture of the screen) goes over a link of Dom0's own to it.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from typing import Any, Final

from bus import sealed
from bus.addresses import DomId
from bus.messages.control import DomainConfig
from bus.messages.envelope import BadMessage, Message
from bus.messages.model import (
    FROM_MODEL,
    ModelDone,
    ModelFailed,
    ModelFlush,
    ModelGo,
    ModelInput,
    ModelKeys,
    ModelOutput,
    ModelPicture,
    ModelReady,
    ModelScreen,
    ModelUnplugged,
)
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all, pair
from domains.dom0.consoled import SerialLine
from domains.dom0.xc import ControlInterface
from domains.native.domain import HypercallError
from domains.native.reactor import Reactor

FIRST_DOMID: Final = 0x4000
"""Device models have domids from here on: this and the guest's."""
READY_S: Final = 20.0
ANSWER_S: Final = 5.0
DRAIN_S: Final = 2.0
BURST: Final = 64
ROLE: Final = 2
"""ssidref of a device model (hypervisor.core.domains.ROLES)."""
VDEV: Final = re.compile(r"(?:hd|xvd)([a-d])")
Deposit = Callable[[str, list[str], list[int], dict[str, Any]], None]


class ModelError(Exception):
    """Told to the user in one line."""


SLOTS: Final = ("hda", "hdb", "hdc", "hdd")


def slot_of(disk: dict[str, Any]) -> str | None:
    """The emulated drive at which a PC has that disk; None: it has it by its PV driver alone. As libxl: the first four of hd and xvd,
    whatever the name; an optical drive is emulated always."""
    found = VDEV.fullmatch(str(disk.get("vdev", "")))
    if found is None:
        return None
    return f"hd{found[1]}"


def model_settings(config: DomainConfig, files: dict[int, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """What a device model is told of its PC, and the files that go along by name. ModelError."""
    disks: list[dict[str, Any]] = []
    given: dict[str, int] = {}
    for disk in config.disks:
        slot = slot_of(disk)
        if slot is None:
            if disk.get("cdrom"):
                raise ModelError(f"optical drive {disk.get('vdev')}: a PC has them at hda to hdd")
            continue
        if any(other["slot"] == slot for other in disks):
            raise ModelError(f"two disks want to be {slot}")
        kind = "raw" if disk.get("format", "raw") == "empty" else str(disk.get("format", "raw"))
        disks.append(
            {
                "slot": slot,
                "cdrom": bool(disk.get("cdrom")),
                "readonly": bool(disk.get("readonly")),
                "format": kind,
            }
        )
        if disk.get("file", -1) in files:
            given[slot] = files[disk["file"]]
    settings: dict[str, Any] = {
        "serial": config.serial,
        "vga": config.vga,
        "boot": config.boot,
        "memory_mb": config.memory_mb,
        "disks": disks,
        "name": config.name,
    }
    if config.vnc:
        settings["vnc"] = {
            "listen": config.vnc_listen,
            "display": config.vnc_display,
            "unused": config.vnc_unused,
            "password": config.vnc_password,
        }
    if config.video_bios in files:
        given["video_bios"] = files[config.video_bios]
    return settings, given


class DeviceModel:
    """One guest's. `settings` and `files` (name -> descriptor, which stay the caller's) are what it is told at its start."""

    def __init__(
        self,
        reactor: Reactor,
        xc: ControlInterface,
        deposit: Deposit,
        guest: DomId,
        serial: SerialLine,
        settings: dict[str, Any],
        files: dict[str, int],
    ) -> None:
        """Starts its process. HypercallError."""
        self._reactor: Final = reactor
        self._xc: Final = xc
        self._deposit: Final = deposit
        self.guest: Final = guest
        self.domid: Final = DomId(FIRST_DOMID + guest)
        self._serial: Final = serial
        self._ready = False
        self._why = ""
        self._tokens = itertools.count(1)
        self._answers: dict[int, tuple[Message, list[int]] | None] = {}
        """Requests by token; None: not answered yet. Only the first answer counts."""
        self.vnc: tuple[str, int] | None = None
        """IP address and port of its VNC server, once it is up."""
        self.on_unplugged: Callable[[list[str]], None] = lambda slots: None
        ours, theirs = pair()
        self._link: PacketLink | None = PacketLink(ours, FROM_MODEL)
        self._name: Final = f"d{self.domid}"
        try:
            deposit(self._name, ["control", *files], [theirs.fileno(), *files.values()], settings)
            try:
                xc.create_domain(uuid=os.urandom(16), max_vcpus=1, ssidref=ROLE, domid=self.domid)
            except BaseException:
                deposit(self._name, [], [], {})
                raise
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reactor.reader(ours.fileno(), self._receive)

    def start(self) -> None:
        """The guest is built: give the device model its rights and wait until it serves. ModelError, HypercallError."""
        self._xc.set_target(self.domid, self.guest)
        self._send(ModelGo(guest=self.guest))
        deadline = time.monotonic() + READY_S
        while not self._ready:
            if self._why or self._link is None or time.monotonic() > deadline:
                raise ModelError(f"the device model does not come up: {self._why or 'it says nothing'}")
            self._reactor.once(0.05)
        self._serial.send = self._input
        self._serial.poll()  # what was typed before

    # --- the link

    def _send(self, message: Message) -> bool:
        """False: it cannot be sent now, or for good."""
        if self._link is None:
            return False
        try:
            self._link.send(message)
        except LinkFull:
            return False
        except LinkClosed:
            self._lost("it went away")
            return False
        return True

    def _input(self, data: bytes) -> bool:
        if self._send(ModelInput(data=data)):
            return True
        if self._link is not None:
            self._reactor.writer(self._link.fileno(), self._room)
        return False

    def _room(self) -> None:
        """The link takes something again: what waits on the serial line goes on."""
        if self._link is not None:
            self._reactor.writer(self._link.fileno(), None)
            self._serial.poll()

    def _receive(self) -> None:
        if self._link is None:
            return

        def nonsense(error: BadMessage) -> None:
            self._lost(f"it sent nonsense: {error}")

        for message, fds in self._link.burst(BURST, nonsense, lambda: self._lost("its process ended")):
            if isinstance(message, ModelPicture | ModelDone) and self._waits(message.token):
                self._answers[message.token] = (message, fds)
                continue
            close_all(fds)
            if isinstance(message, ModelOutput):
                self._serial.output(message.data)
            elif isinstance(message, ModelReady):
                self._ready = True
                if message.vnc_port:
                    self.vnc = message.vnc_listen, message.vnc_port
            elif isinstance(message, ModelUnplugged):
                self.on_unplugged(list(message.slots))
            elif isinstance(message, ModelFailed):
                self._why = message.why

    def _waits(self, token: int) -> bool:
        """A request with that token has no answer yet."""
        return token in self._answers and self._answers[token] is None

    def _lost(self, why: str) -> None:
        self._why = self._why or why
        if self._link is not None:
            self._reactor.forget(self._link.fileno())
            self._link.close()
            self._link = None

    # --- what a person asks

    def _ask(self, make: Callable[[int], Message]) -> tuple[Message, list[int]]:
        """A request and its answer; the descriptors are the caller's. ModelError."""
        token = next(self._tokens)
        self._answers[token] = None
        try:
            self._send(make(token))
            deadline = time.monotonic() + ANSWER_S
            while (answer := self._answers[token]) is None:
                if self._link is None or time.monotonic() > deadline:
                    raise ModelError(
                        f"the device model does not answer{': ' if self._why else ''}{self._why}"
                    )
                self._reactor.once(0.05)
            message, fds = answer
            if isinstance(message, ModelDone | ModelPicture) and message.error:
                close_all(fds)
                raise ModelError(message.error)
            return message, fds
        finally:
            del self._answers[token]

    def keys(self, keys: list[str]) -> None:
        """Press and release keys. ModelError."""
        _, fds = self._ask(lambda token: ModelKeys(token=token, keys=keys))
        close_all(fds)

    def screen(self) -> tuple[int, int, int]:
        """(width, height, descriptor of a memfd with three bytes a pixel), the caller's. ModelError."""
        message, fds = self._ask(lambda token: ModelScreen(token=token))
        if not isinstance(message, ModelPicture) or len(fds) != 1 or not message.width or not message.height:
            close_all(fds)
            raise ModelError("the device model sent no picture")
        try:
            sealed.check(fds[0], 3 * message.width * message.height)
        except ValueError as error:
            close_all(fds)
            raise ModelError(f"the device model sent something else than a picture: {error}") from None
        return message.width, message.height, fds[0]

    # --- the end

    def drain(self) -> None:
        """The guest does not run any more: take what it wrote last on its serial line. A device model that does not say so in time is
        not waited for."""
        token = next(self._tokens)
        self._answers[token] = None
        self._send(ModelFlush(token=token))
        deadline = time.monotonic() + DRAIN_S
        while self._link is not None and self._waits(token) and time.monotonic() < deadline:
            self._reactor.once(0.02)
        answer = self._answers.pop(token)
        if answer is not None:
            close_all(answer[1])

    def close(self) -> None:
        """The guest is gone: end the process."""
        self._serial.send = None
        self._lost("closed")
        try:
            self._xc.destroy(self.domid)
        except HypercallError as error:
            if error.errno != 3:  # ESRCH: gone already
                raise
        finally:
            self._deposit(self._name, [], [], {})
