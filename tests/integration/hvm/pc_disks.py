"""Disk images that a PC boots: an MBR and GRUB's core image, with a file system behind them where that is wanted."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import pytest

GRUB: Final = Path("/usr/lib/grub/i386-pc")
SEABIOS: Final = Path("/usr/share/seabios/bios-256k.bin")
SECTOR: Final = 512
FIRST: Final = 2048
"""First sector of the partition."""
PROMPT_MODULES: Final = ("biosdisk", "part_msdos", "ext2", "normal", "echo", "ls", "halt", "reboot", "test")
LINUX_MODULES: Final = (*PROMPT_MODULES, "linux", "boot", "configfile")


def need(*files: Path) -> None:
    """Skip where a file is missing; `./devtool setup` installs the packages."""
    missing = [str(path) for path in files if not path.exists()]
    if missing or shutil.which("grub-mkimage") is None:
        pytest.skip(f"not here: {', '.join(missing) or 'grub-mkimage'}: run ./devtool setup")


def core_image(modules: tuple[str, ...]) -> bytes:
    """GRUB's core image for a PC, without its first sector's list of blocks."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "core.img"
        command = ["grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o", str(out), *modules]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return out.read_bytes()


def bootable_disk(
    path: Path, modules: tuple[str, ...] = PROMPT_MODULES, files: dict[str, bytes] | None = None
) -> Path:
    """A disk with GRUB, and one ext2 partition with `files` if there are any."""
    need(GRUB / "boot.img", SEABIOS)
    core = bytearray(core_image(modules))
    core += bytes(-len(core) % SECTOR)
    assert SECTOR + len(core) < FIRST * SECTOR
    # The first sector of the core image loads the rest: (first sector, sectors, segment).
    struct.pack_into("<QHH", core, SECTOR - 12, 2, len(core) // SECTOR - 1, 0x820)
    boot = bytearray((GRUB / "boot.img").read_bytes()[:SECTOR])
    struct.pack_into("<Q", boot, 0x5C, 1)
    boot[0x1BE:0x1FE] = bytes(64)
    boot[0x1FE:0x200] = b"\x55\xaa"
    content = b""
    if files:
        content = _file_system(files)
        struct.pack_into(
            "<B3sB3sII",
            boot,
            0x1BE,
            0x80,
            b"\xfe\xff\xff",
            0x83,
            b"\xfe\xff\xff",
            FIRST,
            len(content) // SECTOR,
        )
    with path.open("wb") as disk:
        disk.write(boot + core)
        disk.seek(FIRST * SECTOR)
        disk.write(content)
        disk.truncate(max(FIRST * SECTOR + len(content), 4 << 20))
    return path


def _file_system(files: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        root, image = Path(scratch) / "root", Path(scratch) / "image"
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        image.touch()
        os.truncate(image, max(8 << 20, 2 * sum(len(data) for data in files.values()) & -1 << 20))
        command = ["mke2fs", "-q", "-F", "-t", "ext2", "-E", "root_owner=0:0", "-d", str(root), str(image)]
        path = os.environ.get("PATH", "") + ":/sbin:/usr/sbin"
        subprocess.run(command, check=True, capture_output=True, timeout=60, env={**os.environ, "PATH": path})
        return image.read_bytes()
