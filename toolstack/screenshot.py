"""The picture on a full HVM guest's screen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from drivers.pc.vga_render import Picture
from toolstack.errors import MachineError

if TYPE_CHECKING:
    from toolstack.client import ControlClient


def take(client: ControlClient, domain: str) -> Picture:
    """The screen as it is now. MachineError: the guest has none, or has ended."""
    result, files = client.request_files("screenshot", {"domain": domain})
    try:
        width, height = int(result["width"]), int(result["height"])
        size = 3 * width * height
        rgb = os.pread(files[0], size, 0) if len(files) == 1 else b""
    finally:
        for fd in files:
            os.close(fd)
    if len(rgb) != size or not size:
        raise MachineError(f"screenshot {domain}: the picture is not whole")
    return Picture(width, height, rgb)
