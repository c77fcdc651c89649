"""drivers/pc/vga, vga_vbe, vga_render: register file, write modes, what is plain memory, pictures of each kind of mode, PNG."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import cast

import pytest

from drivers.pc.bus import MmioSpace, PortSpace
from drivers.pc.pci import PciBus
from drivers.pc.system import ResetControl
from drivers.pc.vga import VRAM, PlainRange, Vga
from drivers.pc.vga_render import Picture, render, text_lines

MODE3 = {
    "misc": 0x67,
    "seq": (3, 0, 3, 0, 2),
    "crtc": (0x5F, 0x4F, 0x50, 0x82, 0x55, 0x81, 0xBF, 0x1F, 0, 0x4F, 0x0D, 0x0E, 0, 0, 0, 0, 0x9C, 0x8E, 0x8F, 0x28, 0x1F, 0x96, 0xB9, 0xA3, 0xFF),
    "gc": (0, 0, 0, 0, 0, 0x10, 0x0E, 0x0F, 0xFF),
    "attribute": (0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3A, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0x0C, 0, 0x0F, 8, 0),
}  # fmt: skip
MODE12 = {
    "misc": 0xE3,
    "seq": (3, 1, 0x0F, 0, 6),
    "crtc": (0x5F, 0x4F, 0x50, 0x82, 0x54, 0x80, 0x0B, 0x3E, 0, 0x40, 0, 0, 0, 0, 0, 0, 0xEA, 0x8C, 0xDF, 0x28, 0, 0xE7, 4, 0xE3, 0xFF),
    "gc": (0, 0, 0, 0, 0, 0, 5, 0x0F, 0xFF),
    "attribute": (*range(6), 0x14, 7, *range(0x38, 0x40), 1, 0, 0x0F, 0, 0),
}  # fmt: skip
MODE13 = {
    "misc": 0x63,
    "seq": (3, 1, 0x0F, 0, 0x0E),
    "crtc": (0x5F, 0x4F, 0x50, 0x82, 0x54, 0x80, 0xBF, 0x1F, 0, 0x41, 0, 0, 0, 0, 0, 0, 0x9C, 0x8E, 0x8F, 0x28, 0x40, 0x96, 0xB9, 0xA3, 0xFF),
    "gc": (0, 0, 0, 0, 0, 0x40, 5, 0x0F, 0xFF),
    "attribute": (*range(16), 0x41, 0, 0x0F, 0, 0),
}  # fmt: skip
Mode = dict[str, object]


class Card:
    """The card on a bus, its frame buffer at 0xF0000000."""

    def __init__(self) -> None:
        self.vram = bytearray(VRAM)
        self.layouts = 0
        self.ports, self.mmio = PortSpace(), MmioSpace()
        self.vga = Vga(self.vram, b"\x55\xaa")
        self.vga.on_layout = self._layout
        bus = PciBus(self.ports, self.mmio, lambda *pin: None, ResetControl(lambda hard: None))
        bus.attach()
        bus.add(2, 0, self.vga)
        self.vga.attach(self.ports)
        self.vga.attach_window(self.mmio)
        for offset, value in ((0x10, 0xF000_0000), (0x18, 0xF100_0000), (4, 3)):
            self.ports.write(0xCF8, 4, 1 << 31 | 2 << 11 | offset)
            self.ports.write(0xCFC, 4, value)

    def _layout(self) -> None:
        self.layouts += 1

    def mode(self, mode: dict[str, object]) -> None:
        """As a video BIOS sets it."""
        out = self.ports.write
        out(0x3C2, 1, mode["misc"])  # type: ignore[arg-type]
        for port, name in ((0x3C4, "seq"), (0x3D4, "crtc"), (0x3CE, "gc")):
            if name == "crtc":
                out(port, 2, 0x0011)
            for index, value in enumerate(cast(Sequence[int], mode[name])):
                out(port, 2, index | value << 8)
        self.ports.read(0x3DA, 1)
        for index, value in enumerate(cast(Sequence[int], mode["attribute"])):
            out(0x3C0, 1, index)
            out(0x3C0, 1, value)
        out(0x3C0, 1, 0x20)
        out(0x3C8, 1, 0)
        for number in range(64):
            for bit in (2, 1, 0):  # EGA's 64 colours
                out(0x3C9, 1, 42 * (number >> bit & 1) + 21 * (number >> bit + 3 & 1))

    def gc(self, index: int, value: int) -> None:
        self.ports.write(0x3CE, 2, index | value << 8)

    def seq(self, index: int, value: int) -> None:
        self.ports.write(0x3C4, 2, index | value << 8)

    def vbe(self, index: int, value: int) -> None:
        self.ports.write(0x1CE, 2, index)
        self.ports.write(0x1CF, 2, value)

    def vbe_get(self, index: int) -> int:
        self.ports.write(0x1CE, 2, index)
        return self.ports.read(0x1CF, 2)

    def vbe_mode(self, width: int, height: int, bpp: int, flags: int = 0x41) -> None:
        self.vbe(4, 0)
        for index, value in ((1, width), (2, height), (3, bpp), (4, flags)):
            self.vbe(index, value)

    def font(self, code: int, rows: bytes) -> None:
        """As a BIOS loads it: plane 2, at 0xA0000."""
        self.seq(2, 4)
        self.seq(4, 7)
        self.gc(5, 0)
        self.gc(6, 4)
        for index, row in enumerate(rows):
            self.mmio.write(0xA0000 + 32 * code + index, 1, row)
        self.seq(2, 3)
        self.seq(4, 3)
        self.gc(5, 0x10)
        self.gc(6, 0x0E)


@pytest.fixture
def card() -> Card:
    return Card()


def pixel(picture: Picture, x: int, y: int) -> tuple[int, ...]:
    at = 3 * (y * picture.width + x)
    return tuple(picture.rgb[at : at + 3])


def test_text_is_plain_memory_and_is_drawn(card: Card) -> None:
    card.mode(MODE3)
    assert card.vga.plain_ranges() == (PlainRange(0xB8000, 0x8000, 0), PlainRange(0xF000_0000, VRAM, 0))
    card.font(0x41, bytes([0x80, 0xFF]) + bytes(13) + b"\x01")
    assert card.vga.plain_ranges()[0] == PlainRange(0xB8000, 0x8000, 0)
    card.vram[0:4] = b"A\x1eA\x07"  # written by the guest without an exit
    assert card.mmio.read(0xB8000, 4) == 0x0741_1E41
    card.mmio.write(0xB8000 + 160, 2, 0x4F41)
    assert card.vram[160:162] == b"A\x4f"
    assert text_lines(card.vga)[0][:3] == "AA\0"
    card.ports.write(0x3D4, 2, 0x200A)  # cursor off
    picture = render(card.vga)
    assert (picture.width, picture.height) == (720, 400)
    yellow, blue, grey, white, red = (
        (255, 255, 85),
        (0, 0, 170),
        (170, 170, 170),
        (255, 255, 255),
        (170, 0, 0),
    )
    assert [pixel(picture, x, 0) for x in (0, 1, 8)] == [yellow, blue, blue]
    assert [pixel(picture, x, 1) for x in (0, 7, 8)] == [yellow, yellow, blue]
    assert pixel(picture, 9, 0) == grey
    assert pixel(picture, 7, 15) == yellow
    assert [pixel(picture, x, 16) for x in (0, 1)] == [white, red]
    assert pixel(picture, 30, 30) == (0, 0, 0)


def test_box_drawing_characters_reach_the_ninth_column(card: Card) -> None:
    card.mode(MODE3)
    card.font(0xC4, b"\xff" * 16)
    card.font(0x41, b"\xff" * 16)
    card.vram[0:4] = b"\xc4\x07A\x07"
    card.ports.write(0x3D4, 2, 0x200A)
    picture = render(card.vga)
    assert pixel(picture, 8, 3) == (170, 170, 170)
    assert pixel(picture, 17, 3) == (0, 0, 0)


def test_cursor_blinking_and_start_address(card: Card) -> None:
    card.mode(MODE3)
    card.font(0x41, b"\xff" * 16)
    card.vram[160:162] = b"A\x87"
    for index, value in ((0x0F, 82), (0x0A, 0x0D), (0x0B, 0x0E)):
        card.ports.write(0x3D4, 2, index | value << 8)
    card.vram[165] = 0x07
    picture = render(card.vga)
    assert pixel(picture, 18, 16 + 13) == (170, 170, 170)
    assert pixel(picture, 18, 16 + 12) == (0, 0, 0)
    assert pixel(render(card.vga, 250_000_000), 18, 16 + 13) == (0, 0, 0)
    assert pixel(picture, 0, 16) == (170, 170, 170)
    assert pixel(render(card.vga, 500_000_000), 0, 16) == (0, 0, 0)
    card.ports.write(0x3D4, 2, 0x500D)  # start at cell 80
    assert pixel(render(card.vga), 0, 0) == (170, 170, 170)
    assert text_lines(card.vga)[0][0] == "A"


def test_planes_and_write_modes(card: Card) -> None:
    """Mode 12h, as GRUB and Windows draw: mode 0 with set/reset and bit mask, 1 copies, 2 colours, 3."""
    card.mode(MODE12)
    assert card.vga.plain_ranges() == (PlainRange(0xF000_0000, VRAM, 0),)
    put, get, planes = card.mmio.write, card.mmio.read, card.vga.planes
    put(0xA0000, 1, 0x81)
    assert [plane[0] for plane in planes] == [0x81] * 4
    card.gc(0, 5)
    card.gc(1, 0x0F)
    card.gc(8, 0x0F)
    get(0xA0000, 1)
    put(0xA0000, 1, 0)
    assert [plane[0] for plane in planes] == [0x8F, 0x80, 0x8F, 0x80]
    card.gc(1, 0)
    card.gc(8, 0xFF)
    card.gc(5, 2)
    card.seq(2, 0x07)
    get(0xA0001, 1)
    put(0xA0001, 1, 0x0A)
    assert [plane[1] for plane in planes] == [0, 0xFF, 0, 0]
    card.gc(5, 1)
    card.seq(2, 0x0F)
    get(0xA0000, 1)
    put(0xA0002, 1, 0x55)
    assert [plane[2] for plane in planes] == [0x8F, 0x80, 0x8F, 0x80]
    card.gc(5, 3)
    card.gc(0, 8)
    get(0xA0002, 1)
    put(0xA0002, 1, 0xF0)
    assert [plane[2] for plane in planes] == [0x0F, 0, 0x0F, 0xF0]
    card.gc(5, 0)
    card.gc(3, 0x18)
    get(0xA0002, 1)
    put(0xA0002, 1, 0xFF)
    assert [plane[2] for plane in planes] == [0xF0, 0xFF, 0xF0, 0x0F], "exclusive or"
    card.gc(3, 4)
    put(0xA0003, 1, 0x12)
    assert planes[0][3] == 0x21, "rotated by 4"


def test_read_modes(card: Card) -> None:
    card.mode(MODE12)
    for number, value in enumerate((0xF0, 0xCC, 0xAA, 0x00)):
        card.vga.planes[number][7] = value
    for number, value in enumerate((0xF0, 0xCC, 0xAA, 0x00)):
        card.gc(4, number)
        assert card.mmio.read(0xA0007, 1) == value
    card.gc(5, 8)
    card.gc(2, 0b0101)
    assert card.mmio.read(0xA0007, 1) == 0xF0 & ~0xCC & 0xAA
    card.gc(7, 0b0001)
    assert card.mmio.read(0xA0007, 1) == 0xF0


def test_mode_12_is_drawn(card: Card) -> None:
    card.mode(MODE12)
    card.vga.planes[0][0] = 0x80
    card.vga.planes[2][0] = 0xC0
    card.vga.planes[3][80] = 0x01
    picture = render(card.vga)
    assert (picture.width, picture.height) == (640, 480)
    assert [pixel(picture, x, 0) for x in (0, 1, 2)] == [(170, 0, 170), (170, 0, 0), (0, 0, 0)]
    assert pixel(picture, 7, 1) == (85, 85, 85)


def test_mode_13(card: Card) -> None:
    card.mode(MODE13)
    assert card.vga.plain_ranges()[0] == PlainRange(0xA0000, 0x10000, 0)
    card.mmio.write(0xA0000 + 320, 4, 0x0403_0201)
    assert card.vram[320:324] == b"\1\2\3\4"
    picture = render(card.vga)
    assert (picture.width, picture.height) == (320, 400)
    assert pixel(picture, 0, 1) == (0, 0, 0)
    assert [pixel(picture, x, 2) for x in range(4)] == [(0, 0, 170), (0, 170, 0), (0, 170, 170), (170, 0, 0)]
    assert pixel(picture, 3, 3) == (170, 0, 0)
    card.seq(4, 6)  # unchained: the content goes on being seen
    assert card.vga.planes[1][80] == 2
    card.ports.write(0x3D4, 2, 0x0014)
    card.ports.write(0x3D4, 2, 0xE317)
    assert pixel(render(card.vga), 1, 2) == (0, 170, 0)


def test_content_follows_a_change_of_addressing(card: Card) -> None:
    card.mode(MODE3)
    card.vram[0:4] = b"a\x07b\x17"
    card.mode(MODE12)
    assert (card.vga.planes[0][:2], card.vga.planes[1][:2]) == (b"ab", b"\x07\x17")
    card.mode(MODE3)
    assert card.vram[0:4] == b"a\x07b\x17"


def test_what_is_not_plain_is_told(card: Card) -> None:
    card.mode(MODE3)
    before = card.layouts
    for change in (
        lambda: card.gc(8, 0x0F),
        lambda: card.gc(8, 0xFF),
        lambda: card.ports.write(0x3C2, 1, 0x65),
    ):
        change()
    assert card.layouts == before + 3
    assert card.vga.plain_ranges() == (PlainRange(0xF000_0000, VRAM, 0),)
    assert card.mmio.read(0xB8000, 1) == 0xFF, "memory is off"


def test_vbe(card: Card) -> None:
    """Linux's bochs driver and vgabios: identify, memory size, set a mode."""
    assert card.vbe_get(0) == 0xB0C5
    assert card.vbe_get(0xA) == VRAM >> 16
    card.vbe(4, 2)
    assert [card.vbe_get(n) for n in (1, 2, 3)] == [2560, 1600, 32]
    card.vram[0:4] = b"junk"
    card.vbe_mode(800, 600, 32)
    assert card.vram[0:4] == bytes(4)
    assert [card.vbe_get(n) for n in (1, 2, 3, 6)] == [800, 600, 32, 800]
    card.mmio.write(0xF000_0000 + 4 * (800 * 2 + 3), 4, 0x00112233)
    picture = render(card.vga)
    assert (picture.width, picture.height) == (800, 600)
    assert pixel(picture, 3, 2) == (0x11, 0x22, 0x33)
    card.vbe(9, 2)
    assert pixel(render(card.vga), 3, 0) == (0x11, 0x22, 0x33)
    card.vbe(4, 0)
    assert card.vbe_get(4) == 0


@pytest.mark.parametrize(
    ("bpp", "raw", "want"),
    [
        (8, b"\x0c", (255, 0, 0)),
        (15, struct.pack("<H", 0b0_11111_00000_10000), (255, 0, 132)),
        (16, struct.pack("<H", 0b11111_100000_00001), (255, 130, 8)),
        (24, b"\x01\x02\x03", (3, 2, 1)),
        (32, b"\x01\x02\x03\x00", (3, 2, 1)),
    ],
)
def test_vbe_depths(card: Card, bpp: int, raw: bytes, want: tuple[int, int, int]) -> None:
    card.vbe_mode(640, 480, bpp)
    card.ports.write(0x3C8, 1, 0x0C)
    for value in (63, 0, 0):
        card.ports.write(0x3C9, 1, value)
    card.vbe(6, 704)
    at = (704 * 5 + 6) * len(raw)
    card.vram[at : at + len(raw)] = raw
    assert pixel(render(card.vga), 6, 5) == want


def test_vbe_banks(card: Card) -> None:
    card.vbe_mode(640, 480, 8)
    card.vbe(5, 3)
    assert card.vga.plain_ranges()[0] == PlainRange(0xA0000, 0x10000, 3 << 16)
    card.mmio.write(0xA0010, 1, 0x77)
    assert card.vram[0x30010] == 0x77
    card.vbe(5, 0x1000)
    assert card.vbe_get(5) == 3


def test_vbe_that_cannot_be(card: Card) -> None:
    card.vbe_mode(5000, 600, 32)
    assert card.vbe_get(4) & 1 == 0
    card.vbe_mode(2560, 1600, 32)
    assert card.vbe_get(4) & 1
    card.vbe(6, 4000)
    assert card.vbe_get(6) == 2560, "as much memory is not there"
    card.vbe(8, 500)
    card.vbe(9, 5000)
    assert (card.vbe_get(8), card.vbe_get(9)) == (0, VRAM // 10240 - 1600)
    render(card.vga)
    card.ports.write(0x1CE, 1, 1)
    assert card.vbe_get(0x55) == 0xFFFF


def test_vbe_by_memory(card: Card) -> None:
    assert card.mmio.read(0xF100_0500, 2) == 0xB0C5
    for index, value in ((1, 640), (2, 480), (3, 32), (4, 0x41)):
        card.mmio.write(0xF100_0500 + 2 * index, 2, value)
    assert card.vga.vbe.enabled
    card.mmio.write(0xF100_0400, 1, 0x20)
    card.mmio.write(0xF100_0402, 1, 0x67)
    assert card.ports.read(0x3CC, 1) == 0x67


def test_registers_read_back(card: Card) -> None:
    card.mode(MODE3)
    get, out = card.ports.read, card.ports.write
    out(0x3D4, 1, 0x13)
    assert get(0x3D5, 1) == 0x28
    out(0x3D4, 2, 0xFF00)
    out(0x3D4, 1, 0)
    assert get(0x3D5, 1) == 0x5F, "protected"
    out(0x3C4, 1, 4)
    assert get(0x3C5, 1) == 2
    out(0x3CE, 1, 6)
    assert get(0x3CF, 1) == 0x0E
    get(0x3DA, 1)
    out(0x3C0, 1, 6)
    assert get(0x3C1, 1) == 0x14
    out(0x3C7, 1, 1)
    assert [get(0x3C9, 1) for _ in range(6)] == [0, 0, 42, 0, 42, 0]
    assert get(0x3C7, 1) == 3
    out(0x3C6, 1, 0x0F)
    assert get(0x3C6, 1) == 0x0F
    assert get(0x3CC, 1) == 0x67
    assert {get(0x3DA, 1) & 8 for _ in range(4)} == {0, 8}
    assert get(0x3B4, 1) == get(0x3D4, 1)


def test_a_blank_screen_is_black(card: Card) -> None:
    card.mode(MODE3)
    card.vram[0:0x1000] = b"\xdb\x0f" * 0x800
    card.seq(1, 0x20)
    assert set(render(card.vga).rgb) == {0}
    card.seq(1, 0)
    card.ports.read(0x3DA, 1)
    card.ports.write(0x3C0, 1, 0)
    assert set(render(card.vga).rgb) == {0}


def test_png(card: Card) -> None:
    """The file is read back by hand: signature, chunks with their sums, filter 0 lines."""
    card.mode(MODE13)
    card.vram[0] = 4
    picture = render(card.vga)
    data = picture.png()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert struct.unpack(">IIBB", chunks[b"IHDR"][:10]) == (320, 400, 8, 2)
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == 400 * (1 + 960)
    assert raw[:4] == b"\0\xaa\0\0"


def test_buffers_that_cannot_be() -> None:
    for bad in (bytearray(100), memoryview(bytes(VRAM))):
        with pytest.raises(ValueError, match="video memory"):
            Vga(bad)


def test_reset(card: Card) -> None:
    card.vbe_mode(640, 480, 32)
    card.vga.reset()
    assert card.vga.plain_ranges() == ()
    assert not card.vga.vbe.enabled
