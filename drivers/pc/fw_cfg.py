"""QEMU's firmware configuration device: items by number and files by name, read by port or by DMA.

SeaBIOS reads it under Xen too, if it is there (src/fw/paravirt.c, qemu_cfg_init: the platform is QEMU and Xen both): it is how the
serial console (`etc/sercon-port`) and the boot order (`bootorder`) get there. Read only: DMA writes are refused.
Source: QEMU, docs/specs/fw_cfg.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from drivers.pc.bus import ONES, GuestMemory, GuestMemoryError, PortSpace, Range

SELECTOR: Final = 0x510
DMA: Final = 0x514
SIGNATURE, ID, RAM_SIZE, NOGRAPHIC, NB_CPUS = 0x00, 0x01, 0x03, 0x04, 0x05
BOOT_MENU, MAX_CPUS, FILE_DIR, FIRST_FILE = 0x0E, 0x0F, 0x19, 0x20
VERSION, VERSION_DMA = 1, 2
MAX_FILES: Final = 256
MAX_TRANSFER: Final = 16 << 20
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16
DMA_SIGNATURE: Final = 0x51454D5520434647
_ACCESS: Final = struct.Struct(">IIQ")


class FwCfg:
    """Items are bytes. A file's name has at most 55 bytes."""

    def __init__(
        self,
        memory: GuestMemory,
        files: Mapping[str, bytes],
        *,
        ram_size: int,
        vcpus: int,
        boot_menu: bool = False,
    ) -> None:
        """ValueError: too many files, or a name too long."""
        self._memory: Final = memory
        self._items: Final[dict[int, bytes]] = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", VERSION | VERSION_DMA),
            RAM_SIZE: struct.pack("<Q", ram_size),
            NOGRAPHIC: struct.pack("<H", 0),
            NB_CPUS: struct.pack("<H", vcpus),
            MAX_CPUS: struct.pack("<H", vcpus),
            BOOT_MENU: struct.pack("<H", boot_menu),
        }
        if len(files) > MAX_FILES:
            raise ValueError(f"{len(files)} files for the firmware, at most {MAX_FILES}")
        directory = struct.pack(">I", len(files))
        for number, (name, content) in enumerate(sorted(files.items()), FIRST_FILE):
            encoded = name.encode("ascii")
            if not 0 < len(encoded) < 56:
                raise ValueError(f"file name {name!r} for the firmware: 1 to 55 bytes")
            directory += struct.pack(">IHH56s", len(content), number, 0, encoded)
            self._items[number] = content
        self._items[FILE_DIR] = directory
        self._item = b""
        self._at = 0
        self._address = 0

    def attach(self, ports: PortSpace) -> None:
        """Ports 0x510, 0x511, 0x514 to 0x51B. BusError."""
        ports.add(Range("fw_cfg", SELECTOR, 2, self._read, self._write, 2))
        ports.add(Range("fw_cfg DMA", DMA, 8, self._read_dma, self._write_dma, 8))

    def reset(self) -> None:
        """Nothing is selected."""
        self._item, self._at, self._address = b"", 0, 0

    def _read(self, offset: int, size: int) -> int:
        if offset == 0:
            return ONES[size]
        at = self._at
        if at >= len(self._item):
            return 0
        self._at = at + 1
        return self._item[at]

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            self._item, self._at = self._items.get(value, b""), 0

    def _read_dma(self, offset: int, size: int) -> int:
        return int.from_bytes(DMA_SIGNATURE.to_bytes(8, "big")[offset : offset + size], "little")

    def _write_dma(self, offset: int, size: int, value: int) -> None:
        place = (value & ONES[size]).to_bytes(size, "little")
        address = bytearray(self._address.to_bytes(8, "big"))
        address[offset : offset + size] = place
        self._address = int.from_bytes(address, "big")
        if offset + size == 8:
            where, self._address = self._address, 0
            self._transfer(where)

    def _transfer(self, where: int) -> None:
        """One DMA operation; its control field says how it went. Without a place for that nothing happens."""
        try:
            control, length, address = _ACCESS.unpack(self._memory.read(where, _ACCESS.size))
            result = 0 if self._carry_out(control, length, address) else ERROR
            self._memory.write(where, struct.pack(">I", result))
        except GuestMemoryError:
            return

    def _carry_out(self, control: int, length: int, address: int) -> bool:
        if control & SELECT:
            self._item, self._at = self._items.get(control >> 16, b""), 0
        if control & READ:
            if length > MAX_TRANSFER:
                return False
            data = self._item[self._at : self._at + length]
            try:
                self._memory.write(address, data.ljust(length, b"\0"))
            except GuestMemoryError:
                return False
            self._at += len(data)
        elif control & WRITE:
            return False
        elif control & SKIP:
            self._at = min(self._at + length, len(self._item))
        return not control & ERROR
