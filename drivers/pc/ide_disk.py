"""An ATA hard disk: CHS, 28 and 48 bit addresses, PIO by sectors and blocks, DMA, flush, identification, settings.

SMART, security and the other optional features are refused (ABRT) and not announced. With its write cache on (as after reset) a write is
acknowledged when the medium has it, and is durable after FLUSH CACHE; with it off, and for the FUA commands, it is durable when
it is acknowledged. Source: ATA/ATAPI-6, chapter 8.
"""

from __future__ import annotations

import struct
from typing import Final

from drivers.hw.nvme.media import Media, MediaError
from drivers.pc.ide import ABRT, DRDY, DRQ, DSC, IDNF, LBA, UNC, Drive, Failed, Transfer

SECTOR: Final = 512
MAX_MULTIPLE: Final = 128
"""Sectors of a READ MULTIPLE block (SeaBIOS and Linux use up to that many)."""
HEADS, SECTORS, MAX_CYLINDERS = 16, 63, 16383
LBA28: Final = 1 << 28
_WRITES: Final = {0x30, 0x31, 0x34, 0x39, 0xC5, 0xCE, 0xCA, 0xCB, 0x35, 0x3D}
_EXTENDED: Final = {0x24, 0x29, 0x34, 0x39, 0xCE, 0x25, 0x35, 0x3D, 0x42}
_MULTIPLE: Final = {0x29, 0x39, 0xC4, 0xC5, 0xCE}
_DMA: Final = {0x25, 0x35, 0x3D, 0xC8, 0xC9, 0xCA, 0xCB}
_FUA: Final = {0x3D, 0xCE}
_PIO: Final = {0x20, 0x21, 0x24, 0x30, 0x31, 0x34} | _MULTIPLE
_NOTHING: Final = {*range(0x10, 0x20), 0x94, 0x95, 0x96, 0x97, 0x99, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6}
"""Recalibrate, standby, idle, sleep."""


def swapped(text: str, length: int) -> bytes:
    """A string as IDENTIFY has it: padded with blanks, bytes of each word exchanged."""
    raw = text.encode("ascii", "replace")[:length].ljust(length)
    return bytes(raw[index ^ 1] for index in range(length))


class Disk(Drive):
    """One disk. `medium` is this drive's alone."""

    def __init__(
        self, medium: Media, *, serial: str, model: str = "Domicile HARDDISK", firmware: str = "1.0"
    ) -> None:
        self._medium: Final = medium
        self._names: Final = (serial, firmware, model)
        self.sectors: Final = medium.size // SECTOR
        self.cylinders: Final = max(1, min(MAX_CYLINDERS, self.sectors // (HEADS * SECTORS)))
        self.errors: list[str] = []
        """What the medium said when it failed, the last few."""
        super().__init__()

    def forget(self) -> None:
        """See Drive. Modes go back to those after power on."""
        self._multiple = 0
        self._heads, self._per_track = HEADS, SECTORS
        self._write_cache = self._look_ahead = True
        self._mwdma: int | None = None
        self._udma: int | None = None

    # -- addresses ------------------------------------------------------------------------------------------------

    def _range(self, extended: bool) -> tuple[int, int]:
        """(first sector, count). The first is past the end for an address that cannot be."""
        low, mid, high = self.lba
        if extended:
            count = self.count | self.hob[1] << 8 or 0x10000
            return low | mid << 8 | high << 16 | self.hob[2] << 24 | self.hob[3] << 32 | self.hob[
                4
            ] << 40, count
        count = self.count or 256
        if self.device & LBA:
            return low | mid << 8 | high << 16 | (self.device & 15) << 24, count
        head = self.device & 15
        if not 1 <= low <= self._per_track or head >= self._heads:
            return self.sectors, count
        return ((mid | high << 8) * self._heads + head) * self._per_track + low - 1, count

    def _set_address(self, sector: int, left: int, extended: bool) -> None:
        """The task file tells where an error was, or where the command ended."""
        if extended or self.device & LBA:
            self.lba[:] = sector & 0xFF, sector >> 8 & 0xFF, sector >> 16 & 0xFF
            if extended:
                self.hob[2:] = sector >> 24 & 0xFF, sector >> 32 & 0xFF, sector >> 40 & 0xFF
                self.hob[1] = left >> 8 & 0xFF
            else:
                self.device = self.device & 0xF0 | sector >> 24 & 15
        else:
            track, low = divmod(sector, self._per_track)
            cylinder, head = divmod(track, self._heads)
            self.lba[:] = low + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF
            self.device = self.device & 0xF0 | head
        self.count = left & 0xFF

    # -- commands -------------------------------------------------------------------------------------------------

    def command(self, code: int) -> None:
        """See Drive."""
        if code in _PIO or code in _DMA:
            self._access(code)
        elif code in (0x40, 0x41, 0x42, 0x70):  # READ VERIFY, SEEK
            self._verify(code)
        elif code in (0xE7, 0xEA):
            self._flush()
        elif code == 0xEC:
            self.send(self._identify(), self._end_quietly)
            self.attention()
        elif code == 0xEF:
            self._set_features()
        elif code == 0xC6:
            self._set_multiple()
        elif code == 0x91:
            self._per_track, self._heads = self.count or self._per_track, (self.device & 15) + 1
            self.done()
        elif code in (0xE5, 0x98):  # CHECK POWER MODE: active
            self.count = 0xFF
            self.done()
        elif code in _NOTHING:
            self.done()
        else:
            self.abort()

    def _end_quietly(self) -> None:
        """The host took the last data: no interrupt."""
        self.status = DRDY | DSC

    def _verify(self, code: int) -> None:
        first, count = self._range(code == 0x42)
        if code == 0x70:
            count = 1
        if first + count > self.sectors:
            self.abort(IDNF)
        else:
            self.done()

    def _flush(self) -> None:
        try:
            self._medium.flush()
        except MediaError as error:
            self._note(error)
            self.abort()
        else:
            self.done()

    def _set_multiple(self) -> None:
        count = self.count
        if count > MAX_MULTIPLE or count & (count - 1):
            self.abort()
            return
        self._multiple = count
        self.done()

    def _set_features(self) -> None:
        feature = self.feature
        if feature == 0x03:
            kind, mode = self.count >> 3, self.count & 7
            if kind == 4 and mode <= 2:
                self._mwdma, self._udma = mode, None
            elif kind == 8 and mode <= 5:
                self._mwdma, self._udma = None, mode
            elif kind > 1 or (kind == 1 and mode > 4):
                self.abort()
                return
        elif feature in (0x02, 0x82):
            self._write_cache = feature == 0x02
            if not self._write_cache:
                self._flush()
                return
        elif feature in (0xAA, 0x55):
            self._look_ahead = feature == 0xAA
        elif feature not in (0x66, 0xCC):
            self.abort()
            return
        self.done()

    def _note(self, error: MediaError) -> None:
        self.errors = [*self.errors[-9:], str(error)]

    # -- reading and writing --------------------------------------------------------------------------------------

    def _access(self, code: int) -> None:
        extended, writes = code in _EXTENDED, code in _WRITES
        first, count = self._range(extended)
        if (writes and self._medium.read_only) or (code in _MULTIPLE and not self._multiple):
            self.abort()
        elif first + count > self.sectors:
            self.abort(IDNF)
        elif code in _DMA:
            self._start_dma(first, count, writes, extended, code in _FUA)
        else:
            block = self._multiple if code in _MULTIPLE else 1
            if writes:
                self._pio_out(first, count, block, extended, code in _FUA)
            else:
                self._pio_in(first, count, block, extended)

    def _load(self, first: int, count: int) -> bytearray:
        """Failed: the command has ended with an error."""
        data = bytearray(count * SECTOR)
        try:
            self._medium.read(first * SECTOR, memoryview(data))
        except MediaError as error:
            self._note(error)
            raise Failed from None
        return data

    def _store(self, first: int, data: bytes | bytearray | memoryview, fua: bool) -> None:
        try:
            self._medium.write(first * SECTOR, memoryview(data), fua or not self._write_cache)
        except MediaError as error:
            self._note(error)
            raise Failed from None

    def _fail(self, sector: int, left: int, extended: bool, error: int) -> None:
        self._set_address(sector, left, extended)
        self.abort(error)

    def _pio_in(self, first: int, count: int, block: int, extended: bool) -> None:
        size = min(block, count)
        try:
            data = self._load(first, size)
        except Failed:
            self._fail(first, count, extended, UNC)
            return
        self.status = DRDY | DSC
        self._set_address(first + size - 1, count - size, extended)
        if count > size:
            self.send(data, lambda: self._pio_in(first + size, count - size, block, extended))
        else:
            self.send(data, self._end_quietly)
        self.attention()

    def _pio_out(self, first: int, count: int, block: int, extended: bool, fua: bool) -> None:
        size = min(block, count)

        def arrived() -> None:
            try:
                self._store(first, self.received, fua)
            except Failed:
                self._fail(first, count, extended, ABRT)
                return
            self._set_address(first + size - 1, count - size, extended)
            if count > size:
                self._pio_out(first + size, count - size, block, extended, fua)
                self.attention()
            else:
                self.done()

        self.status = DRDY | DSC
        self.ask(size * SECTOR, arrived)

    def _start_dma(self, first: int, count: int, writes: bool, extended: bool, fua: bool) -> None:
        at = first

        def produce(most: int) -> bytes | bytearray:
            nonlocal at
            size = min(most // SECTOR, first + count - at)
            data = self._load(at, size) if size else b""
            at += size
            return data

        def consume(data: memoryview) -> None:
            nonlocal at
            self._store(at, data, fua)
            at += len(data) // SECTOR

        def finish() -> None:
            self._set_address(first + count - 1, 0, extended)
            self.done()

        def fail() -> None:
            self._fail(min(at, first + count - 1), first + count - at, extended, ABRT if writes else UNC)

        self.status = DRDY | DSC | DRQ
        if writes:
            self.dma(Transfer(count * SECTOR, finish, fail, consume=consume))
        else:
            self.dma(Transfer(count * SECTOR, finish, fail, produce=produce))

    # -- identification -------------------------------------------------------------------------------------------

    def _identify(self) -> bytes:
        words = [0] * 256
        current = min(self.sectors // (self._heads * self._per_track), MAX_CYLINDERS)
        capacity = current * self._heads * self._per_track
        words[0] = 0x0040
        words[1], words[3], words[6] = self.cylinders, HEADS, SECTORS
        words[20], words[21], words[22] = 3, 512, 4
        words[47] = 0x8000 | MAX_MULTIPLE
        words[48] = 1
        words[49] = 0x0F00  # DMA, LBA, IORDY
        words[50], words[51], words[52], words[53] = 0x4000, 0x0200, 0x0200, 7
        words[54], words[55], words[56] = current, self._heads, self._per_track
        words[57], words[58] = capacity & 0xFFFF, capacity >> 16 & 0xFFFF
        words[59] = 0x0100 | self._multiple if self._multiple else 0
        small = min(self.sectors, LBA28 - 1)
        words[60], words[61] = small & 0xFFFF, small >> 16
        words[63] = 7 | (1 << 8 + self._mwdma if self._mwdma is not None else 0)
        words[64] = 3
        words[65] = words[66] = words[67] = words[68] = 120
        words[80] = 0x0070  # ATA/ATAPI-4 to 6
        words[81] = 0x0018
        words[82] = 0x0060  # look-ahead, write cache
        words[83] = 0x7400  # flush cache, flush cache ext, 48 bits
        words[84] = 0x4040  # write FUA ext
        words[85] = self._write_cache << 5 | self._look_ahead << 6
        words[86], words[87] = 0x3400, 0x4040
        words[88] = 0x3F | (1 << 8 + self._udma if self._udma is not None else 0)
        words[93] = 0x600B
        for index in range(4):
            words[100 + index] = self.sectors >> 16 * index & 0xFFFF
        out = bytearray(struct.pack("<256H", *words))
        serial, firmware, model = self._names
        out[20:40], out[46:54], out[54:94] = swapped(serial, 20), swapped(firmware, 8), swapped(model, 40)
        out[510] = 0xA5
        out[511] = -sum(out[:511]) & 0xFF
        return bytes(out)
