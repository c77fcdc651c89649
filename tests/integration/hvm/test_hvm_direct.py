"""`kernel=` in a full HVM guest: SeaBIOS starts what looks like a bzImage by the option ROM, with its command line and ramdisk."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import SEABIOS, need

pytestmark = pytest.mark.timeout(400)
COMMAND = [sys.executable, "-m", "toolstack.cli", "run", "--type", "hvm"]
# Entered with DS = ES = SS = 0x1000. Prints by INT 10h: the text at 0x300, the command line at 2000:0, the text at 0x310; copies (INT 15h,
# AH = 87h, descriptors at 0x380) what is at ramdisk_image, then what is at 1 MiB, and prints both.
CODE = bytes.fromhex(
    "be0003e86b00b800208ed831f6e86100b800108ed88ec0be1003e8540066a11802a3920366c1e810a2940388269703be8003b91000b487cd15"
    "b800308ed831f6e82e00b800108ed88ec0c70692030000c606940310c606970300be8003b91000b487cd15b800308ed831f6e80300f4ebfd"
    "ac84c07409b40ebb0700cd10ebf2c3"
)


def made_kernel() -> bytes:
    """A file of the boot protocol's shape with that code."""
    image = bytearray(4 * 512)
    image[0x1F1] = 3
    struct.pack_into("<4sH", image, 0x202, b"HdrS", 0x20F)
    image[0x200:0x202] = b"\xeb\x66"  # jmp 0x268
    image[0x211] = 1
    struct.pack_into("<II", image, 0x22C, 0x7FFFFFFF, 0)
    struct.pack_into("<I", image, 0x238, 255)
    struct.pack_into("<QI", image, 0x258, 0x1000000, 1 << 20)
    image[0x268 : 0x268 + len(CODE)] = CODE
    image[0x300:0x30D] = b"\r\ncmdline <\0\0"
    image[0x310:0x314] = b">\r\n\0"
    image[0x390:0x3A0] = bytes.fromhex("ffff000000930000 ffff000003930000")
    return bytes(image) + b"high part\r\nstarted\r\n\0".ljust(4096, b"\0")


@pytest.mark.parametrize("paging", ["--hap", "--no-hap"])
def test_seabios_starts_a_kernel_directly(tmp_path: Path, paging: str) -> None:
    need(SEABIOS)
    kernel, ramdisk = tmp_path / "kernel", tmp_path / "ramdisk"
    kernel.write_bytes(made_kernel())
    ramdisk.write_bytes(b"a ramdisk\r\n\0".ljust(1 << 20, b"x"))
    done = subprocess.run(
        [
            *COMMAND,
            str(kernel),
            "--ramdisk",
            str(ramdisk),
            "--cmdline",
            "one two=3",
            "--memory",
            "64",
            paging,
            "--until",
            "started",
            "--timeout",
            "150",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=180,
        check=False,
    )
    console = done.stdout.decode("latin1")
    assert done.returncode == 0, f"{done.stderr.decode()}\n{console}"
    assert "cmdline <one two=3>" in console
    assert "a ramdisk" in console
    assert "high part" in console


def test_a_file_that_is_no_bzimage_is_refused_in_one_line(tmp_path: Path) -> None:
    need(SEABIOS)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(4096))
    done = subprocess.run([*COMMAND, str(kernel)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].endswith("an ELF kernel starts with type pvh")
