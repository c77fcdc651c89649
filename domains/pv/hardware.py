"""What a PV domain that owns devices has beside its vCPUs: their configuration space behind ports, and their registers in I/O memory.

The process shell implements it over the bus (`domains.domu.pv_hardware`).
"""

from __future__ import annotations

from typing import Protocol


class Hardware(Protocol):
    """All methods are called on the vCPU's thread. What does not answer reads as all ones."""

    def port_read(self, port: int, size: int) -> int:
        """IN from a port of 0xCF8 to 0xCFF."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT to one."""

    def vector_mapped(self, bdf: int) -> None:
        """The hypervisor gave the domain a vector of that device (PHYSDEVOP_map_pirq): as Xen does, its MSI-X is switched on."""

    def mmio_read(self, address: int, size: int) -> int:
        """A load from I/O memory, by machine address."""

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """A store."""
