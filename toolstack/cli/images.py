"""From what the user gave to a `DomainConfig` and the open files that go along."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from toolstack.errors import InputError
from toolstack.xlcfg.keys import SHIM_CMDLINE

if TYPE_CHECKING:
    from bus.messages.control import DomainConfig

SEABIOS: Final = "/usr/share/seabios/bios-256k.bin"
VIDEO_BIOS: Final = "/usr/share/seabios/vgabios-stdvga.bin"
SHIMS: Final = "/usr/lib/xen*/boot/xen-shim"
MAX_SHOWN: Final = 60
"""Characters of a bad value that an error repeats."""
NAME: Final = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


def open_image(path: str, what: str, *, writable: bool = False) -> int:
    """A descriptor of a regular, non-empty file. InputError."""
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{what} {path}: {os.strerror(error.errno or 0)}") from None
    status = os.fstat(fd)
    problem = ""
    if not os.path.isfile(f"/proc/self/fd/{fd}"):
        problem = "not a regular file"
    elif status.st_size == 0:
        problem = "the file is empty"
    if problem:
        os.close(fd)
        raise InputError(f"{what} {path}: {problem}")
    return fd


def name_of(path: str) -> str:
    """A domain name made of a kernel's file name."""
    words = re.sub(r"[^A-Za-z0-9_.+-]+", "-", Path(path).stem).strip("-")
    return words[:64] or "guest"


def check_name(name: str) -> str:
    """The name, if a domain can have it. InputError."""
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: use 1 to 64 letters, digits, '_', '.', '+', '-'")
    return name


def is_elf(path: str) -> bool:
    """It is there, and an ELF file."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def _firmware(path: str) -> str:
    """The path, if there is a file. InputError with the mend."""
    if not os.path.exists(path) and path in (SEABIOS, VIDEO_BIOS):
        raise InputError(f"firmware {path}: no such file: install Debian's package seabios")
    return path


def find_shim() -> str:
    """Xen's shim, of Debian's package (the newest, if there are several) or of `domicile guest fetch shim`. InputError."""
    found = sorted(glob.glob(SHIMS))
    if not found:
        from toolstack.guestfetch import FetchError, fetched_shims

        with contextlib.suppress(FetchError):
            found = [str(path) for path in fetched_shims()]
    if not found:
        raise InputError(
            "pvshim: there is no xen-shim: `domicile guest fetch shim` gets Debian's, pvshim_path= names one"
        )
    return found[-1]


class Images:
    """Descriptors in the order in which they travel; closed on exit."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors.clear()

    def add(self, path: str, what: str, *, writable: bool = False) -> int:
        """Opens it; its index. InputError."""
        self.descriptors.append(open_image(path, what, writable=writable))
        return len(self.descriptors) - 1


def elsewhere(disk: dict[str, Any]) -> bool:
    """Its target is something of the domain that serves it (backend=), no file of ours."""
    return disk.get("backend", "") not in ("", "DomIO")


def _with_file(disk: dict[str, Any], images: Images) -> dict[str, Any]:
    """`file` is the index of its descriptor: -1 for a drive without a medium."""
    if not disk["target"] or elsewhere(disk):
        return {**disk, "file": -1}
    return {**disk, "file": images.add(disk["target"], "disk", writable=not disk["readonly"])}


def make_config(fields: dict[str, Any], images: Images) -> DomainConfig:
    """The validated configuration; `kernel`, `ramdisk` and the disks' `target` are paths here. InputError names the field."""
    from pydantic import ValidationError

    from bus.messages.control import DomainConfig

    kernel, ramdisk = fields.get("kernel") or "", fields.get("ramdisk") or ""
    firmware: dict[str, Any] = {}
    if fields.get("type") == "hvm":
        path = fields.get("firmware_path") or SEABIOS
        firmware = {"firmware": images.add(_firmware(path), "firmware"), "firmware_path": path}
        bios = fields.get("bios_path") or SEABIOS
        if is_elf(path) and (os.path.exists(bios) or fields.get("bios_path")):
            firmware["bios"] = images.add(bios, "BIOS")
        if fields.get("vga", "stdvga") == "stdvga":
            firmware["video_bios"] = images.add(_firmware(VIDEO_BIOS), "video BIOS")
    fields = {name: value for name, value in fields.items() if name != "bios_path"}
    if fields.pop("pvshim", False):
        shim = fields.get("shim_path") or find_shim()
        fields |= {"shim": images.add(shim, "shim"), "shim_path": shim}
        fields["shim_cmdline"] = fields.get("shim_cmdline") or SHIM_CMDLINE
    values = {
        "uuid": uuid.uuid4().bytes,
        **fields,
        "kernel": images.add(kernel, "kernel") if kernel else -1,
        "kernel_path": kernel,
        "ramdisk": images.add(ramdisk, "ramdisk") if ramdisk else -1,
        "ramdisk_path": ramdisk,
        **firmware,
        "disks": [_with_file(disk, images) for disk in fields.get("disks", [])],
    }
    try:
        return DomainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        given = repr(first["input"])
        given = given if len(given) <= MAX_SHOWN else f"{given[:MAX_SHOWN]}... ({len(given)} characters)"
        raise InputError(f"{where}={given}: {first['msg']}"[:400]) from None
