"""Machine files (`domicile up machine.toml`): a machine and the domains that are started on it, in one file.

[machine]
memory = 2048            # MB
cpus = 2
domio = "native"         # or "guest": the driver domain that serves the disks is a guest program

[[domain]]               # keys of xl.cfg, with TOML's values
name = "web"
kernel = "vmlinuz"       # beside this file
memory = 512
disk = ["web.img,raw,xvda,w"]

[[domain]]
config = "db.cfg"        # a file in xl.cfg's own grammar; further keys go before its own
paused = true
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from toolstack.domio import check_kind
from toolstack.errors import InputError
from toolstack.xlcfg.errors import ConfigError
from toolstack.xlcfg.grammar import Setting, parse
from toolstack.xlcfg.model import XlConfig, load, understand

MAX_FILE: Final = 1 << 20
MAX_DOMAINS: Final = 64
MACHINE_KEYS: Final = {"memory": (64, 1 << 20), "cpus": (0, 64)}
_KEY: Final = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(slots=True)
class MachineFile:
    """What is to be started."""

    memory: int = 4096
    cpus: int = 0
    domio: str = "native"
    domains: list[tuple[XlConfig, bool]] = field(default_factory=list)
    """(configuration, paused), in the order in which they are started."""


def read_machine_file(path: str) -> MachineFile:
    """InputError: the file is not there, no TOML, or says what makes no sense."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise InputError(f"{path}: {os.strerror(error.errno or 0)}") from None
    if len(raw) > MAX_FILE:
        raise InputError(f"{path}: longer than {MAX_FILE} bytes: this is no machine file")
    try:
        data = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: {error}") from None
    for name in data:
        if name not in ("machine", "domain"):
            raise InputError(f"{path}: {name}: there are [machine] and [[domain]]")
    result = _machine(path, data.get("machine", {}))
    tables = data.get("domain", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: domain: write [[domain]], once for each")
    if len(tables) > MAX_DOMAINS:
        raise InputError(f"{path}: {len(tables)} domains: at most {MAX_DOMAINS}")
    for number, table in enumerate(tables, 1):
        result.domains.append(_domain(path, number, table))
    names = [config.name for config, _ in result.domains]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two domains are named {name!r}")
    return result


def _machine(path: str, table: Any) -> MachineFile:
    if not isinstance(table, dict):
        raise InputError(f"{path}: machine: write [machine], and its keys below")
    values: dict[str, int] = {}
    domio = "native"
    for key, value in table.items():
        if key == "domio":
            domio = check_kind(str(value), f"{path}: machine.domio")
            continue
        if key not in MACHINE_KEYS:
            raise InputError(f"{path}: machine.{key}: there are {', '.join((*MACHINE_KEYS, 'domio'))}")
        low, high = MACHINE_KEYS[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{path}: machine.{key}: {value!r}: a number from {low} to {high}")
        values[key] = value
    return MachineFile(values.get("memory", 4096), values.get("cpus", 0), domio)


def _domain(path: str, number: int, table: dict[str, Any]) -> tuple[XlConfig, bool]:
    source = f"{path}: domain {table['name'] if isinstance(table.get('name'), str) else number}"
    given = dict(table)
    paused, config = given.pop("paused", False), given.pop("config", None)
    if not isinstance(paused, bool):
        raise InputError(f"{source}: paused: true or false")
    settings: dict[str, Setting] = {}
    lines: list[str] = []
    for key, value in given.items():
        if not _KEY.fullmatch(key):
            raise InputError(f"{source}: {key[:60]}: there is no such key: see xl.cfg(5)")
        lines.append(f"{key} = {_value(source, key, value)}")
    base = Path(path).parent
    if config is not None:
        if not isinstance(config, str):
            raise InputError(f"{source}: config: the path of a file in xl.cfg's grammar")
        return load(str(base / config), lines), paused
    for line in lines:
        settings.update(parse(line, source))
    try:
        return understand(settings, source, base), paused
    except ConfigError as error:  # positions are those of our own lines
        raise InputError(f"{source}: {error.text}") from None


def _value(source: str, key: str, value: Any) -> str:
    """A value of TOML's as xl.cfg writes it."""
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, str):
        if "\n" in value or "\0" in value:
            raise InputError(f"{source}: {key}: one line of text")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_value(source, key, item) for item in value) + "]"
    raise InputError(f"{source}: {key}: text, a number, or a list of them")
