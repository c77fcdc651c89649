"""PIIX3's ISA bridge (82371SB function 0): PIRQ routing. Its other parts are modules of their own.

`on_route(link, isa line)` is told of each change; 0 is "not routed". Source: 82371SB data sheet, 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from drivers.pc.fabric import LINKS, NO_ROUTE
from drivers.pc.pci import PciFunction

PIRQ: Final = 0x60
PIRQ_OFF: Final = 0x80
ROUTABLE: Final = frozenset((3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15))


class Piix3Isa(PciFunction):
    """00:01.0."""

    def __init__(self, on_route: Callable[[int, int], None]) -> None:
        super().__init__("82371SB ISA", vendor=0x8086, device=0x7000, class_code=0x060100, multifunction=True)
        self._on_route: Final = on_route
        self.data[4] = 7
        self.mask[4] = self.mask[5] = 0
        self.data[6:8] = (0x0200).to_bytes(2, "little")
        for offset, value, mask in (
            (0x4C, 0x4D, 0xFF),  # ISA recovery times
            (0x4E, 0x03, 0xFF),  # X-bus chip select
            (0x4F, 0x00, 0x01),
            (0x69, 0x02, 0xFE),  # top of memory
            (0x6A, 0x00, 0x85),
            (0x70, 0x80, 0xEF),  # motherboard IRQ routes
            (0x76, 0x0C, 0x8F),  # DMA
            (0x77, 0x0C, 0x8F),
            (0x82, 0x00, 0x0B),  # deterministic latency
            (0xA0, 0x08, 0x1F),  # SMI control
            (0xA2, 0x00, 0xFF),
            (0xA8, 0x0F, 0xFF),
        ):
            self.data[offset], self.mask[offset] = value, mask
        for link in range(LINKS):
            self.data[PIRQ + link], self.mask[PIRQ + link] = PIRQ_OFF, 0x8F
        self._routes = [NO_ROUTE] * LINKS
        self.on_write = self._written

    def route(self, link: int) -> int:
        """The ISA line of a link, 0 for none."""
        value = self.data[PIRQ + link]
        return NO_ROUTE if value & PIRQ_OFF or value & 15 not in ROUTABLE else value & 15

    def reset(self) -> None:
        """No link is routed."""
        super().reset()
        self._written(PIRQ, LINKS)

    def _written(self, offset: int, size: int) -> None:
        if offset >= PIRQ + LINKS or offset + size <= PIRQ:
            return
        for link in range(LINKS):
            now = self.route(link)
            if now != self._routes[link]:
                self._routes[link] = now
                self._on_route(link, now)
