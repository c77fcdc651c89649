"""Names of virtual disks and their numbers (docs/misc/vbd-interface: `xvda1` -> 51713)."""

from __future__ import annotations

import re
from typing import Final

XVD_MAJOR: Final = 202
HD_MAJORS: Final = (3, 22)
SD_MAJOR: Final = 8
EXTENDED: Final = 1 << 28
MAX_NUMBER: Final = (1 << 29) - 1
"""The highest that vbd-interface has a meaning for: the last partition of the last extended disk."""
_NAME: Final = re.compile(r"(xvd|hd|sd|vd)([a-z]{1,2})([0-9]{0,9})")
_POSITION: Final = re.compile(r"d([0-9]{1,9})(?:p([0-9]{1,9}))?")


def number_of(vdev: str) -> int:
    """The device number that the frontend finds as `virtual-device`. ValueError for a name that is none."""
    match = _POSITION.fullmatch(vdev)
    if match:
        return _encode(int(match[1]), int(match[2] or 0))
    if re.fullmatch(r"0x[0-9a-f]{1,8}|[1-9][0-9]{0,9}|0", vdev):
        number = int(vdev, 0)
        if number > MAX_NUMBER:
            raise ValueError(f"vdev {vdev!r}: a number up to {MAX_NUMBER:#x}")
        return number
    match = _NAME.fullmatch(vdev)
    if match is None:
        raise ValueError(f"vdev {vdev!r}: xvda, hda, sda (and a partition), d0p1 or a number")
    disk = 0
    for letter in match[2]:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    disk, partition = disk - 1, int(match[3] or 0)
    if match[1] == "hd":
        if disk > 3 or partition > 63:
            raise ValueError(f"vdev {vdev!r}: hda to hdd, partitions up to 63")
        return HD_MAJORS[disk // 2] << 8 | (disk % 2) << 6 | partition
    if match[1] == "sd":
        if disk > 15 or partition > 15:
            raise ValueError(f"vdev {vdev!r}: sda to sdp, partitions up to 15")
        return SD_MAJOR << 8 | disk << 4 | partition
    return _encode(disk, partition)


def _encode(disk: int, partition: int) -> int:
    if disk < 16 and partition < 16:
        return XVD_MAJOR << 8 | disk << 4 | partition
    if disk >= 1 << 20 or partition > 255:
        raise ValueError(f"disk {disk}, partition {partition}: out of range")
    return EXTENDED | disk << 8 | partition
