"""I/O ports of an unprivileged PV guest, as Xen answers them (emul-priv-op): the access must be allowed by the virtual IOPL or
by the vCPU's I/O bitmap, else #GP; no real port is reachable. CONFIG_ADDRESS (0xCF8, 32 bits) and the RTC index (0x70) are
kept and read back; everything else reads as ones and swallows writes. A driver domain reaches the configuration space of its own
devices by 0xCF8 and 0xCFC (on Xen only the hardware domain reaches any).
"""

from __future__ import annotations

from typing import Final

from bus.abi.xen import VMASST_TYPE_architectural_iopl
from domains.pv.api import GuestFault
from domains.pv.cpu import Cpu
from domains.pv.hardware import Hardware

RTC_INDEX: Final = 0x70
PCI_CONFIG_ADDRESS: Final = 0xCF8
PCI_PORTS: Final = range(0xCF8, 0xD00)
_IOPL_ASSIST: Final = 1 << VMASST_TYPE_architectural_iopl


def iopl_ok(cpu: Cpu) -> bool:
    """The virtual IOPL admits the current mode. Without the architectural_iopl assist the guest kernel counts as ring 1."""
    s = cpu.current
    level = (0 if cpu.assists & _IOPL_ASSIST else 1) if s.kernel_mode else 3
    return level << 12 <= s.iopl


def access_ok(cpu: Cpu, port: int, size: int) -> bool:
    """IOPL, or clear bits in the I/O bitmap (an unreadable byte of it denies)."""
    if iopl_ok(cpu):
        return True
    s = cpu.current
    if port + size > s.iobmp_limit:
        return False
    address = s.iobmp + (port >> 3)
    try:
        mask = int.from_bytes(cpu.mmu.read_virtual(address, 2), "little")
    except GuestFault:
        try:
            mask = cpu.mmu.read_virtual(address, 1)[0] | 0xFF00
        except GuestFault:
            return False
    return not mask & ((1 << size) - 1) << (port & 7)


class IoPorts:
    """The two registers that Xen keeps for a domain."""

    __slots__ = ("_hardware", "config_address", "rtc_index")

    def __init__(self, hardware: Hardware | None = None) -> None:
        self._hardware = hardware
        self.config_address = 0
        self.rtc_index = 0

    def read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes that `access_ok` admitted."""
        if self._hardware is not None and port in PCI_PORTS:
            return self._hardware.port_read(port, size)
        if port == PCI_CONFIG_ADDRESS and size == 4:
            return self.config_address
        value = 0
        for i in range(size):
            value |= (self.rtc_index if port + i == RTC_INDEX else 0xFF) << 8 * i
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes that `access_ok` admitted."""
        if self._hardware is not None and port in PCI_PORTS:
            self._hardware.port_write(port, size, value)
            return
        if port == PCI_CONFIG_ADDRESS and size == 4:
            self.config_address = value & 0xFFFFFFFF
            return
        for i in range(size):
            if port + i == RTC_INDEX:
                self.rtc_index = value >> 8 * i & 0xFF
