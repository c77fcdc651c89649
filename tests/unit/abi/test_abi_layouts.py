"""Every structure and constant of bus/abi is what the C compiler makes of the installed Xen headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.abi import abi_compiler

MODULES = abi_compiler.header_modules()
BY_NAME = {module.__name__: module for module in MODULES}


@pytest.fixture(scope="session")
def c_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    return abi_compiler.ask(MODULES, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize("name", BY_NAME)
def test_structures_have_the_layout_of_the_header(name: str, c_says: dict[str, tuple[str, ...]]) -> None:
    wrong = []
    for layout in abi_compiler.layouts(BY_NAME[name]):
        key = f"{name}.{layout.name}"
        if c_says[f"size {key}"] != (str(layout.size),):
            wrong.append(f"{key}: {layout.size} bytes, in C {c_says[f'size {key}']}")
        for field in layout.fields:
            if not layout.c_field(field):
                continue
            ours = (str(layout.offset(field)), str(layout.field_size(field)))
            if c_says[f"field {key}.{field}"] != ours:
                wrong.append(f"{key}.{field}: (offset, size) {ours}, in C {c_says[f'field {key}.{field}']}")
    assert not wrong


@pytest.mark.parametrize("name", BY_NAME)
def test_constants_have_the_value_of_the_header(name: str, c_says: dict[str, tuple[str, ...]]) -> None:
    wrong = []
    for constant, value in abi_compiler.constants(BY_NAME[name]):
        kind = "str" if isinstance(value, str) else "int"
        (in_c,) = c_says[f"{kind} {name}.{constant}"]
        same = value == in_c if isinstance(value, str) else (value - int(in_c)) % 2**64 == 0
        if not same:
            wrong.append(f"{name}.{constant} = {value}, in C {in_c}")
    assert not wrong


def test_the_comparison_covers_the_abi(c_says: dict[str, tuple[str, ...]]) -> None:
    """The comparison above is not empty: names that everything depends on are in it."""
    names = {"size bus.abi.xen.shared_info", "field bus.abi.xen.start_info.console_mfn"}
    names |= {"int bus.abi.errno.XEN_ENOSYS", "int bus.abi.xen.HYPERVISOR_memory_op"}
    assert names <= c_says.keys()
    assert len(c_says) > 2000


def test_missing_headers_are_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abi_compiler, "HEADERS", tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="libxen-dev"):
        abi_compiler.ask([], tmp_path)
