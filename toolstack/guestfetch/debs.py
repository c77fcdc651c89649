"""Gets files out of Debian packages as any user: `apt-get download` and `dpkg-deb -x`, into a cache, each
once.

A package is unpacked beside its place and renamed into it, so that what is there is always whole, whoever
else fetches.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

DOWNLOAD_TIMEOUT_S: Final = 600
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")


class FetchError(RuntimeError):
    """A guest cannot be fetched. One line that says what is missing and the mend."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/domicile, or ~/.cache/domicile; made if it is not there. FetchError if it cannot be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "domicile"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"no cache directory {path}: {error.strerror}; set XDG_CACHE_HOME") from None
    return path


def unpacked(package: str) -> Path:
    """Directory with the package's files, fetched if it is not in the cache. FetchError."""
    target = cache_directory() / "packages" / package
    if target.is_dir():
        return target
    if not _NAME.fullmatch(package):
        raise FetchError(f"not the name of a Debian package: {package!r}")
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(
                f"{tool} is not here: fetching {package} needs Debian's apt; give the kernel file instead"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package}-", dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        try:
            run(["apt-get", "-q", "download", package], scratch, f"apt-get download {package}")
        except FetchError as error:
            raise FetchError(f"{error} (apt-get update may help)") from None
        archives = list(scratch.glob("*.deb"))
        if len(archives) != 1:
            raise FetchError(f"apt-get download {package} gave {len(archives)} files; run apt-get update")
        files = scratch / "files"
        run(["dpkg-deb", "-x", str(archives[0]), str(files)], scratch, f"unpacking {archives[0].name}")
        try:
            files.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    return target


def dependency(package: str, prefix: str) -> str:
    """The one package with that prefix that `package` depends on (a metapackage's versioned one).
    FetchError."""
    if shutil.which("apt-cache") is None:
        raise FetchError(f"apt-cache is not here: {package} needs Debian's apt; give the kernel file instead")
    text = run(["apt-cache", "depends", "--important", package], Path("/"), f"apt-cache depends {package}")
    found = [
        name
        for line in text.splitlines()
        if line.strip().startswith("Depends:") and (name := line.split(":", 1)[1].strip()).startswith(prefix)
    ]
    if not found:
        raise FetchError(f"apt knows no {prefix}* that {package} depends on; run apt-get update")
    return found[0]


def run(command: list[str], directory: Path, what: str) -> str:
    """Standard output of a command. FetchError with the last line of its complaint."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{what}: no end within {DOWNLOAD_TIMEOUT_S} s") from None
    except OSError as error:
        raise FetchError(f"{what}: {error.strerror}") from None
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[
            -1
        ]
        raise FetchError(f"{what}: {complaint}")
    return done.stdout
