"""Disks: device processes with the files, DomIO that drives them, and the nodes by which frontends find their backends.

One NVMe controller (a device process of its own) serves one disk. DomIO is started with the first disk, and owns all controllers.
The supervisor's part (`domicile devd`) is here too: a device process that ends is plugged in again, and DomIO is restarted in place.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from bus.addresses import DomId
from bus.messages.device import Inspect
from bus.messages.domain import Order
from bus.messages.warden import Deposit, Deposited
from bus.packets import PacketLink
from domains.dom0.builder.errors import BuildError
from domains.dom0.toolstack.driver_domain import (
    MAX_RESTARTS,
    READY_TIMEOUT_S,
    WINDOW_S,
    DriverDomain,
    DriverDomainBusy,
    Restarts,
)
from domains.dom0.toolstack.driver_guest import DriverGuest
from domains.dom0.toolstack.vdev import number_of
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import HypercallError, NativeDomain

DOMIO_PAGES: Final = 8192
"""DomIO's own memory: queues, ledgers, rings (32 MiB)."""
DEPOSIT_TIMEOUT_S: Final = 5.0
RESTART_DELAY_S: Final = 0.05


MAX_DISKS: Final = 31
"""At a time: DomIO's memory has places for so many (domains.domio)."""
NO_DEVICE: Final = -1
"""Instead of the PCI address of a disk that another driver domain serves."""


class DiskError(Exception):
    """Told to the user in one line."""


def number_in(text: str | None, default: int) -> int:
    """The number that a node of somebody else's holds: a 32-bit one, or the default."""
    return int(text) if text is not None and re.fullmatch("[0-9]{1,9}|[1-3][0-9]{9}", text) else default


@dataclass(slots=True)
class Disk:
    """One virtual disk of a guest."""

    name: str
    bdf: int
    domid: DomId
    vdev: str
    number: int
    config: dict[str, Any]
    settings: dict[str, Any]
    backend: DomId
    """The domain that serves it: DomIO, or a driver domain of the user's own, which has no device of ours for it."""
    waiting: int | None = None
    """Its file, while an emulated drive of the guest's has it: the device process gets it when the guest has unplugged that."""


class Disks:
    """All disks of the machine, and DomIO."""

    def __init__(
        self, host: NativeDomain, store: XenstoreService, xc: ControlInterface, warden: PacketLink,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._host = host
        self._store = store
        self._xc = xc
        self._warden = warden
        self._log = log
        self.driver = DriverDomain(host, store, xc, log, name="DomIO", role=1, pages=DOMIO_PAGES, model=True)
        self.driver.give_up = self.destroy_domio
        self.disks: dict[str, Disk] = {}
        self.find_domain: Callable[[str], DomId | None] = lambda name: None
        """A running domain by its name or number."""
        self.others: Callable[[int], tuple[str, str] | None] = lambda bdf: None
        """(role, name) of a device that is no disk of ours, by its PCI address."""
        self._restarts: dict[int, Restarts] = {}
        self._serial = 0
        self._place = 0
        host.on_order["device_ended"] = self._device_ended

    # ------------------------------------------------------------------ DomIO

    @property
    def domio(self) -> DomId | None:
        """DomIO, if there is one."""
        return self.driver.domid

    def check(self) -> None:
        """VIRQ_DOM_EXC."""
        self.driver.check()

    def use_guest(self, image: int, path: str) -> None:
        """DomIO is to be the program in that kernel file (the descriptor stays the caller's). DiskError: one runs already, or it is no
        kernel."""
        if self.domio is not None:
            raise DiskError("there is a DomIO already: choose its kind before the first disk, or destroy it")
        try:
            self.driver.program = DriverGuest(self._host, self._xc, image, path)
        except (BuildError, ValueError, OSError, MemoryError) as error:
            raise DiskError(f"{path}: {error or 'no memory for it'}") from None

    def destroy_domio(self) -> None:
        """DomIO goes for good: its devices are pulled out, and its frontends find their backends Closed. DiskError if there is none."""
        domid = self.domio
        if domid is None:
            raise DiskError("there is no DomIO: it comes with the first disk")
        disks = [disk for disk in self.disks.values() if disk.backend == domid]
        for disk in disks:
            del self.disks[disk.name]
        for disk in disks:
            self._xc.plug(disk.bdf, "nvme", disk.name, present=False)
            self.deposit(disk.name, [], [], {})
        self.driver.destroy()
        self._store.remove(f"/local/domain/{domid}/device-model")
        for disk in disks:
            back = f"/local/domain/{domid}/backend/vbd/{disk.domid}/{disk.number}"
            self._store.write(f"{back}/online", "0")
            self._store.write(f"{back}/state", "6")

    # ------------------------------------------------------------------ devices

    def iommu(self, **args: int | None) -> dict[str, Any]:
        """What the hypervisor shows of its IOMMU: `bdf`, `domain`, `iova` (see Inspect). HypercallError."""
        link = self._host.link
        token = link.next_token()
        given = {name: value for name, value in args.items() if value is not None}
        rc, data = link.exchange(Inspect(token=token, what="iommu", args=given), token)
        if rc < 0:
            raise HypercallError(-rc, "IOMMU")
        view: dict[str, Any] = msgpack.unpackb(data, strict_map_key=False)
        return view

    def deposit(self, name: str, fds: list[str], descriptors: list[int], settings: dict[str, Any]) -> None:
        """Have the warden keep the files for the process of that name; none: it forgets them. DiskError."""
        self._warden.send(Deposit(name=name, fds=fds, settings=settings), descriptors)
        poller = select.poll()
        poller.register(self._warden.fileno(), select.POLLIN)
        deadline = time.monotonic() + DEPOSIT_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            poller.poll(left * 1000)
            packet = self._warden.receive()
            if packet is not None and isinstance(packet[0], Deposited) and packet[0].name == name:
                return
        raise DiskError(f"disk {name}: the warden did not take its files")

    def _device_ended(self, order: Order, fds: list[int]) -> bytes:
        bdf = order.body["bdf"]
        self._log(f"device {bdf:#x}: its process ended ({order.body['how']})")
        wait = self._restarts.setdefault(bdf, Restarts()).wait()
        if wait is None:
            self._log(
                f"device {bdf:#x} ended {MAX_RESTARTS} times, and never ran for {WINDOW_S:.0f} s: it is not plugged in any more; its log says "
                "why; detach its disk, and attach it again"
            )
        else:
            self._host.reactor.after(RESTART_DELAY_S + wait, lambda: self._plug_again(bdf))
        return b""

    def _plug_again(self, bdf: int) -> None:
        found = self.others(bdf)
        for disk in self.disks.values():
            if disk.bdf == bdf:
                found = ("nvme", disk.name)
        if found is None:
            return
        try:
            self._xc.plug(bdf, *found)
        except HypercallError as error:
            self._log(f"device {bdf:#x} cannot be plugged in again: {error}")

    # ------------------------------------------------------------------ attaching

    def attach(self, domid: DomId, config: dict[str, Any], fd: int | None, *, emulated: bool = False) -> Disk:
        """Give a guest a disk: `config` as toolstack.xlcfg.devices makes it, `fd` its file (which stays the caller's, and open while the
        guest lives). `emulated`: the guest's device model has it first; `hand_over` follows. DiskError, HypercallError."""
        vdev = str(config.get("vdev", ""))
        try:
            number = number_of(vdev)
        except ValueError as error:
            raise DiskError(str(error)) from None
        self._expect_new(domid, vdev, number)
        served = str(config.get("backend") or "")
        if served and served != "DomIO":
            return self._attach_foreign(domid, vdev, number, config, served)
        if fd is None:
            raise DiskError(f"disk {vdev}: no file was given (an empty drive is not served)")
        if self.domio is None:
            self._start_domio()  # others are served while it starts: what they took is looked at below
            self._expect_new(domid, vdev, number)
        backend = self.domio
        assert backend is not None
        bdf = self._free_place()
        self._serial += 1
        readonly = bool(config.get("readonly")) or bool(config.get("cdrom"))
        settings = {
            "serial": f"DOMICILE{self._serial:04d}",
            "namespace1": {"format": config.get("format", "raw"), "read_only": readonly},
        }
        disk = Disk(f"disk{self._serial}", bdf, domid, vdev, number, config, settings, backend, fd)
        self.disks[disk.name] = disk
        try:
            if not emulated:
                self._plug_in(disk, backend)
            self._write_nodes(disk, backend, readonly)
        except BaseException:
            del self.disks[disk.name]
            self._pull_out(disk)
            raise
        return disk

    def _expect_new(self, domid: DomId, vdev: str, number: int) -> None:
        if any(disk.domid == domid and disk.number == number for disk in self.disks.values()):
            raise DiskError(f"domain {domid} has a disk {vdev} already")

    def _start_domio(self) -> None:
        try:
            with self.driver.being_started():
                self.driver.start()
        except DriverDomainBusy as error:
            raise DiskError(str(error)) from None
        except BuildError as error:
            raise DiskError(f"DomIO: {error}") from None

    def _free_place(self) -> int:
        """The PCI address of a new disk's controller, on bus 0. They are taken in turn, so that one that became free rests before it is
        another disk's. DiskError: all are in use."""
        used = {disk.bdf for disk in self.disks.values()}
        for step in range(MAX_DISKS):
            place = (self._place + step) % MAX_DISKS + 1
            if place << 3 not in used and self.others(place << 3) is None:
                self._place = place
                return place << 3
        raise DiskError(f"the machine has {MAX_DISKS} disks, and DomIO serves no more")

    def _attach_foreign(
        self, domid: DomId, vdev: str, number: int, config: dict[str, Any], name: str
    ) -> Disk:
        """backend=DOMAIN: nodes as libxl writes them; what `target` is, is that domain's to know (its `xl devd`, or whatever it has for
        that, writes physical-device)."""
        backend = self.find_domain(name)
        if backend is None:
            raise DiskError(f"disk {vdev}: there is no domain {name!r} to serve it (backend=)")
        if backend in (0, domid):
            raise DiskError(
                f"disk {vdev}: domain {name!r} cannot serve it (backend=): it has no block back end"
            )
        self._serial += 1
        disk = Disk(f"disk{self._serial}", NO_DEVICE, domid, vdev, number, config, {}, backend)
        self.disks[disk.name] = disk
        readonly = bool(config.get("readonly")) or bool(config.get("cdrom"))
        self._write_nodes(disk, backend, readonly)
        return disk

    def _plug_in(self, disk: Disk, backend: DomId) -> None:
        fd, disk.waiting = disk.waiting, None
        if fd is None:
            return
        self.deposit(disk.name, ["namespace1"], [fd], disk.settings)
        self._xc.plug(disk.bdf, "nvme", disk.name)
        self._xc.assign_device(backend, disk.bdf)

    def _pull_out(self, disk: Disk) -> None:
        """As far as it was plugged in: what is not there cannot be taken away, and is no error."""
        if disk.waiting is not None or disk.bdf == NO_DEVICE:
            return
        self._restarts.pop(disk.bdf, None)
        try:
            self._xc.plug(disk.bdf, "nvme", disk.name, present=False)
        except HypercallError as error:
            self._log(f"{disk.vdev} of domain {disk.domid}: {error}")
        try:
            self.deposit(disk.name, [], [], {})
        except DiskError as error:
            self._log(f"{disk.vdev} of domain {disk.domid}: {error}")

    def hand_over(self, domid: DomId, vdev: str) -> None:
        """The guest's device model has closed the disk's image: the back end opens it now. Where that cannot be, the log says why, and the
        guest finds no disk: it happens when the guest likes, and is no matter of Dom0's or of other guests."""
        for disk in list(self.disks.values()):
            if disk.domid == domid and disk.vdev == vdev:
                try:
                    self._plug_in(disk, disk.backend)
                except (HypercallError, DiskError) as error:
                    self._log(f"{vdev} of domain {domid}: its back end does not get it: {error}")

    def wait_offered(self, domid: DomId) -> None:
        """Wait, as libxl does before it starts a guest, until the back ends of its disks offer them (InitWait or beyond). One that
        does not come up in time is logged: the guest sees it when it does."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        mine = [disk for disk in self.disks.values() if disk.domid == domid and disk.waiting is None]
        for disk in mine:
            state = f"/local/domain/{disk.backend}/backend/vbd/{domid}/{disk.number}/state"
            while self._store.read(state) in (None, "1"):
                if time.monotonic() > deadline:
                    self._log(f"{disk.vdev} of domain {domid}: its back end does not come up")
                    return
                self._host.reactor.once(0.05)

    def _write_nodes(self, disk: Disk, backend: DomId, readonly: bool) -> None:
        """Both ends' directories, as libxl writes them (docs/misc/xenstore-paths)."""
        store, domid, ours = self._store, disk.domid, disk.bdf != NO_DEVICE
        back = f"/local/domain/{backend}/backend/vbd/{domid}/{disk.number}"
        front = f"/local/domain/{domid}/device/vbd/{disk.number}"
        store.remove(back)
        store.remove(front)
        store.mkdir(back)
        store.permit(back, f"n{backend}", f"r{domid}")
        store.mkdir(front)
        store.permit(front, f"n{domid}", f"r{backend}")
        for path, value in (
            ("frontend", front),
            ("frontend-id", str(domid)),
            ("online", "1"),
            ("removable", "1" if disk.config.get("cdrom") else "0"),
            ("bootable", "1"),
            ("state", "1"),
            ("dev", disk.vdev),
            ("type", "nvme" if ours else "phy"),
            ("mode", "r" if readonly else "w"),
            ("device-type", "cdrom" if disk.config.get("cdrom") else "disk"),
            ("params", f"nvme:{disk.bdf:x}" if ours else str(disk.config.get("target", ""))),
            *([] if ours else [("script", str(disk.config.get("script") or "/etc/xen/scripts/block"))]),
            ("discard-enable", "1" if disk.config.get("discard", True) else "0"),
        ):
            store.write(f"{back}/{path}", value)
        for path, value in (
            ("backend", back),
            ("backend-id", str(backend)),
            ("state", "1"),
            ("virtual-device", str(disk.number)),
            ("device-type", "cdrom" if disk.config.get("cdrom") else "disk"),
        ):
            store.write(f"{front}/{path}", value)

    def list(self, domid: DomId) -> list[dict[str, Any]]:
        """What `xl block-list` shows."""
        rows = []
        for disk in self.disks.values():
            if disk.domid != domid:
                continue
            back = f"/local/domain/{disk.backend}/backend/vbd/{domid}/{disk.number}"
            front = f"/local/domain/{domid}/device/vbd/{disk.number}"
            rows.append(
                {
                    "vdev": disk.number,
                    "name": disk.vdev,
                    "backend_id": int(disk.backend),
                    "handle": int(domid),
                    "state": number_in(self._store.read(f"{back}/state"), 0),
                    "event_channel": number_in(self._store.read(f"{front}/event-channel"), -1),
                    "ring_ref": number_in(self._store.read(f"{front}/ring-ref"), -1),
                    "path": back,
                }
            )
        return rows

    def detach(self, domid: DomId, vdev: str, *, force: bool = False) -> None:
        """Take a disk away: the backend closes, then the device goes. DiskError if the guest does not let go."""
        number = number_of(vdev)
        for disk in list(self.disks.values()):
            if disk.domid == domid and disk.number == number:
                self._detach(disk, force=force)
                return
        raise DiskError(f"domain {domid} has no disk {vdev}")

    def _detach(self, disk: Disk, *, force: bool) -> None:
        store = self._store
        back = f"/local/domain/{disk.backend}/backend/vbd/{disk.domid}/{disk.number}"
        front = f"/local/domain/{disk.domid}/device/vbd/{disk.number}"
        if not force and store.read(f"{back}/state") is not None:
            store.write(f"{back}/online", "0")
            store.write(f"{back}/state", "5")
            deadline = time.monotonic() + 10.0
            while store.read(f"{back}/state") not in (None, "6"):
                if time.monotonic() > deadline:
                    raise DiskError(f"{disk.vdev}: the guest does not let go of it")
                self._host.reactor.once(0.1)
        del self.disks[disk.name]
        store.remove(back)
        store.remove(front)
        self._pull_out(disk)

    def domain_died(self, domid: DomId) -> None:
        """Its disks go with it."""
        for disk in [disk for disk in self.disks.values() if disk.domid == domid]:
            self._detach(disk, force=True)
