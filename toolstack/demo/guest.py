"""The demo's guests: Debian's Linux that writes to an ext4 disk and says what it was told is safe; and a look at the disk afterwards."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from toolstack.errors import MachineError
from toolstack.guestfetch import FetchError, Guest, debian, fetch
from toolstack.guestfetch.debs import run
from toolstack.guestfetch.images import root_disk

DISK_MB: Final = 32
FILE_KB: Final = 64
MAX_FILES: Final = 200
MODULES: Final = ("xen-blkfront", "crc32c_generic", "ext4")
WRITER: Final = f"""
i=0; while [ ! -b /dev/xvda ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 /dev/xvda /mnt && echo MOUNTED || poweroff -f
(read -r word </dev/hvc0; touch /tmp/enough) &
n=0
while [ ! -e /tmp/enough ] && [ $n -lt {MAX_FILES} ]; do
    set -- $(head -c {FILE_KB << 10} /dev/urandom | tee /tmp/new | sha256sum)
    dd if=/tmp/new of=/mnt/f$n bs={FILE_KB}k conv=fsync 2>/dev/null && echo "ACK $n $1" || echo "FAILED write $n"
    n=$((n+1))
done
echo "IO-ERRORS $(dmesg | grep -ci 'i/o error')"
umount /mnt && echo UNMOUNTED
poweroff -f
"""
"""A line `ACK n sha256` is printed only after fsync came back: from then on the file must be there, whatever happens."""
GREETING: Final = ("hello.txt", "Hello from an ext4 disk behind DomIO")
CMDLINE: Final = (
    "quiet audit=0 apparmor=0 cryptomgr.notests random.trust_cpu=on mitigations=off nokaslr rodata=off"
)
"""Nothing that the demo shows depends on these: they spare an emulated CPU a quarter of the boot: self-tests, checks of page tables."""


ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\x20-\x7e]")


@dataclass(slots=True)
class Files:
    """What the guests are made of, and where the disk is."""

    debian: Guest
    grub: Guest
    disk: Path


def get_files(directory: Path) -> Files:
    """Fetched where they are not in the cache; a new disk. MachineError."""
    try:
        grub = fetch("grub")
        linux = debian(modules=MODULES, extra={"etc/rc.guest": WRITER.encode()})
        disk = directory / "disk.img"
        with disk.open("wb") as file:
            file.truncate(DISK_MB << 20)
        root = directory / "root"
        root.mkdir()
        (root / GREETING[0]).write_text(GREETING[1] + "\n", encoding="ascii")
        options = ["-q", "-F", "-t", "ext4", "-L", "demo", "-d", str(root)]
        run([_tool("mke2fs"), *options, str(disk)], directory, "mke2fs")
    except FetchError as error:
        raise MachineError(str(error)) from None
    return Files(linux, grub, disk)


SWITCH: Final = """
i=0; while [ ! -b /dev/xvda ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 /dev/xvda /mnt || { echo "no root file system on /dev/xvda"; poweroff -f; }
umount /proc /sys /dev/pts
mount --move /dev /mnt/dev
echo SWITCHING
exec switch_root /mnt /sbin/init
"""
"""In the ramdisk: the modules are loaded; the root file system is on the disk."""
ROOT_MB: Final = 64
ROOT_FILES: Final = 500
ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")
"""Of the two guests on their bridge."""
ROOT_WRITER: Final = f"""
ip addr add {ADDRESSES[0]}/24 dev eth0 && ip link set eth0 up || echo "FAILED: no network"
echo "ROOT $(grep ' / ' /proc/mounts | tail -n 1)"
(read -r word </dev/hvc0; touch /dev/enough) &
n=0
while [ ! -e /dev/enough ] && [ $n -lt {ROOT_FILES} ]; do
    set -- $(head -c {FILE_KB << 10} /dev/urandom | tee /dev/new | sha256sum)
    dd if=/dev/new of=/f$n bs={FILE_KB}k conv=fsync 2>/dev/null && echo "ACK $n $1" || echo "FAILED write $n"
    n=$((n+1))
    sleep 0.1
done
echo "IO-ERRORS $(dmesg | grep -ci 'i/o error')"
mount -o remount,ro / && echo UNMOUNTED
poweroff -f
"""
"""On the disk: as WRITER, but the disk is the root file system."""
TICKER: Final = f"""
ip addr add {ADDRESSES[1]}/24 dev eth0 && ip link set eth0 up || echo "FAILED: no network"
ping {ADDRESSES[0]} &
n=0
while true; do echo "TICK $n"; n=$((n+1)); sleep 1; done
"""
"""For a guest that has nothing to do with the disk: it is to notice nothing. It asks the other one over the network, too."""


@dataclass(slots=True)
class RootedFiles:
    """A guest whose root is on a disk, and one without a disk."""

    rooted: Guest
    ticker: Guest
    disk: Path


def get_rooted(directory: Path) -> RootedFiles:
    """As `get_files`, for the story in containers. MachineError."""
    try:
        rooted = debian(modules=(*MODULES, "xen-netfront"), extra={"etc/rc.guest": SWITCH.encode()})
        ticker = debian(modules=("xen-netfront",), extra={"etc/rc.guest": TICKER.encode()})
        disk = root_disk(directory / "root.ext4", ROOT_MB, extra={"etc/rc.guest": ROOT_WRITER.encode()})
    except FetchError as error:
        raise MachineError(str(error)) from None
    return RootedFiles(rooted, ticker, disk)


def _tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if path is None:
        raise MachineError(f"{name} is not here: install the package e2fsprogs")
    return path


@dataclass(slots=True)
class Watched:
    """A guest's console and end, from notices."""

    name: str
    text: str = ""
    ended: str | None = None
    details: str = ""
    acknowledged: dict[int, str] = field(default_factory=dict)
    """File number and SHA-256, as the guest printed them."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    _rest: str = ""

    def take(self, what: str, body: dict[str, Any]) -> None:
        """A notice about this guest."""
        if what == "ended":
            self.ended, self.details = body["reason"], body["details"]
        elif what == "console":
            data = body["data"].decode("latin1")
            self.text += data
            *whole, self._rest = (self._rest + data).split("\n")
            for line in whole:
                self._line(line.strip())

    def _line(self, line: str) -> None:
        self.lines.append(line)
        words = line.split()
        if len(words) == 3 and words[0] == "ACK" and words[1].isdigit() and len(words[2]) == 64:
            self.acknowledged[int(words[1])] = words[2]

    def plain(self) -> str:
        """The console's text without what moves a cursor."""
        return ESCAPES.sub("", self.text)

    def tail(self) -> str:
        """The last lines, for an error."""
        return "\n".join([*list(self.lines)[-12:], self._rest]).strip()


@dataclass(slots=True)
class DiskVerdict:
    """What the host found in the image."""

    checked: int
    wrong: list[int]
    """Numbers of files that are not there as acknowledged."""
    fsck_status: int
    fsck_says: str


def look_at_disk(disk: Path, acknowledged: dict[int, str]) -> DiskVerdict:
    """e2fsck without mending, and every acknowledged file read out with debugfs. MachineError without those tools."""
    environment = os.environ | {"LC_ALL": "C"}
    fsck = subprocess.run(
        [_tool("e2fsck"), "-fn", str(disk)], capture_output=True, text=True, env=environment, timeout=60, check=False
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        commands = "".join(f"dump /f{number} {scratch}/f{number}\n" for number in acknowledged)
        subprocess.run(
            [_tool("debugfs"), "-f", "-", str(disk)],
            input=commands, capture_output=True, text=True, env=environment, timeout=60, check=False,
        )  # fmt: skip
        wrong = [
            number
            for number, digest in acknowledged.items()
            if _digest(Path(scratch) / f"f{number}") != digest
        ]
    said = (fsck.stdout.strip() or fsck.stderr.strip()).splitlines()
    return DiskVerdict(len(acknowledged), wrong, fsck.returncode, said[-1] if said else "")


def _digest(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha256(content).hexdigest() if len(content) == FILE_KB << 10 else ""
