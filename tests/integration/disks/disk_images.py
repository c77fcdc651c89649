"""Disk images for these tests: ext4 made and read without mounting (e2fsprogs)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = ("mkfs.ext4", "debugfs", "e2fsck")
MODULES = ("xen-blkfront", "crc32c_generic", "ext4")


def tool(name: str) -> str:
    """Its path; the test is skipped where it is not installed."""
    path = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        pytest.skip(f"{name} (e2fsprogs) is not installed")
    return path


def make_ext4(path: Path, megabytes: int, content: Path | None = None) -> Path:
    """An ext4 file system in a file, with the files of a directory in it."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    source = ["-d", str(content)] if content is not None else []
    subprocess.run([tool("mkfs.ext4"), "-q", "-F", "-b", "4096", *source, str(path)], check=True, timeout=60)
    return path


def fsck(path: Path) -> None:
    """AssertionError with what e2fsck says, unless the file system is clean."""
    done = subprocess.run(
        [tool("e2fsck"), "-fn", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def md5_of(image: Path, name: str, scratch: Path) -> str:
    """The checksum of a file in the image."""
    target = scratch / "dumped"
    target.unlink(missing_ok=True)
    command = [tool("debugfs"), "-R", f"dump /{name} {target}", str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return (
        hashlib.md5(target.read_bytes(), usedforsecurity=False).hexdigest() if target.exists() else "missing"
    )
