"""Fetches guests that nobody here wrote: GRUB for Xen, Debian's Linux with a busybox initramfs, SeaBIOS,
Xen's shim.

`fetch("debian")` gives paths in the cache (`$XDG_CACHE_HOME/domicile` or ~/.cache/domicile); a second call
finds them there.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .debs import FetchError, cache_directory, dependency, unpacked
from .images import INIT_LINE, busybox, initramfs, kernel_modules, root_disk

__all__ = [
    "GUESTS",
    "INIT_LINE",
    "MODULES",
    "FetchError",
    "Guest",
    "debian",
    "fetch",
    "fetched_shims",
    "root_disk",
]

GUESTS: Final = ("debian", "grub", "seabios", "shim")

SHIM_PACKAGE: Final = "xen-utils-4.17"
MODULES: Final = ("xen-blkfront", "xen-netfront", "nvme", "crc32c_generic", "ext4")
"""Modules that a guest with disks and a network may need: `debian(modules=MODULES)`."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest's files."""

    name: str
    kernel: Path
    """What a PV guest boots; for `seabios` the firmware, for `shim` what a PVH guest with `pvshim=1` starts in."""
    ramdisk: Path | None = None
    pvh_kernel: Path | None = None
    """What a PVH guest boots, where that is another file or the same one."""
    cmdline: str = ""
    version: str = ""


def fetch(name: str) -> Guest:
    """The files of a guest, fetched and built where they are not in the cache. FetchError."""
    if name == "grub":
        base = unpacked("grub-xen-host") / "usr" / "lib" / "grub-xen"
        kernel, pvh = base / "grub-x86_64-xen.bin", base / "grub-i386-xen_pvh.bin"
        return Guest("grub", _there(kernel), pvh_kernel=_there(pvh))
    if name == "debian":
        return debian()
    if name == "seabios":
        return Guest("seabios", _there(unpacked("seabios") / "usr" / "share" / "seabios" / "bios-256k.bin"))
    if name == "shim":
        unpacked(SHIM_PACKAGE)
        return Guest("shim", _there((*fetched_shims(), Path("xen-shim"))[0]))
    raise FetchError(f"no guest named {name!r}: there are {', '.join(GUESTS)}")


def fetched_shims() -> list[Path]:
    """Xen's shims in the cache. FetchError if there can be no cache."""
    return sorted((cache_directory() / "packages" / SHIM_PACKAGE).glob("usr/lib/xen*/boot/xen-shim"))


def debian(modules: tuple[str, ...] = (), extra: dict[str, bytes] | None = None) -> Guest:
    """Debian's linux-image-amd64 with an initramfs that has these kernel modules (and what they need) and
    files.

    The init loads the modules, prints `INIT_LINE` and gives a shell on hvc0. FetchError; ModuleError for a
    module that the kernel does not have.
    """
    package = _linux_package()
    kernel = _there(unpacked(package) / "boot" / f"vmlinuz-{package.removeprefix('linux-image-')}")
    content = initramfs(busybox(), kernel_modules(package, modules) if modules else None, extra)
    digest = hashlib.sha256(content).hexdigest()[:16]
    ramdisk = _store(cache_directory() / "ramdisks" / f"{package}-{digest}.cpio.gz", content)
    return Guest("debian", kernel, ramdisk, kernel, "console=hvc0", package.removeprefix("linux-image-"))


def _linux_package() -> str:
    """The versioned kernel package; what was fetched once stays the answer, so that a cache works without
    apt."""
    had = sorted((cache_directory() / "packages").glob("linux-image-*-amd64"))
    return had[-1].name if had else dependency("linux-image-amd64", "linux-image-")


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FetchError(f"the package has no file {path.name}; its cache is {path.parent}")
    return path


def _store(path: Path, content: bytes) -> Path:
    """Put a file into the cache, whole or not at all. Its name is bound to its content."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path
