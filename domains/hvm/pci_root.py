"""What a PVH guest that was given devices has beside its vCPUs: PCI bus 0 behind ports 0xCF8 to 0xCFF, and the devices' BARs.

There is no bridge chip on it but a host bridge to be found by, and there are no interrupt lines: devices send messages. A full HVM
guest has its bus in its device model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from drivers.pc.assigned import AssignedFunction
from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.pci import BAR0, PciBus, PciFunction
from drivers.pc.pci_setup import MMIO_BASE, MMIO_END
from drivers.pc.system import XEN_DEBUG, DebugPort, ResetControl

PAGE: Final = 4096


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
            device = bdf >> 3 & 31
            if bdf >> 8 or device << 3 in self.bus.targets:
                device = next(n for n in range(1, 32) if n << 3 not in self.bus.targets)
            self._place(function, log)
            self.bus.add(device, 0, function)

    def _place(self, function: AssignedFunction, log: Callable[[str], None]) -> None:
        """BARs as firmware would leave them, not decoded yet. One for which there is no room stays at 0: the kernel's to place."""
        for index, bar in function.bars.items():
            size = max(bar.size, PAGE)
            start = -(-self._next // size) * size
            if start + size > MMIO_END:
                log(f"{function.name}: no room for BAR {index}")
                continue
            self._next = start + size
            function.config_write(BAR0 + 4 * index, 4, start)
