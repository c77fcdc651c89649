"""The hardware of a driver domain that is a PV guest: its devices on PCI bus 0, their BARs in the machine's PCI hole.

Implements `domains.pv.hardware.Hardware`. Devices come at any time (a disk is attached) and start new lives (their processes end); both
are taken up between two runs of the vCPU, as registers are read for it over the bus.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from bus.addresses import PAGE_SHIFT, Mfn
from bus.link import DomainLink
from domains.domu.devices import GuestDevices
from domains.hvm.pci_root import PciRoot
from domains.pv.domain import PvDomain


class PvHardware:
    """See the module."""

    def __init__(self, link: DomainLink, log: Callable[[str], None]) -> None:
        """`log` takes lines for the hypervisor's log."""
        self._log: Final = log
        self._devices: Final = GuestDevices(link, log)
        self._news: list[tuple[dict[str, Any], list[int]]] = []
        self._root: Final = PciRoot({}, lambda: None, log, lambda byte: None)

    def attached(self, body: dict[str, Any], fds: list[int]) -> None:
        """Order `device_attached`. Takes over the descriptors."""
        self._news.append((body, fds))

    def settle(self, domain: PvDomain) -> None:
        """Take up what is new, between two runs of the vCPU."""
        while self._news:
            body, fds = self._news.pop(0)
            bdf = body["bdf"]
            self._devices.attached(body, fds)
            if bdf in self._devices.functions or bdf not in self._devices.devices:
                continue
            function = self._devices.make_function(bdf, lambda address, data: None, own_vectors=False)
            if function is None:
                continue
            try:
                places = self._root.add(bdf, function, self._log)
            except ValueError as error:
                self._log(str(error))
                continue
            for address, size in places:
                domain.give_io_memory(Mfn(address >> PAGE_SHIFT), size >> PAGE_SHIFT)

    # -- what the guest does --------------------------------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """See Hardware."""
        return self._root.ports.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """See Hardware."""
        self._root.ports.write(port, size, value)

    def vector_mapped(self, bdf: int) -> None:
        """See Hardware."""
        function = self._devices.functions.get(bdf)
        if function is not None:
            function.enable_vectors()

    def mmio_read(self, address: int, size: int) -> int:
        """See Hardware."""
        return self._root.mmio.read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """See Hardware."""
        self._root.mmio.write(address, size, value)
