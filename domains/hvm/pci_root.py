"""Devices that a guest was given, on its PCI bus 0 behind ports 0xCF8 to 0xCFF, with their BARs. There are no interrupt lines: devices send
messages.

`PciRoot` is the bus of a PVH guest: no bridge chip is on it but a host bridge to be found by. A full HVM guest has its bus in its device
model; `PciOverlay` takes the configuration accesses to devices of the guest's own out of what goes there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from drivers.pc.assigned import AssignedFunction
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.pci import BAR0, CONFIG_ADDRESS, CONFIG_DATA, ENABLE, PciBus, PciFunction
from drivers.pc.pci_setup import MMIO_BASE, MMIO_END
from drivers.pc.system import XEN_DEBUG, DebugPort, ResetControl

PAGE: Final = 4096
EMULATED: Final = range(4)
"""Device numbers of a full HVM guest's emulated devices (domains.dm.board)."""


def free_device(bdf: int, taken: Collection[int]) -> int:
    """Where a device goes: one of bus 0 keeps its number if that is free, others get the first free one. ValueError: the bus is full."""
    device = bdf >> 3 & 31
    if not bdf >> 8 and device not in taken:
        return device
    for number in range(1, 32):
        if number not in taken:
            return number
    raise ValueError("there is no room on the guest's PCI bus")


class PciRoot:
    """See the module. `devices`: functions by the machine's PCI address; a function of bus 0 keeps its device number."""

    def __init__(
        self,
        devices: Mapping[int, AssignedFunction],
        reset: Callable[[], None],
        log: Callable[[str], None],
        debug: Callable[[int], None],
    ) -> None:
        """`reset`: the guest asked for one by port 0xCF9; `debug` takes bytes of Xen's debug port."""
        self.ports: Final = PortSpace()
        self.mmio: Final = MmioSpace()
        self.bus: Final = PciBus(
            self.ports, self.mmio, lambda device, pin, level: None, ResetControl(lambda hard: reset()), log
        )
        self.bus.attach()
        DebugPort(XEN_DEBUG, debug).attach(self.ports)
        # 440FX's numbers: configuration mechanism 1 is believed in where a host bridge is found.
        self.bus.add(
            0, 0, PciFunction("host bridge", vendor=0x8086, device=0x1237, class_code=0x060000, revision=2)
        )
        self._next = MMIO_BASE
        for bdf, function in sorted(devices.items()):
            self.add(bdf, function, log)

    def add(self, bdf: int, function: AssignedFunction, log: Callable[[str], None]) -> list[tuple[int, int]]:
        """Another function; (address, bytes) of its BARs, whole pages. ValueError: the bus is full."""
        device = free_device(bdf, {devfn >> 3 for devfn in self.bus.targets})
        places = self._place(function, log)
        self.bus.add(device, 0, function)
        return places

    def _place(self, function: AssignedFunction, log: Callable[[str], None]) -> list[tuple[int, int]]:
        """BARs as firmware would leave them, not decoded yet. One for which there is no room stays at 0: the kernel's to place."""
        places: list[tuple[int, int]] = []
        for index, bar in function.bars.items():
            size = max(bar.size, PAGE)
            start = -(-self._next // size) * size
            if start + size > MMIO_END:
                log(f"{function.name}: no room for BAR {index}")
                continue
            self._next = start + size
            function.config_write(BAR0 + 4 * index, 4, start)
            places.append((start, size))
        return places


class OverlayPorts:
    """The ports of a full HVM guest, with the devices of its own in front of configuration mechanism 1."""

    def __init__(self, ports: PortSpace) -> None:
        self._ports: Final = ports
        self._address = 0
        self.functions: Final[dict[int, AssignedFunction]] = {}
        """By device << 3."""

    def _own(self, port: int) -> tuple[AssignedFunction, int] | None:
        """The device that the address register names, and the place in its configuration space."""
        if port < CONFIG_DATA or not self._address & ENABLE or self._address & 0x00FF_0000:
            return None
        function = self.functions.get(self._address >> 8 & 0xFF)
        return None if function is None else (function, (self._address & 0xFC) + port - CONFIG_DATA)

    def read(self, port: int, size: int) -> int:
        """See PortSpace."""
        if CONFIG_DATA <= port < CONFIG_DATA + 4 and port + size <= CONFIG_DATA + 4:
            own = self._own(port)
            if own is not None:
                return own[0].config_read(own[1], size)
        return self._ports.read(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        """See PortSpace. The device model has the address register as well."""
        if CONFIG_ADDRESS <= port < CONFIG_DATA + 4:
            if port == CONFIG_ADDRESS and size == 4:
                self._address = value
            elif port + size <= CONFIG_DATA + 4:
                own = self._own(port)
                if own is not None:
                    own[0].config_write(own[1], size, value)
                    return
        self._ports.write(port, size, value)


class PciOverlay:
    """See the module. Their BARs are put below the end of the window for devices, from above: the firmware's grow from below."""

    def __init__(
        self,
        devices: Mapping[int, AssignedFunction],
        ports: PortSpace,
        mmio: MmioSpace,
        log: Callable[[str], None],
    ) -> None:
        """ValueError: there is no room for all of them."""
        self.ports: Final = OverlayPorts(ports)
        self.mmio: Final = mmio
        self._end = MMIO_END
        for bdf, function in sorted(devices.items()):
            device = free_device(bdf, {*EMULATED, *(devfn >> 3 for devfn in self.ports.functions)})
            self._place(function, log)
            function.log = log
            function.connect(ports, mmio, None, lambda: None)
            self.ports.functions[device << 3] = function

    def _place(self, function: AssignedFunction, log: Callable[[str], None]) -> None:
        for index, bar in function.bars.items():
            size = max(bar.size, PAGE)
            start = (self._end - size) // size * size
            if start < MMIO_BASE + (MMIO_END - MMIO_BASE) // 2:
                log(f"{function.name}: no room for BAR {index}")
                continue
            self._end = start
            function.config_write(BAR0 + 4 * index, 4, start)
