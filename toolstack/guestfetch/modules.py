"""Kernel modules of an unpacked Debian kernel package: which others a module needs, in the order to load
them.

The package has no modules.dep (depmod makes it when it is installed), so the names come from the `depends=`
line in each module's own .modinfo section, and from modules.builtin.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path

_DEPENDS = re.compile(rb"(?:^|\0)depends=([A-Za-z0-9_,-]*)\0")
MAX_MODULE = 64 << 20


class ModuleError(ValueError):
    """A module is not in the package, or cannot be read."""


def canonical(name: str) -> str:
    """A module's name as the kernel writes it: without suffix, with underscores."""
    return name.split(".ko")[0].replace("-", "_")


def dependencies(content: bytes) -> tuple[str, ...]:
    """Names of the modules that one needs directly, by its own content."""
    # The line stands in .modinfo; no other section of a module has it between zeros.
    found = _DEPENDS.search(content)
    return tuple(canonical(name.decode()) for name in found[1].split(b",") if name) if found else ()


class ModuleTree:
    """The modules below lib/modules/VERSION of a package."""

    def __init__(self, root: Path) -> None:
        self._files = {
            canonical(path.name): path
            for path in sorted(root.rglob("*.ko*"))
            if path.name.endswith((".ko", ".ko.xz"))
        }
        listing = root / "modules.builtin"
        lines = listing.read_text().split() if listing.exists() else []
        self._builtin = {canonical(Path(line).name) for line in lines}

    def content(self, name: str) -> bytes:
        """The module's bytes, unpacked. ModuleError if there is none of that name."""
        path = self._files.get(canonical(name))
        if path is None:
            raise ModuleError(f"no kernel module {name!r} in the package")
        data = path.read_bytes()
        if path.suffix == ".xz":
            unpacker = lzma.LZMADecompressor()
            data = unpacker.decompress(data, MAX_MODULE + 1)
        if len(data) > MAX_MODULE:
            raise ModuleError(f"kernel module {name!r} is larger than {MAX_MODULE} bytes")
        return data

    def load_order(self, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
        """(name, content) of the modules and all that they need, each before those that need it.

        What is built into the kernel is left out. ModuleError for one that is in neither place.
        """
        out: dict[str, bytes] = {}
        busy: set[str] = set()

        def visit(name: str) -> None:
            if name in out or name in busy or (name in self._builtin and name not in self._files):
                return
            busy.add(name)
            content = self.content(name)
            for needed in dependencies(content):
                visit(needed)
            out[name] = content

        for name in names:
            visit(canonical(name))
        return list(out.items())
