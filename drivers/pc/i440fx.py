"""The PCI host bridge 82441FX: identity, PAM registers, SMRAM control.

There is no memory controller behind it. PAM says for each piece of 0xC0000 to 0xFFFFF whether reads and writes go to memory or to the
bus (where the ROM is); `on_pam` is called when that changes. Under Xen that area is memory always, and firmware leaves PAM alone: the
callback may be left out. DRAM row boundaries and error registers only hold what is written. Source: Intel 82441FX data sheet, 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from drivers.pc.pci import PciFunction

PAM: Final = 0x59
SMRAM: Final = 0x72
PAM_RE, PAM_WE = 1, 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of memory and where accesses of it go."""

    start: int
    end: int
    read_memory: bool
    write_memory: bool


class I440fx(PciFunction):
    """00:00.0."""

    def __init__(self, on_pam: Callable[[list[Segment]], None] | None = None) -> None:
        super().__init__("82441FX", vendor=0x8086, device=0x1237, class_code=0x060000, revision=2)
        self._on_pam: Final = on_pam
        self.data[4] = 6  # memory is decoded and it is bus master, for ever
        self.mask[4] = self.mask[5] = 0
        self.data[6:8] = (0x0280).to_bytes(2, "little")
        self.mask[PAM] = 0x30
        self.mask[PAM + 1 : PAM + 7] = b"\x33" * 6
        self.mask[0x50:0x59] = b"\xff" * 9  # configuration, buffers, arbitration timer, DRAM control
        self.mask[0x60:0x68] = b"\xff" * 8  # DRAM row boundaries
        self.data[SMRAM] = 2
        self.mask[SMRAM] = 0x58
        self._before: list[Segment] = self.segments()
        self.on_write = self._written

    def segments(self) -> list[Segment]:
        """0xC0000 to 0xFFFFF by PAM."""
        pieces = [(0xF0000, 0x10000, self.data[PAM] >> 4)]
        for index in range(12):
            code = self.data[PAM + 1 + index // 2] >> 4 * (index & 1)
            pieces.append((0xC0000 + 0x4000 * index, 0x4000, code))
        return [
            Segment(start, start + size, bool(code & PAM_RE), bool(code & PAM_WE))
            for start, size, code in sorted(pieces)
        ]

    def reset(self) -> None:
        """PAM: everything goes to the bus."""
        super().reset()
        self._written(PAM, 7)

    def _written(self, offset: int, size: int) -> None:
        if offset < PAM + 7 and offset + size > PAM:
            now = self.segments()
            if now != self._before:
                self._before = now
                if self._on_pam is not None:
                    self._on_pam(now)
