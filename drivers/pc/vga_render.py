"""The picture that a VGA shows: text with the font of plane 2, cursor and blinking; 16 and 256 colours; VBE modes.

Not drawn (black): CGA's graphics modes 4 to 6, split screens, pixel panning. Doubled lines are drawn doubled, as on a monitor.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from drivers.pc.vga import CHAIN4, ODD_EVEN, PLANE, Vga

MAX_WIDTH, MAX_HEIGHT = 2560, 1600
BLINK: Final = 500_000_000
"""ns that a blinking character is there, and is gone; the cursor is twice as fast."""
_SPREAD: Final = [bytes(byte >> 7 - bit & 1 for bit in range(8)) for byte in range(256)]


@dataclass(frozen=True, slots=True)
class Picture:
    """`rgb`: three bytes a pixel, lines from the top."""

    width: int
    height: int
    rgb: bytes

    def png(self) -> bytes:
        """As a PNG file (8 bits a colour; ISO/IEC 15948)."""

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        pitch = 3 * self.width
        lines = b"".join(b"\0" + self.rgb[at : at + pitch] for at in range(0, len(self.rgb), pitch))
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 6)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body


def _black(width: int = 640, height: int = 400) -> Picture:
    return Picture(width, height, bytes(3 * width * height))


def _colours(vga: Vga) -> list[bytes]:
    """The DAC's 256 colours as three bytes each."""
    palette = vga.palette
    if vga.vbe.wide_dac:
        return [bytes(palette[3 * n : 3 * n + 3]) for n in range(256)]
    return [bytes(part << 2 | part >> 4 for part in palette[3 * n : 3 * n + 3]) for n in range(256)]


def _sixteen(vga: Vga) -> list[bytes]:
    """The colours of attributes 0 to 15."""
    attribute, colours = vga.attribute, _colours(vga)
    found = []
    for number in range(16):
        index = attribute[number] & 0x3F
        if attribute[0x10] & 0x80:
            index = index & 0x0F | (attribute[0x14] & 0x0F) << 4
        else:
            index |= (attribute[0x14] & 0x0C) << 4
        found.append(colours[index & vga.dac_mask])
    return found


def _size(vga: Vga) -> tuple[int, int]:
    """(characters in a line, lines) that the CRT controller shows."""
    crtc = vga.crtc
    lines = (crtc[0x12] | (crtc[7] & 2) << 7 | (crtc[7] & 0x40) << 3) + 1
    return crtc[1] + 1, lines


def render(vga: Vga, now: int = 0) -> Picture:
    """What is on the screen. `now` (ns) decides what blinks is on; at 0 all is."""
    vbe = vga.vbe
    if vbe.enabled:
        return _vbe(vga)
    if vga.seq[1] & 0x20 or not vga.attribute_shown or vga.crtc[0x17] & 0x80 == 0:
        return _black()
    if not vga.gc[6] & 1:
        return _text(vga, now)
    columns, lines = _size(vga)
    if vga.gc[5] & 0x40:
        return _colours_256(vga, columns, lines)
    if vga.gc[5] & 0x20 or not vga.crtc[0x17] & 1:
        return _black(min(columns * 8, MAX_WIDTH), min(lines, MAX_HEIGHT))
    return _planar(vga, columns, lines)


def _repeat(lines: Iterable[bytes], times: int, most: int) -> bytes:
    return (
        b"".join(line * times for line in lines)
        if times == 1
        else b"".join(piece for line in lines for piece in (line,) * times)[:most]
    )


# -- text ---------------------------------------------------------------------------------------------------------


def text_lines(vga: Vga) -> list[str]:
    """The characters of the text screen in code page 437's order as Latin-1; empty outside text modes."""
    if vga.vbe.enabled or vga.gc[6] & 1:
        return []
    columns, _, rows = _text_size(vga)
    cells = _text_cells(vga, columns, rows)
    return [cells[row][0::2].decode("cp437") for row in range(rows)]


def _text_size(vga: Vga) -> tuple[int, int, int]:
    columns, lines = _size(vga)
    height = (vga.crtc[9] & 0x1F) + 1
    return columns, height, max(1, min(lines, MAX_HEIGHT) // height)


def _text_cells(vga: Vga, columns: int, rows: int) -> list[bytes]:
    """Character and attribute pairs, by row."""
    crtc = vga.crtc
    start = crtc[0x0C] << 8 | crtc[0x0D]
    pitch = crtc[0x13] * 2
    if vga.kind == ODD_EVEN:
        memory = bytes(vga.vram[: 2 * PLANE])
    else:
        memory = bytes(part for pair in zip(vga.planes[0], vga.planes[1], strict=True) for part in pair)
    memory += memory[: 4 * columns]
    return [
        memory[at : at + 2 * columns]
        for at in (2 * (start + row * pitch) & 2 * PLANE - 1 for row in range(rows))
    ]


def _font(vga: Vga, select: int) -> bytes:
    """The 8 KiB of one of eight fonts: 32 bytes a character."""
    base = (select & 3) << 14 | (select & 4) << 11
    return bytes(vga.planes[2][base : base + 0x2000])


def _text(vga: Vga, now: int) -> Picture:
    columns, height, rows = _text_size(vga)
    wide = not vga.seq[1] & 1
    width = columns * (9 if wide else 8)
    if width > MAX_WIDTH:
        return _black()
    mode = vga.attribute[0x10]
    blinks = bool(mode & 8)
    hidden = blinks and now // BLINK & 1 == 1
    graphics = wide and bool(mode & 4)
    select = vga.seq[3]
    fonts = [_font(vga, select & 3 | select >> 2 & 4), _font(vga, select >> 2 & 3 | select >> 3 & 4)]
    two = fonts[0] != fonts[1]
    colours = _sixteen(vga)
    painted: dict[int, list[bytes]] = {}
    cells = _text_cells(vga, columns, rows)
    cursor = _cursor(vga, columns, rows, now)
    out = []
    for row, line in enumerate(cells):
        glyphs = []
        for column in range(columns):
            code, attribute = line[2 * column], line[2 * column + 1]
            front, back = attribute & 15, attribute >> 4
            if blinks:
                if hidden and back & 8:
                    front = back & 7
                back &= 7
            font = fonts[0] if attribute & 8 or not two else fonts[1]
            key = front | back << 4 | (0x100 if graphics and 0xC0 <= code <= 0xDF else 0)
            paint = painted.get(key)
            if paint is None:
                paint = painted[key] = _paint(colours[front], colours[back], wide, bool(key & 0x100))
            rows_of = font[32 * code : 32 * code + height].ljust(height, b"\0")
            if cursor is not None and cursor[:2] == (row, column):
                rows_of = bytes(
                    0xFF if cursor[2] <= index <= cursor[3] else byte for index, byte in enumerate(rows_of)
                )
            glyphs.append((paint, rows_of))
        out += [b"".join([paint[rows_of[scan]] for paint, rows_of in glyphs]) for scan in range(height)]
    return Picture(width, rows * height, b"".join(out))


def _paint(front: bytes, back: bytes, wide: bool, graphics: bool) -> list[bytes]:
    """RGB of each byte of a glyph."""
    found = []
    for byte in range(256):
        pixels = b"".join(front if byte & 0x80 >> bit else back for bit in range(8))
        if wide:
            pixels += front if graphics and byte & 1 else back
        found.append(pixels)
    return found


def _cursor(vga: Vga, columns: int, rows: int, now: int) -> tuple[int, int, int, int] | None:
    """(row, column, first line, last line)."""
    crtc = vga.crtc
    pitch = crtc[0x13] * 2
    if crtc[0x0A] & 0x20 or not pitch or 2 * now // BLINK & 1 == 1:
        return None
    place = (crtc[0x0E] << 8 | crtc[0x0F]) - (crtc[0x0C] << 8 | crtc[0x0D])
    row, column = divmod(place, pitch)
    if not 0 <= row < rows or column >= columns:
        return None
    return row, column, crtc[0x0A] & 0x1F, crtc[0x0B] & 0x1F


# -- graphics -----------------------------------------------------------------------------------------------------


def _through_palette(indices: bytes, colours: list[bytes]) -> bytes:
    out = bytearray(3 * len(indices))
    for part in range(3):
        out[part::3] = indices.translate(bytes(colour[part] for colour in colours))
    return bytes(out)


def _double(vga: Vga) -> int:
    return ((vga.crtc[9] & 0x1F) + 1) * (2 if vga.crtc[9] & 0x80 else 1)


def _planar(vga: Vga, columns: int, lines: int) -> Picture:
    """16 colours from four planes."""
    times = _double(vga)
    width, height = columns * 8, min(lines, MAX_HEIGHT)
    if width > MAX_WIDTH:
        return _black()
    crtc = vga.crtc
    start, pitch = crtc[0x0C] << 8 | crtc[0x0D], crtc[0x13] * 2
    shown = vga.attribute[0x12] & 15
    rows = []
    for line in range(-(-height // times)):
        at = start + line * pitch & PLANE - 1
        total = 0
        for plane in range(4):
            if not shown & 1 << plane:
                continue
            memory = vga.planes[plane]
            piece = memory[at : at + columns]
            if len(piece) < columns:
                piece = piece + memory[: columns - len(piece)]
            total |= int.from_bytes(b"".join([_SPREAD[byte] for byte in piece]), "little") << plane
        rows.append(total.to_bytes(width, "little"))
    indices = _repeat(rows, times, width * height)
    colours = _sixteen(vga)
    return Picture(width, height, _through_palette(indices[: width * height], colours + [b"\0\0\0"] * 240))


def _colours_256(vga: Vga, columns: int, lines: int) -> Picture:
    """Mode 13h, and its relatives without chaining: a pixel is two dots wide."""
    times = _double(vga)
    width, height = columns * 4, min(lines, MAX_HEIGHT)
    crtc = vga.crtc
    start, pitch = crtc[0x0C] << 8 | crtc[0x0D], crtc[0x13] * 2
    rows = []
    chained = bytes(vga.vram[:PLANE]) if vga.kind == CHAIN4 else b""
    for line in range(-(-height // times)):
        if chained:
            at = 4 * (start + line * pitch) & PLANE - 1
            row = chained[at : at + width]
            rows.append(row if len(row) == width else row + chained[: width - len(row)])
            continue
        at = start + line * pitch & PLANE - 1
        mixed = bytearray(width)
        for plane in range(4):
            memory = vga.planes[plane]
            piece = memory[at : at + columns]
            mixed[plane::4] = piece if len(piece) == columns else piece + memory[: columns - len(piece)]
        rows.append(bytes(mixed))
    indices = _repeat(rows, times, width * height)[: width * height]
    mask = vga.dac_mask
    colours = _colours(vga)
    return Picture(width, height, _through_palette(indices, [colours[n & mask] for n in range(256)]))


def _vbe(vga: Vga) -> Picture:
    vbe = vga.vbe
    width, height, bpp = vbe.width, vbe.height, vbe.bpp
    if bpp == 4:
        return _black(width, height)
    size = bpp + 7 >> 3
    start, pitch, vram = vbe.start, vbe.pitch, vga.vram
    if pitch == width * size:
        data = bytes(vram[start : start + pitch * height])
    else:
        data = b"".join(
            bytes(vram[at : at + width * size]) for at in range(start, start + pitch * height, pitch)
        )
    data = data[: width * height * size].ljust(width * height * size, b"\0")
    if bpp == 8:
        colours, mask = _colours(vga), vga.dac_mask
        return Picture(width, height, _through_palette(data, [colours[n & mask] for n in range(256)]))
    out = bytearray(3 * width * height)
    if bpp >= 24:
        for part in range(3):
            out[part::3] = data[2 - part :: size]
    else:
        low, high = data[0::2], data[1::2]
        for part, (from_high, from_low) in enumerate(_TABLES[bpp]):
            one, other = high.translate(from_high), low.translate(from_low)
            total = int.from_bytes(one, "little") | int.from_bytes(other, "little")
            out[part::3] = total.to_bytes(len(one), "little")
    return Picture(width, height, bytes(out))


def _tables(bits: tuple[int, int, int]) -> list[tuple[bytes, bytes]]:
    """For each colour: what the high byte and the low byte of a pixel contribute to its eight bits."""
    found = []
    shifts = (bits[1] + bits[2], bits[2], 0)
    for shift, count in zip(shifts, bits, strict=True):

        def part(word: int, shift: int = shift, count: int = count) -> int:
            value = word >> shift & (1 << count) - 1
            return value << 8 - count | value >> 2 * count - 8

        found.append((bytes(part(n << 8) for n in range(256)), bytes(part(n) for n in range(256))))
    return found


_TABLES: Final = {15: _tables((5, 5, 5)), 16: _tables((5, 6, 5))}
