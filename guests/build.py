"""Builds the conformance guests with the C compiler of the `ziglang` package; cached by the content of the
sources.

`build("hello")` gives the path of an ELF file that Xen (and Domicile) boots as a 64-bit PV guest. Xen's
headers are those of the package libxen-dev, found in $DOMICILE_XEN_HEADERS or /usr/include. The cache is
`$XDG_CACHE_HOME/domicile/guests` (or under ~/.cache); a build takes a second or two, a second call nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300
"""The first build of a user program builds its C library, too."""
INTERFACE_VERSION = 0x00040D00
"""__XEN_INTERFACE_VERSION__: which shape of the headers' structures the guests use."""

FLAGS = [
    *(
        "-target",
        "x86_64-freestanding-none",
        "-std=gnu11",
        "-O2",
        "-ffreestanding",
        "-nostdlib",
        "-fno-builtin",
    ),
    *("-fno-pic", "-mcmodel=kernel", "-mno-red-zone"),
    *("-mno-sse", "-mno-mmx", "-mno-avx", "-mno-80387"),  # a guest's library saves no vector registers
    *("-fno-stack-protector", "-fno-sanitize=all", "-fno-asynchronous-unwind-tables"),
    *("-Wall", "-Wextra", "-Werror"),
]


USER_FLAGS = [
    "-target",
    "x86_64-linux-musl",
    "-static",
    "-std=gnu11",
    "-O1",
    "-fno-sanitize=all",
    "-Wall",
    "-Werror",
]


class GuestBuildError(RuntimeError):
    """A guest cannot be built: the compiler or the headers are not there, or a source does not compile."""


SYSTEMS = ("blkfront", "domio")
"""Guests of several files, each in a directory of its own: no conformance programs."""


def programs() -> tuple[str, ...]:
    """Names of all conformance programs, sorted."""
    return tuple(sorted(path.stem for path in (HERE / "programs").glob("*.c")))


def build(name: str) -> Path:
    """Path of the built guest. GuestBuildError with the compiler's words."""
    if name not in (*programs(), *SYSTEMS):
        raise GuestBuildError(f"no guest named {name!r}: there are {', '.join((*programs(), *SYSTEMS))}")
    return _build([name])[name]


def build_all() -> dict[str, Path]:
    """Path of every guest by name."""
    return _build([*programs(), *SYSTEMS])


def build_user(name: str) -> Path:
    """Path of a static program for a Linux guest's user mode (`guests/user`). GuestBuildError with the compiler's words."""
    source = HERE / "user" / f"{name}.c"
    if not source.exists():
        raise GuestBuildError(f"no user program named {name!r}")
    target = _cache() / f"{name}-{_digest([source], _zig_version())}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / name
            _run(["cc", *USER_FLAGS, str(source), "-o", str(built)])
            built.replace(target)
    return target


def _build(names: list[str]) -> dict[str, Path]:
    headers = _headers()
    cache = _cache()
    library = sorted((HERE / "lib").glob("*.[cS]"))
    common = [HERE / "guest.lds", HERE / "build.py", *sorted((HERE / "include").glob("*.h")), *library]
    base = _digest([*common, headers / "xen" / "xen.h", headers / "xen" / "xen-compat.h"], _zig_version())
    sources = {name: _sources(name) for name in names}
    out = {name: cache / f"{name}-{_digest(found, base)[:24]}.elf" for name, found in sources.items()}
    missing = {
        name: [path for path in found if path.suffix != ".h"]
        for name, found in sources.items()
        if not out[name].exists()
    }
    if not missing:
        return out
    with tempfile.TemporaryDirectory(dir=cache) as scratch_name, ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(scratch_name)
        inputs = [*library, *(path for found in missing.values() for path in found)]
        objects = dict(
            zip(inputs, pool.map(lambda path: _compile(path, scratch, headers), inputs), strict=True)
        )
        for name, found in missing.items():
            linked = scratch / f"{name}.elf"
            _run(
                [
                    "ld.lld",
                    "-static",
                    "-z",
                    "max-page-size=4096",
                    "-T",
                    str(HERE / "guest.lds"),
                    "-o",
                    str(linked),
                ]
                + [str(objects[path]) for path in [*library, *found]]
            )
            linked.replace(out[name])
    return out


def _sources(name: str) -> list[Path]:
    """A guest's own files."""
    if name in SYSTEMS:
        return sorted((HERE / name).glob("*.[chS]"))
    return [HERE / "programs" / f"{name}.c"]


def _compile(source: Path, scratch: Path, headers: Path) -> Path:
    target = scratch / f"{source.stem}{source.suffix[1:]}-{source.parent.name}.o"
    define = f"-D__XEN_INTERFACE_VERSION__={INTERFACE_VERSION:#x}"
    include = ["-I", str(HERE / "include"), "-idirafter", str(headers)]
    _run(["cc", *FLAGS, define, *include, "-c", str(source), "-o", str(target)])
    return target


def _run(arguments: list[str]) -> None:
    # The compiler keeps a cache of its own and looks for a home directory otherwise.
    own = {"ZIG_GLOBAL_CACHE_DIR": str(_cache() / "zig"), "ZIG_LOCAL_CACHE_DIR": str(_cache() / "zig")}
    command = [sys.executable, "-m", "ziglang", *arguments]
    try:
        done = subprocess.run(
            command, env=os.environ | own, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GuestBuildError(f"the compiler did not end within {TIMEOUT_S} s") from None
    if done.returncode:
        raise GuestBuildError(done.stderr.strip() or f"the compiler ended with status {done.returncode}")


def _zig_version() -> str:
    if importlib.util.find_spec("ziglang") is None:
        raise GuestBuildError("no C compiler: install the Python package ziglang (it is in the extra 'dev')")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ziglang")
    except PackageNotFoundError:  # a copy that was put on the path without its metadata
        return "unknown"


def _headers() -> Path:
    root = Path(os.environ.get("DOMICILE_XEN_HEADERS", "/usr/include"))
    if not (root / "xen" / "xen.h").exists():
        raise GuestBuildError(f"no Xen headers in {root}: install the package libxen-dev")
    return root


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "domicile" / "guests"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestBuildError(f"no cache directory {path}: {error.strerror}; set XDG_CACHE_HOME") from None
    return path


def _digest(paths: list[Path], seed: str) -> str:
    digest = hashlib.sha256(seed.encode())
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    for guest, where in build_all().items():
        print(f"{guest}\t{where}")
