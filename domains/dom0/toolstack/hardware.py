"""Devices of the machine that are for guests to own (`domicile device-plug`, pci= in a guest's file), beside the disks' controllers,
which are DomIO's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bus.addresses import DomId
from domains.dom0.toolstack.disks import Disks
from domains.dom0.xc import ControlInterface
from domains.native.domain import HypercallError, NativeDomain

FIRST_BDF: Final = 0x0100
"""01:00.0: where a device goes that was given no address; the disks' controllers are on bus 0."""
MAX_BDF: Final = 0xFFFF
MAX_DEVICES: Final = 64
READY_S: Final = 20.0
KINDS: Final = ("nvme",)


class HardwareError(Exception):
    """Told to the user in one line."""


@dataclass(slots=True)
class Plugged:
    """One device."""

    name: str
    bdf: int
    kind: str
    path: str
    """Of its file, for show."""


def bdf_text(bdf: int) -> str:
    """0000:01:00.0"""
    return f"{bdf >> 16:04x}:{bdf >> 8 & 0xFF:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"


class Hardware:
    """See the module. A device whose process ends is plugged in again: its owner sees a device that was reset."""

    def __init__(self, host: NativeDomain, xc: ControlInterface, disks: Disks) -> None:
        self._host: Final = host
        self._xc: Final = xc
        self._disks: Final = disks
        self._serial = 0
        self.devices: Final[dict[int, Plugged]] = {}
        disks.others = self.device_of

    def device_of(self, bdf: int) -> tuple[str, str] | None:
        """(role, name) of its process; None: no device of ours."""
        found = self.devices.get(bdf)
        return None if found is None else (found.kind, found.name)

    def _row(self, bdf: int) -> dict[str, Any] | None:
        try:
            view = self._disks.iommu(bdf=bdf)
        except HypercallError:
            return None
        row: dict[str, Any] = view["devices"][0]
        return row

    def owner(self, bdf: int) -> int | None:
        """The domain that has it."""
        row = self._row(bdf)
        return None if row is None else row["domain"]

    def plug(self, kind: str, config: dict[str, Any], fd: int, bdf: int | None = None) -> int:
        """A new device with that file; its PCI address. `config`: format, readonly, target (the path). HardwareError, DiskError."""
        if kind not in KINDS:
            raise HardwareError(f"device {kind}: there are {', '.join(KINDS)}")
        if len(self.devices) >= MAX_DEVICES:
            raise HardwareError(f"device {kind}: a machine has at most {MAX_DEVICES}")
        if bdf is None:
            bdf = next(at for at in range(FIRST_BDF, MAX_BDF, 8) if self._free(at))
        elif not 0 < bdf <= MAX_BDF or not self._free(bdf):
            raise HardwareError(f"device {bdf_text(bdf)}: there is one at that address already")
        self._serial += 1
        found = Plugged(f"hw{self._serial}", bdf, kind, str(config.get("target", "")))
        settings = {
            "serial": f"DOMICILEHW{self._serial:04d}",
            "namespace1": {
                "format": config.get("format", "raw"),
                "read_only": bool(config.get("readonly")),
            },
        }
        self._disks.deposit(found.name, ["namespace1"], [fd], settings)
        self.devices[bdf] = found
        self._xc.plug(bdf, kind, found.name)
        return bdf

    def _free(self, bdf: int) -> bool:
        return bdf not in self.devices and all(disk.bdf != bdf for disk in self._disks.disks.values())

    def unplug(self, bdf: int) -> None:
        """It goes. HardwareError if there is none, or a guest has it."""
        found = self._find(bdf)
        owner = self.owner(bdf)
        if owner is not None:
            raise HardwareError(f"device {bdf_text(bdf)}: domain {owner} has it")
        del self.devices[bdf]
        self._xc.plug(bdf, found.kind, found.name, present=False)
        self._disks.deposit(found.name, [], [], {})

    def _find(self, bdf: int) -> Plugged:
        found = self.devices.get(bdf)
        if found is None:
            raise HardwareError(f"device {bdf_text(bdf)}: there is none (domicile pci-assignable-list)")
        return found

    def give(self, domid: DomId, bdfs: Sequence[int]) -> None:
        """Before the domain's memory is there: the devices are its own, and answer. HardwareError, HypercallError."""
        for bdf in bdfs:
            self._find(bdf)
            owner = self.owner(bdf)
            if owner is not None:
                raise HardwareError(f"device {bdf_text(bdf)}: domain {owner} has it")
        for bdf in bdfs:
            deadline = time.monotonic() + READY_S
            while not (row := self._row(bdf)) or not row["present"]:
                if time.monotonic() > deadline:
                    raise HardwareError(f"device {bdf_text(bdf)}: its process does not answer")
                self._host.reactor.once(0.02)
            self._xc.assign_device(domid, bdf)

    def list(self, domid: int | None = None) -> list[dict[str, Any]]:
        """Devices and their owners; of one domain only, if it is given."""
        rows = [
            {
                "bdf": each.bdf,
                "kind": each.kind,
                "path": each.path,
                "domid": self.owner(each.bdf),
            }
            for each in self.devices.values()
        ]
        return [row for row in rows if domid is None or row["domid"] == domid]
