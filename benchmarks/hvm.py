"""Full HVM guests: what an exit costs to a device beside the vCPU, to nobody, and to the device model; SeaBIOS from reset to the boot sector.

    python benchmarks/hvm.py

Each line is a machine of its own (`domicile run --type hvm`) with a firmware or a disk made here; the guest's own TSC (1 GHz) measures.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
COMMAND = [sys.executable, "-m", "toolstack.cli", "run", "--type", "hvm", "--timeout", "120"]
# '=', ebx as eight hexadecimal digits and a newline to COM1, then stop: mov cx, 8; mov dx, 0x3f8; mov al, '='; out dx, al;
# 1: rol ebx, 4; mov al, bl; and al, 15; add al, '0'; cmp al, '9'; jbe 2f; add al, 39; 2: out dx, al; loop 1b; mov al, 10; out dx, al;
# cli; hlt. The '=' tells the number from what SeaBIOS prints, whose UUID ends in hexadecimal digits too.
TELL = bytes.fromhex("b90800 baf803 b03d ee 66c1c304 88d8 240f 0430 3c39 7602 0427 ee e2ed b00a ee fa f4")
START = bytes.fromhex("fa 31c0 8ed0 bc0070")  # cli; xor ax, ax; mov ss, ax; mov sp, 0x7000
CMOS = 0x70
"""First of four bytes of CMOS memory that nobody uses: the time at the reset is kept there."""


def reading(port: int, count: int) -> bytes:
    """Firmware that reads a port so often and tells the nanoseconds."""
    code = START + b"\x66\xb9" + struct.pack("<I", count)  # mov ecx, count
    code += (
        bytes.fromhex("0f31 6689c3") + b"\xba" + struct.pack("<H", port)
    )  # rdtsc; mov ebx, eax; mov dx, port
    code += bytes.fromhex(
        "ec 6649 75fb 0f31 6629d8 6689c3"
    )  # 1: in al, dx; dec ecx; jnz 1b; rdtsc; sub eax, ebx; mov ebx, eax
    return (code + TELL).ljust(0xFFF0, b"\xf4") + bytes.fromhex("ea000000f0").ljust(16, b"\0")


def stamped(image: bytes) -> bytes:
    """SeaBIOS that notes the TSC in CMOS memory before its first instruction."""
    entry = image[-16:-11]  # the far jump at the reset vector
    stub = bytes.fromhex("0f31 6689c3")  # rdtsc; mov ebx, eax
    for index in range(4):
        # mov al, CMOS + index; out 0x70, al; mov al, bl; out 0x71, al; shr ebx, 8
        stub += bytes((0xB0, CMOS + index)) + bytes.fromhex("e670 88d8 e671 66c1eb08")
    stub += entry
    at = image.index(bytes(len(stub) + 32), len(image) - 0x10000) + 16
    patched = bytearray(image)
    patched[at : at + len(stub)] = stub
    patched[-16:-11] = b"\xea" + struct.pack("<HH", at - (len(image) - 0x10000), 0xF000)
    return bytes(patched)


def boot_sector() -> bytes:
    """Tells the nanoseconds since the note in CMOS memory."""
    code = bytes.fromhex("fa 0f31 6689c6 6631db")  # cli; rdtsc; mov esi, eax; xor ebx, ebx
    for index in (3, 2, 1, 0):
        # shl ebx, 8; mov al, CMOS + index; out 0x70, al; in al, 0x71; mov bl, al
        code += bytes.fromhex("66c1e308") + bytes((0xB0, CMOS + index)) + bytes.fromhex("e670 e471 88c3")
    code += bytes.fromhex("6629de 6689f3")  # sub esi, ebx; mov ebx, esi
    return (code + TELL).ljust(510, b"\0") + b"\x55\xaa"


def run(*arguments: str) -> int:
    """The number that the guest tells."""
    done = subprocess.run([*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    found = re.findall(rb"=([0-9a-f]{8})\r?\n", done.stdout)
    if len(found) != 1:
        raise SystemExit(f"{arguments}: {done.stdout!r} {done.stderr.decode()}")
    return int(found[0], 16)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        firmware, disk = Path(scratch) / "bios.bin", Path(scratch) / "disk.img"
        for name, port, count in (
            ("POST port, beside the vCPU", 0x80, 100_000),
            ("8259 mask, beside the vCPU", 0x21, 100_000),
            ("8254 counter, beside the vCPU", 0x40, 100_000),
            ("port of nobody", 0x300, 100_000),
            ("16550 scratch register, device model", 0x3FF, 10_000),
        ):
            firmware.write_bytes(reading(port, count))
            rounds = sorted(run("--firmware", str(firmware)) / count / 1000 for _ in range(3))
            print(
                f"IN, {name}: {rounds[1]:.2f} us (of three: {', '.join(f'{r:.2f}' for r in rounds)})",
                flush=True,
            )
        firmware.write_bytes(stamped(SEABIOS.read_bytes()))
        disk.write_bytes(boot_sector() + bytes(1 << 20))
        times = sorted(
            run("--firmware", str(firmware), "--disk", f"{disk},raw,hda,w", "--boot", "c") / 1e9
            for _ in range(3)
        )
        print(
            f"SeaBIOS, reset to boot sector: {times[1]:.2f} s (of three: {', '.join(f'{t:.2f}' for t in times)})"
        )


if __name__ == "__main__":
    main()
