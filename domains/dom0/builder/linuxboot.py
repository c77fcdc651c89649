"""Direct boot of a bzImage in a full HVM guest (`kernel=` with type hvm): the parts of the boot protocol, and the option ROM that starts it.

On Xen QEMU loads the kernel from fw_cfg by an option ROM of its own. Here the builder puts the protected-mode part and the ramdisk
where they belong in the guest's memory, and the ROM, which SeaBIOS finds as `genroms/linuxboot.bin` and boots from first, holds the rest: it
copies the real-mode part to 0x10000 and the command line to 0x20000 and jumps there, as a boot loader does, with all of the BIOS
at the kernel's service. Source: Linux, Documentation/x86/boot.rst (protocol 2.02 and later, loaded high); BIOS Boot Specification 1.01
(option ROMs with a bootstrap entry vector).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from .bzimage import is_bzimage
from .errors import BuildError

SECTOR: Final = 512
HIGH: Final = 0x100000
"""Where the protected-mode part of a kernel that is loaded high begins."""
SETUP_SEGMENT, CMDLINE_SEGMENT = 0x1000, 0x2000
HEAP_END: Final = 0xE000
MAX_SETUP: Final = 0x8000
MAX_CMDLINE: Final = 2048
LOADED_HIGH, CAN_USE_HEAP = 1, 0x80
UNDEFINED_LOADER: Final = 0xFF
DEFAULT_RAMDISK_MAX: Final = 0x37FFFFFF
FIRMWARE: Final = 8 << 20
"""Memory below its end in which SeaBIOS works before it boots."""
ALIGNMENT: Final = 1 << 21
ROM_BLOCK: Final = 512
MAX_ROM: Final = 0x10000
"""It addresses itself by one segment."""
CODE, PNP = 0x40, 0x20


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """What goes where. `pieces`: (guest-physical address, bytes)."""

    rom: bytes
    pieces: tuple[tuple[int, bytes], ...]


def direct_boot(kernel: bytes, ramdisk: bytes, cmdline: str, low_memory: int) -> DirectBoot:
    """Lay a kernel out in a guest with so many bytes of memory below 4 GiB. BuildError."""
    if not is_bzimage(kernel) or len(kernel) < 0x250:
        raise BuildError(
            "kernel: a full HVM guest starts a bzImage (or boots from a disk); an ELF kernel starts with type pvh"
        )
    (version,) = struct.unpack_from("<H", kernel, 0x206)
    if version < 0x202 or not kernel[0x211] & LOADED_HIGH:
        raise BuildError(
            f"bzImage: boot protocol {version >> 8}.{version & 255:02d}, or not loaded high: too old"
        )
    size = ((kernel[0x1F1] or 4) + 1) * SECTOR
    if size > MAX_SETUP or size >= len(kernel):
        raise BuildError(f"bzImage: a real-mode part of {size} bytes")
    text = cmdline.encode("utf-8") + b"\0"
    most = min(struct.unpack_from("<I", kernel, 0x238)[0] or 255 if version >= 0x206 else 255, MAX_CMDLINE)
    if len(text) - 1 > most:
        raise BuildError(f"cmdline: {len(text) - 1} bytes, and this kernel takes {most}")
    protected = kernel[size:]
    end = HIGH + len(protected)
    if version >= 0x20A:
        preferred, needs = struct.unpack_from("<QI", kernel, 0x258)
        end = max(end, HIGH + needs, preferred + needs)
    pieces = [(HIGH, protected)]
    place = 0
    if ramdisk:
        place = -(-end // ALIGNMENT) * ALIGNMENT
        limit = struct.unpack_from("<I", kernel, 0x22C)[0] if version >= 0x203 else DEFAULT_RAMDISK_MAX
        if place + len(ramdisk) > limit + 1:
            raise BuildError(f"ramdisk: {len(ramdisk)} bytes do not fit below {limit:#x}, behind the kernel")
        pieces.append((place, ramdisk))
        end = place + len(ramdisk)
    if end + FIRMWARE > low_memory:
        raise BuildError(
            f"kernel and ramdisk need {end + FIRMWARE >> 20} MB of memory: the guest has {low_memory >> 20}"
        )
    setup = bytearray(kernel[:size])
    setup[0x210] = UNDEFINED_LOADER
    setup[0x211] |= CAN_USE_HEAP
    struct.pack_into("<II", setup, 0x218, place, len(ramdisk))
    struct.pack_into("<H", setup, 0x224, HEAP_END - 0x200)
    struct.pack_into("<I", setup, 0x228, CMDLINE_SEGMENT << 4)
    return DirectBoot(option_rom(bytes(setup), text), tuple(pieces))


def option_rom(setup: bytes, cmdline: bytes) -> bytes:
    """A ROM that starts a kernel's real-mode part. BuildError if it does not fit."""
    data = CODE + 0x40
    line = data + len(setup)
    words = len(setup) // 2
    code = bytes.fromhex(
        "fafc"  # cli; cld
        "8cc88ed8"  # mov ax, cs; mov ds, ax
        f"b8{SETUP_SEGMENT.to_bytes(2, 'little').hex()}8ec0"  # mov ax, SETUP_SEGMENT; mov es, ax
        f"be{data.to_bytes(2, 'little').hex()}31ff"  # mov si, data; xor di, di
        f"b9{words.to_bytes(2, 'little').hex()}f3a5"  # mov cx, words; rep movsw
        f"b8{CMDLINE_SEGMENT.to_bytes(2, 'little').hex()}8ec0"  # mov ax, CMDLINE_SEGMENT; mov es, ax
        f"be{line.to_bytes(2, 'little').hex()}31ff"  # mov si, line; xor di, di
        f"b9{len(cmdline).to_bytes(2, 'little').hex()}f3a4"  # mov cx, length; rep movsb
        f"b8{SETUP_SEGMENT.to_bytes(2, 'little').hex()}"  # mov ax, SETUP_SEGMENT
        "8ed88ec08ee08ee88ed0"  # mov ds, es, fs, gs, ss
        "bcf0ff"  # mov sp, 0xfff0
        f"ea0000{(SETUP_SEGMENT + 0x20).to_bytes(2, 'little').hex()}"  # jmp SETUP_SEGMENT + 0x20 : 0
    )
    size = -(-(line + len(cmdline) + 1) // ROM_BLOCK) * ROM_BLOCK
    if size > MAX_ROM:
        raise BuildError(f"bzImage: real-mode part and command line need {size} bytes of ROM")
    rom = bytearray(size)
    rom[0:4] = b"\x55\xaa" + bytes([size // ROM_BLOCK]) + b"\xcb"  # the initialization: retf
    struct.pack_into("<H", rom, 0x1A, PNP)
    # $PnP, revision 1, 32 bytes, next, checksum, device, names, type (boot device), indicators, BCV, disconnect, BEV, resources
    header = struct.pack(
        "<4sBBHxBIHH3sBHHHHH", b"$PnP", 1, 2, 0, 0, 0, 0, 0x0C, b"\x80\0\0", 0, 0, 0, CODE, 0, 0
    )
    rom[PNP : PNP + 32] = header
    rom[0x04:0x0C] = b"\0" * 8
    rom[0x0C:0x18] = b"Linux kernel"
    rom[PNP + 9] = -sum(rom[PNP : PNP + 32]) & 0xFF
    rom[CODE : CODE + len(code)] = code
    rom[data : data + len(setup)] = setup
    rom[line : line + len(cmdline)] = cmdline
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)
