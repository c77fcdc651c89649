"""domains/dom0/builder/linuxboot: the layout by the boot protocol, the option ROM and what is refused."""

from __future__ import annotations

import struct

import pytest

from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.linuxboot import ALIGNMENT, CODE, HIGH, direct_boot

MB = 1 << 20


def bzimage(
    *, version: int = 0x20F, flags: int = 1, sectors: int = 3, code: bytes = b"\xf4", high: bytes = b"kernel"
) -> bytes:
    """A file of the boot protocol's shape: real-mode code at 0x200 behind its short jump, protected-mode part."""
    image = bytearray((sectors + 1) * 512)
    image[0x1F1] = sectors
    struct.pack_into("<4sH", image, 0x202, b"HdrS", version)
    image[0x200:0x202] = b"\xeb\x66"  # jmp 0x268
    image[0x211] = flags
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<I", image, 0x238, 255)
    struct.pack_into("<QI", image, 0x258, 16 * MB, 4 * MB)
    image[0x268 : 0x268 + len(code)] = code
    return bytes(image) + high


def test_everything_has_its_place() -> None:
    made = direct_boot(bzimage(), b"ramdisk", "console=ttyS0", 64 * MB)
    assert made.pieces == ((HIGH, b"kernel"), (20 * MB, b"ramdisk"))
    assert 20 * MB % ALIGNMENT == 0
    rom = made.rom
    assert rom[:2] == b"\x55\xaa"
    assert len(rom) == rom[2] * 512
    assert not sum(rom) & 0xFF
    pnp = struct.unpack_from("<H", rom, 0x1A)[0]
    header = rom[pnp : pnp + 32]
    assert header[:4] == b"$PnP"
    assert not sum(header) & 0xFF
    assert struct.unpack_from("<H", header, 0x1A)[0] == CODE, "the bootstrap entry vector"
    setup = rom[rom.index(b"HdrS") - 0x202 :]
    assert struct.unpack_from("<II", setup, 0x218) == (20 * MB, 7)
    assert struct.unpack_from("<I", setup, 0x228)[0] == 0x20000
    assert setup[0x211] == 0x81
    assert b"console=ttyS0\0" in rom


def test_without_a_ramdisk_there_is_none() -> None:
    made = direct_boot(bzimage(), b"", "", 64 * MB)
    assert made.pieces == ((HIGH, b"kernel"),)
    setup = made.rom[made.rom.index(b"HdrS") - 0x202 :]
    assert struct.unpack_from("<II", setup, 0x218) == (0, 0)


@pytest.mark.parametrize(
    ("kernel", "cmdline", "memory", "why"),
    [
        (b"\x7fELF" + bytes(4096), "", 64, "an ELF kernel starts with type pvh"),
        (bzimage(version=0x201), "", 64, "boot protocol 2.01"),
        (bzimage(flags=0), "", 64, "not loaded high"),
        (bzimage(sectors=70), "", 64, "real-mode part of 36352 bytes"),
        (bzimage()[:2048], "", 64, "real-mode part"),
        (bzimage(), "x" * 256, 64, "256 bytes, and this kernel takes 255"),
        (bzimage(), "", 16, "need 28 MB of memory: the guest has 16"),
    ],
)
def test_what_is_refused(kernel: bytes, cmdline: str, memory: int, why: str) -> None:
    with pytest.raises(BuildError, match=why):
        direct_boot(kernel, b"", cmdline, memory * MB)


def test_a_ramdisk_that_the_kernel_cannot_reach() -> None:
    image = bytearray(bzimage())
    struct.pack_into("<I", image, 0x22C, 0x13FFFFF)
    with pytest.raises(BuildError, match="do not fit below 0x13fffff"):
        direct_boot(bytes(image), bytes(5), "", 64 * MB)
