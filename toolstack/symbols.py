"""Names of a kernel's addresses: from the symbol table of its ELF file, or from a System.map (or `nm`) text."""

from __future__ import annotations

import bisect
import os
from pathlib import Path
from typing import Final

from toolstack.errors import InputError

MAX_BYTES: Final = 1 << 30
MAX_SYMBOLS: Final = 2_000_000
FAR: Final = 1 << 20
"""An address farther behind a symbol than this does not belong to it."""
_CODE_LETTERS: Final = frozenset("tTwW")


class Symbols:
    """Functions by address."""

    def __init__(self, found: list[tuple[int, str]]) -> None:
        """`found`: (address, name) pairs in any order."""
        found.sort()
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, address: int) -> str | None:
        """`function+0x1f`; None for what is in no function."""
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0 or address - self._addresses[index] > FAR:
            return None
        return f"{self._names[index]}+{address - self._addresses[index]:#x}"


def read_symbols(path: str) -> Symbols:
    """Of the file. InputError, naming it: no such file, neither kind, too long, or without a function."""
    what = f"--symbols {path}"
    try:
        if not Path(path).is_file():
            raise InputError(f"{what}: no such file")
        if os.path.getsize(path) > MAX_BYTES:
            raise InputError(f"{what}: longer than {MAX_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            found = _of_elf(path) if file.read(4) == b"\x7fELF" else _of_map(path)
    except OSError as error:
        raise InputError(f"{what}: {os.strerror(error.errno or 0)}") from None
    except _Nonsense as error:
        raise InputError(f"{what}: {error}") from None
    if not found:
        raise InputError(f"{what}: it names no function (stripped?)")
    return Symbols(found)


class _Nonsense(ValueError):
    pass


def _of_elf(path: str) -> list[tuple[int, str]]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    found: list[tuple[int, str]] = []
    try:
        with open(path, "rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            if table is None or not hasattr(table, "iter_symbols"):
                return found
            for symbol in table.iter_symbols():
                entry = symbol.entry
                if (
                    symbol.name
                    and entry.st_value
                    and entry.st_shndx not in ("SHN_UNDEF", "SHN_ABS")
                    and entry.st_info.type in ("STT_FUNC", "STT_NOTYPE")
                ):
                    found.append((int(entry.st_value), symbol.name))
                    if len(found) > MAX_SYMBOLS:
                        raise _Nonsense(f"more than {MAX_SYMBOLS} symbols")
    except ELFError as error:
        raise _Nonsense(f"not a good ELF file: {error}") from None
    except (ValueError, KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        if isinstance(error, _Nonsense):
            raise
        raise _Nonsense(f"not a good ELF file: {error!r}") from None
    return found


def _of_map(path: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words:
                continue
            try:
                address = int(words[0], 16)
            except ValueError:
                raise _Nonsense(
                    f"line {number} is not `address type name`: neither an ELF file nor a System.map"
                ) from None
            if len(words) >= 3 and words[1] in _CODE_LETTERS and address < 1 << 64:
                found.append((address, words[2]))
                if len(found) > MAX_SYMBOLS:
                    raise _Nonsense(f"more than {MAX_SYMBOLS} symbols")
    return found
