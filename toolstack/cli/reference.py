"""`python -m toolstack.cli.reference > docs/reference.md`: the command's verbs, options and exit statuses, from the code."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, Final

import typer

from toolstack import errors, machinefile
from toolstack.cli.app import app
from toolstack.domio import KINDS

STATUSES: Final = (
    (errors.EXIT_OK, "done; of `run`: the guest powered off, or --until matched"),
    (errors.EXIT_FAILED, "the guest crashed, or the machine could not do what was asked"),
    (errors.EXIT_USAGE, "bad input: an option, a file, a configuration"),
    (errors.EXIT_TIMEOUT, "what was waited for did not come in time (--timeout)"),
    (errors.EXIT_INTERRUPTED, "ended from the keyboard"),
)
HEAD: Final = """# The command

Made by `python -m toolstack.cli.reference > docs/reference.md` from the code; a test compares. Do not edit.

Errors are one line on standard error, `domicile: WHAT: WHY: MEND`. Colour is used on terminals only, and not where `NO_COLOR` is set or
`TERM` is `dumb`. `domicile --install-completion` puts completion of verbs and options into your shell. `DOMICILE_MACHINE` stands for
`--machine`.
"""


def reference() -> str:
    """The page."""
    command: Any = typer.main.get_command(app)
    lines = [HEAD, "## Exit statuses", "", "| status | when |", "| --- | --- |"]
    lines += [f"| {status} | {text} |" for status, text in STATUSES]
    lines += ["| 128+N | ended by signal N (141: nobody reads standard output any more) |", ""]
    lines += ["## Machine files", "", *_machine_files(), "## Verbs", ""]
    lines += _verbs("domicile", command)
    return "\n".join(lines).rstrip() + "\n"


def _machine_files() -> list[str]:
    text, _, example = (machinefile.__doc__ or "").partition("\n\n")
    example = textwrap.dedent(example).strip()
    ranges = ", ".join(f"`{key}` {low} to {high}" for key, (low, high) in machinefile.MACHINE_KEYS.items())
    return [
        text,
        "",
        "```toml",
        example,
        "```",
        "",
        f"`[machine]` has {ranges}, `domio` ({' or '.join(KINDS)}); at most {machinefile.MAX_DOMAINS} domains. All of them come up, or nothing does.",
        "",
    ]


def _verbs(prefix: str, command: Any) -> list[str]:
    lines: list[str] = []
    for name in sorted(command.commands):
        verb = command.commands[name]
        if hasattr(verb, "commands"):
            lines += _verbs(f"{prefix} {name}", verb)
            continue
        arguments = [param for param in verb.params if param.param_type_name == "argument"]
        options = [
            param for param in verb.params if param.param_type_name == "option" and param.name != "help"
        ]
        usage = " ".join([f"{prefix} {name}", *(_argument(param) for param in arguments)])
        lines += [f"### `{usage}`", "", inspect.cleandoc(verb.help or "").replace("\n  ", "\n    "), ""]
        rows = [(_argument(param), getattr(param, "help", None) or "") for param in arguments]
        rows += [(_option(param), param.help or "") for param in options]
        if rows:
            lines += ["| | |", "| --- | --- |"]
            lines += [f"| `{left}` | {_cell(right)} |" for left, right in rows]
            lines.append("")
    return lines


def _argument(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _option(param: Any) -> str:
    names = ", ".join([*param.opts, *param.secondary_opts])
    return names if param.is_flag else f"{names} {param.metavar or 'TEXT'}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
