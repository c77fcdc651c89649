"""Where hvmloader leaves the memory map (hvm/e820.h)."""

from __future__ import annotations

from typing import Final

HVM_E820_PAGE: Final = 0x00090000
HVM_E820_NR_OFFSET: Final = 0x000001E8
HVM_E820_OFFSET: Final = 0x000002D0
HVM_BELOW_4G_RAM_END: Final = 0xF0000000
HVM_BELOW_4G_MMIO_START: Final = HVM_BELOW_4G_RAM_END
HVM_BELOW_4G_MMIO_LENGTH: Final = 0x10000000
