"""The domain builder: a kernel file and a ramdisk into a new guest's memory and first vCPU state. No I/O.

`load_kernel` recognises the file, `build_pv` makes a PV guest of it, `build_pvh` a PVH guest.
"""

from .context import guest_context
from .errors import BuildError
from .kernel import Kernel, load_kernel
from .pv import GuestMemory, PvBuildRequest, PvBuilt, PvContext, build_pv, check_pv
from .pvh import MapEntry, PvhBuildRequest, PvhBuilt, build_pvh, check_pvh, ram_ranges, special_pages

__all__ = [
    "BuildError",
    "GuestMemory",
    "Kernel",
    "MapEntry",
    "PvBuildRequest",
    "PvBuilt",
    "PvContext",
    "PvhBuildRequest",
    "PvhBuilt",
    "build_pv",
    "build_pvh",
    "check_pv",
    "check_pvh",
    "guest_context",
    "load_kernel",
    "ram_ranges",
    "special_pages",
]
