"""Makes docs/abi.md from the table of hypercalls: `python -m bus.abi.reference > docs/abi.md`."""

from __future__ import annotations

from collections import Counter
from typing import Final

from bus.abi import errno
from bus.abi.hypercalls import (
    HYPERCALLS,
    ArrayArg,
    Command,
    Direction,
    Form,
    Guests,
    Hypercall,
    Privilege,
    State,
    Where,
)
from bus.abi.version import XEN_MAJOR, XEN_MINOR

_HEAD: Final = f"""# The guest ABI, hypercall by hypercall

Made by `python -m bus.abi.reference > docs/abi.md` from the one table (`bus/abi/hypercalls.py`), from which the
dispatchers and the fuzzers are derived too. Do not edit.

The interface is that of Xen {XEN_MAJOR}.{XEN_MINOR}, for 64-bit guests; constants and structures (`bus/abi/`) are
compared with Debian's `libxen-dev` by the C compiler in every test run.

* **State**: *served*; *partly*: what is missing is in the notes; *refused*: with which errno.
* **Where**: *domain process*: what touches only the caller's own vCPUs and frames; *hypervisor*: over the bus.
* **Who**: everybody else gets -EPERM. Where a kind of guest is not named, the number does not exist for it: -ENOSYS.
* **Wire form**, for what crosses the bus: the structure's bytes, then the arrays that its handles point to, each as
  long as its count says. The reply has the updated structure and the arrays that are written. A *list* is as many
  structures as there are, and the same number in the reply. A call with an error may have an empty reply.
"""

_ARROW: Final = {
    Direction.IN: "in the request",
    Direction.OUT: "in the reply",
    Direction.BOTH: "in request and reply",
}


def _name(number: int) -> str:
    return "-" + errno.NAMES.get(number, str(number))


def _guests(guests: Guests) -> str:
    single = {"PV": Guests.PV, "HVM": Guests.HVM, "PVH": Guests.PVH}
    return (
        "all" if guests == Guests.ALL else ", ".join(name for name, flag in single.items() if flag & guests)
    )


def _state(command: Command) -> str:
    return f"refused, {_name(command.refusal)}" if command.state is State.REFUSED else command.state.value


def _array(array: ArrayArg) -> str:
    element = f"{array.element} bytes" if isinstance(array.element, int) else f"`{array.element.name}`"
    unit = "bits" if array.bits else element
    count = f"`{array.count}`" if isinstance(array.count, str) else str(array.count)
    reply = f" (reply: `{array.reply_count}`)" if array.reply_count else ""
    optional = ", absent if null" if array.optional else ""
    return f"`{array.handle}`: {count}{reply} × {unit}, {_ARROW[array.direction]}, at most {array.limit}{optional}"


def _wire(command: Command) -> str:
    if command.where is Where.LOCAL:
        return f"`{command.argument.name}`, in place" if command.argument else ""
    if command.argument is None or command.form is Form.NONE:
        return "no data"
    text = f"`{command.argument.name}`"
    if command.payload is not None:
        text += f" with `{command.payload.name}`"
    if command.form is Form.LIST:
        text = "list of " + text
    return "; ".join([text, *map(_array, command.arrays)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _row(command: Command) -> str:
    errors = "; ".join(f"{_name(e.errno)}: {e.cause}" for e in command.errors)
    cells = (
        str(command.number),
        f"`{command.name}`",
        _state(command),
        command.where.value,
        _guests(command.guests),
        command.privilege.value,
        _wire(command),
        errors,
        command.note,
    )
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _section(hypercall: Hypercall) -> str:
    lines = [f"## {hypercall.number}: {hypercall.name}", ""]
    if hypercall.arguments:
        lines += [f"`{hypercall.name}({', '.join(hypercall.arguments)})`", ""]
    if hypercall.note:
        lines += [hypercall.note[0].upper() + hypercall.note[1:] + ".", ""]
    if hypercall.command_argument != -1 and hypercall.unknown:
        lines += [f"Unknown command: {_name(hypercall.unknown)}.", ""]
    lines += ["| nr | command | state | where | guests | who | argument, wire form | errors | notes |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_row(c) for c in sorted(hypercall.commands, key=lambda c: c.number)]
    return "\n".join(lines)


def _summary() -> str:
    lines = [
        "## All numbers",
        "",
        "| nr | hypercall | commands | served | partly | refused |",
        "|---|---|---|---|---|---|",
    ]
    for hypercall in HYPERCALLS.values():
        count = Counter(c.state for c in hypercall.commands)
        link = f"[{hypercall.name}](#{hypercall.number}-{hypercall.name})"
        if _is_absent(hypercall):
            link = hypercall.name
        lines.append(
            f"| {hypercall.number} | {link} | {len(hypercall.commands)} | {count[State.SERVED] or ''} "
            f"| {count[State.PARTLY] or ''} | {count[State.REFUSED] or ''} |"
        )
    return "\n".join(lines)


def _is_absent(hypercall: Hypercall) -> bool:
    """Refused as a whole."""
    return hypercall.command_argument == -1 and hypercall.commands[0].state is State.REFUSED


def _absent() -> str:
    lines = ["## Refused as a whole", "", "| nr | hypercall | errno | why |", "|---|---|---|---|"]
    for hypercall in filter(_is_absent, HYPERCALLS.values()):
        (command,) = hypercall.commands
        first = "-EPERM, for the control domain " if command.privilege is Privilege.CONTROL else ""
        lines.append(
            f"| {hypercall.number} | {hypercall.name} | {first}{_name(command.refusal)} | {_cell(command.note)} |"
        )
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    sections = [_section(h) for h in HYPERCALLS.values() if not _is_absent(h)]
    return "\n\n".join([_HEAD.rstrip(), _summary(), *sections, _absent()]) + "\n"


if __name__ == "__main__":
    print(render(), end="")
