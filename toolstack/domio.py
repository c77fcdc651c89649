"""Which DomIO a machine has: the native program, or the guest program of `guests/domio` on a vCPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toolstack.errors import InputError

if TYPE_CHECKING:
    from toolstack.client import ControlClient

KINDS: Final = ("native", "guest")
KERNEL: Final = "DOMICILE_DOMIO"
"""Environment variable: the guest program's kernel file, where it is to be another one."""
PACKED: Final = Path(__file__).parent / "programs" / "domio.elf"
"""Where a wheel has it; a checkout builds it from its sources."""


def check_kind(kind: str, what: str) -> str:
    """The kind itself. InputError for one that is not there; `what` asked for it."""
    if kind not in KINDS:
        raise InputError(f"{what} {kind!r}: there are {', '.join(KINDS)}")
    return kind


def open_program() -> tuple[int, str]:
    """The guest program: a descriptor, which the caller closes, and its path. InputError: it is not there, or cannot be built."""
    path = os.environ.get(KERNEL, "")
    if not path:
        path = _built()
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
    except OSError as error:
        raise InputError(f"{path}: {os.strerror(error.errno or 0)}") from None


def _built() -> str:
    if PACKED.exists():
        return str(PACKED)
    try:
        from guests.build import GuestBuildError, build
    except ImportError:
        raise InputError(
            f"DomIO as a guest: this wheel was built without it, and its sources are not here; name a kernel file in ${KERNEL}"
        ) from None
    try:
        return str(build("domio"))
    except GuestBuildError as error:
        raise InputError(f"DomIO as a guest: {error}") from None


def use_program(client: ControlClient, fd: int, path: str) -> None:
    """Have the machine's next DomIO be that program. MachineError."""
    client.request("domio", {"path": path}, [fd])
