"""Writes cpio archives of the "newc" kind, as Linux takes them for an initramfs. No I/O; the same input gives
the same bytes.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst: a header of "070701" and 13 numbers
of 8 hexadecimal digits, the name with a closing zero, padding to 4 bytes, the content, padding to 4 bytes; at
the end an entry named TRAILER!!!.
"""

from __future__ import annotations

import stat
from typing import Final

_MAGIC: Final = "070701"
_TRAILER: Final = "TRAILER!!!"
MAX_NAME: Final = 4096
MAX_FILE: Final = (1 << 32) - 1


class CpioError(ValueError):
    """An entry that the format cannot hold, or that is there already."""


class CpioWriter:
    """An archive under construction. Parent directories are added where they are missing; all belongs to
    root."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(name, stat.S_IFDIR | mode)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, mode: int, major: int, minor: int) -> None:
        """Add a device node; `mode` has S_IFCHR or S_IFBLK and the permission bits."""
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            raise CpioError(f"{name}: mode {mode:#o} is not that of a device")
        self._add(name, mode, device=(major, minor))

    def finish(self) -> bytes:
        """The archive, padded to 512 bytes. The writer can go on afterwards."""
        out = b"".join(self._parts) + _entry(0, _TRAILER, 0, b"", (0, 0))
        return out + bytes(-len(out) % 512)

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        parts = name.split("/")
        if not name or "" in parts or "." in parts or ".." in parts or "\0" in name or name == _TRAILER:
            raise CpioError(f"not a name for an archive: {name!r}")
        if len(name.encode()) >= MAX_NAME or len(content) > MAX_FILE:
            raise CpioError(f"{name[:64]}: too long for an archive")
        if name in self._names:
            raise CpioError(f"{name}: twice in one archive")
        parent = name.rpartition("/")[0]
        if parent and parent not in self._names:
            self.directory(parent)
        self._names.add(name)
        self._inode += 1
        self._parts.append(_entry(self._inode, name, mode, content, device))


def _entry(inode: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device of the file (2), device it stands for (2), name size,
    # checksum
    numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
    head = (_MAGIC + "".join(f"{n:08X}" for n in numbers)).encode() + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
