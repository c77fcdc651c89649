"""Verbs that change a running guest: mem-set, mem-max, vcpu-set, rename; and what is sent to it or to the hypervisor: sysrq, trigger,
debug-keys."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from toolstack.cli.state import ask
from toolstack.errors import InputError

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or id.")]
Memory = Annotated[
    str, typer.Argument(metavar="SIZE", help="In MiB, or with a suffix: b, k, m, g, t (units of 1,024).")
]
_SIZE = re.compile(r"(\d{1,15})\s*([bkmgt]?)b?", re.IGNORECASE)
_SHIFT = {"b": -10, "k": 0, "": 10, "m": 10, "g": 20, "t": 30}


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    for name, verb in (
        ("mem-set", mem_set),
        ("mem-max", mem_max),
        ("vcpu-set", vcpu_set),
        ("rename", rename),
        ("sysrq", sysrq),
        ("trigger", trigger),
        ("debug-keys", debug_keys),
    ):
        app.command(name)(verb)


def kib_of(verb: str, text: str) -> int:
    """KiB of a size as xl takes it: a number alone is MiB. InputError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{verb}: size {text!r}: a number of MiB, or with a suffix b, k, m, g or t")
    number, shift = int(match[1]), _SHIFT[match[2].lower()]
    return number << shift if shift >= 0 else number >> -shift


def mem_set(domain: Domain, size: Memory) -> None:
    """Have a guest's balloon driver give memory back, or take it again. Example: domicile mem-set web 96"""
    ask("mem-set", domain=domain, kib=kib_of("mem-set", size))


def mem_max(domain: Domain, size: Memory) -> None:
    """The most memory that a guest may own. Example: domicile mem-max web 128m"""
    ask("mem-max", domain=domain, kib=kib_of("mem-max", size))


def vcpu_set(
    domain: Domain,
    count: Annotated[int, typer.Argument(metavar="N", min=1, max=128, help="vCPUs to be online.")],
) -> None:
    """Have a guest's kernel bring vCPUs up, or take them down. Example: domicile vcpu-set web 1"""
    ask("vcpu-set", domain=domain, count=count)


def rename(
    domain: Domain, name: Annotated[str, typer.Argument(metavar="NAME", help="The new name.")]
) -> None:
    """Give a domain another name. Example: domicile rename web web-old"""
    ask("rename", domain=domain, name=name)


def sysrq(
    domain: Domain, key: Annotated[str, typer.Argument(metavar="KEY", help="One letter; h lists them.")]
) -> None:
    """Send a "magic SysRq" key to a guest's kernel. Example: domicile sysrq web h"""
    ask("sysrq", domain=domain, key=key)


def trigger(
    domain: Domain,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="nmi; of a full HVM guest also power, sleep.")],
    vcpu: Annotated[int, typer.Argument(metavar="[VCPU]", min=0, max=127, help="For nmi.")] = 0,
) -> None:
    """Send an NMI to a vCPU, or press a button of a guest's PC. Example: domicile trigger web nmi 1"""
    ask("trigger", domain=domain, what=what, vcpu=vcpu)


def debug_keys(
    keys: Annotated[str, typer.Argument(metavar="KEYS", help="One letter or several; h lists them.")],
) -> None:
    """Have the hypervisor print something to its log. Example: domicile debug-keys h && domicile dmesg"""
    ask("debug-keys", keys=keys)
