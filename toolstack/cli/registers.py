"""The verb `registers`, and the same in short for a run that ended at its timeout."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolstack.cli.output import say
from toolstack.cli.state import ask
from toolstack.errors import MachineError

if TYPE_CHECKING:
    from toolstack.symbols import Symbols

Row = Mapping[str, Any]


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("registers")(registers)


def registers(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or id.")],
    vcpu: Annotated[
        int | None, typer.Argument(metavar="[VCPU]", min=0, max=127, help="That one alone.")
    ] = None,
    symbols: Annotated[
        str,
        typer.Option(
            "--symbols", metavar="FILE", help="Name functions: the kernel's ELF file, or its System.map."
        ),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Where a guest's vCPUs are, as Xen's xenctx shows it; the guest runs on. Example: domicile registers web --symbols vmlinux"""
    from toolstack.symbols import read_symbols

    names = read_symbols(symbols) if symbols else None
    rows: list[dict[str, Any]] = ask("registers", domain=domain)
    if vcpu is not None:
        rows = [row for row in rows if row["vcpu"] == vcpu]
        if not rows:
            raise MachineError(f"registers {domain}: vCPU {vcpu} was never started: `domicile vcpu-list`")
    if json:
        for row in rows:
            row["function"] = names.name(row["rip"]) if names else None
        say(json_module.dumps(rows))
    else:
        say("\n\n".join(dump(row, names) for row in rows))


def place(row: Row, names: Symbols | None = None) -> str:
    """One line: which vCPU, what it does, where."""
    name = names.name(row["rip"]) if names else None
    where = f"{row['cs']:04x}:[<{row['rip']:016x}>]" + (f" {name}" if name else "")
    return f"vcpu {row['vcpu']}: {row['state']}, {row['mode']}, RIP {where}"


def dump(row: Row, names: Symbols | None = None) -> str:
    """All registers of one vCPU."""
    lines = [place(row, names)]
    wide = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
    lines += _lines(row, wide, 3)
    lines.append(f"rflags: {row['rflags']:016x}")
    lines.append("   ".join(f"{name}: {row[name]:04x}" for name in ("cs", "ss", "ds", "es", "fs", "gs")))
    lines.append(
        "   ".join(f"{name}: {row[name]:016x}" for name in ("fs_base", "gs_base_kernel", "gs_base_user"))
    )
    lines += _lines(row, ("cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"), 3)
    return "\n".join(lines)


def _lines(row: Row, names: Iterable[str], each: int) -> list[str]:
    words = [f"{name + ':':<5}{row[name]:016x}" for name in names]
    return ["   ".join(words[at : at + each]) for at in range(0, len(words), each)]
