"""An ATAPI optical drive with a medium of 2048-byte sectors that can be changed: the commands that firmware and kernels send.

One data track. Not there: audio, subchannels, DVD structures, writing. Sources: ATA/ATAPI-6, 8.23 and 9.8; SFF-8020i; MMC-3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from drivers.hw.nvme.media import Media, MediaError
from drivers.pc.ide import ABRT, DRDY, DRQ, DSC, ERR, Drive, Failed, Transfer
from drivers.pc.ide_disk import swapped

BLOCK: Final = 2048
PACKET: Final = 12
CD, IO = 1, 2
"""Interrupt reason: command or data, direction."""
DMA: Final = 1
NOT_READY, MEDIUM_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION = 2, 3, 5, 6
NO_MEDIUM, BAD_COMMAND, LBA_RANGE, BAD_FIELD = (0x3A, 0), (0x20, 0), (0x21, 0), (0x24, 0)
INCOMPATIBLE_MEDIUM: Final = (0x30, 0)
MEDIUM_CHANGED, READ_ERROR, REMOVAL_PREVENTED = (0x28, 0), (0x11, 0), (0x53, 2)
EVENT_NONE, EVENT_EJECT_REQUEST, EVENT_NEW_MEDIUM, EVENT_REMOVED = 0, 1, 2, 3
CDROM_PROFILE: Final = 0x0008
DVD_PROFILE: Final = 0x0010
CD_BLOCKS: Final = 80 * 60 * 75
"""A medium with more is a DVD."""
CHUNK: Final = 64
"""Blocks that are read from the medium at once for PIO."""
MAX_BLOCKS: Final = 1 << 15
"""Of one command."""


class _Sense(Exception):
    def __init__(self, key: int, code: tuple[int, int]) -> None:
        super().__init__(f"sense {key:x} {code[0]:02x}/{code[1]:02x}")
        self.key = key
        self.code = code


def _msf(block: int) -> bytes:
    minute, rest = divmod(block + 150, 60 * 75)
    second, frame = divmod(rest, 75)
    return bytes((0, minute & 0xFF, second, frame))


class OpticalDrive(Drive):
    """One drive. `on_eject` is called when the guest ejects the medium, which is then the caller's to close."""

    signature = (0x14, 0xEB)

    def __init__(
        self, medium: Media | None, *, serial: str, model: str = "Domicile DVD-ROM", firmware: str = "1.0"
    ) -> None:
        self._medium = medium
        self._names: Final = (serial, firmware, model)
        self.on_eject: Callable[[Media], None] = lambda medium: None
        self.locked = False
        self.tray_open = False
        self._attention_due = False
        self._event = EVENT_NONE
        self._sense: tuple[int, tuple[int, int]] = (0, (0, 0))
        self._limit = 0
        self.errors: list[str] = []
        super().__init__()

    def forget(self) -> None:
        """See Drive. The medium and its lock stay."""
        self.status = 0  # a packet device is not ready until its first command (ATA/ATAPI-6, 9.12)
        self._mwdma: int | None = None
        self._udma: int | None = None

    # -- the medium -----------------------------------------------------------------------------------------------

    @property
    def medium(self) -> Media | None:
        """What is in it."""
        return self._medium

    def insert(self, medium: Media) -> None:
        """Put a medium in, by hand: the tray closes. ValueError: there is one."""
        if self._medium is not None:
            raise ValueError("there is a medium in the drive")
        self._medium = medium
        self.tray_open = False
        self._attention_due = True
        self._event = EVENT_NEW_MEDIUM

    def eject(self) -> Media | None:
        """The button, from outside: the medium, or None if the guest holds it locked; it is then asked to give it free."""
        if self.locked:
            self._event = EVENT_EJECT_REQUEST
            return None
        medium, self._medium = self._medium, None
        if medium is not None:
            self._event = EVENT_REMOVED
        return medium

    @property
    def blocks(self) -> int:
        """Of the medium; 0 without one."""
        return 0 if self._medium is None else self._medium.size // BLOCK

    # -- ATA commands ---------------------------------------------------------------------------------------------

    def command(self, code: int) -> None:
        """See Drive."""
        if code == 0xA0:
            self.count = self.count & ~7 | CD
            self.status = DRDY | DSC
            self.ask(PACKET, self._packet_arrived)
        elif code == 0xA1:
            self.send(self._identify(), self._end_quietly)
            self.attention()
        elif code == 0x08:
            device = self.device
            self.reset()
            self.device = device & 0x10
        elif code == 0xEC:
            self.count = self.lba[0] = 1
            self.lba[1:] = self.signature
            self.abort()
        elif code == 0xEF and self.feature == 3:
            kind, mode = self.count >> 3, self.count & 7
            self._mwdma = mode if kind == 4 else None
            self._udma = mode if kind == 8 else None
            self.done()
        elif (code == 0xEF and self.feature in (0x66, 0xCC)) or code in (0xE0, 0xE1, 0xE2, 0xE3, 0xE6):
            self.done()
        elif code == 0xE5:
            self.count = 0xFF
            self.done()
        else:
            self.abort()

    def _end_quietly(self) -> None:
        self.status = DRDY | DSC

    def _identify(self) -> bytes:
        words = [0] * 256
        words[0] = 0x85C0  # ATAPI, optical, removable, DRQ within 50 us, packets of 12 bytes
        words[49] = 0x0F00
        words[53] = 7
        words[63] = 7 | (1 << 8 + self._mwdma if self._mwdma is not None else 0)
        words[64] = 3
        words[65] = words[66] = words[67] = words[68] = 120
        words[80] = 0x0070
        words[82], words[83], words[84] = 0x4210, 0x4000, 0x4000
        words[85], words[87] = 0x4210, 0x4000
        words[88] = 0x3F | (1 << 8 + self._udma if self._udma is not None else 0)
        words[93] = 0x600B
        out = bytearray(struct.pack("<256H", *words))
        serial, firmware, model = self._names
        out[20:40], out[46:54], out[54:94] = swapped(serial, 20), swapped(firmware, 8), swapped(model, 40)
        return bytes(out)

    # -- packets --------------------------------------------------------------------------------------------------

    def _packet_arrived(self) -> None:
        packet = bytes(self.received)
        code = packet[0]
        self._limit = self.lba[1] | self.lba[2] << 8
        try:
            if self._attention_due and code not in (0x03, 0x12, 0x46, 0x4A):
                self._attention_due = False
                raise _Sense(UNIT_ATTENTION, MEDIUM_CHANGED)
            handler = _COMMANDS.get(code)
            if handler is None:
                raise _Sense(ILLEGAL_REQUEST, BAD_COMMAND)
            if code != 0x03:
                self._sense = (0, (0, 0))
            handler(self, packet)
        except _Sense as sense:
            self._refuse(sense.key, sense.code)

    def _refuse(self, key: int, code: tuple[int, int]) -> None:
        self._sense = (key, code)
        self.count = self.count & ~7 | CD | IO
        self.status = DRDY | DSC | ERR
        self.error = key << 4 | ABRT
        self.attention()

    def _good(self, packet: bytes = b"") -> None:
        self.count = self.count & ~7 | CD | IO
        self.done()

    def _answer(self, data: bytes, allocated: int) -> None:
        """Data of a command that is no read of the medium."""
        data = data[:allocated]
        if not data:
            self._good()
        elif self.feature & DMA:
            rest = [data]
            self.status = DRDY | DSC | DRQ
            self.count = self.count & ~7 | IO
            self.dma(
                Transfer(
                    len(data), self._good, self._dma_failed, produce=lambda most: rest.pop() if rest else b""
                )
            )
        else:
            self._blocks_out(memoryview(data), self._good)

    def _dma_failed(self) -> None:
        self._refuse(*(self._sense if self._sense[0] else (MEDIUM_ERROR, READ_ERROR)))

    def _blocks_out(self, data: memoryview, after: Callable[[], None]) -> None:
        """PIO: pieces of at most the byte count limit, an interrupt for each."""
        limit = self._limit or 0xFFFE
        if limit == 0xFFFF:
            limit = 0xFFFE
        size = min(len(data), limit & ~1 if len(data) > limit else limit) or 1
        self.lba[1], self.lba[2] = size & 0xFF, size >> 8
        self.count = self.count & ~7 | IO
        self.status = DRDY | DSC
        rest = data[size:]
        self.send(data[:size], (lambda: self._blocks_out(rest, after)) if rest else after)
        self.attention()

    def _need_medium(self) -> Media:
        if self._medium is None:
            raise _Sense(NOT_READY, NO_MEDIUM)
        if not self.blocks:
            raise _Sense(NOT_READY, INCOMPATIBLE_MEDIUM)  # a file of less than one block
        return self._medium

    def _test_ready(self, packet: bytes) -> None:
        self._need_medium()
        self._good()

    def _request_sense(self, packet: bytes) -> None:
        key, (code, qualifier) = self._sense
        if not key and self._attention_due:
            self._attention_due = False
            key, (code, qualifier) = UNIT_ATTENTION, MEDIUM_CHANGED
        data = bytes((0xF0 if key else 0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0))
        self._sense = (0, (0, 0))
        self._answer(data, packet[4])

    def _inquiry(self, packet: bytes) -> None:
        if packet[1] & 3:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
        _, firmware, model = self._names
        vendor, _, product = model.partition(" ")
        texts = vendor.ljust(8)[:8] + product.ljust(16)[:16] + firmware.ljust(4)[:4]
        self._answer(bytes((5, 0x80, 0, 0x21, 31, 0, 0, 0)) + texts.encode("ascii", "replace"), packet[4])

    def _capacity(self, packet: bytes) -> None:
        self._need_medium()
        self._answer(struct.pack(">II", self.blocks - 1, BLOCK), 8)

    def _prevent(self, packet: bytes) -> None:
        self.locked = bool(packet[4] & 1)
        self._good()

    def _start_stop(self, packet: bytes) -> None:
        if packet[4] & 2:
            if packet[4] & 1:
                self.tray_open = False
            else:
                if self.locked:
                    raise _Sense(NOT_READY if self._medium is None else ILLEGAL_REQUEST, REMOVAL_PREVENTED)
                medium = self.eject()
                self.tray_open = True
                if medium is not None:
                    self.on_eject(medium)
        self._good()

    def _mode_sense(self, packet: bytes) -> None:
        page, kind = packet[2] & 0x3F, packet[2] >> 6
        if kind == 3:
            raise _Sense(ILLEGAL_REQUEST, (0x39, 0))
        pages = {
            0x01: bytes((0x01, 6, 0, 5, 0, 0, 0, 0)),
            0x2A: struct.pack(
                ">BBBBBBBBHHHHHHB3x", 0x2A, 20, 0x3B, 0, 0x70, 0x60, 0x29 | self.locked << 1, 0, 706, 2, 512, 706, 0, 0, 0
            ),
        }  # fmt: skip
        if page == 0x3F:
            body = b"".join(pages.values())
        elif page in pages:
            body = pages[page]
        else:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
        medium_type = 0x70 if self._medium is None else 0x01
        self._answer(
            struct.pack(">HB5x", 6 + len(body), medium_type) + body, int.from_bytes(packet[7:9], "big")
        )

    def _toc(self, packet: bytes) -> None:
        self._need_medium()
        time, first = bool(packet[1] & 2), packet[6]
        kind = packet[2] & 15 or packet[9] >> 6

        def place(block: int) -> bytes:
            return _msf(block) if time else struct.pack(">I", block)

        if kind == 0:
            if first > 1 and first != 0xAA:
                raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
            body = b"\x01\x01"
            if first <= 1:
                body += b"\0\x14\x01\0" + place(0)
            body += b"\0\x14\xaa\0" + place(self.blocks)
        elif kind == 1:
            body = b"\x01\x01\0\x14\x01\0" + place(0)
        elif kind == 2:
            lead_out = _msf(self.blocks)[1:]
            body = b"\x01\x01"
            for point, where in (
                (0xA0, b"\x01\0\0"),
                (0xA1, b"\x01\0\0"),
                (0xA2, lead_out),
                (0x01, b"\0\2\0"),
            ):
                body += bytes((1, 0x14, 0, point, 0, 0, 0, 0)) + where
        else:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
        self._answer(struct.pack(">H", len(body)) + body, int.from_bytes(packet[7:9], "big"))

    def _configuration(self, packet: bytes) -> None:
        if packet[1] & 3 > 2:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
        start, wanted = int.from_bytes(packet[2:4], "big"), packet[1] & 3
        dvd = self.blocks > CD_BLOCKS
        current = 0 if self._medium is None else DVD_PROFILE if dvd else CDROM_PROFILE
        profiles = struct.pack(
            ">HBxHBx", DVD_PROFILE, current == DVD_PROFILE, CDROM_PROFILE, current == CDROM_PROFILE
        )
        features = {
            0x0000: (3, profiles),
            0x0001: (7, struct.pack(">IB3x", 2, 1)),  # core: ATAPI
            0x0003: (3, bytes((0x29, 0, 0, 0))),  # removable medium: tray, eject, lock
            0x0010: (bool(current), struct.pack(">IHBx", BLOCK, 16 if dvd else 1, 1)),  # random readable
            0x001E: (current == CDROM_PROFILE, bytes(4)),  # CD read
            0x001F: (current == DVD_PROFILE, bytes(4)),  # DVD read
        }
        body = b""
        for number, (flags, data) in features.items():
            if (wanted == 2 and number == start) or (
                wanted < 2 and number >= start and (flags & 1 or not wanted)
            ):
                body += struct.pack(">HBB", number, int(flags), len(data)) + data
        header = struct.pack(">IHH", 4 + len(body), 0, current)
        self._answer(header + body, int.from_bytes(packet[7:9], "big"))

    def _event_status(self, packet: bytes) -> None:
        if not packet[1] & 1:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)  # asynchronous notification
        if packet[4] & 0x10:
            event, self._event = self._event, EVENT_NONE
            state = self.tray_open | (2 if self._medium is not None else 0)
            data = bytes((0, 6, 4, 0x10, event, state, 0, 0))
        else:
            data = bytes((0, 2, 0x80, 0x10))
        self._answer(data, int.from_bytes(packet[7:9], "big"))

    def _disc_information(self, packet: bytes) -> None:
        self._need_medium()
        data = bytearray(34)
        data[1], data[2], data[3], data[4], data[5], data[6], data[7] = 32, 0x0E, 1, 1, 1, 1, 0x20
        self._answer(bytes(data), int.from_bytes(packet[7:9], "big"))

    def _mechanism(self, packet: bytes) -> None:
        self._answer(bytes((0, self.tray_open << 4, 0, 0, 0, 1, 0, 0)), int.from_bytes(packet[8:10], "big"))

    def _seek(self, packet: bytes) -> None:
        self._need_medium()
        if int.from_bytes(packet[2:6], "big") >= self.blocks:
            raise _Sense(ILLEGAL_REQUEST, LBA_RANGE)
        self._good()

    # -- reading --------------------------------------------------------------------------------------------------

    def _read_10(self, packet: bytes) -> None:
        self._read(int.from_bytes(packet[2:6], "big"), int.from_bytes(packet[7:9], "big"))

    def _read_12(self, packet: bytes) -> None:
        self._read(int.from_bytes(packet[2:6], "big"), int.from_bytes(packet[6:10], "big"))

    def _read_cd(self, packet: bytes) -> None:
        if packet[9] & 0xF8 not in (0, 0x10) or packet[10] & 7 or packet[1] >> 2 & 7 not in (0, 2):
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)  # more than the user data of mode 1
        count = int.from_bytes(packet[6:9], "big")
        if packet[9] & 0x10:
            self._read(int.from_bytes(packet[2:6], "big"), count)
        else:
            self._good()

    def _load(self, first: int, count: int) -> bytearray:
        medium = self._medium
        data = bytearray(count * BLOCK)
        if medium is None:
            self._sense = (NOT_READY, NO_MEDIUM)
            raise Failed
        try:
            medium.read(first * BLOCK, memoryview(data))
        except MediaError as error:
            self.errors = [*self.errors[-9:], str(error)]
            self._sense = (MEDIUM_ERROR, READ_ERROR)
            raise Failed from None
        return data

    def _read(self, first: int, count: int) -> None:
        self._need_medium()
        if count > MAX_BLOCKS:
            raise _Sense(ILLEGAL_REQUEST, BAD_FIELD)
        if first + count > self.blocks:
            raise _Sense(ILLEGAL_REQUEST, LBA_RANGE)
        if not count:
            self._good()
        elif self.feature & DMA:
            self._read_by_dma(first, count)
        else:
            self._read_by_pio(first, count)

    def _read_by_pio(self, first: int, count: int) -> None:
        size = min(count, CHUNK)
        try:
            data = memoryview(self._load(first, size))
        except Failed:
            self._refuse(*self._sense)
            return
        if count > size:
            self._blocks_out(data, lambda: self._read_by_pio(first + size, count - size))
        else:
            self._blocks_out(data, self._good)

    def _read_by_dma(self, first: int, count: int) -> None:
        at = first

        def produce(most: int) -> bytes | bytearray:
            nonlocal at
            size = min(max(most // BLOCK, 1), first + count - at)
            data = self._load(at, size) if size else b""
            at += size
            return data

        self.status = DRDY | DSC | DRQ
        self.count = self.count & ~7 | IO
        self.dma(Transfer(count * BLOCK, self._good, self._dma_failed, produce=produce))


_COMMANDS: Final[dict[int, Callable[[OpticalDrive, bytes], None]]] = {
    0x00: OpticalDrive._test_ready,
    0x03: OpticalDrive._request_sense,
    0x12: OpticalDrive._inquiry,
    0x1B: OpticalDrive._start_stop,
    0x1E: OpticalDrive._prevent,
    0x25: OpticalDrive._capacity,
    0x28: OpticalDrive._read_10,
    0x2B: OpticalDrive._seek,
    0x43: OpticalDrive._toc,
    0x46: OpticalDrive._configuration,
    0x4A: OpticalDrive._event_status,
    0x51: OpticalDrive._disc_information,
    0x5A: OpticalDrive._mode_sense,
    0xA8: OpticalDrive._read_12,
    0xBB: OpticalDrive._good,
    0xBD: OpticalDrive._mechanism,
    0xBE: OpticalDrive._read_cd,
}
