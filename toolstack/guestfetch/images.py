"""The initramfs and the root disk that Debian's kernel boots into: a static busybox and a small init of our
own."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

from .cpio import CpioWriter
from .debs import FetchError, run, unpacked
from .modules import ModuleTree

INIT_LINE: Final = "domicile: init"
"""What the init prints when it is up; tests and `--until` wait for it."""

INIT: Final = f"""#!/bin/busybox sh
# The first process of a Domicile guest: file systems, modules in order, then a shell on the console.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
for module in $(cat /lib/modules/order 2>/dev/null); do
    insmod /lib/modules/$module.ko || echo "domicile: module $module failed"
done
[ -x /etc/rc.guest ] && . /etc/rc.guest
echo "{INIT_LINE}"
console=/dev/hvc0
[ -c $console ] || console=/dev/console
while true; do
    setsid cttyhack sh <$console >$console 2>&1
done
"""

_DIRECTORIES: Final = ("bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sys", "tmp", "var")
MAX_DISK_MB: Final = 1 << 20


def busybox() -> bytes:
    """The static busybox of Debian's package busybox-static."""
    return (unpacked("busybox-static") / "bin" / "busybox").read_bytes()


def initramfs(
    tool: bytes, modules: list[tuple[str, bytes]] | None = None, extra: dict[str, bytes] | None = None
) -> bytes:
    """A gzip-compressed initramfs: busybox, `INIT`, the modules in the order to load them, further files by
    path.

    A file `etc/rc.guest` among the further files is run by the init before it says that it is up.
    """
    archive = CpioWriter()
    for name in _DIRECTORIES:
        archive.directory(name, 0o1777 if name == "tmp" else 0o755)
    archive.device("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    archive.device("dev/null", stat.S_IFCHR | 0o666, 1, 3)
    archive.file("bin/busybox", tool, 0o755)
    archive.file("init", INIT.encode(), 0o755)
    if modules:
        archive.file("lib/modules/order", "".join(f"{name}\n" for name, _ in modules).encode())
        for name, content in modules:
            archive.file(f"lib/modules/{name}.ko", content)
    for path, content in (extra or {}).items():
        archive.file(path, content, 0o755)
    return gzip.compress(archive.finish(), 6, mtime=0)


def kernel_modules(package: str, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Modules (with what they need, in order) out of a kernel package that is in the cache or gets
    fetched."""
    roots = list((unpacked(package) / "lib" / "modules").iterdir())
    if len(roots) != 1:
        raise FetchError(f"{package} has {len(roots)} directories of kernel modules, not one")
    return ModuleTree(roots[0]).load_order(names)


def root_disk(path: Path | str, size_mb: int, *, extra: dict[str, bytes] | None = None) -> Path:
    """Make an ext4 image of `size_mb` MiB with a busybox root (`/sbin/init` is `INIT`), as any user.

    Needs mke2fs (package e2fsprogs). An existing file is replaced, once the new one is whole. FetchError.
    """
    if not 4 <= size_mb <= MAX_DISK_MB:
        raise FetchError(f"root disk: {size_mb} MiB (4 to {MAX_DISK_MB})")
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if mke2fs is None:
        raise FetchError("mke2fs is not here: install the package e2fsprogs")
    target = Path(path)
    tool = busybox()
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch_name:
        root, image = Path(scratch_name) / "root", Path(scratch_name) / "image"
        for name in (*_DIRECTORIES, "sbin"):
            (root / name).mkdir(parents=True)
        files = {"bin/busybox": tool, "sbin/init": INIT.encode(), **(extra or {})}
        for name, content in files.items():
            file = root / name
            if root not in file.resolve().parents:
                raise FetchError(f"root disk: {name!r} leaves the image")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o755)
        with image.open("wb") as empty:
            empty.truncate(size_mb << 20)
        # root_owner: the files belong to root in the image, whoever makes it.
        options = ["-q", "-F", "-t", "ext4", "-L", "domicile", "-E", "root_owner=0:0", "-d", str(root)]
        run([mke2fs, *options, str(image)], root, f"making {target.name}")
        image.replace(target)
    return target
