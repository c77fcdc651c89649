"""Names of addresses: from System.map, from ELF files, and from what is neither."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guests.build import build
from toolstack.cli.registers import dump, place
from toolstack.errors import InputError
from toolstack.symbols import FAR, Symbols, read_symbols

MAP = """ffffffff81000000 T _text
ffffffff81000100 t helper
ffffffff81000200 D data_is_not_code

ffffffff81000300 W weak
"""


def test_addresses_are_named_by_the_function_before_them(tmp_path: Path) -> None:
    """Data is no function, and what is far behind the last one is in none."""
    file = tmp_path / "System.map"
    file.write_text(MAP)
    names = read_symbols(str(file))
    assert len(names) == 3
    assert names.name(0xFFFFFFFF81000000) == "_text+0x0"
    assert names.name(0xFFFFFFFF81000210) == "helper+0x110"
    assert names.name(0xFFFFFFFF81000300 + FAR) == f"weak+{FAR:#x}"
    assert names.name(0xFFFFFFFF81000301 + FAR) is None
    assert names.name(0xFFFFFFFF80FFFFFF) is None


def test_an_elf_file_with_symbols() -> None:
    """A guest of this project."""
    names = read_symbols(str(build("hello")))
    assert {"_start", "main"} & set(names._names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello world\n", "line 1 is not"),
        (b"", "names no function"),
        (b"ffffffff81000000 D data\n", "names no function"),
        (b"\x7fELF" + bytes(60), "not a good ELF file"),
        (b"\x7fELF\x02\x01\x01" + b"\xff" * 200, "not a good ELF file"),
    ],
)
def test_what_has_no_names_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    """In one line, with the file's name."""
    file = tmp_path / "f"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said) as told:
        read_symbols(str(file))
    assert str(file) in str(told.value)


def test_no_such_file() -> None:
    with pytest.raises(InputError, match="no such file"):
        read_symbols("/nope")


def test_the_text_of_a_vcpu() -> None:
    """As narrow as a terminal, every register once."""
    wide = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16))]
    names = [
        *wide,
        "rip",
        "rflags",
        "cs",
        "ss",
        "ds",
        "es",
        "fs",
        "gs",
        "fs_base",
        "gs_base_kernel",
        "gs_base_user",
    ]
    names += ["cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"]
    row = {name: number for number, name in enumerate(names)}
    row |= {"vcpu": 3, "state": "blocked", "mode": "kernel", "rip": 0x1010}  # type: ignore[dict-item]
    text = dump(row, Symbols([(0x1000, "idle")]))
    assert text.splitlines()[0] == "vcpu 3: blocked, kernel, RIP 0012:[<0000000000001010>] idle+0x10"
    assert place(row).endswith("1010>]")
    assert max(map(len, text.splitlines())) <= 110
    shown = re.findall(r"(\w+): *[0-9a-f]{4}", text)
    assert sorted(shown) == sorted(set(names) - {"rip"})
