"""New code that is read from an emulated disk into a page that held other code runs as read: by PIO and by bus-master DMA, round after round.

A boot sector's program reads one of 256 sectors to 0x20000 and calls it; each is `mov ax, 0x4200 + number; retf` behind some NOPs.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.hvm.pc_disks import SEABIOS, need

COMMAND = [
    sys.executable,
    "-m",
    "toolstack.cli",
    "run",
    "--type",
    "hvm",
    "--memory",
    "32",
    "--timeout",
    "280",
]
PIO, DMA, IN_TURNS = 0, 1, 2
FIRST = 64
# xor ax, ax; mov ds, ax; mov es, ax; mov ax, 0x201; mov cx, 2; mov dx, 0x80; mov bx, 0x7e00; int 0x13; jmp 0:0x7e00
BOOT = bytes.fromhex("31c08ed88ec0b80102b90200ba8000bb007ecd13ea007e0000")
# At 0x7e00, 16 bits. Rounds (u32) at 0x7df4, mode at 0x7df8. Interrupts of the drive off (port 0x3f6); the bus master's base from 00:01.1; one
# descriptor at 0x608 for 512 bytes at 0x20000. A round: LBA = 64 + (round & 255) to the task file; PIO: command 0x20, wait for
# DRQ, rep insw; DMA: command 0xc8, start, wait until not active, error bit looked at; call 0x2000:0; ax is to be 0x4200 + (round & 255).
# The verdict goes to COM1.
PROGRAM = bytes.fromhex(
    "fafc31c08ed88ed0bc0070baf603b002eebaf80c66b82009008066efbafc0ced24fca30006baf80c66b80409008066efbafc0ced0c05ef66c70608"
    "060000020066c7060c06000200806631ed89e86625ff0000006683c0406689c3baf201b001ee4288d8ee4288f8ee4230c0ee42b0e0eea0f87d3c02"
    "750489e8240184c0751ebaf701b020eeec24883c0875f9b800208ec031ffb90001baf001f36deb3b8b160006b008ee83c202b006ee83c20266b808"
    "06000066efbaf701b0c8ee8b160006b009ee83c202eca80175fb83ea0230c0eebaf701eca88175239a0000002089eb81e3ff0081c3004239d87510"
    "6645663b2ef47d0f8555ffbe0e7feb03be1d7fbaf803ac84c07403eeebf8faf4ebfc3d616c6c20617320726561640d0a003d4f5448455220434f44"
    "452052414e0d0a00"
)


def disk(path: Path, rounds: int, mode: int) -> Path:
    """Boot sector, program and the sectors to be run."""
    image = bytearray((FIRST + 256) * 512)
    image[: len(BOOT)] = BOOT
    struct.pack_into("<IB", image, 0x1F4, rounds, mode)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[512 : 512 + len(PROGRAM)] = PROGRAM
    for number in range(256):
        code = b"\x90" * (number % 7) + b"\xb8" + struct.pack("<H", 0x4200 + number) + b"\xcb"
        at = (FIRST + number) * 512
        image[at : at + len(code)] = code
    path.write_bytes(image)
    return path


def run(image: Path, *arguments: str) -> None:
    need(SEABIOS)
    done = subprocess.run(
        [*COMMAND, "--disk", f"{image},raw,hda,r", "--boot", "c", *arguments, "--until", "=all as read"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout.decode('latin1')[-500:]}\n{done.stderr.decode()}"
    assert b"OTHER CODE" not in done.stdout


@pytest.mark.timeout(320)
@pytest.mark.parametrize("paging", ["--hap", "--no-hap"])
def test_a_few_hundred_rounds(tmp_path: Path, paging: str) -> None:
    run(disk(tmp_path / "disk.img", 600, IN_TURNS), paging)


@pytest.mark.long
@pytest.mark.timeout(320)
@pytest.mark.parametrize("mode", [PIO, DMA])
def test_ten_thousand_rounds(tmp_path: Path, mode: int) -> None:
    run(disk(tmp_path / "disk.img", 10_000, mode))
