"""From descriptors and settings to media."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from drivers.hw.nvme.media import Media, RawMedia
from drivers.hw.nvme.media_overlay import OverlayMedia
from drivers.hw.nvme.media_qcow2 import Qcow2Media, is_qcow2

MAX_NAMESPACES: Final = 16
BLOCKS: Final = {512: 9, 4096: 12}


class DiskError(ValueError):
    """The settings or descriptors of a namespace do not make a disk."""


def open_disks(
    fds: Mapping[str, int], settings: Mapping[str, Any]
) -> tuple[dict[int, Media], dict[int, int]]:
    """Media and log2 of the block size, by namespace id. DiskError, MediaError."""
    media: dict[int, Media] = {}
    shifts: dict[int, int] = {}
    for nsid in range(1, MAX_NAMESPACES + 1):
        name = f"namespace{nsid}"
        if name not in fds:
            continue
        options = settings.get(name, {})
        if not isinstance(options, Mapping):
            raise DiskError(f"settings of {name}: {options!r} is no table")
        block = options.get("block", 512)
        if block not in BLOCKS:
            raise DiskError(f"{name}: blocks of {block} bytes; 512 and 4096 are possible")
        shifts[nsid] = BLOCKS[block]
        media[nsid] = _open(
            name, fds, str(options.get("format", "raw")), bool(options.get("read_only", False))
        )
    if not media:
        raise DiskError("no namespace was given")
    return media, shifts


def _open(name: str, fds: Mapping[str, int], form: str, read_only: bool) -> Media:
    overlay, bitmap = fds.get(f"{name}.overlay"), fds.get(f"{name}.bitmap")
    if (overlay is None) != (bitmap is None):
        raise DiskError(f"{name}: an overlay needs both its data and its bitmap")
    base: Media
    if form == "raw":
        base = RawMedia(fds[name], read_only=read_only or overlay is not None)
    elif form == "qcow2":
        backing_fd = fds.get(f"{name}.backing")
        backing: Media | None = None
        if backing_fd is not None:
            backing = Qcow2Media(backing_fd) if is_qcow2(backing_fd) else RawMedia(backing_fd, read_only=True)
        base = Qcow2Media(fds[name], backing)
        if overlay is None and not read_only:
            raise DiskError(f"{name}: qcow2 images are not written to; an overlay is needed, or read_only")
    else:
        raise DiskError(f"{name}: format {form!r}; 'raw' and 'qcow2' are possible")
    if overlay is None or bitmap is None:
        return base
    return OverlayMedia(base, overlay, bitmap, read_only=read_only)
