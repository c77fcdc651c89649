"""The standard VGA with Bochs' VBE extensions: PCI 1234:1111, as QEMU's stdvga that Debian's vgabios-stdvga.bin drives.

Registers of sequencer, CRT controller, graphics and attribute controller, DAC; the window at 0xA0000 with all read and write modes;
VBE with linear frame buffer and banks. What is seen is `vga_render`'s.

**Memory.** `vram`, the owner's buffer, is the linear frame buffer, and the window too in modes in which the window is plain memory:
text (odd/even: characters and attributes side by side from offset 0), chained 256 colours (from offset 0), VBE banks. `plain_ranges`
says which guest addresses are at which offset of it now; there the owner may map it as memory of the guest, and need not come here.
The four planes have memory of their own (64 KiB each); when the kind of addressing changes, content moves between them and `vram`.

Odd/even and chained modes address plane offsets 0, 1, 2 ... (as QEMU; a VGA leaves gaps, which software cannot see but by changing
the addressing with content). Status register 1 toggles retrace with each read: who waits for it waits one read.
Sources: IBM PS/2 Hardware Interface Technical Reference (video subsystem, VGA function); FreeVGA; Bochs vbe_display_api.txt;
QEMU, docs/specs/standard-vga.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from drivers.pc.bus import MmioSpace, PortSpace, Range
from drivers.pc.pci import COMMAND, COMMAND_IO, Bar, PciFunction
from drivers.pc.vga_vbe import Vbe

VRAM: Final = 16 << 20
PLANE: Final = 0x10000
WINDOW: Final = 0xA0000
WINDOW_SIZE: Final = 0x20000
_WINDOWS: Final = ((0, 0x20000), (0, 0x10000), (0x10000, 0x8000), (0x18000, 0x8000))
"""(offset from WINDOW, size) by memory map select."""
SEQ_MASKS: Final = bytes((0x03, 0x3D, 0x0F, 0x3F, 0x0E, 0, 0, 0xFF))
GC_MASKS: Final = bytes((0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF))
ODD_EVEN, CHAIN4, PLANAR, LINEAR = "odd/even", "chained", "planar", "linear"
REGISTER_BAR: Final = 0x1000


@dataclass(frozen=True, slots=True)
class PlainRange:
    """Guest addresses [`gpa`, `gpa` + `size`) are `vram` from `offset` on."""

    gpa: int
    size: int
    offset: int


class Vga(PciFunction):
    """00:02.0 or where it is put. `vram` is a writable buffer of VRAM bytes (a bytearray, an mmap, a memoryview of shared memory)."""

    def __init__(self, vram: bytearray | memoryview, rom: bytes = b"") -> None:
        """ValueError: `vram` has another size."""
        self.vram: Final = memoryview(vram)
        if self.vram.nbytes != VRAM or self.vram.readonly:
            raise ValueError(f"video memory of {self.vram.nbytes} bytes, not a writable one of {VRAM}")
        super().__init__(
            "VGA",
            vendor=0x1234,
            device=0x1111,
            class_code=0x030000,
            revision=2,
            rom=rom,
            bars={
                0: Bar(VRAM, self.read_linear, self.write_linear, prefetchable=True, width=8),
                2: Bar(REGISTER_BAR, self._read_registers, self._write_registers, width=2),
            },
        )
        self.mask[COMMAND] |= COMMAND_IO
        self.planes: Final = [bytearray(PLANE) for _ in range(4)]
        self.on_layout: Callable[[], None] = lambda: None
        """Called when `plain_ranges` has changed."""
        self.vbe: Final = Vbe(VRAM, self._vbe_changed)
        self.seq = bytearray(8)
        self.crtc = bytearray(0x20)
        self.gc = bytearray(9)
        self.attribute = bytearray(21)
        self.palette: Final = bytearray(256 * 3)
        """As written: 6 bits a colour, 8 with VBE's wide DAC."""
        self.dac_mask = 0xFF
        self.misc = 0
        self._latch = [0, 0, 0, 0]
        self._kind = PLANAR
        self._plain: tuple[PlainRange, ...] = ()
        self._registers_reset()

    def _registers_reset(self) -> None:
        self.seq[:] = bytes(8)
        self.crtc[:] = bytes(0x20)
        self.gc[:] = bytes(9)
        self.attribute[:] = bytes(21)
        self.palette[:] = bytes(768)
        self.dac_mask, self.misc, self._feature = 0xFF, 0, 0
        self._seq_index = self._crtc_index = self._gc_index = self._attribute_index = 0
        self._attribute_data = False  # the next write to 0x3C0 is data
        self._dac_read = self._dac_write = self._dac_part = self._dac_state = 0
        self._dac_cache = bytearray(3)
        self._status = 0
        self._latch[:] = (0, 0, 0, 0)

    def attach(self, ports: PortSpace) -> None:
        """VGA's and VBE's ports. BusError."""
        ports.add(Range("VGA", 0x3C0, 0x10, self._read, self._write))
        for base in (0x3B0, 0x3D0):
            crtc = base + 4
            ports.add(Range("VGA CRTC", crtc, 2, self._read_crtc, self._write_crtc))
            ports.add(Range("VGA status", base + 0xA, 1, self._read_status, self._write_feature))
        ports.add(Range("VBE", 0x1CE, 3, self.vbe.read, self.vbe.write, 2, aligned=False))

    def attach_window(self, mmio: MmioSpace) -> None:
        """The window 0xA0000 to 0xBFFFF. BusError."""
        mmio.add(Range("VGA window", WINDOW, WINDOW_SIZE, self.read_window, self.write_window, 8))

    def reset(self) -> None:
        """Registers as after power on; memory stays."""
        super().reset()
        self.vbe.reset()
        self._registers_reset()
        self._relayout()

    @property
    def attribute_shown(self) -> bool:
        """The palette is given to the screen (bit 5 of the attribute index), else the screen is blank."""
        return bool(self._attribute_index & 0x20)

    # -- layout ---------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """How the window addresses memory: ODD_EVEN, CHAIN4, PLANAR, LINEAR (VBE)."""
        return self._kind

    def _find_kind(self) -> str:
        if self.vbe.enabled and self.vbe.bpp > 4:
            return LINEAR
        if self.seq[4] & 8:
            return CHAIN4
        return ODD_EVEN if not self.seq[4] & 4 and self.gc[5] & 0x10 else PLANAR

    def _relayout(self) -> None:
        """Registers that decide on addressing changed."""
        kind = self._find_kind()
        if kind != self._kind:
            self._move(self._kind, kind)
            self._kind = kind
        plain = self._window_plain()
        if plain != self._plain:
            self._plain = plain
            self.on_layout()

    def _move(self, old: str, new: str) -> None:
        vram, planes = self.vram, self.planes
        if LINEAR in (old, new):
            return
        if old == ODD_EVEN:
            for plane in (0, 1):
                planes[plane][:] = vram[plane : 2 * PLANE : 2]
        elif old == CHAIN4:
            for plane in range(4):
                planes[plane][: PLANE // 4] = vram[plane:PLANE:4]
        if new == ODD_EVEN:
            for plane in (0, 1):
                vram[plane : 2 * PLANE : 2] = planes[plane]
        elif new == CHAIN4:
            for plane in range(4):
                vram[plane:PLANE:4] = planes[plane][: PLANE // 4]

    def _window_plain(self) -> tuple[PlainRange, ...]:
        kind, gc = self._kind, self.gc
        start, size = _WINDOWS[gc[6] >> 2 & 3]
        if kind == LINEAR:
            return (PlainRange(WINDOW, 0x10000, self.vbe.bank << 16),)
        if gc[1] & 15 or gc[3] or gc[5] & 0x0B or gc[8] != 0xFF or not self.misc & 2:
            return ()  # set/reset, rotation and logic, other modes, bit mask; or memory is not decoded at all
        if kind == ODD_EVEN and self.seq[2] & 15 == 3 and gc[6] & 2:
            return (PlainRange(WINDOW + start, size, 0),)
        if kind == CHAIN4 and self.seq[2] & 15 == 15:
            return (PlainRange(WINDOW + start, min(size, PLANE), 0),)
        return ()

    def plain_ranges(self) -> tuple[PlainRange, ...]:
        """What of the window and the linear frame buffer is plain memory in the present mode."""
        where = self.bar_address(0)
        return self._plain if where is None else (*self._plain, PlainRange(where, VRAM, 0))

    def settle(self) -> None:
        """See PciFunction; the linear frame buffer may have moved."""
        before = self.bar_address(0)
        super().settle()
        if self.bar_address(0) != before:
            self.on_layout()

    def _vbe_changed(self, clear: int) -> None:
        if clear:
            self.vram[:clear] = bytes(clear)
        self._relayout()

    # -- memory ---------------------------------------------------------------------------------------------------

    def read_linear(self, offset: int, size: int) -> int:
        """The linear frame buffer."""
        return int.from_bytes(self.vram[offset : offset + size], "little")

    def write_linear(self, offset: int, size: int, value: int) -> None:
        """The linear frame buffer."""
        self.vram[offset : offset + size] = value.to_bytes(size, "little")

    def read_window(self, offset: int, size: int) -> int:
        """Offset from 0xA0000."""
        for plain in self._plain:
            at = offset + WINDOW - plain.gpa
            if at >= 0 and at + size <= plain.size:
                return self.read_linear(plain.offset + at, size)
        return sum(self._read_byte(offset + index) << 8 * index for index in range(size))

    def write_window(self, offset: int, size: int, value: int) -> None:
        """Offset from 0xA0000."""
        for plain in self._plain:
            at = offset + WINDOW - plain.gpa
            if at >= 0 and at + size <= plain.size:
                self.write_linear(plain.offset + at, size, value)
                return
        for index in range(size):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)

    def _window_offset(self, offset: int) -> int:
        """In the chosen part of the window; -1 outside."""
        start, size = _WINDOWS[self.gc[6] >> 2 & 3]
        return offset - start if self.misc & 2 and start <= offset < start + size else -1

    def _read_byte(self, offset: int) -> int:
        at = self._window_offset(offset)
        if at < 0:
            return 0xFF
        if self._kind == CHAIN4:
            return self.vram[at & PLANE - 1]
        if self._kind == ODD_EVEN:
            if self.gc[4] & 2:
                return self.planes[2 + (at & 1)][at >> 1]
            return self.vram[at]
        at &= PLANE - 1
        planes, latch, gc = self.planes, self._latch, self.gc
        for plane in range(4):
            latch[plane] = planes[plane][at]
        if not gc[5] & 8:
            return latch[gc[4] & 3]
        result = 0xFF  # read mode 1: which pixels have the compared colour
        for plane in range(4):
            if gc[7] & 1 << plane:
                result &= latch[plane] if gc[2] & 1 << plane else ~latch[plane]
        return result & 0xFF

    def _write_byte(self, offset: int, value: int) -> None:
        at = self._window_offset(offset)
        if at < 0:
            return
        enabled = self.seq[2]
        if self._kind == CHAIN4:
            if enabled & 1 << (at & 3):
                self.vram[at & PLANE - 1] = value
            return
        if self._kind == ODD_EVEN:
            odd = at & 1
            if enabled & 1 << odd:
                self.vram[at] = value
            if enabled & 4 << odd:
                self.planes[2 + odd][at >> 1] = value
            return
        at &= PLANE - 1
        gc, latch = self.gc, self._latch
        mode, bits = gc[5] & 3, gc[8]
        function = gc[3] >> 3 & 3
        rotate = gc[3] & 7
        if mode in (0, 3) and rotate:
            value = (value >> rotate | value << 8 - rotate) & 0xFF
        if mode == 3:
            bits &= value
        for plane in range(4):
            bit = 1 << plane
            if not enabled & bit:
                continue
            old = latch[plane]
            if mode == 1:
                self.planes[plane][at] = old
                continue
            if mode == 2:
                new = 0xFF if value & bit else 0
            elif mode == 3 or gc[1] & bit:
                new = 0xFF if gc[0] & bit else 0
            else:
                new = value
            if function == 1:
                new &= old
            elif function == 2:
                new |= old
            elif function == 3:
                new ^= old
            self.planes[plane][at] = new & bits | old & ~bits & 0xFF

    # -- registers ------------------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int) -> int:
        if offset == 0x5:
            return self.seq[self._seq_index]
        if offset == 0xF:
            return self.gc[self._gc_index]
        if offset == 0x9:
            return self._read_dac()
        if offset == 0x0:
            return self._attribute_index
        if offset == 0x1:
            index = self._attribute_index & 0x1F
            return self.attribute[index] if index < 21 else 0
        if offset == 0xC:
            return self.misc
        simple = {
            0x2: 0x10,  # a monitor is there
            0x4: self._seq_index,
            0x6: self.dac_mask,
            0x7: self._dac_state,
            0x8: self._dac_write,
            0xA: self._feature,
            0xE: self._gc_index,
        }
        return simple.get(offset, 0xFF)

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset == 0x4:
            self._seq_index = value & 7
        elif offset == 0x5:
            self.seq[self._seq_index] = value & SEQ_MASKS[self._seq_index]
            if self._seq_index in (2, 4):
                self._relayout()
        elif offset == 0xE:
            self._gc_index = min(value & 15, 8)
        elif offset == 0xF:
            self.gc[self._gc_index] = value & GC_MASKS[self._gc_index]
            if self._gc_index not in (0, 2, 4, 7):
                self._relayout()
        elif offset == 0x0:
            self._write_attribute(value)
        elif offset == 0x2:
            self.misc = value
            self._relayout()
        elif offset == 0x6:
            self.dac_mask = value
        elif offset == 0x7:
            self._dac_read, self._dac_part, self._dac_state = value, 0, 3
        elif offset == 0x8:
            self._dac_write, self._dac_part, self._dac_state = value, 0, 0
        elif offset == 0x9:
            self._write_dac(value)

    def _write_attribute(self, value: int) -> None:
        if not self._attribute_data:
            self._attribute_index = value & 0x3F
        else:
            index = self._attribute_index & 0x1F
            if index < 16:
                self.attribute[index] = value & 0x3F
            elif index < 21:
                self.attribute[index] = value & (0xEF, 0xFF, 0x3F, 0x0F, 0x0F)[index - 16]
        self._attribute_data = not self._attribute_data

    def _read_dac(self) -> int:
        value = self.palette[self._dac_read * 3 + self._dac_part]
        self._dac_part += 1
        if self._dac_part == 3:
            self._dac_part = 0
            self._dac_read = self._dac_read + 1 & 0xFF
        return value

    def _write_dac(self, value: int) -> None:
        self._dac_cache[self._dac_part] = value if self.vbe.wide_dac else value & 0x3F
        self._dac_part += 1
        if self._dac_part == 3:
            self._dac_part = 0
            self.palette[self._dac_write * 3 : self._dac_write * 3 + 3] = self._dac_cache
            self._dac_write = self._dac_write + 1 & 0xFF

    def _read_crtc(self, offset: int, size: int) -> int:
        return self.crtc[self._crtc_index] if offset else self._crtc_index

    def _write_crtc(self, offset: int, size: int, value: int) -> None:
        if not offset:
            self._crtc_index = value & 0x1F
            return
        index = self._crtc_index
        if self.crtc[0x11] & 0x80 and index < 8:
            if index == 7:  # protected, but for one bit of the line compare
                self.crtc[7] = self.crtc[7] & ~0x10 | value & 0x10
            return
        self.crtc[index] = value

    def _read_status(self, offset: int, size: int) -> int:
        self._attribute_data = False
        self._status ^= 0x09
        return self._status

    def _write_feature(self, offset: int, size: int, value: int) -> None:
        self._feature = value & 0x0B

    # -- registers by memory (BAR 2) ------------------------------------------------------------------------------

    def _read_registers(self, offset: int, size: int) -> int:
        if 0x400 <= offset < 0x420:
            return sum(self._read_port(offset - 0x400 + index) << 8 * index for index in range(size))
        if 0x500 <= offset < 0x516 and size == 2 and not offset & 1:
            return self.vbe.get((offset - 0x500) >> 1)
        return (0, 0xFF, 0xFFFF, 0, 0xFFFF_FFFF)[size] if offset >= 0x400 else 0

    def _write_registers(self, offset: int, size: int, value: int) -> None:
        if 0x400 <= offset < 0x420:
            for index in range(size):
                self._write_port(offset - 0x400 + index, value >> 8 * index & 0xFF)
        elif 0x500 <= offset < 0x516 and size == 2 and not offset & 1:
            self.vbe.set((offset - 0x500) >> 1, value)

    def _read_port(self, port: int) -> int:
        """Counted from 0x3C0."""
        if port < 0x10:
            return self._read(port, 1)
        if port in (0x14, 0x15):
            return self._read_crtc(port - 0x14, 1)
        return self._read_status(0, 1) if port == 0x1A else 0xFF

    def _write_port(self, port: int, value: int) -> None:
        if port < 0x10:
            self._write(port, 1, value)
        elif port in (0x14, 0x15):
            self._write_crtc(port - 0x14, 1, value)
        elif port == 0x1A:
            self._write_feature(0, 1, value)
