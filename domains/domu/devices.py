"""Devices that a PVH guest, or a driver domain that is a PV guest, was given: their registers over the bus, their doorbells by memory, their interrupts by order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bus.link import DomainLink
from bus.messages.device import DeviceAccess, DeviceVector
from domains.device_bell import DeviceBell
from drivers.pc.assigned import AssignedFunction, DeviceError

CONFIG: Final = -1
MAX_DEVICES: Final = 31


class BusDevice:
    """`drivers.pc.assigned.DeviceRegisters` of one device. HypervisorGone ends the process."""

    def __init__(self, link: DomainLink, bdf: int) -> None:
        self._link: Final = link
        self.bdf: Final = bdf
        self._bells: list[DeviceBell] = []

    def set_bells(self, bells: list[DeviceBell]) -> None:
        """The doorbells of its present life."""
        self.close()
        self._bells = bells

    def close(self) -> None:
        """Let go of the doorbells."""
        for bell in self._bells:
            bell.close()
        self._bells = []

    def config_read(self, offset: int, size: int) -> int:
        """See DeviceRegisters."""
        return self._access(CONFIG, offset, size, None)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """See DeviceRegisters."""
        self._access(CONFIG, offset, size, value)

    def read(self, bar: int, offset: int, size: int) -> int:
        """See DeviceRegisters."""
        return self._access(bar, offset, size, None)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See DeviceRegisters; a doorbell is a store and a ring."""
        for bell in self._bells:
            if bell.holds(bar, offset, size):
                bell.store(offset, size, value)
                return
        self._access(bar, offset, size, value)

    def _access(self, space: int, offset: int, size: int, value: int | None) -> int:
        token = self._link.next_token()
        message = DeviceAccess(
            token=token,
            bdf=self.bdf,
            space=space,
            offset=offset,
            size=size,  # type: ignore[arg-type]  # 1, 2, 4 or 8: an access of the vCPU
            write=value is not None,
            value=value or 0,
        )
        rc, data = self._link.exchange(message, token)
        return (1 << 8 * size) - 1 if rc < 0 else int.from_bytes(data, "little")

    def take_vector(self, entry: int, on: bool) -> bool:
        """See DeviceRegisters."""
        token = self._link.next_token()
        rc, _ = self._link.exchange(DeviceVector(token=token, bdf=self.bdf, entry=entry, on=on), token)
        return rc == 0


class GuestDevices:
    """All devices of the guest, by the machine's PCI address."""

    def __init__(self, link: DomainLink, log: Callable[[str], None]) -> None:
        self._link: Final = link
        self._log: Final = log
        self.devices: Final[dict[int, BusDevice]] = {}
        self.functions: Final[dict[int, AssignedFunction]] = {}
        self._bodies: dict[int, dict[str, Any]] = {}

    def attached(self, body: dict[str, Any], fds: list[int]) -> None:
        """Order `device_attached`: a device is given to the guest, or starts a new life. Takes over the descriptors."""
        bdf = body["bdf"]
        bells = [
            DeviceBell(fds[2 * index], fds[2 * index + 1], each["bar"], each["offset"], each["length"])
            for index, each in enumerate(body["doorbells"])
        ]
        if bdf not in self.devices:
            if len(self.devices) >= MAX_DEVICES:
                for bell in bells:
                    bell.close()
                self._log(f"device {bdf:#x}: a guest can have {MAX_DEVICES} devices")
                return
            self.devices[bdf] = BusDevice(self._link, bdf)
        self.devices[bdf].set_bells(bells)
        self._bodies[bdf] = body
        function = self.functions.get(bdf)
        if function is not None:
            function.device_was_reset()

    def make_functions(self, deliver: Callable[[int, int], None]) -> dict[int, AssignedFunction]:
        """The functions for the guest's bus, before the guest starts. A device that makes no sense is left out, and the log says why."""
        for bdf in sorted(self.devices):
            self.make_function(bdf, deliver)
        return self.functions

    def make_function(
        self, bdf: int, deliver: Callable[[int, int], None], *, own_vectors: bool = True
    ) -> AssignedFunction | None:
        """The function of one device. One that makes no sense is None, and the log says why."""
        body = self._bodies[bdf]
        name = f"{bdf >> 8:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"
        bars = [(index, size) for index, size in body["bars"]]
        try:
            function = AssignedFunction(
                name, self.devices[bdf], bars, body["vectors"], deliver, own_vectors=own_vectors
            )
        except DeviceError as error:
            self._log(str(error))
            return None
        self.functions[bdf] = function
        return function

    def message(self, bdf: int, entry: int) -> None:
        """Order `msi`."""
        function = self.functions.get(bdf)
        if function is not None:
            function.message(entry)
