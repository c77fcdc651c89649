"""Asks the C compiler what the Xen headers say: sizes, offsets, constants of all that bus/abi defines."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import bus.abi
from bus.abi.layout import Layout

HEADERS = Path("/usr/include/xen")

INCLUDES = (
    *(
        "errno.h",
        "xen.h",
        "features.h",
        "version.h",
        "event_channel.h",
        "grant_table.h",
        "memory.h",
        "sched.h",
    ),
    *("vcpu.h", "callback.h", "physdev.h", "platform.h", "domctl.h", "sysctl.h", "nmi.h", "elfnote.h"),
    *("arch-x86/cpuid.h", "arch-x86/hvm/start_info.h"),
    *("hvm/params.h", "hvm/hvm_op.h", "hvm/ioreq.h", "hvm/dm_op.h", "hvm/hvm_vcpu.h", "hvm/e820.h"),
    *("hvm/hvm_info_table.h", "hvm/hvm_xs_strings.h", "hvm/save.h"),
    *(
        "io/ring.h",
        "io/blkif.h",
        "io/netif.h",
        "io/console.h",
        "io/xs_wire.h",
        "io/xenbus.h",
        "io/protocols.h",
    ),
)

OUR_OWN_MODULES = {"bus.abi.layout", "bus.abi.hypercalls", "bus.abi.reference"}
"""Modules that are no header's."""


def is_header_module(name: str) -> bool:
    return not any(name == own or name.startswith(own + "_") for own in OUR_OWN_MODULES)


def header_modules() -> list[ModuleType]:
    """Every module of bus/abi that describes a header."""
    found = pkgutil.walk_packages(bus.abi.__path__, "bus.abi.")
    return [importlib.import_module(m.name) for m in found if not m.ispkg and is_header_module(m.name)]


def layouts(module: ModuleType) -> Iterator[Layout[Any]]:
    for name, value in vars(module).items():
        if isinstance(value, Layout):
            assert name == value.name.upper(), f"{module.__name__}.{name} is not named after its record"
            if value.record.__module__ == module.__name__:
                yield value


def constants(module: ModuleType) -> Iterator[tuple[str, int | str]]:
    """The names that a header defines, and our value."""
    own = getattr(module, "NOT_IN_HEADER", ())
    imported = getattr(module, "__annotations__", {})
    for name, value in vars(module).items():
        if name in imported and isinstance(value, (int, str)) and name not in own:
            yield name, value


def c_name(name: str) -> str:
    """The header's name of a constant (see the docstring of bus/abi/xen.py)."""
    return "__" + name if name.startswith("HYPERVISOR_") and "VIRT" not in name else name


def program(modules: list[ModuleType]) -> str:
    lines = ["#define __XEN_TOOLS__ 1", "#include <stdint.h>", "#include <stddef.h>", "#include <stdbool.h>"]
    lines += ["#include <stdio.h>", "#include <errno.h>"]
    lines += [f"#include <xen/{name}>" for name in INCLUDES]
    lines += ['#define S(k, t) printf("size %s %zu\\n", k, sizeof(t))']
    lines += ['#define F(k, t, f) printf("field %s %zu %zu\\n", k, offsetof(t, f), sizeof(((t *)0)->f))']
    lines += ['#define I(k, v) printf("int %s %lld\\n", k, (long long)(v))']
    lines += ['#define T(k, v) printf("str %s %s\\n", k, v)', "int main(void) {"]
    for module in modules:
        for layout in layouts(module):
            key = f"{module.__name__}.{layout.name}"
            lines.append(f'S("{key}", {layout.c_type});')
            for field in layout.fields:
                if layout.c_field(field):
                    lines.append(f'F("{key}.{field}", {layout.c_type}, {layout.c_field(field)});')
        for name, value in constants(module):
            macro = "T" if isinstance(value, str) else "I"
            lines.append(f'{macro}("{module.__name__}.{name}", {c_name(name)});')
    return "\n".join([*lines, "return 0; }"]) + "\n"


def compiler() -> list[str]:
    """gcc or cc if there is one, else the zig of the development dependencies."""
    found = shutil.which("gcc") or shutil.which("cc")
    return [found] if found else [sys.executable, "-m", "ziglang", "cc"]


def ask(modules: list[ModuleType], work: Path) -> dict[str, tuple[str, ...]]:
    """Compile and run the program. Key: "size NAME", "field NAME.FIELD", "int NAME", "str NAME"."""
    if not (HEADERS / "xen.h").exists():
        raise RuntimeError(
            f"Xen's public headers are missing ({HEADERS}): install libxen-dev (./devtool does)"
        )
    (work / "include").mkdir()
    (work / "include" / "xen").symlink_to(HEADERS)
    (work / "abi.c").write_text(program(modules))
    command = [
        *compiler(),
        "-w",
        "-isystem",
        str(work / "include"),
        str(work / "abi.c"),
        "-o",
        str(work / "abi"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    if built.returncode:
        raise RuntimeError(
            f"the C compiler refuses what bus/abi claims of the headers:\n{built.stderr[:4000]}"
        )
    out = subprocess.run([str(work / "abi")], capture_output=True, text=True, timeout=30, check=True).stdout
    answer: dict[str, tuple[str, ...]] = {}
    for line in out.splitlines():
        kind, key, *values = line.split(" ")
        answer[f"{kind} {key}"] = tuple(values) if kind != "str" else (" ".join(values),)
    return answer
