"""Raw disk images for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from toolstack.errors import InputError

MAX_MB: Final = 1 << 20


def make_disk(path: Path, size_mb: int, files: dict[str, bytes] | None = None) -> Path:
    """A sparse image of `size_mb` MiB; with `files` (by path), an ext4 file system that has them (needs mke2fs). InputError."""
    if not 1 <= size_mb <= MAX_MB:
        raise InputError(f"disk: {size_mb} MiB (1 to {MAX_MB})")
    with path.open("wb") as image:
        image.truncate(size_mb << 20)
    if files is None:
        return path
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if mke2fs is None:
        raise InputError("disk with files: mke2fs is not here: install the package e2fsprogs")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        root = Path(scratch)
        for name, content in files.items():
            file = root / name
            if root.resolve() not in file.resolve().parents:
                raise InputError(f"disk: {name!r} leaves the image")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        options = ["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", scratch]
        done = subprocess.run([mke2fs, *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"disk: mke2fs: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return path
